"""How each event changes what is known of a service: a value in, a new one out, time an argument.

Pure. The fleet applies these; ``lifecycle`` then decides from the outcome what to do next.
"""

from __future__ import annotations

from dataclasses import replace

from slurmgate.model import Exit, Health, Phase, Running, ServiceSpec
from slurmgate.observed import (
    LAUNCHING,
    Demand,
    Failure,
    Replica,
    ReplicaReport,
    Service,
    ServiceReport,
    counted,
    with_replica,
    without_replica,
)

MAX_BACKOFF = 60.0
STEADY_AFTER = 60.0


def adopted(service: Service, running: Running, now: float) -> Service:
    """Take over a replica that an earlier backend started.

    What an earlier snapshot said of it is unknown, so it counts as possibly routable until a
    snapshot of this backend has said otherwise.
    """
    return replace(
        service,
        replicas=(
            *service.replicas,
            Replica(
                id=running.replica,
                phase=Phase.STARTING,
                start_hash=running.start_hash,
                since=now,
                created_at=running.started_at,
                port=running.port,
                endpoint=running.endpoint,
                job_id=running.job_id,
                node=running.node,
                running_at=running.started_at,
                closed_at=None,
            ),
        ),
    )


def launched(service: Service, running: Running, now: float) -> Service:
    """A launch succeeded: the replica runs and its endpoint is known."""
    found = service.replica(running.replica)
    if found is None:
        return service
    started = replace(
        found,
        phase=Phase.STARTING,
        since=now,
        port=running.port,
        endpoint=running.endpoint,
        job_id=running.job_id,
        node=running.node,
        running_at=running.started_at,
    )
    return with_replica(service, started)


def launch_failed(service: Service, replica_id: str, code: str, reason: str, now: float) -> Service:
    """A launch failed and left nothing running."""
    if service.replica(replica_id) is None:
        return service
    return failed(without_replica(service, replica_id), code, reason, (), now)


def failed(service: Service, code: str, reason: str, log: tuple[str, ...], now: float) -> Service:
    """A start failed through the service's fault: leases end and the next start waits."""
    failures = service.failures + 1
    backoff = min(MAX_BACKOFF, 2.0 ** (failures - 1))
    return replace(
        counted(service, code),
        failures=failures,
        failure=Failure(code, reason, log, now, now + backoff),
        start_lease=False,
        lease_void_before=now,
    )


def ended(
    service: Service, replica_id: str, how: Exit, log: tuple[str, ...], now: float
) -> Service:
    """The replica's processes are gone. Its own end during a start is a failed start; that of one
    which was ready (or may have been, before it was adopted) is nobody's fault at first.
    """
    found = service.replica(replica_id)
    if found is None:
        return service
    rest = without_replica(service, replica_id)
    if found.phase is Phase.FAILED:
        return failed(rest, "start-failed", found.reason or "", log, now)
    if found.phase is Phase.STOPPING or found.drain is not None:
        return rest
    if found.phase in LAUNCHING and found.never_routable:
        return failed(rest, "start-failed", f"the service {how.describe()} during start", log, now)
    lived = now - (found.since if found.ready_at is None else found.ready_at)
    crashes = service.crashes + 1 if lived < STEADY_AFTER else 1
    pause = 0.0 if crashes == 1 else min(MAX_BACKOFF, 2.0 ** (crashes - 2))
    return replace(rest, lost=rest.lost + 1, crashes=crashes, not_before=now + pause)


def reported(service: Service, report: ServiceReport, now: float) -> Service:
    """Take over what the gate says of the service's requests."""

    def ago(age: float | None) -> float | None:
        return None if age is None else now - age

    last_use = ago(report.idle_s)
    if last_use is None:
        last_use = service.demand.last_use
    demand = Demand(
        requests=report.requests,
        waiting=report.waiting,
        in_flight=report.in_flight,
        last_use=now if report.in_flight > 0 else last_use,
        wanted_at=ago(report.wanted_s),
        lease_until=None if report.lease_s is None else now + report.lease_s,
    )
    changed = replace(service, demand=demand)
    return replace(changed, last_demand=now) if changed.wanted(now) else changed


def replica_reported(
    replica: Replica, report: ReplicaReport, stored: int | None, now: float
) -> Replica:
    """Take over counts and health of one replica; ``stored`` is the snapshot number of this
    epoch that the gate had stored before it read the counts, None when it had none of ours.
    """
    changed = replace(replica, in_flight=report.in_flight)
    if report.gen == replica.gen and report.health is not Health.UNKNOWN:
        down = report.health is Health.DOWN
        changed = replace(
            changed,
            health=report.health,
            health_detail=report.detail,
            down_since=(replica.down_since or now) if down else None,
        )
    elif report.gen == replica.gen and report.detail:
        changed = replace(changed, health_detail=report.detail)
    if replica.closed_at is not None and stored is not None and stored >= replica.closed_at:
        changed = replace(changed, acked=True, quiet=report.in_flight == 0)
    return changed


def published(replica: Replica, number: int) -> Replica:
    """A snapshot with this number was made: note since when the replica is not routable."""
    if replica.routable:
        return replace(replica, closed_at=None, acked=False, quiet=False)
    if replica.closed_at is None:
        return replace(replica, closed_at=number, acked=False, quiet=False)
    return replica


def last_words(service: Service, replica_id: str, log: tuple[str, ...], now: float) -> Service:
    """The log of a replica whose start was given up is here: say so to everybody who waits."""
    found = service.replica(replica_id)
    if found is None or found.phase is not Phase.FAILED:
        return service
    stopping = with_replica(service, replace(found, phase=Phase.STOPPING, since=now))
    return failed(stopping, "start-failed", found.reason or "", log, now)


def configured(service: Service, spec: ServiceSpec) -> Service:
    """The configuration was read again and has this service (still, or again)."""
    if spec == service.spec and not service.retired:
        return service
    changed = replace(service, spec=spec, retired=False)
    if spec.start_hash() != service.spec.start_hash():
        changed = replace(changed, failures=0, failure=None, crashes=0, not_before=float("-inf"))
    return changed


def retired(service: Service) -> Service:
    """The configuration no longer has this service: its replicas end, its demand is void."""
    return replace(service, retired=True, start_lease=False)


def gate_changed(service: Service) -> Service:
    """Another gate reports from now on: the counts of the one before ended with it."""
    replicas = tuple(replace(r, in_flight=0, acked=False, quiet=False) for r in service.replicas)
    demand = replace(service.demand, waiting=0, in_flight=0)
    return replace(service, demand=demand, replicas=replicas)
