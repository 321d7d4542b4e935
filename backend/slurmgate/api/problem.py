"""Errors of the backend's HTTP interface as ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

import json
import logging

from flask import Flask, Response
from werkzeug.exceptions import HTTPException

from slurmgate.errors import ConfigError, SlurmgateError

log = logging.getLogger(__name__)

TYPE = "https://slurmgate.dev/problems/"
LATER = "60"  # as the gate says it of what no repetition helps


def problem(code: str, status: int, detail: str, **more: object) -> Response:
    """Build the answer that says what went wrong."""
    body = {
        "type": TYPE + code,
        "title": code.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
        **more,
    }
    return Response(json.dumps(body), status, mimetype="application/problem+json")


def register(app: Flask) -> None:
    """Answer every error of this application as a problem."""

    @app.errorhandler(SlurmgateError)
    def refused(error: SlurmgateError) -> Response:
        more = {"errors": error.problems} if isinstance(error, ConfigError) else {}
        answer = problem(error.reason, error.http_status, str(error), **more)
        if error.http_status == 401:
            answer.headers["WWW-Authenticate"] = 'Bearer realm="slurmgate"'
        if error.http_status == 503:
            answer.headers["Retry-After"] = "1" if error.retryable else LATER
        return answer

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        if status == 404:
            return problem(
                "no-such-route", 404, "There is no such page; GET / lists what there is."
            )
        answer = problem(error.name.lower().replace(" ", "-"), status, error.description or "")
        allow = error.get_response().headers.get("Allow")
        if allow:
            answer.headers["Allow"] = allow
        return answer

    @app.errorhandler(Exception)
    def broken(error: Exception) -> Response:
        log.exception("an HTTP request met an error of ours", exc_info=error)
        return problem("internal", 500, "an error of the backend's own; its log says which")
