"""``POST /gate/notify``: the gate says what it knows and gets the snapshot when it has another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, abort, request

from slurmgate.control import Control
from slurmgate.fleet import Report
from slurmgate.model import Health
from slurmgate.observed import ReplicaReport, ServiceReport


def blueprint(control: Control) -> Blueprint:
    """Routes of the control socket."""
    routes = Blueprint("gate", __name__)

    @routes.post("/gate/notify")
    def notify() -> Response:
        try:
            report = parse(request.get_json())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            abort(400, f"not a report of a gate: {error!r}")
        answer = control.notify(report)
        if answer is None:
            return Response(status=204)
        return Response(json.dumps(answer), mimetype="application/json")

    return routes


def parse(body: Mapping[str, Any]) -> Report:
    """Read a report; raise KeyError, TypeError or ValueError when it is none."""
    version = body["snapshot"]
    return Report(
        gate=str(body["gate"]),
        epoch=None if version is None else str(version["epoch"]),
        number=None if version is None else int(version["n"]),
        services={name: _service(told) for name, told in dict(body["services"]).items()},
        replicas={name: _replica(told) for name, told in dict(body["replicas"]).items()},
    )


def _service(told: Mapping[str, Any]) -> ServiceReport:
    return ServiceReport(
        requests=int(told.get("requests", 0)),
        waiting=max(0, int(told.get("waiting", 0))),
        in_flight=max(0, int(told.get("in_flight", 0))),
        idle_s=_age(told, "idle_s"),
        wanted_s=_age(told, "wanted_s"),
        lease_s=_age(told, "lease_s"),
    )


def _age(told: Mapping[str, Any], key: str) -> float | None:
    age = told.get(key)
    return None if age is None else max(0.0, float(age))


def _replica(told: Mapping[str, Any]) -> ReplicaReport:
    return ReplicaReport(
        gen=int(told["gen"]),
        in_flight=max(0, int(told["in_flight"])),
        health=Health(told.get("health", "unknown")),
        detail=str(told.get("detail") or "")[:500],
    )
