"""Pure: what the gate is told of each service, and what a change of it is.

``essence`` holds all that the gate acts on and no age, so equal essences mean nothing new;
``wire`` adds the ages of the moment it is sent. Both are JSON values.
"""

from __future__ import annotations

import re
from typing import Any

from slurmgate import scaling
from slurmgate.model import Phase
from slurmgate.observed import LAUNCHING, RETURNING, Replica, Service
from slurmgate.starts import durations, quantile

ENDPOINT_PHASES = frozenset({Phase.STARTING, Phase.READY, Phase.DRAINING})
DEFAULT_ESTIMATE = 10.0
DISABLED_RETRY = 60.0
ESTIMATE_STEP = 30.0
_NEAREST_FIRST = (Phase.STARTING, Phase.RUNNING, Phase.PENDING, Phase.SUBMITTED)
# Slurm's reason for a pending job; what follows in brackets or behind a comma is about nodes.
_ONE_WORD = re.compile(r"([A-Za-z_]{1,40})\b")
_LAUNCH_WORDS = {
    Phase.SUBMITTED: "being submitted",
    Phase.PENDING: "queued",
    Phase.RUNNING: "connecting",
    Phase.STARTING: "starting",
}


def state(service: Service, now: float) -> str:
    """The one word for people: cold, waking, ready, draining, failed, disabled, unknown."""
    phases = {r.phase for r in service.replicas}
    if Phase.READY in phases:
        return "ready"
    if service.unlisted or any(r.adopted and r.phase is Phase.STARTING for r in service.replicas):
        return "unknown"
    if phases & (LAUNCHING | {Phase.FAILED}):
        return "waking"
    if service.backing_off(now) and service.enabled:
        return "failed"
    if phases:
        return "draining"
    if not service.enabled:
        return "disabled"
    if scaling.guard(service, now) is not None:
        return "failed"
    return "waking" if service.wanted(now) and not service.retired else "cold"


def reason(service: Service, now: float) -> str | None:
    """Why it is in its state, in a sentence, where there is something to say."""
    for replica in service.replicas:
        if replica.phase in LAUNCHING and (replica.progress or replica.health_detail):
            return f"{_LAUNCH_WORDS[replica.phase]}: {replica.progress or replica.health_detail}"
        if replica.phase is Phase.READY and replica.suspended_s is not None:
            return replica.progress
        if replica.phase is Phase.READY and replica.down_since is not None:
            return f"not healthy: {replica.progress or replica.health_detail}"
        if replica.phase is Phase.DRAINING and replica.drain is not None:
            return f"draining: {replica.drain.value}"
    if len(scaling.going(service)) < max(1, scaling.wanted(service, now)):
        guard = scaling.guard(service, now)
        if guard is not None:
            return guard.reason
    if service.stopped and not service.replicas and service.spec.replicas.min:
        back = "the next request or slurmgate start" if service.enabled else "slurmgate enable"
        return f"stopped by an operator; {back} brings it back"
    return service.failure.reason if service.failure is not None else service.last_end


def progress(service: Service) -> dict[str, Any] | None:
    """How far the start is that requests wait for: a state, and a reason where one word says it.

    Anybody may read it: no word of it names a node or a job.
    """
    for phase in _NEAREST_FIRST:
        for replica in service.replicas:
            if replica.phase is phase:
                word = _ONE_WORD.match(replica.progress or "") if phase is Phase.PENDING else None
                return {"state": phase.value, "reason": word and word[1]}
    return None


def estimate(service: Service, now: float) -> float:
    """How many seconds a client that finds it cold will probably have to wait; of a service that
    is ready and full nobody can say. A start that is late may well take as long again.
    """
    if any(r.routable for r in service.replicas):
        return DEFAULT_ESTIMATE
    if service.failure is not None and service.backing_off(now):
        return service.failure.retry_at - now
    guard = scaling.guard(service, now)
    if guard is not None and guard.until is not None and not service.replicas:
        return guard.until - now
    usual = durations(service.recent)
    expected = quantile(usual, 0.5) if usual else DEFAULT_ESTIMATE
    queued = [r.starts_at - now for r in service.replicas if _queued(r) and r.starts_at is not None]
    if queued:
        return max(1.0, min(queued)) + DEFAULT_ESTIMATE
    launching = [now - _queued_since(r) for r in service.replicas if r.phase in LAUNCHING]
    return max(1.0, abs(expected - max(launching, default=0.0)))


