"""Small makers of values that several tests need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slurmgate.model import Health, LauncherKind, Phase, ServiceSpec, Sighting
from slurmgate.observed import Replica, Service

NOW = 1000.0


def spec(**changes: Any) -> ServiceSpec:
    base = ServiceSpec(
        name="LLM",
        route_name="llm",
        api_paths=("/",),
        bash_file="serve.sh",
        check_health_path="/health",
        timeout=10.0,
        folder=Path("/srv"),
        launcher=LauncherKind.PROCESS,
    )
    return replace(base, **changes)


def replica(**changes: Any) -> Replica:
    base = Replica(
        id="r1",
        phase=Phase.READY,
        start_hash=spec().start_hash(),
        since=NOW - 5,
        created_at=NOW - 8,
        port=20001,
        endpoint="127.0.0.1:20001",
        running_at=NOW - 8,
        ready_at=NOW - 5,
        health=Health.UP,
        closed_at=None,
    )
    return replace(base, **changes)


def starting(**changes: Any) -> Replica:
    return replica(
        **{"phase": Phase.STARTING, "ready_at": None, "health": Health.UNKNOWN, "closed_at": 0}
        | changes
    )


def service(*replicas: Replica, **changes: Any) -> Service:
    changes.setdefault("spec", spec())
    return Service(replicas=replicas, **changes)


def sighting(replica_id: str, **changes: Any) -> Sighting:
    base = Sighting(
        replica_id,
        "LLM",
        spec().start_hash(),
        Phase.STARTING,
        NOW,
        port=20001,
        endpoint="127.0.0.1:20001",
        job_id="1",
        node="n",
        running_at=NOW,
    )
    return replace(base, **changes)
