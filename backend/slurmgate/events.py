"""How each event changes what is known of a service: a value in, a new one out, time an argument.

Pure. The fleet applies these; ``lifecycle`` then decides from the outcome what to do next.
"""

from __future__ import annotations

from dataclasses import replace

from slurmgate import nodes, scaling
from slurmgate.model import End, Fault, Health, Phase, ServiceSpec, Sighting
from slurmgate.observed import (
    LAUNCHING,
    Demand,
    Drain,
    Failure,
    Outcome,
    Refusal,
    Replica,
    ReplicaReport,
    Service,
    ServiceReport,
    Start,
    counted,
    recorded,
    with_replica,
    without_replica,
)

MAX_BACKOFF = 60.0
STEADY_AFTER = 60.0
SETTLED_AFTER = 10.0
SAME_MOMENT = 0.02
PORTS_TRIED = 5
SAME_END = 30.0
ANSWERED = "last poll: status "  # so the gate's words begin where the service answered
LEFT = frozenset({Phase.FAILED, Phase.STOPPING})


def adopted(
    service: Service, sighting: Sighting, now: float, *, on_record: bool = False
) -> Service:
    """Take over a replica that an earlier backend started.

    Unless what became of its start is ``on_record``, that is still to be found out.
    What an earlier snapshot said of one with an endpoint is unknown, so it counts as possibly
    routable until a snapshot of this backend has said otherwise.
    """
    reached = sighting.endpoint is not None
    fresh = Replica(
        id=sighting.replica,
        phase=sighting.phase,
        start_hash=sighting.start_hash,
        since=now,
        created_at=sighting.created_at,
        gen=sighting.gen,
        endpoint=sighting.endpoint,
        closed_at=None if reached else 0,
        adopted=reached,
        known_since=now,
        on_record=on_record or any(s.replica == sighting.replica for s in service.recent),
        entrusted=True,
    )
    launches = service.launches
    if not fresh.on_record:
        launches = (*launches, fresh.created_at)
    told = _told(fresh, sighting)
    taken = replace(service, replicas=(*service.replicas, told), launches=launches)
    return taken if reached else replace(taken, last_demand=now)


def launched(service: Service, sighting: Sighting, now: float) -> Service:
    """A launch succeeded. What was seen since is newer than what it says."""
    found = service.replica(sighting.replica)
    if found is None or found.phase is not Phase.SUBMITTED:
        return service
    return seen(with_replica(service, replace(found, entrusted=True)), sighting, now)


def seen(service: Service, sighting: Sighting, now: float) -> Service:
    """The launcher tells how a replica does.

    At another place than before (its job was queued again) it starts anew: what was known of its
    health says nothing any more.
    """
    found = service.replica(sighting.replica)
    if found is None:
        return service
    known = _told(found, sighting)
    same_place = (sighting.endpoint, sighting.gen) == (found.endpoint, found.gen)
    no_news = sighting.endpoint is not None or sighting.phase is found.phase
    if found.phase in LEFT or (same_place and no_news):
        return with_replica(service, known)
    moved = replace(
        known,
        phase=sighting.phase,
        since=now,
        endpoint=sighting.endpoint,
        gen=sighting.gen,
        adopted=False,
        hopeless=None,
        ready_at=None,
        health=Health.UNKNOWN,
        health_detail="",
        down_since=None,
    )
    changed = with_replica(service, moved)
    return replace(changed, last_demand=now) if found.endpoint is not None else changed


def _told(replica: Replica, sighting: Sighting) -> Replica:
    return replace(
        replica,
        port=sighting.port,
        job_id=sighting.job_id,
        node=sighting.node,
        queued_at=sighting.queued_at,
        running_at=sighting.running_at,
        progress=sighting.reason,
        notice=sighting.notice,
        starts_at=sighting.starts_at,
        ends_at=_end(replica, sighting),
        suspended_s=sighting.suspended_s,
        api_key=sighting.api_key,
    )


def _end(replica: Replica, sighting: Sighting) -> float | None:
    """Give the end by its time limit. Slurm tells whole seconds that are left, and takes its time:
    one a little later than known is no news, else a successor would come, go and come again.
    """
    known, told = replica.ends_at, sighting.ends_at
    if known is None or told is None or sighting.gen != replica.gen:
        return told
    return known if 0 <= told - known < SAME_END else told


