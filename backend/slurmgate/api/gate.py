"""``POST /gate/notify``: the gate says what it knows, and gets the snapshot and the clients' keys
when it has others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, abort, request

from slurmgate.control import Control
from slurmgate.fleet import Report
from slurmgate.keyring import Keyring, KeyUse
from slurmgate.model import Health
from slurmgate.observed import ReplicaReport, ServiceReport


def blueprint(control: Control, keyring: Keyring) -> Blueprint:
    """Routes of the control socket."""
    routes = Blueprint("gate", __name__)

    @routes.post("/gate/notify")
    def notify() -> Response:
        try:
            body = request.get_json()
            report, use = parse(body), parse_key_use(body)
            known = None if body.get("keys") is None else str(body["keys"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            abort(400, f"not a report of a gate: {error!r}")
        answer = control.notify(report) or {}
        keyring.heard(known, use)
        keys = keyring.current  # not before the snapshot, which must never be the newer one
        # A gate that gets its first snapshot gets the keys with it: until then it holds requests,
        # from then on it lets them in.
        if known != keys.version or (answer and report.number is None):
            answer = {**answer, "keys": keys.wire()}
        if not answer:
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


def parse_key_use(body: Mapping[str, Any]) -> dict[str, KeyUse]:
    """Read what was counted for each key; raise like ``parse``."""
    return {
        str(name): KeyUse(
            requests=max(0, int(told.get("requests", 0))),
            refused=max(0, int(told.get("refused", 0))),
            in_flight=max(0, int(told.get("in_flight", 0))),
        )
        for name, told in dict(body.get("key_use") or {}).items()
    }


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