def _queued_since(replica: Replica) -> float:
    return replica.created_at if replica.queued_at is None else replica.queued_at


def _start_expected(service: Service) -> int | None:
    """When the scheduler means to start it, so roughly that few changes of its mind are news."""
    expected = [r.starts_at for r in service.replicas if _queued(r) and r.starts_at is not None]
    return round(min(expected) / ESTIMATE_STEP) if expected else None


def _queued(replica: Replica) -> bool:
    return replica.phase is Phase.PENDING


def refusal(service: Service, now: float) -> dict[str, Any] | None:
    """Why no start is tried for a request at present; None when one is, or is under way.

    Nor is there one while a replica is ready, though it may not be reached for a moment, while
    one is drained that demand takes back, or while the last lines of a start that was given up are
    fetched: then the reason of that is told.
    """
    if scaling.going(service):
        return None
    if any(r.phase is Phase.DRAINING and r.drain in RETURNING for r in service.replicas):
        return None
    if not service.enabled:
        return {"code": "disabled", "reason": "service management is disabled", "log": []}
    failure = service.failure
    if failure is not None and service.backing_off(now):
        return {"code": failure.code, "reason": failure.reason, "log": list(failure.log)}
    if any(r.phase is Phase.FAILED for r in service.replicas):
        return None
    guard = scaling.guard(service, now)
    if guard is not None:
        return {"code": "cannot-start", "reason": guard.reason, "log": []}
    return None


def essence(service: Service, now: float) -> dict[str, Any]:
    """Everything about a service that the gate acts on, without ages."""
    spec = service.spec
    return {
        "name": spec.name,
        "route_name": spec.route_name,
        "retired": service.retired,
        "unknown": service.unlisted,
        "api_paths": list(spec.api_paths),
        "no_wake": list(spec.no_wake),
        "models": list(spec.models),
        "upstream_model": spec.upstream_model,
        "public": spec.public,
        "heartbeat": spec.heartbeat,
        "max_idle_connection": spec.max_idle_connection,
        "cors": None if spec.cors is None else list(spec.cors),
        "state": state(service, now),
        "reason": reason(service, now),
        "progress": progress(service),
        "refusal": refusal(service, now),
        "starts_at": _start_expected(service),
        "hold_timeout": spec.hold_timeout,
        "max_waiting": spec.max_waiting,
        "max_in_flight": spec.replicas.max_in_flight,
        "affinity": spec.affinity,
        "prefix_affinity": spec.prefix_affinity,
        "replay": spec.replay,
        "read_timeout": spec.read_timeout,
        "health": {
            "path": spec.check_health_path,
            "interval": spec.health.interval,
            "start_interval": list(spec.health.start_interval),
            "timeout": spec.health.timeout,
            "failures": spec.health.failures,
        },
        "replicas": [_replica(r) for r in service.replicas if _visible(r)],
    }


def _visible(replica: Replica) -> bool:
    return replica.endpoint is not None and replica.phase in ENDPOINT_PHASES


def _replica(replica: Replica) -> dict[str, Any]:
    return {
        "id": replica.id,
        "gen": replica.gen,
        "endpoint": replica.endpoint,
        "phase": replica.phase.value,
        "routable": replica.routable,
        "job_id": replica.job_id,
        "node": replica.node,
        "key": replica.api_key,
    }


def wire(service: Service, now: float) -> dict[str, Any]:
    """The essence with ages and estimates as of now, as it is sent to the gate."""
    entry = essence(service, now)
    entry["retry_after_s"] = round(estimate(service, now), 3)
    if entry["refusal"] is not None:
        wait = estimate(service, now) if service.enabled else DISABLED_RETRY
        entry["refusal"]["retry_after_s"] = round(max(wait, 1.0), 3)
    void = service.lease_void_before
    entry["leases_void_s"] = None if void == float("-inf") else round(now - void, 3)
    ages = {r.id: now - r.running_at for r in service.replicas if r.running_at is not None}
    for replica in entry["replicas"]:
        replica["age_s"] = round(ages[replica["id"]], 3)
    return entry