def hopeless(service: Service, replica_id: str, refusal: Refusal) -> Service:
    """A replica on its way will never serve; of one that has served its health decides."""
    found = service.replica(replica_id)
    if found is None or found.phase not in LAUNCHING:
        return service
    return with_replica(service, replace(found, hopeless=refusal))


def launch_failed(service: Service, replica_id: str, code: str, reason: str, now: float) -> Service:
    """A launch failed and left nothing running: it is none of the starts of this hour."""
    found = service.replica(replica_id)
    if found is None:
        return service
    rest = _not_of_this_hour(without_replica(service, replica_id), found)
    if found.phase is Phase.STOPPING:  # it was kept from being submitted, as nobody wants it
        return recorded(rest, start_of(service, found, Outcome.CANCELLED, found.reason, now))
    return failed(rest, found, code, reason, (), now)


def _not_of_this_hour(service: Service, replica: Replica) -> Service:
    """Nothing was started for this replica."""
    launches = list(service.launches)
    if replica.created_at in launches:
        launches.remove(replica.created_at)
    return replace(service, launches=tuple(launches))


def failed(
    service: Service,
    replica: Replica,
    code: str,
    reason: str,
    log: tuple[str, ...],
    now: float,
    *,
    seen: bool = True,
) -> Service:
    """A start failed through the service's fault: leases end and the next start waits.

    ``seen``: it ended just now, see ``start_of``.
    One that cannot start is not kept from any node: that may be what it cannot start for.
    """
    failures = service.failures + 1
    backoff = min(MAX_BACKOFF, 2.0 ** (failures - 1))
    strikes = service.strikes
    if code == "cannot-start":
        strikes = ()
    elif replica.node is not None:
        strikes = nodes.struck(service, replica.node, now, own=False)
    start = start_of(service, replica, Outcome.FAILED, reason, now, seen=seen)
    service = recorded(service, start)
    return replace(
        counted(service, code),
        strikes=strikes,
        failures=failures,
        failure=Failure(code, reason, log, now, now + backoff),
        start_lease=False,
        lease_void_before=now,
        ports_taken=0,
    )


def start_of(
    service: Service,
    replica: Replica,
    outcome: Outcome,
    reason: str | None,
    now: float,
    *,
    seen: bool = True,
) -> Start:
    """Say how a replica's start went that is over now.

    When it became ready, or ended (not ``seen``), while no backend looked is not known: that is
    left out.
    """
    ran = replica.running_at
    if outcome is Outcome.READY:
        seen = replica.watched
    queued_until = now if ran is None and seen else ran
    return Start(
        service=service.spec.name,
        replica=replica.id,
        ended=now,
        outcome=outcome,
        queue_s=None if queued_until is None else max(0.0, queued_until - replica.created_at),
        start_s=max(0.0, now - ran) if ran is not None and seen else None,
        reason=reason,
        job_id=replica.job_id,
        node=replica.node,
    )


def ended(service: Service, replica_id: str, end: End, log: tuple[str, ...], now: float) -> Service:
    """The replica's job or process is gone. Its own end during a start is a failed start; that of
    one which was ready (or may have been, before it was adopted) is nobody's fault at first.
    """
    found = service.replica(replica_id)
    if found is None:
        return service
    found = replace(found, node=found.node or end.node)
    rest = without_replica(service, replica_id)
    if not end.began:
        rest = _not_of_this_hour(rest, found)
    fresh = found.never_routable and found.ready_at is None
    unsaid = found.ready_at is None and not found.on_record
    seen = not end.unseen
    if found.phase is Phase.FAILED:
        code = found.hopeless.code if found.hopeless is not None else end.code
        return failed(rest, found, code, found.reason or "", log, now, seen=seen)
    if end.bad_node is not None:
        rest = replace(rest, strikes=nodes.struck(service, end.bad_node, now, own=True))
    if found.phase is Phase.STOPPING or found.drain is not None:
        why = found.reason or (found.drain.value if found.drain else None)
        outcome = Outcome.FAILED if found.drain is Drain.UNHEALTHY else Outcome.CANCELLED
        cancelled = start_of(service, found, outcome, why, now, seen=seen)
        return recorded(rest, cancelled) if unsaid else rest
    lost = start_of(service, found, Outcome.LOST, end.reason, now, seen=seen)
    if fresh and end.fault is Fault.PORT and service.ports_taken < PORTS_TRIED:
        return replace(recorded(rest, lost), ports_taken=service.ports_taken + 1)
    if fresh and end.fault is not Fault.NOBODY:
        return failed(rest, found, end.code, f"{end.reason} during start", log, now, seen=seen)
    if unsaid:
        rest = recorded(rest, lost)
    lived = now - found.since
    steady = SETTLED_AFTER if end.fault is Fault.NOBODY else STEADY_AFTER
    crashes = service.crashes + 1 if lived < steady else 1
    pause = 0.0 if crashes == 1 else min(MAX_BACKOFF, 2.0 ** (crashes - 2))
    return replace(
        rest,
        lost=rest.lost + 1,
        crashes=crashes,
        not_before=now + pause,
        last_end=end.reason,
        last_output=log,
        last_demand=now,
    )


