"""What the backend knows of a service, its replicas and its demand, and what a gate reports.

Immutable values. Only the fleet holds them for longer than a call; ``events`` says how they change
and ``lifecycle`` what to do next.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from slurmgate.model import Health, Phase, ServiceSpec

LAUNCHING = frozenset({Phase.SUBMITTED, Phase.PENDING, Phase.RUNNING, Phase.STARTING})
RECENT_STARTS = 100
COLD_START_BOUNDS = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Drain(StrEnum):
    """Why a replica gets no new requests and is to end."""

    IDLE = "idle"
    CHANGED = "changed"
    REMOVED = "removed"
    ADMIN = "stopped by an operator"
    UNHEALTHY = "unhealthy"
    SURPLUS = "one more than wanted"
    ENDING = "its time limit is near"
    SILENT = "gate silent"
    SUSPENDED = "suspended by Slurm"


RETURNING = frozenset({Drain.IDLE, Drain.SILENT})
"""Drains that demand takes back."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What requests are told when a start has no prospect."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Replica:
    """One job or process. ``closed_at`` is the number of the first snapshot since which the gate
    may not route to it: None while it is routable or no snapshot has said so yet, 0 when it has
    never been routable. ``acked`` and ``quiet`` are what the gate proved since it was closed:
    that no new request can reach it, and that none is left on it.

    ``queued_at`` is when its job last came into the queue, maybe long after it was made.
    ``stopping_since`` is when it was first told to end, whatever that takes. ``progress`` and
    ``notice`` are its launcher's words; ``hopeless`` is why it will never serve.
    ``adopted``: an earlier backend started it, and nobody has said yet how it does. ``known_since``
    is when it was taken over from one; ``seen_loading``: since then it was found not to answer yet.
    ``on_record``: what became of its start is known and kept. ``entrusted``: its launch is over, so
    that its launcher can end it whatever is known of its job. ``suspended_s`` is for how long its
    processes have been seen to be stopped by the scheduler: such a one takes connections and
    answers none. ``api_key`` is what the gate has to show it.
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
    queued_at: float | None = None
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
    stopping_since: float | None = None
    reason: str | None = None
    adopted: bool = False
    known_since: float = float("-inf")
    seen_loading: bool = False
    on_record: bool = False
    entrusted: bool = False
    hopeless: Refusal | None = None
    reconnected_at: float | None = None
    progress: str | None = None
    notice: str | None = None
    starts_at: float | None = None
    ends_at: float | None = None
    suspended_s: float | None = None
    api_key: str | None = field(default=None, repr=False)

    @property
    def routable(self) -> bool:
        """May the gate send it new requests?"""
        healthy = self.health is not Health.DOWN and self.suspended_s is None
        return self.phase is Phase.READY and healthy

    @property
    def never_routable(self) -> bool:
        """No gate can ever have sent it a request: it needs no handshake to be ended."""
        return self.closed_at == 0

    @property
    def watched(self) -> bool:
        """Would this backend have seen it become ready? Else that may have been at any time since
        it began to run.
        """
        ran = self.running_at
        return self.seen_loading or ran is None or ran >= self.known_since


@dataclass(frozen=True, slots=True)
class Demand:
    """What the gate last said of a service's requests; points in time are ours."""

    requests: int = 0
    waiting: int = 0
    in_flight: int = 0
    last_use: float | None = None
    wanted_at: float | None = None
    lease_until: float | None = None
    waiting_since: float | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """Since when a number of replicas has been needed without a break, and when it last was."""

    since: float
    last: float


@dataclass(frozen=True, slots=True)
class Strike:
    """A failure on a node; ``own``: it was the node's doing, not the service's."""

    node: str
    at: float
    own: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """The last start that failed: what held requests are told, and when the next may be tried."""

    code: str
    reason: str
    log: tuple[str, ...]
    at: float
    retry_at: float


class Outcome(StrEnum):
    """What became of a start: ``lost`` by nobody's fault, ``cancelled`` as nobody wanted it."""

    READY = "ready"
    FAILED = "failed"
    LOST = "lost"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Start:
    """One start that has come to its end: durations in seconds, None for what was never reached or
    nobody knows.

    ``ended`` is a point in time; ``queue_s`` ends where it began to run, ``start_s`` begins there.
    """

    service: str
    replica: str
    ended: float
    outcome: Outcome
    queue_s: float | None = None
    start_s: float | None = None
    reason: str | None = None
    job_id: str | None = None
    node: str | None = None


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
    the next start back a little, and requests wait for it. ``last_end`` and ``last_output`` are of
    the last replica that ended by itself since one was ready. ``unlisted``: nobody can say yet
    whether more of it runs, or whether that still does. ``stopped``: by an operator, and nobody has
    asked for it since.

    ``needs`` is what its load needed, for one replica, for two, and so on; ``launches`` when its
    replicas of the last hour were started; ``recent`` what became of the last starts; ``strikes``
    where it failed.
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
    last_end: str | None = None
    last_output: tuple[str, ...] = ()
    ports_taken: int = 0
    unlisted: bool = False
    stopped: bool = False
    needs: tuple[Need, ...] = ()
    launches: tuple[float, ...] = ()
    recent: tuple[Start, ...] = ()
    strikes: tuple[Strike, ...] = ()
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


def recorded(service: Service, start: Start) -> Service:
    """Keep what became of a start; only the first word about each counts.

    Half of what is kept is for those that succeeded: a night of failures must not take away what
    is known of how long a start takes.
    """
    if any(known.replica == start.replica for known in service.recent):
        return service
    recent = (*service.recent, start)
    if len(recent) > RECENT_STARTS:
        good = [known.outcome is Outcome.READY for known in recent]
        oldest = good.index(2 * sum(good) > RECENT_STARTS)
        recent = recent[:oldest] + recent[oldest + 1 :]
    return replace(service, recent=recent)
