"""Everything that changes something: POST, and only with the admin token."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable

from flask import Blueprint, Response, request

from slurmgate.control import Control
from slurmgate.errors import Unauthorized
from slurmgate.keyring import Keyring
from slurmgate.reload import Reloader

MOST_LINES = 10_000


def blueprint(
    control: Control,
    reloader: Reloader,
    keyring: Keyring,
    token: Callable[[], str],
    remember_management: Callable[[bool], None],
) -> Blueprint:
    """Admin routes, the original system's names included."""
    routes = Blueprint("admin", __name__)

    @routes.before_request
    def authorise() -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        known = hmac.compare_digest(given.strip().encode(), token().encode())
        if scheme.lower() != "bearer" or not known:
            raise Unauthorized(
                "give the admin token: Authorization: Bearer TOKEN"
                " (file admin-token in the state directory)"
            )

    def done(**more: object) -> Response:
        """Answer once the gate knows, so that the next request meets what was changed."""
        informed = control.await_gate() and keyring.await_gate()
        answer = {"ok": True, "gate_informed": informed, **more}
        return Response(json.dumps(answer) + "\n", mimetype="application/json")

    @routes.post("/admin/reload")
    def reload() -> Response:
        notes = reloader.reload()
        return done(loaded_at=reloader.loaded_at, notes=notes)

    @routes.post("/admin/services/<path:name>/start")
    def start(name: str) -> Response:
        control.start_service(name)
        return done(service=name)

    @routes.post("/demand_<path:route>")
    def demand(route: str) -> Response:
        return start(control.view.routed(route).spec.name)

    @routes.post("/admin/services/<path:name>/stop")
    def stop(name: str) -> Response:
        control.stop_service(name)
        return done(service=name)

    @routes.get("/admin/logs/<path:name>")
    def logs(name: str) -> Response:
        lines = min(request.args.get("lines", 100, type=int), MOST_LINES)
        replica, tail = control.last_lines(name, lines)
        return Response(
            json.dumps({"replica": replica, "lines": tail}) + "\n", mimetype="application/json"
        )

    def manage(*, enabled: bool, kill: bool = False) -> Response:
        control.manage(enabled=enabled, kill=kill)
        notes = []
        try:
            remember_management(enabled)
        except OSError as error:
            notes.append(f"in force until the backend restarts: cannot write it down: {error}")
        return done(management_enabled=enabled, notes=notes)

    @routes.post("/admin/management/enable")
    @routes.post("/enable_service_management")
    def enable() -> Response:
        return manage(enabled=True)

    @routes.post("/admin/management/disable")
    @routes.post("/disable_service_management")
    def disable() -> Response:
        return manage(enabled=False)

    @routes.post("/admin/management/kill")
    @routes.post("/kill_disable_service_management")
    def kill() -> Response:
        return manage(enabled=False, kill=True)

    @routes.post("/admin/adopt/<owner>")
    def adopt(owner: str) -> Response:
        return done(owner=owner, adopted=control.take_over(owner))

    return routes
