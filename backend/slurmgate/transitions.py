"""What a service is once a decision about it was taken, or an operator has spoken.

Pure: a value and an action in, a new value out. Called by the fleet.
"""

from __future__ import annotations

from dataclasses import replace

from slurmgate import nodes, scaling
from slurmgate.actions import Close, GiveUp, MarkReady, Reconnect, Reopen, Stop
from slurmgate.events import last_words, start_of
from slurmgate.model import Phase
from slurmgate.observed import (
    LAUNCHING,
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
SENT_AWAY = 0.1  # a request that is sent away ends so soon after its lease was noted, at most


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
            if scaling.going(service):
                return service
            if why is Drain.IDLE:
                return replace(service, lease_void_before=now)
            return replace(service, start_lease=True) if _renew(why) else service
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
    """Its first healthy answer. One that takes the place of another does not count as use.

    One taken over was idle since its last use, which used up leases of before; if there was none
    since it began, it may have been starting until now. Who is sent away is no use of it.
    """
    was_adopted = not replica.never_routable
    warm = [r.ready_at for r in service.replicas if r.ready_at is not None]
    since, void = now, service.lease_void_before
    used = service.demand.last_use
    began = replica.created_at if replica.running_at is None else replica.running_at
    if service.demand.wanted_at is not None:
        began = max(began, service.demand.wanted_at + SENT_AWAY)
    if was_adopted and used is not None and used >= began:
        since, void = used, max(void, used)
    elif warm:
        since = max(warm)
    ready = replace(
        replica,
        phase=Phase.READY,
        since=now,
        ready_at=since,
        down_since=None,
        adopted=False,
        on_record=True,
    )
    if not replica.on_record:
        service = _started(service, replica, now)
    return replace(
        with_replica(service, ready),
        failures=0,
        failure=None,
        start_lease=False,
        lease_void_before=void,
        last_end=None,
        last_output=(),
        ports_taken=0,
    )


def _started(service: Service, replica: Replica, now: float) -> Service:
    start = start_of(service, replica, Outcome.READY, None, now)
    service = counted(recorded(service, start), "ready")
    histogram = service.cold_start_histogram
    if start.start_s is not None:
        histogram = histogram.add(now - replica.created_at)
    return replace(
        service,
        strikes=nodes.worked(service, replica.node),
        cold_start_histogram=histogram,
    )


def stop_by_admin(service: Service, drain_for: float, now: float) -> Service:
    """An operator wants every replica of it ended within ``drain_for`` seconds.

    Leases end, and so does the wait of whoever is held for a start: else it would begin anew. A
    client that asks later starts it again.
    """
    starting = any(r.phase in LAUNCHING for r in service.replicas)
    ready = any(r.phase is Phase.READY for r in service.replicas)
    service = replace(
        service,
        stopped=True,
        start_lease=False,
        lease_void_before=now,
        needs=(),
        demand=replace(service.demand, waiting=0, waiting_since=None),
    )
    if starting and not ready:
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
