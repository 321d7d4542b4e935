"""``/``, ``/info`` and ``/check_…``: what there is and how it does, for people and scripts.

Clients outside ``gate.private`` (the gate says which in ``X-Slurmgate-Private``) see state, class
of reason and estimates, but no log lines, node names, job ids or version.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from flask import Blueprint, Response, request

from slurmgate import __version__, nodes, scaling, snapshot
from slurmgate.control import Control
from slurmgate.fleet import View
from slurmgate.keyring import Keyring
from slurmgate.model import Phase
from slurmgate.observed import LAUNCHING, Replica, Service
from slurmgate.ports import Clock
from slurmgate.reload import Reloader
from slurmgate.starts import cold_start_s

RUNNING = frozenset({Phase.READY, Phase.DRAINING})
"""As in the original system: the job runs *and* has passed its health check."""


def blueprint(
    control: Control, reloader: Reloader, keyring: Keyring, clock: Clock, instance: str
) -> Blueprint:
    """Routes for reading; none of them changes anything."""
    routes = Blueprint("info", __name__)

    @routes.get("/")
    def index() -> Response:
        services = [s.spec.route_name for s in control.view.services if not s.retired]
        links = {"info": "/info", "health": "/healthz", "ready": "/readyz"}
        paths = [f"/{route}/" for route in services]
        return _json({"name": "Slurmgate", "links": links, "services": paths})

    @routes.get("/info")
    def info() -> Response:
        view, now, private = control.view, clock(), _private()
        services = [
            service_info(s, view, now, private=private) for s in view.services if not s.retired
        ]
        return _json(
            {
                "instance": instance,
                "version": __version__ if private else None,
                "management_enabled": view.enabled,
                "config": {
                    "loaded_at": reloader.loaded_at,
                    "error": _error(reloader.error, "the configuration", private=private),
                    "keys_error": _error(keyring.current.error, "the keys", private=private),
                    "gate_note": reloader.gate_note if private else None,
                },
                "services": services,
                "strangers": _strangers(control) if private else [],
            }
        )

    @routes.get("/info/<path:name>")
    def one(name: str) -> Response:
        view = control.view
        return _json(service_info(view.find(name), view, clock(), private=_private()))

    @routes.get("/check_<path:route>")
    def check(route: str) -> Response:
        view = control.view
        return _json(service_info(view.routed(route), view, clock(), private=_private()))

    return routes


def _strangers(control: Control) -> list[dict[str, str]]:
    """Jobs of our instance with another owner; ``slurmgate adopt OWNER`` takes them over."""
    return [dataclasses.asdict(stranger) for stranger in control.strangers()]


def _error(error: str | None, what: str, *, private: bool) -> str | None:
    return error if private or error is None else f"{what} file has errors"


def _private() -> bool:
    return request.headers.get("X-Slurmgate-Private", "1") == "1"


def _json(value: object) -> Response:
    return Response(json.dumps(value) + "\n", mimetype="application/json")


def service_info(service: Service, view: View, now: float, *, private: bool) -> dict[str, Any]:
    """The entry of one service; ``private`` shows what only people near the cluster may see."""
    spec, demand = service.spec, service.demand
    state = snapshot.state(service, now)
    ready = next((r for r in service.replicas if r.phase is Phase.READY), None)
    idle_from = None if ready is None else service.idle_since(ready.ready_at or ready.since)
    idle = None if idle_from is None else max(0.0, now - idle_from)
    entry: dict[str, Any] = {
        "name": spec.name,
        "route_name": spec.route_name,
        "description": spec.description,
        "launcher": spec.launcher.value,
        "models": list(spec.models),
        "state": state,
        "started": bool(service.replicas),
        "running": any(r.phase in RUNNING for r in service.replicas),
        "reason": _reason(service, now, private=private),
        "management_enabled": view.enabled,
        "waiting": demand.waiting,
        "in_flight": demand.in_flight,
        "requests": demand.requests,
        "idle_s": _rounded(idle),
        "stops_in_s": _stops_in(service, idle),
        "retry_after_s": None if state == "ready" else _rounded(snapshot.estimate(service, now)),
        "cold_start_s": cold_start_s(service.recent),
        "replicas_wanted": max(scaling.wanted(service, now), scaling.kept(service, now, now)),
        "excluded_nodes": list(nodes.avoided(service, now)) if private else [],
        "replicas": [_replica(r, now, private=private) for r in service.replicas],
    }
    failure = service.failure
    lines = service.last_output if failure is None else failure.log
    entry["log"] = list(lines) if private else []
    return entry


def _stops_in(service: Service, idle: float | None) -> float | None:
    """When its last replica stops if nobody asks any more; None while that is not to happen."""
    if idle is None or scaling.floor(service):
        return None
    return _rounded(max(0.0, service.spec.timeout - idle))


def _reason(service: Service, now: float, *, private: bool) -> str | None:
    if private:
        return snapshot.reason(service, now) or _stage(service)
    return service.failure.code if service.failure is not None else _stage(service)


def _stage(service: Service) -> str | None:
    """Why a service that is started does not run, in a word; None when it does, or is cold."""
    if any(r.phase in RUNNING for r in service.replicas):
        return None
    if any(r.phase is Phase.PENDING for r in service.replicas):
        return "queued"
    return "starting" if any(r.phase in LAUNCHING for r in service.replicas) else None


def _replica(replica: Replica, now: float, *, private: bool) -> dict[str, Any]:
    reason = replica.reason or (replica.drain.value if replica.drain else None)
    if reason is None and (replica.phase in LAUNCHING or replica.suspended_s is not None):
        reason = replica.progress or replica.health_detail or None
    return {
        "id": replica.id,
        "state": replica.phase.value,
        "job_id": replica.job_id if private else None,
        "node": replica.node if private else None,
        "reason": reason if private else None,
        "since_s": _rounded(now - replica.since),
        "in_flight": replica.in_flight,
        "notice": replica.notice if private else None,
        "starts_in_s": _until(replica.starts_at, now),
        "ends_in_s": _until(replica.ends_at, now),
    }


def _until(moment: float | None, now: float) -> float | None:
    return None if moment is None else _rounded(max(0.0, moment - now))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