def last_output(service: Service, reason: str, log: tuple[str, ...]) -> Service:
    """The last lines of a replica that ended by itself are here."""
    return replace(service, last_output=log) if service.last_end == reason else service


def reported(service: Service, report: ServiceReport, now: float) -> Service:
    """Take over what the gate says of the service's requests."""

    def ago(age: float | None) -> float | None:
        return None if age is None else now - age

    known = service.demand
    last_use = _moment(known.last_use, ago(report.idle_s))
    if last_use is None:
        last_use = known.last_use
    waiting_since = known.waiting_since
    demand = Demand(
        requests=report.requests,
        waiting=report.waiting,
        in_flight=report.in_flight,
        last_use=now if report.in_flight > 0 else last_use,
        wanted_at=_moment(known.wanted_at, ago(report.wanted_s)),
        lease_until=_moment(
            known.lease_until, None if report.lease_s is None else now + report.lease_s
        ),
        waiting_since=(waiting_since or now) if report.waiting > 0 else None,
    )
    changed = replace(service, demand=demand)
    changed = replace(changed, needs=scaling.noted(changed, now))
    if changed.wanted(now):
        stopped = service.stopped and changed.backing_off(now)
        return replace(changed, last_demand=now, stopped=stopped)
    return changed


def _moment(known: float | None, told: float | None) -> float | None:
    """Give a moment that was told as an age: the known one if that is meant, so that an age that
    only grows is no news.
    """
    if known is None or told is None or abs(told - known) >= SAME_MOMENT:
        return told
    return known


def replica_reported(
    replica: Replica, report: ReplicaReport, stored: int | None, now: float
) -> Replica:
    """Take over counts and health of one replica; ``stored`` is the snapshot number of this
    epoch that the gate had stored before it read the counts, None when it had none of ours.
    """
    changed = replace(replica, in_flight=report.in_flight)
    if report.gen == replica.gen and report.health is not Health.UP and report.detail:
        changed = replace(changed, seen_loading=True)
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


def last_words(
    service: Service, replica_id: str, log: tuple[str, ...], now: float, hint: str | None = None
) -> Service:
    """The log of a replica whose start was given up is here: say so to everybody who waits.

    ``hint`` is what its launcher can add to the reason, unless the service has answered since.
    """
    found = service.replica(replica_id)
    if found is None or found.phase is not Phase.FAILED:
        return service
    ending = replace(found, phase=Phase.STOPPING, since=now, stopping_since=now)
    stopping = with_replica(service, ending)
    reason = found.reason or ""
    if hint is not None and hint not in reason and not found.health_detail.startswith(ANSWERED):
        reason = f"{reason}; {hint}" if reason else hint
    code = "start-failed" if found.hopeless is None else found.hopeless.code
    return failed(stopping, found, code, reason, log, now)


def listed(service: Service) -> Service:
    """Its host was listed: what runs of it is known."""
    return replace(service, unlisted=False)


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
    demand = replace(service.demand, waiting=0, in_flight=0, waiting_since=None)
    return replace(service, demand=demand, replicas=replicas)
