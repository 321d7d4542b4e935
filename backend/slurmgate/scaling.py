"""How many replicas a service should have, and which of them will not last.

Pure. The load of a service is what is in flight and waiting, as the gate last reported it; it needs
one replica for each ``target_in_flight`` of that. For each number of replicas it is noted since
when that many have been needed without a break, and when they last were (``Service.needs``): so a
load that lasts brings more, and one that is gone for long lets them go, one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slurmgate.model import LauncherKind, Phase
from slurmgate.observed import LAUNCHING, Drain, Need, Replica, Service
from slurmgate.starts import durations, quantile

WAITING_LASTS = 0.25
BREAK = 1.0
HOUR = 3600.0
LEAVES_WITHIN = 30.0
LEAST_LEAD = 120.0
LEAD_EXTRA = 60.0
LEAD_SHARE = 0.95
QUEUED = frozenset({Phase.SUBMITTED, Phase.PENDING})
ENDING_PHASES = frozenset({Phase.FAILED, Phase.STOPPING})


@dataclass(frozen=True, slots=True)
class Guard:
    """Why no further replica may be started at present; ``until`` when the next one may."""

    reason: str
    until: float | None = None


# -- the load --------------------------------------------------------------------------------


def need(service: Service) -> int:
    """How many replicas the load of now needs, within ``max``."""
    bounds = service.spec.replicas
    load = service.demand.in_flight + service.demand.waiting
    return min(bounds.max, math.ceil(load / _per_replica(service)))


def _per_replica(service: Service) -> int:
    bounds = service.spec.replicas
    return max(1, min(bounds.target_in_flight, bounds.max_in_flight or bounds.target_in_flight))


def noted(service: Service, now: float) -> tuple[Need, ...]:
    """Note what the load of now needs; a break of less than a second is none."""
    needed = need(service)
    known = service.needs[: service.spec.replicas.max]
    fresh = Need(now, now)
    levels = []
    for level in range(max(needed, len(known))):
        before = known[level] if level < len(known) else None
        if level >= needed:
            levels.append(known[level])
        elif before is None or now - before.last > BREAK:
            levels.append(fresh)
        else:
            levels.append(Need(before.since, now))
    return tuple(levels)


def _lasted(service: Service, count: int, now: float) -> bool:
    """Has the load needed so many for ``scale_up_after``, and does it still?"""
    if count > len(service.needs):
        return False
    known = service.needs[count - 1]
    return now - known.last <= BREAK and now - known.since >= service.spec.scale_up_after


# -- how many --------------------------------------------------------------------------------


def floor(service: Service) -> int:
    """How many are kept without any demand."""
    held_down = service.stopped or service.retired or not service.enabled
    return 0 if held_down else service.spec.replicas.min


def wanted(service: Service, now: float) -> int:
    """How many should be on their way or ready now."""
    count = max(floor(service), int(service.wanted(now)))
    since = service.demand.waiting_since
    if since is not None and (not _any_ready(service) or now - since >= WAITING_LASTS):
        count = max(count, need(service))
    while not service.stopped and _lasted(service, count + 1, now):
        count += 1
    return min(count, service.spec.replicas.max)


def _any_ready(service: Service) -> bool:
    return any(r.phase is Phase.READY for r in service.replicas)


def kept(service: Service, now: float, at: float) -> int:
    """How many are still to be there at a point in time, as far as can be said now."""
    spec = service.spec
    count = max(floor(service), int(_in_use(service, now, at)))
    while count < min(spec.replicas.max, len(service.needs)):
        if at - service.needs[count].last >= spec.timeout:
            break
        count += 1
    return count


def _in_use(service: Service, now: float, at: float) -> bool:
    """Will it be? Whoever asked a moment ago asks again; what is idle for longer goes on so."""
    ready = [r.ready_at for r in service.replicas if r.ready_at is not None]
    if not ready or service.stopped:
        return False
    since = service.idle_since(max(ready))
    timeout = service.spec.timeout
    return since is None or at - since < timeout or now - since < timeout / 2


def going(service: Service) -> list[Replica]:
    """Those that are on their way or ready, and meant to stay."""
    return [
        r
        for r in service.replicas
        if r.drain is None and (r.phase in LAUNCHING or r.phase is Phase.READY)
    ]


# -- which will not last ---------------------------------------------------------------------


def changed(service: Service, replica: Replica) -> bool:
    """Was it started with parameters that are not those of now?"""
    return replica.start_hash != service.spec.start_hash()


def ending(service: Service, now: float) -> frozenset[str]:
    """Replicas whose time limit is so near that others have to take their place from now on.

    Only one at a time can be replaced: of several that end together the first is due earliest. No
    replica is replaced in the first half of its time, else short jobs would do nothing else.
    """
    limited = [r for r in going(service) if r.ends_at is not None and _has_served(r)]
    lead = _lead(service) if limited else 0.0
    if lead <= 0:
        return frozenset()
    found = set()
    done_by = float("inf")
    for replica in sorted(limited, key=lambda r: r.ends_at or 0.0, reverse=True):
        end = replica.ends_at or 0.0
        due = min(end, done_by) - lead
        done_by = due
        began = replica.running_at if replica.running_at is not None else replica.created_at
        if now >= max(due, (began + end) / 2):
            found.add(replica.id)
    return frozenset(found)


def _has_served(replica: Replica) -> bool:
    return replica.phase is Phase.READY or not replica.never_routable


def _lead(service: Service) -> float:
    """How long before its end a replica's successor is started, in seconds; 0: never."""
    if service.spec.renew_before is not None:
        return service.spec.renew_before
    took = durations(service.recent)
    usual = quantile(took, LEAD_SHARE) if took else 0.0
    return max(LEAST_LEAD, usual + LEAD_EXTRA)


