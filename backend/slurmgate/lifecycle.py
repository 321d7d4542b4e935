"""Decisions about a service's replicas: ``decide`` says what to do, ``transitions`` what follows.

Pure and level-triggered: ``decide`` looks only at the present state, so an action that was lost,
or came too late, is simply decided again. Called by the control loop, the only writer of this
state.
"""

from __future__ import annotations

from slurmgate import leaving, scaling
from slurmgate.actions import Action, Close, GiveUp, Launch, MarkReady, Reconnect, Reopen, Stop
from slurmgate.model import Health, LauncherKind, Phase
from slurmgate.observed import RETURNING, Drain, Replica, Service

STOP_AGAIN = 20.0
SILENT_GRACE = 300.0
LAST_WORDS = 5.0


def decide(service: Service, gate_seen: float, now: float) -> tuple[Action, ...]:
    """Compare what is with what should be; ``gate_seen`` is when the gate last reported."""
    silent = now - gate_seen
    # Each of these looks at all replicas together: one such decision at a time.
    old = scaling.outdated(service, now)
    closing = (
        leaving.surplus(service, old)
        or leaving.replaced(service, old, now)
        or leaving.unneeded(service, old, now)
    )
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
    if replica.phase is Phase.SUBMITTED and not replica.entrusted:
        return None
    spec = service.spec
    if service.retired or replica.drain is not None or scaling.changed(service, replica):
        return Stop(replica.id, "no longer wanted")
    if replica.hopeless is not None:
        return GiveUp(replica.id, replica.hopeless.reason)
    since = replica.created_at if replica.queued_at is None else replica.queued_at
    if spec.queue_timeout and now - since >= spec.queue_timeout:
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
    if replica.suspended_s is not None:  # it cannot start meanwhile, so that is no fault of its own
        return _decide_suspended(service, replica)
    if replica.health is Health.UP:
        return MarkReady(replica.id)
    if replica.hopeless is not None:
        if replica.never_routable:
            return GiveUp(replica.id, replica.hopeless.reason)
        if now - replica.since >= spec.replace_after:  # it has served: a key may come back
            return Close(replica.id, Drain.UNHEALTHY)
    began = replica.since  # an adopted one began long ago: what counts is what we see of it
    if replica.never_routable and replica.running_at is not None:
        began = max(replica.running_at, replica.known_since)
    if now - began >= spec.start_timeout:
        if not replica.never_routable:
            return Close(replica.id, Drain.UNHEALTHY)
        seen = replica.health_detail or "no health check was answered"
        reason = f"not healthy {spec.start_timeout:g} s after its start (start_timeout): {seen}"
        return GiveUp(replica.id, reason)
    return None


def _decide_suspended(service: Service, replica: Replica) -> Action | None:
    if not _stuck(service, replica):
        return None
    if replica.never_routable:
        return Stop(replica.id, Drain.SUSPENDED.value)
    return Close(replica.id, Drain.SUSPENDED)


def _decide_ready(service: Service, replica: Replica, silent: float, now: float) -> Action | None:
    spec = service.spec
    if service.retired:
        return Close(replica.id, Drain.REMOVED, leaving.drain_by(service, now))
    if silent >= spec.timeout + SILENT_GRACE:
        return Close(replica.id, Drain.SILENT)
    if _stuck(service, replica):
        return Close(replica.id, Drain.SUSPENDED)
    if _lost(replica, spec.replace_after, now):
        return Close(replica.id, Drain.UNHEALTHY)
    if spec.launcher is LauncherKind.SLURM and _may_reconnect(replica):
        return Reconnect(replica.id)
    since = service.idle_since(replica.ready_at or replica.since)
    if since is None or replica.in_flight > 0:
        return None
    if scaling.changed(service, replica) and not leaving.kept_warm(service, replica, now):
        return Close(replica.id, Drain.CHANGED)
    if now - since < spec.timeout or not leaving.is_last(service):
        return None
    unused = service.demand.last_use is None or service.demand.last_use < (replica.ready_at or 0)
    if service.leased(now) and unused:
        return None
    return Close(replica.id, Drain.IDLE, leaving.drain_by(service, now))


def _stuck(service: Service, replica: Replica) -> bool:
    """Has the scheduler kept its processes stopped for too long? Whom it was stopped for may run
    for days. As long as nobody can say that it still is, that changes nothing.
    """
    return replica.suspended_s is not None and replica.suspended_s >= service.spec.replace_after


def _lost(replica: Replica, after: float, now: float) -> bool:
    """Has it been silent for too long? While its launcher knows why (its login host is away)
    another one would do no better.
    """
    if replica.down_since is None or replica.progress is not None:
        return False
    return now - replica.down_since >= after


def _may_reconnect(replica: Replica) -> bool:
    """Once each time it goes down, and never while a request may still get its answer."""
    if replica.down_since is None or replica.in_flight > 0 or replica.suspended_s is not None:
        return False
    return replica.reconnected_at is None or replica.reconnected_at < replica.down_since


def _decide_draining(
    service: Service, replica: Replica, silent: float, now: float
) -> Action | None:
    reason = replica.drain.value if replica.drain else "no longer wanted"
    stuck = _stuck(service, replica)
    if not service.retired and not stuck and leaving.take_back(service, replica, silent, now):
        return Reopen(replica.id)
    if replica.quiet or replica.never_routable:
        return Stop(replica.id, reason)
    # What is in flight at one that is stopped gets no answer; cut off, it is sent to another one.
    overdue = stuck or (replica.drain_by is not None and now >= replica.drain_by)
    if overdue and (replica.acked or silent >= leaving.SILENT_STOP):
        return Stop(replica.id, reason)
    if silent >= service.spec.timeout + SILENT_GRACE:
        return Stop(replica.id, "the gate has not reported for too long")
    return None


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
