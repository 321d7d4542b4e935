"""Decisions about a service's replicas: ``decide`` says what to do, ``apply`` what follows.

Pure and level-triggered: ``decide`` looks only at the present state, so an action that was lost,
or came too late, is simply decided again. Called by the control loop, the only writer of this
state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slurmgate import nodes, scaling
from slurmgate.events import last_words, start_of
from slurmgate.model import Health, LauncherKind, Phase
from slurmgate.observed import (
    LAUNCHING,
    RETURNING,
    Drain,
    Failure,
    Outcome,
    Replica,
    Service,
    counted,
    recorded,
    with_replica,
)

ADMIN_DRAIN = 60.0
STOP_AGAIN = 20.0
SILENT_GRACE = 300.0
SILENT_STOP = 5.0
LAST_WORDS = 5.0
LEAVING = frozenset({Phase.DRAINING, Phase.FAILED, Phase.STOPPING})
PROGRESS = (Phase.SUBMITTED, Phase.PENDING, Phase.RUNNING, Phase.STARTING, Phase.READY)


@dataclass(frozen=True, slots=True)
class Launch:
    """Start one more replica."""


@dataclass(frozen=True, slots=True)
class MarkReady:
    """Its first healthy answer came: let requests to it."""

    replica: str


@dataclass(frozen=True, slots=True)
class Close:
    """Give it no new requests and end it once none is left, at ``by`` at the latest."""

    replica: str
    why: Drain
    by: float | None = None


@dataclass(frozen=True, slots=True)
class Reopen:
    """Demand came before it was ended: let requests to it again."""

    replica: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End its processes or job now."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Its start has failed: fetch the last lines of its log, then end it."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reconnect:
    """It runs and answers nothing: have the way to it made anew, once each time."""

    replica: str


Action = Launch | MarkReady | Close | Reopen | Stop | GiveUp | Reconnect


def decide(service: Service, gate_seen: float, now: float) -> tuple[Action, ...]:
    """Compare what is with what should be; ``gate_seen`` is when the gate last reported."""
    silent = now - gate_seen
    # Each of these looks at all replicas together: one such decision at a time.
    old = scaling.outdated(service, now)
    closing = _surplus(service, old) or _replaced(service, old, now) or _unneeded(service, old, now)
    closed = {action.replica for action in closing}
    actions: list[Action] = [*closing]
    for replica in service.replicas:
        if replica.id in closed:
            continue
        action = _decide_replica(service, replica, silent, now)
        if action is not None:
            actions.append(action)
    if not any(isinstance(a, Reopen) for a in actions) and _may_launch(service, silent, now):
        actions += [Launch()] * scaling.missing(service, old, now)
    return tuple(actions)


def _surplus(service: Service, old: frozenset[str]) -> list[Close | Stop]:
    """Replicas too many: ``max`` was lowered, or an adoption brought one whose drain was forgotten
    with the backend.

    Kept are those that serve or are furthest on the way, of these the newest. As long as not all
    is known of those that were adopted, any of them may be the only one that serves.
    """
    going = scaling.going(service)
    if service.unlisted or any(r.adopted for r in going):
        return []
    most = service.spec.replicas.max
    meant = [r for r in going if r.id not in old]
    leaving = [r for r in going if r.id in old]
    many = meant[:0]
    for group, room in ((meant, most), (leaving, min(most, most + 1 - min(most, len(meant))))):
        group.sort(key=lambda r: _worth(service, r), reverse=True)
        many += group[room:]
    return [Close(r.id, Drain.SURPLUS) for r in many]


def _worth(service: Service, replica: Replica) -> tuple[bool, int, bool, float]:
    """How much would be lost with it."""
    fresh = not scaling.changed(service, replica)
    return (replica.routable, PROGRESS.index(replica.phase), fresh, replica.created_at)


def _replaced(service: Service, old: frozenset[str], now: float) -> list[Close | Stop]:
    """Let go what others have replaced, as soon as enough of them serve; one at a time."""
    ready = [r for r in scaling.going(service) if r.phase is Phase.READY]
    leaving = [r for r in ready if r.id in old]
    if not leaving or len(leaving) == len(ready):
        return []
    level = max(1, scaling.kept(service, now, now), scaling.wanted(service, now))
    first = min(leaving, key=lambda r: (not scaling.changed(service, r), _ends(r)))
    if sum(r.routable for r in ready if r is not first) < level:
        return []
    why = Drain.CHANGED if scaling.changed(service, first) else Drain.ENDING
    return [Close(first.id, why)]


def _ends(replica: Replica) -> float:
    return float("inf") if replica.ends_at is None else replica.ends_at


def _unneeded(service: Service, old: frozenset[str], now: float) -> list[Close | Stop]:
    """Let go one of several that the load has not needed for long; the last has a rule of its own.

    A job that still waits in the queue goes sooner than one that runs.
    """
    spec = service.spec
    going = scaling.going(service)
    ready = [r for r in going if r.phase is Phase.READY]
    queued = [r for r in going if r.phase is Phase.PENDING]
    lasting = len(going) - len(old)
    level = scaling.wanted(service, now)
    if old:
        level = max(level, scaling.kept(service, now, scaling.replaced_from(service, old, now)))
    if queued and lasting > max(1, level):
        newest = max(queued, key=lambda r: r.created_at)
        if now - max(_last_needed(service, lasting), newest.created_at) >= spec.abandon_timeout:
            return [Stop(newest.id, "the load that it was for has gone")]
    if _shrinking(service) or len(ready) <= max(1, level):
        return []
    since = max(_last_needed(service, len(ready)), *(r.since for r in ready))
    if now - since < spec.timeout:
        return []
    victim = min(ready, key=lambda r: (r.routable, r.in_flight, _ends(r), -r.created_at))
    return [Close(victim.id, Drain.IDLE, _drain_by(service, now))]


def _shrinking(service: Service) -> bool:
    """Is one on its way out that nobody needed? The next one waits until it is gone."""
    return any(r.drain is Drain.IDLE for r in service.replicas)


def _last_needed(service: Service, count: int) -> float:
    """When the load last needed so many."""
    return service.needs[count - 1].last if count <= len(service.needs) else float("-inf")


def _drain_by(service: Service, now: float) -> float | None:
    patience = service.spec.drain_timeout
    return now + patience if patience else None


def _decide_replica(service: Service, replica: Replica, silent: float, now: float) -> Action | None:
    match replica.phase:
        case Phase.SUBMITTED | Phase.PENDING:
            return _decide_pending(service, replica, now)
        case Phase.RUNNING | Phase.STARTING:
            return _decide_starting(service, replica, now)
        case Phase.READY:
            return _decide_ready(service, replica, silent, now)
        case Phase.DRAINING:
            return _decide_draining(service, replica, silent, now)
        case Phase.FAILED if now - replica.since >= LAST_WORDS:
            return Stop(replica.id, replica.reason or "")
        case Phase.STOPPING if now - replica.since >= STOP_AGAIN:
            return Stop(replica.id, replica.reason or "")
        case _:
            return None


def _decide_pending(service: Service, replica: Replica, now: float) -> Action | None:
    if replica.phase is Phase.SUBMITTED:
        return None
    spec = service.spec
    if service.retired or replica.drain is not None or scaling.changed(service, replica):
        return Stop(replica.id, "no longer wanted")
    if replica.hopeless is not None:
        return GiveUp(replica.id, replica.hopeless.reason)
    if spec.queue_timeout and now - replica.created_at >= spec.queue_timeout:
        reason = f"still in the queue after {spec.queue_timeout:g} s (queue_timeout)"
        return GiveUp(replica.id, reason)
    if now - service.last_demand >= spec.abandon_timeout and not _expected(service, now):
        return Stop(replica.id, "every waiting client has hung up")
    return None


def _expected(service: Service, now: float) -> bool:
    """Is any replica wanted? Beside one that is ready, others go by rules for all together."""
    if any(r.phase is Phase.READY for r in scaling.going(service)):
        return True
    return scaling.wanted(service, now) > 0


def _decide_starting(service: Service, replica: Replica, now: float) -> Action | None:
    spec = service.spec
    changed = scaling.changed(service, replica) and replica.never_routable
    if service.retired or replica.drain is not None or changed:
        if replica.never_routable:
            return Stop(replica.id, "no longer wanted")
        return Close(replica.id, replica.drain or Drain.REMOVED, replica.drain_by)
    if replica.health is Health.UP:
        return MarkReady(replica.id)
    if replica.hopeless is not None:
        if replica.never_routable:
            return GiveUp(replica.id, replica.hopeless.reason)
        if now - replica.since >= spec.replace_after:  # it has served: a key may come back
            return Close(replica.id, Drain.UNHEALTHY)
    began = replica.since  # an adopted one began long ago: what counts is what we see of it
    if replica.never_routable and replica.running_at is not None:
        began = replica.running_at
    if now - began >= spec.start_timeout:
        if not replica.never_routable:
            return Close(replica.id, Drain.UNHEALTHY)
        seen = replica.health_detail or "no health check was answered"
        reason = f"not healthy {spec.start_timeout:g} s after its start (start_timeout): {seen}"
        return GiveUp(replica.id, reason)
    return None


def _decide_ready(service: Service, replica: Replica, silent: float, now: float) -> Action | None:
    spec = service.spec
    if service.retired:
        return Close(replica.id, Drain.REMOVED, _drain_by(service, now))
    if silent >= spec.timeout + SILENT_GRACE:
        return Close(replica.id, Drain.SILENT)
    if _lost(replica, spec.replace_after, now):
        return Close(replica.id, Drain.UNHEALTHY)
    if spec.launcher is LauncherKind.SLURM and _may_reconnect(replica):
        return Reconnect(replica.id)
    since = service.idle_since(replica.ready_at or replica.since)
    if since is None or replica.in_flight > 0:
        return None
    if scaling.changed(service, replica) and not _kept_warm(service, replica, now):
        return Close(replica.id, Drain.CHANGED)
    if now - since < spec.timeout or not _is_last(service):
        return None
    unused = service.demand.last_use is None or service.demand.last_use < (replica.ready_at or 0)
    if service.leased(now) and unused:
        return None
    return Close(replica.id, Drain.IDLE, _drain_by(service, now))


def _kept_warm(service: Service, replica: Replica, now: float) -> bool:
    """Is another one to be ready first, though nobody uses it?"""
    return scaling.floor(service) > 0 and replica.id in scaling.outdated(service, now)


def _is_last(service: Service) -> bool:
    """Is it the only one that serves, and none is kept for nothing?"""
    ready = [r for r in scaling.going(service) if r.phase is Phase.READY]
    return len(ready) == 1 and scaling.floor(service) == 0 and not _shrinking(service)


def _lost(replica: Replica, after: float, now: float) -> bool:
    """Has it been silent for too long? While its launcher knows why (its login host is away, it is
    suspended) another one would do no better.
    """
    if replica.down_since is None or replica.progress is not None:
        return False
    return now - replica.down_since >= after


def _may_reconnect(replica: Replica) -> bool:
    """Once each time it goes down, and never while a request may still get its answer."""
    if replica.down_since is None or replica.in_flight > 0:
        return False
    return replica.reconnected_at is None or replica.reconnected_at < replica.down_since


def _decide_draining(
    service: Service, replica: Replica, silent: float, now: float
) -> Action | None:
    reason = replica.drain.value if replica.drain else "no longer wanted"
    if not service.retired and _take_back(service, replica, silent, now):
        return Reopen(replica.id)
    if replica.quiet or replica.never_routable:
        return Stop(replica.id, reason)
    overdue = replica.drain_by is not None and now >= replica.drain_by
    if overdue and (replica.acked or silent >= SILENT_STOP):
        return Stop(replica.id, reason)
    if silent >= service.spec.timeout + SILENT_GRACE:
        return Stop(replica.id, "the gate has not reported for too long")
    return None


def _take_back(service: Service, replica: Replica, silent: float, now: float) -> bool:
    """Has what closed the replica passed? Other reasons than these stand."""
    old = scaling.outdated(service, now)
    lasting = [r for r in scaling.going(service) if r.id not in old]
    others, serving = len(lasting), any(r.routable for r in lasting)
    match replica.drain:
        case Drain.IDLE if serving:
            return scaling.wanted(service, now) > others
        case Drain.IDLE:
            since = service.idle_since(replica.ready_at or replica.since)
            used = since is None or now - since < service.spec.timeout
            return used or replica.in_flight > 0 or service.wanted(now)
        case Drain.UNHEALTHY:
            short = others < max(1, scaling.wanted(service, now))
            needed = short or (not serving and service.wanted(now))
            return replica.health is Health.UP and needed
        case Drain.SILENT:
            return silent < SILENT_STOP
        case _:
            return False


def _may_launch(service: Service, silent: float, now: float) -> bool:
    """May anything be started at all? One that is drained for nothing is taken back before that."""
    if service.retired or not service.enabled or silent >= service.spec.timeout + SILENT_GRACE:
        return False
    if service.backing_off(now) or now < service.not_before:
        return False
    if service.unlisted and not service.wanted(now):
        return False
    return not any(
        r.phase is Phase.FAILED or (r.phase is Phase.DRAINING and r.drain in RETURNING)
        for r in service.replicas
    )


def launching(service: Service, replica_id: str, now: float) -> Service:
    """Note a replica about to be launched, before anything is done about it."""
    replica = Replica(
        id=replica_id,
        phase=Phase.SUBMITTED,
        start_hash=service.spec.start_hash(),
        since=now,
        created_at=now,
    )
    lately = (at for at in service.launches if now - at < scaling.HOUR)
    return replace(
        service,
        replicas=(*service.replicas, replica),
        last_demand=now,
        launches=(*lately, now),
    )


def apply(
    service: Service, action: MarkReady | Close | Reopen | Stop | GiveUp | Reconnect, now: float
) -> Service:
    """Give the service as it is once the action was taken."""
    replica = service.replica(action.replica)
    if replica is None:
        return service
    match action:
        case MarkReady():
            return _ready(service, replica, now)
        case Close(why=why, by=by):
            closed = replace(replica, phase=Phase.DRAINING, since=now, drain=why, drain_by=by)
            service = with_replica(service, closed)
            if why is Drain.IDLE:
                return replace(service, lease_void_before=now)
            renew = _renew(why) and not scaling.going(service)
            return replace(service, start_lease=True) if renew else service
        case Reopen():
            opened = replace(
                replica,
                phase=Phase.READY,
                since=now,
                ready_at=now if replica.ready_at is None else replica.ready_at,
                drain=None,
                drain_by=None,
            )
            return replace(with_replica(service, opened), start_lease=False)
        case Stop(reason=reason):
            if replica.phase is Phase.FAILED:  # its log did not come: the failure counts without
                return last_words(service, replica.id, (), now)
            first = now if replica.stopping_since is None else replica.stopping_since
            stopping = replace(
                replica, phase=Phase.STOPPING, since=now, stopping_since=first, reason=reason
            )
            return with_replica(service, stopping)
        case GiveUp(reason=reason):
            return with_replica(
                service, replace(replica, phase=Phase.FAILED, since=now, reason=reason)
            )
        case Reconnect():
            return with_replica(service, replace(replica, reconnected_at=now))


def _renew(why: Drain) -> bool:
    """A service that was warm stays warm when only its replica has to change."""
    return why in (Drain.CHANGED, Drain.UNHEALTHY)


def _ready(service: Service, replica: Replica, now: float) -> Service:
    """Its first healthy answer. One that takes the place of another does not count as use."""
    was_adopted = not replica.never_routable
    warm = [r.ready_at for r in service.replicas if r.ready_at is not None]
    since = now
    if was_adopted and service.demand.last_use is not None:
        since = service.demand.last_use
    elif warm:
        since = max(warm)
    ready = replace(
        replica,
        phase=Phase.READY,
        since=now,
        ready_at=since,
        down_since=None,
        adopted=False,
    )
    if not was_adopted:
        service = _started(service, replica, now)
    return replace(
        with_replica(service, ready),
        failures=0,
        failure=None,
        start_lease=False,
        last_end=None,
        last_output=(),
        ports_taken=0,
    )


def _started(service: Service, replica: Replica, now: float) -> Service:
    took = now - replica.created_at
    service = recorded(service, start_of(service, replica, Outcome.READY, None, now))
    return replace(
        counted(service, "ready"),
        strikes=nodes.worked(service, replica.node),
        cold_start_histogram=service.cold_start_histogram.add(took),
    )


def stop_by_admin(service: Service, drain_for: float, now: float) -> Service:
    """An operator wants every replica of it ended within ``drain_for`` seconds.

    Leases end, and so does the wait of whoever is held for a start: else it would begin anew. A
    client that asks later starts it again.
    """
    starting = any(r.phase in LAUNCHING for r in service.replicas)
    ready = any(r.phase is Phase.READY for r in service.replicas)
    waiting = service.demand.waiting > 0
    service = replace(
        service,
        stopped=True,
        start_lease=False,
        lease_void_before=now,
        needs=(),
        demand=replace(service.demand, waiting=0, waiting_since=None),
    )
    if waiting or (starting and not ready):
        failure = Failure("start-failed", Drain.ADMIN.value, (), now, now + 1.0)
        service = replace(service, failure=failure)
    for replica in service.replicas:
        if replica.phase in (Phase.STOPPING, Phase.FAILED):
            continue
        marked = replace(replica, drain=Drain.ADMIN, drain_by=now + drain_for)
        if replica.phase is Phase.READY:
            marked = replace(marked, phase=Phase.DRAINING, since=now)
        service = with_replica(service, marked)
    return service


def start_by_admin(service: Service) -> Service:
    """An operator wants it started now, whatever failed before."""
    going = scaling.going(service)
    if going:
        ready = any(r.phase is Phase.READY for r in going)
        return replace(service, stopped=False, start_lease=service.start_lease or not ready)
    return replace(
        service,
        stopped=False,
        start_lease=True,
        failures=0,
        failure=None,
        crashes=0,
        not_before=float("-inf"),
    )