def outdated(service: Service, now: float) -> frozenset[str]:
    """Replicas that others have to replace: their time ends, or they are of an older
    configuration.

    A service of one replica with a fixed port is changed over when nobody uses it: two at a time
    could not have that port.
    """
    old = set(ending(service, now))
    if service.spec.remote_port is None or service.spec.replicas.max > 1:
        present = service.spec.start_hash()
        old |= {r.id for r in going(service) if _has_served(r) and r.start_hash != present}
    return frozenset(old)


# -- how many to start -----------------------------------------------------------------------


def missing(service: Service, old: frozenset[str], now: float) -> int:
    """How many to start now: as many as are wanted beyond those that last, within all bounds.
    ``old`` are those that are outdated.

    At most ``max`` exist, and one more while one replaces another or is about to be gone.
    """
    meant = going(service)
    lasting = len(meant) - len(old)
    short = wanted(service, now) - lasting
    if lasting < kept_without(service, old, now):
        short = max(short, 1)
    most = service.spec.replicas.max
    room = min(most + bool(old) - len(meant), most + 1 - len(service.replicas))
    single = service.spec.remote_port is not None and most == 1
    if single and not old and any(r.drain is not Drain.ENDING for r in service.replicas):
        room = 0  # beside one whose time ends another port is taken
    return max(0, min(short, room, _queue_room(service), _hour_room(service, now)))


def kept_without(service: Service, old: frozenset[str], now: float) -> int:
    """How many are still to be there once the first outdated one is gone; 0 if none is outdated."""
    return kept(service, now, _replaced_from(service, old, now)) if old else 0


def _replaced_from(service: Service, old: frozenset[str], now: float) -> float:
    """The moment from which on the first of them is gone: now, if it could be at any time."""
    ends = [
        now if changed(service, r) or r.ends_at is None else r.ends_at
        for r in service.replicas
        if r.id in old
    ]
    return max(now, min(ends, default=now))


def guard(service: Service, now: float) -> Guard | None:
    """Say why nothing may be started, whatever is wanted, and will not be soon."""
    spec = service.spec
    if _hour_room(service, now) <= 0:
        last_hour = sorted(at for at in service.launches if now - at < HOUR)
        reason = f"{len(last_hour)} starts within the last hour (max_starts_per_hour)"
        return Guard(reason, last_hour[-spec.max_starts_per_hour] + HOUR)
    if _queue_room(service) <= 0 and not _soon_left(service, now):
        return Guard(f"{_queued(service)} of its jobs wait in the queue already (max_pending)")
    return None


def _hour_room(service: Service, now: float) -> int:
    lately = sum(now - at < HOUR for at in service.launches)
    return service.spec.max_starts_per_hour - lately


def _queue_room(service: Service) -> int:
    return service.spec.max_pending - _queued(service)


def _queued(service: Service) -> int:
    """Jobs that wait, or that nobody knows to have left the queue."""
    if service.spec.launcher is not LauncherKind.SLURM:
        return 0
    return sum(_in_queue(r) for r in service.replicas)


def _in_queue(replica: Replica) -> bool:
    if replica.phase in ENDING_PHASES:
        return replica.running_at is None and replica.never_routable
    return replica.phase in QUEUED


def _soon_left(service: Service, now: float) -> bool:
    """Is there room in a moment, as a job is just being cancelled, or will be as soon as its
    submission or its last lines are known? What takes long may never happen.
    """
    told = (
        r.stopping_since if r.stopping_since is not None or not _to_leave(r) else r.since
        for r in service.replicas
        if _in_queue(r)
    )
    return any(since is not None and now - since < LEAVES_WITHIN for since in told)


def _to_leave(replica: Replica) -> bool:
    return replica.drain is not None or replica.phase is Phase.FAILED
