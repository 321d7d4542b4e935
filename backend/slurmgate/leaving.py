"""Which of a service's replicas are to go, and which of those that are going may stay.

Pure. These decisions look at all replicas together; ``scaling`` says how many there should be.
"""

from __future__ import annotations

from slurmgate import scaling
from slurmgate.actions import Close, Stop
from slurmgate.model import Health, Phase
from slurmgate.observed import Drain, Replica, Service

SILENT_STOP = 5.0
PROGRESS = (Phase.SUBMITTED, Phase.PENDING, Phase.RUNNING, Phase.STARTING, Phase.READY)


def surplus(service: Service, old: frozenset[str]) -> list[Close | Stop]:
    """Replicas too many: ``max`` was lowered, or an adoption brought one whose drain was forgotten
    with the backend.

    Kept are those that serve or are furthest on the way, of these the newest. As long as not all
    is known of those that were adopted, any of them may be the only one that serves.
    """
    going = scaling.going(service)
    if service.unlisted or any(r.adopted for r in going):
        return []
    most = service.spec.replicas.max
    if len(going) <= most:
        return []
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


def replaced(service: Service, old: frozenset[str], now: float) -> list[Close | Stop]:
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


def unneeded(service: Service, old: frozenset[str], now: float) -> list[Close | Stop]:
    """Let go one of several that the load has not needed for long; the last has a rule of its own.

    A job that still waits in the queue goes sooner than one that runs.
    """
    spec = service.spec
    going = scaling.going(service)
    ready = [r for r in going if r.phase is Phase.READY]
    queued = [r for r in going if r.phase is Phase.PENDING]
    lasting = len(going) - len(old)
    level = max(scaling.wanted(service, now), scaling.kept_without(service, old, now))
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
    return [Close(victim.id, Drain.IDLE, drain_by(service, now))]


def _shrinking(service: Service) -> bool:
    """Is one on its way out that nobody needed? The next one waits until it is gone."""
    return any(r.drain is Drain.IDLE for r in service.replicas)


def _last_needed(service: Service, count: int) -> float:
    """When the load last needed so many."""
    return service.needs[count - 1].last if count <= len(service.needs) else float("-inf")


def drain_by(service: Service, now: float) -> float | None:
    patience = service.spec.drain_timeout
    return now + patience if patience else None


def kept_warm(service: Service, replica: Replica, now: float) -> bool:
    """Is another one to be ready first, though nobody uses it?"""
    return scaling.floor(service) > 0 and replica.id in scaling.outdated(service, now)


def is_last(service: Service) -> bool:
    """Is it the only one that serves, and none is kept for nothing?"""
    ready = [r for r in scaling.going(service) if r.phase is Phase.READY]
    return len(ready) == 1 and scaling.floor(service) == 0 and not _shrinking(service)


def take_back(service: Service, replica: Replica, silent: float, now: float) -> bool:
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
