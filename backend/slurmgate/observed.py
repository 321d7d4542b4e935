"""What the backend knows of a service and its replicas, and how each event changes that knowledge.

Pure: every function takes a value and gives a new one, time is an argument. Only the control loop
holds these values for longer than a call; ``lifecycle`` decides from them what to do next.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from slurmgate.model import Exit, Health, Phase, Running, ServiceSpec

LAUNCHING = frozenset({Phase.SUBMITTED, Phase.PENDING, Phase.RUNNING, Phase.STARTING})
MAX_BACKOFF = 60.0
RECENT_COLD_STARTS = 20
STEADY_AFTER = 60.0
COLD_START_BOUNDS = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Drain(StrEnum):
    """Why a replica gets no new requests and is to end."""

    IDLE = "idle"
    CHANGED = "changed"
    REMOVED = "removed"
    ADMIN = "stopped by an operator"
    UNHEALTHY = "unhealthy"
    SURPLUS = "one more than wanted"
    SILENT = "gate silent"


@dataclass(frozen=True, slots=True)
class Replica:
    """One job or process. ``closed_at`` is the number of the first snapshot since which the gate
    may not route to it: None while it is routable or no snapshot has said so yet, 0 when it has
    never been routable. ``acked`` and ``quiet`` are what the gate proved since it was closed:
    that no new request can reach it, and that none is left on it.
    """

    id: str
    phase: Phase
    start_hash: str
    since: float
    created_at: float
    gen: int = 1
    port: int | None = None
    endpoint: str | None = None
    job_id: str | None = None
    node: str | None = None
    running_at: float | None = None
    ready_at: float | None = None
    health: Health = Health.UNKNOWN
    health_detail: str = ""
    down_since: float | None = None
    in_flight: int = 0
    closed_at: int | None = 0
    acked: bool = False
    quiet: bool = False
    drain: Drain | None = None
    drain_by: float | None = None
    reason: str | None = None

    @property
    def routable(self) -> bool:
        """May the gate send it new requests?"""
        return self.phase is Phase.READY and self.health is not Health.DOWN

    @property
    def never_routable(self) -> bool:
        """No gate can ever have sent it a request: it needs no handshake to be ended."""
        return self.closed_at == 0


@dataclass(frozen=True, slots=True)
class Demand:
    """What the gate last said of a service's requests; points in time are ours."""

    requests: int = 0
    waiting: int = 0
    in_flight: int = 0
    last_use: float | None = None
    wanted_at: float | None = None
    lease_until: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The last start that failed: what held requests are told, and when the next may be tried."""

    code: str
    reason: str
    log: tuple[str, ...]
    at: float
    retry_at: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations since the backend's start, counted by upper bound (the last one is infinite)."""

    counts: tuple[int, ...] = (0,) * (len(COLD_START_BOUNDS) + 1)
    total: float = 0.0

    def add(self, seconds: float) -> Histogram:
        """Count one duration."""
        place = bisect.bisect_left(COLD_START_BOUNDS, seconds)
        counts = tuple(n + (i == place) for i, n in enumerate(self.counts))
        return Histogram(counts, self.total + seconds)


@dataclass(frozen=True, slots=True)
class Service:
    """A configured service, or one no longer configured (``retired``) whose replicas still end.

    ``failures`` counts failed starts in a row; while their backoff runs, requests are refused.
    ``crashes`` counts replicas in a row that died soon after they were ready; ``not_before`` holds
    the next start back a little, and requests wait for it.
    """

    spec: ServiceSpec
    replicas: tuple[Replica, ...] = ()
    demand: Demand = field(default_factory=Demand)
    enabled: bool = True
    retired: bool = False
    start_lease: bool = False
    lease_void_before: float = float("-inf")
    last_demand: float = float("-inf")
    failures: int = 0
    failure: Failure | None = None
    crashes: int = 0
    not_before: float = float("-inf")
    cold_starts: tuple[float, ...] = ()
    cold_start_histogram: Histogram = field(default_factory=Histogram)
    lost: int = 0
    starts: Mapping[str, int] = field(default_factory=dict)

    def replica(self, replica_id: str) -> Replica | None:
        """Find one of its replicas."""
        return next((r for r in self.replicas if r.id == replica_id), None)

    def wanted(self, now: float) -> bool:
        """Is there demand: somebody waits, asked within a lease, or an operator said start?"""
        return self.demand.waiting > 0 or self.start_lease or self.leased(now)

    def leased(self, now: float) -> bool:
        """Was a client sent away with a Retry-After that has not run out yet?"""
        granted, until = self.demand.wanted_at, self.demand.lease_until
        return (
            granted is not None
            and until is not None
            and granted > self.lease_void_before
            and now < until
        )

    def backing_off(self, now: float) -> bool:
        """Did a start fail so recently that no other is tried yet?"""
        return self.failure is not None and now < self.failure.retry_at

    def idle_since(self, ready_at: float) -> float | None:
        """Since when nobody uses it; None while a request is in flight or waiting."""
        if self.demand.waiting > 0 or self.demand.in_flight > 0:
            return None
        return max(ready_at, self.demand.last_use or ready_at)


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """A service in a gate's report: a running total, counts, and ages in seconds."""

    requests: int = 0
    waiting: int = 0
    in_flight: int = 0
    idle_s: float | None = None
    wanted_s: float | None = None
    lease_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica in a gate's report."""

    gen: int
    in_flight: int
    health: Health
    detail: str = ""


def with_replica(service: Service, changed: Replica) -> Service:
    """Put a changed replica in the place of the one with its id."""
    return replace(
        service,
        replicas=tuple(changed if r.id == changed.id else r for r in service.replicas),
    )


def without_replica(service: Service, replica_id: str) -> Service:
    """Forget a replica that has ended."""
    return replace(service, replicas=tuple(r for r in service.replicas if r.id != replica_id))


def counted(service: Service, outcome: str) -> Service:
    """Count a start by its outcome."""
    starts = {**service.starts, outcome: service.starts.get(outcome, 0) + 1}
    return replace(service, starts=starts)


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
