"""All services together: takes events in, decides, numbers the snapshots. Pure but for its log.

Not thread-safe: the control loop owns the one Fleet of a backend and calls it from its thread
only. No method does I/O or reads a clock; what is to be done outside comes back as effects.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slurmgate import actions, events, lifecycle, nodes, scaling, snapshot, transitions
from slurmgate.errors import UnknownService
from slurmgate.model import LauncherKind, Phase, ServiceSpec, Sighting
from slurmgate.observed import (
    ReplicaReport,
    Service,
    ServiceReport,
    Start,
    recorded,
    with_replica,
)

log = logging.getLogger(__name__)

MAX_STEPS = 8
REMEMBERED_ENDS = 1000
LISTING_PATIENCE = 10.0
LOOKED_AT = 10
LOOK_IN = 10


@dataclass(frozen=True, slots=True)
class Report:
    """One notify call of a gate. ``epoch`` and ``number`` name the snapshot it had stored."""

    gate: str
    epoch: str | None
    number: int | None
    services: Mapping[str, ServiceReport]
    replicas: Mapping[str, ReplicaReport]


@dataclass(frozen=True, slots=True)
class View:
    """What all other threads may read: every service as it stands after the last change."""

    epoch: str
    number: int
    services: tuple[Service, ...]
    enabled: bool
    gate_seen: float
    gate_stored: int | None
    settled: bool = True
    gate: str | None = None

    def find(self, name: str) -> Service:
        """Find a configured service by name, else by route; raise UnknownService."""
        return self._first(name, lambda spec: spec.name, lambda spec: spec.route_name)

    def routed(self, route: str) -> Service:
        """Find a configured service by route, else by name; raise UnknownService."""
        return self._first(route, lambda spec: spec.route_name, lambda spec: spec.name)

    def _first(self, word: str, *called: Callable[[ServiceSpec], str]) -> Service:
        for call in called:
            for service in self.services:
                if not service.retired and call(service.spec) == word:
                    return service
        raise UnknownService(f"no service is called {word!r}; GET /info lists them")

    def wire(self, now: float) -> dict[str, Any]:
        """The whole snapshot as the gate gets it."""
        return {
            "version": {"epoch": self.epoch, "n": self.number},
            "services": [snapshot.wire(service, now) for service in self.services],
        }


@dataclass(frozen=True, slots=True)
class LaunchReplica:
    """To be done outside: start this replica, not on the nodes to ``avoid``."""

    spec: ServiceSpec
    replica: str
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StopReplica:
    """To be done outside: end this replica."""

    spec: ServiceSpec
    replica: str


@dataclass(frozen=True, slots=True)
class FetchLastWords:
    """To be done outside: read the last lines of its log, then report them."""

    spec: ServiceSpec
    replica: str


@dataclass(frozen=True, slots=True)
class ReconnectReplica:
    """To be done outside: make the way to this replica anew."""

    spec: ServiceSpec
    replica: str


Effect = LaunchReplica | StopReplica | FetchLastWords | ReconnectReplica


class Fleet:
    """Every service, the number of the newest snapshot, and which gate reports."""

    def __init__(self, epoch: str, new_id: Callable[[], str], now: float, *, enabled: bool) -> None:
        self._epoch = epoch
        self._new_id = new_id
        self._enabled = enabled
        self._services: dict[str, Service] = {}
        self._dirty: set[str] = set()
        self._turn = 0
        self._essences: dict[str, dict[str, Any]] = {}
        self._effects: list[Effect] = []
        self._starts: list[Start] = []
        self._earlier: dict[str, list[Start]] = {}
        self._on_record: set[str] = set()
        self._number = 0
        self._gate: str | None = None
        self._former_gates: set[str] = set()
        self._gate_seen = now
        self._gate_stored: int | None = None
        self._before_gate: dict[str, int] = {}
        self._ended: deque[str] = deque(maxlen=REMEMBERED_ENDS)
        self._began = now
        self._settled = False

    def view(self) -> View:
        """An immutable picture of everything."""
        return View(
            self._epoch,
            self._number,
            tuple(self._services.values()),
            self._enabled,
            self._gate_seen,
            self._gate_stored,
            self._settled,
            self._gate,
        )

    # -- deciding --------------------------------------------------------------------------

    def look_at_unsettled(self) -> int:
        """Have the next ``settle`` look at all services in which time alone changes something.

        Of many that only serve, or wait for nobody, it looks at a tenth in turn. Gives how many of
        either kind there are.
        """
        unsettled = [s for s in enumerate(self._services.values()) if _unsettled(s[1])]
        few = sum(_steady(service) for _, service in unsettled) <= LOOKED_AT
        self._turn = (self._turn + 1) % LOOK_IN
        for place, service in unsettled:
            if few or place % LOOK_IN == self._turn or not _steady(service):
                self._dirty.add(service.spec.name)
        return len(unsettled)

    def settle(self, now: float) -> list[Effect]:
        """Decide for every service that changed and number the snapshot; what is to be done."""
        if not self._settled:
            self._settled = now - self._began >= LISTING_PATIENCE or not any(
                service.unlisted for service in self._services.values()
            )
        changed = False
        dirty, self._dirty = self._dirty, set()
        for name in dirty & self._services.keys():
            for _ in range(MAX_STEPS):
                decided = lifecycle.decide(self._services[name], self._gate_seen, now)
                for action in decided:
                    self._act(name, action, now)
                if not decided:
                    break
            changed = self._note(name, now) or changed
        if changed:
            self._publish()
        effects, self._effects = self._effects, []
        return effects

    def _act(self, name: str, action: actions.Action, now: float) -> None:
        service = self._services[name]
        if isinstance(action, actions.Launch):
            replica = self._new_id()
            self._services[name] = transitions.launching(service, replica, now)
            log.info("service %s replica %s: starting", name, replica)
            avoid = nodes.avoided(service, now)
            self._effects.append(LaunchReplica(service.spec, replica, avoid))
            return
        self._services[name] = changed = transitions.apply(service, action, now)
        _log_action(service, action, now)
        _log_change(service, changed)
        self._starts += _new_starts(service, changed)
        if isinstance(action, actions.Stop):
            self._effects.append(StopReplica(service.spec, action.replica))
        elif isinstance(action, actions.GiveUp):
            self._effects.append(FetchLastWords(service.spec, action.replica))
        elif isinstance(action, actions.Reconnect):
            self._effects.append(ReconnectReplica(service.spec, action.replica))

    def _note(self, name: str, now: float) -> bool:
        """Did anything change that the gate must know?"""
        service = self._services[name]
        if service.retired and not service.replicas:
            del self._services[name]
            self._before_gate.pop(name, None)
            return self._essences.pop(name, None) is not None
        essence = snapshot.essence(service, now)
        if self._essences.get(name) == essence:
            return False
        self._essences[name] = essence
        return True

    def _publish(self) -> None:
        self._number += 1
        for name, service in self._services.items():
            if service.replicas:
                published = tuple(events.published(r, self._number) for r in service.replicas)
                self._services[name] = replace(service, replicas=published)

    # -- events ----------------------------------------------------------------------------

    def _set(self, name: str, service: Service) -> None:
        before = self._services.get(name)
        _log_change(before, service)
        if before is not None:
            self._starts += _new_starts(before, service)
        self._services[name] = service
        self._dirty.add(name)

    def change(self, name: str, fold: Callable[[Service], Service]) -> None:
        """Change one service by name, if there (still) is one."""
        service = self._services.get(name)
        if service is not None:
            self._set(name, fold(service))

    def change_configured(self, name: str, fold: Callable[[Service], Service]) -> None:
        """Change one service by name or route; raise UnknownService."""
        self.change(self.view().find(name).spec.name, fold)

    def owner_of(self, replica: str) -> Service | None:
        """Find the service a replica belongs to."""
        services = self._services.values()
        return next((s for s in services if s.replica(replica) is not None), None)

    def configure(self, specs: Iterable[ServiceSpec], since: float = float("-inf")) -> None:
        """Take over a configuration: what did not change is left alone, what is gone retires.

        Leases granted before ``since`` are not for the services that are new in it.
        """
        before, self._services = self._services, {}
        for spec in specs:
            known = before.pop(spec.name, None)
            if known is None:
                fresh = Service(spec, enabled=self._enabled, lease_void_before=since)
                self._set(spec.name, self._with_earlier(fresh))
                continue
            self._services[spec.name] = known
            if known.spec != spec or known.retired:
                self._set(spec.name, events.configured(known, spec))
        for name, service in before.items():
            self._services[name] = service
            if not service.retired:
                self._set(name, events.retired(service))

    def remember(self, starts: Iterable[Start]) -> None:
        """Take over what became of earlier starts, before anything is configured."""
        for start in starts:
            self._earlier.setdefault(start.service, []).append(start)
            self._on_record.add(start.replica)

    def _with_earlier(self, service: Service) -> Service:
        """Give a service that is new here what is known of its earlier starts."""
        for start in self._earlier.pop(service.spec.name, ()):
            service = recorded(service, start)
        ran = (s for s in service.recent if s.job_id is not None)  # the others left nothing
        began = (s.ended - (s.queue_s or 0.0) - (s.start_s or 0.0) for s in ran)
        return replace(service, launches=tuple(began))

    def take_starts(self) -> list[Start]:
        """Give the starts that have come to their end since the last call."""
        starts, self._starts = self._starts, []
        return starts

    def manage(self, now: float, *, enabled: bool, kill: bool) -> None:
        """Switch management of all services on or off; with ``kill`` end every replica too."""
        self._enabled = enabled
        for name, service in list(self._services.items()):
            changed = replace(service, enabled=enabled)
            if enabled:
                changed = replace(changed, stopped=False)
            else:
                changed = replace(changed, start_lease=False)
            if kill:
                changed = transitions.stop_by_admin(changed, 0.0, now)
            self._set(name, changed)

    def seen(self, kind: LauncherKind, sighting: Sighting, folder: Path, now: float) -> None:
        """A launcher tells how a replica does; one that nobody knows is taken over."""
        owner = self.owner_of(sighting.replica)
        if owner is not None:
            self.change(owner.spec.name, lambda s: events.seen(s, sighting, now))
        elif sighting.replica not in self._ended:
            self.adopt(kind, sighting, folder, now)

    def ended(self, replica: str) -> None:
        """Note that a replica has ended: what is still told of it comes too late."""
        self._ended.append(replica)

    def unlisted(self, names: Iterable[str]) -> None:
        """Nobody can say of these services what runs. It matters of those that have replicas."""
        for name in names:
            service = self._services.get(name)
            if service is not None and service.replicas:
                self._set(name, replace(service, unlisted=True))

    def adopt(self, kind: LauncherKind, sighting: Sighting, folder: Path, now: float) -> None:
        """Take over a replica that an earlier backend started, whatever is configured now."""
        name = sighting.service
        if name not in self._services:
            spec = ServiceSpec(name, "", (), "", "/", 60.0, folder, launcher=kind)
            self._services[name] = Service(spec, retired=True)
        known = sighting.replica in self._on_record
        self._set(name, events.adopted(self._services[name], sighting, now, on_record=known))
        where = sighting.endpoint or sighting.phase.value
        log.info("service %s replica %s: adopted, %s", name, sighting.replica, where)

    def report(self, report: Report, now: float) -> None:
        """Take in what a gate says; a gate that another one has followed is not heard."""
        if report.gate != self._gate and not self._gate_takes_over(report.gate):
            return
        self._gate_seen = now
        stored = report.number if report.epoch == self._epoch else None
        self._gate_stored = stored
        for name, service in list(self._services.items()):
            told = report.services.get(name)
            changed = service
            if told is not None:
                total = self._before_gate.get(name, 0) + told.requests
                changed = events.reported(changed, replace(told, requests=total), now)
            for replica in service.replicas:
                seen = report.replicas.get(replica.id)
                if seen is not None:
                    heard = events.replica_reported(replica, seen, stored, now)
                    changed = with_replica(changed, heard)
            if changed != service:  # of hundreds most are told of without news
                self._set(name, changed)

    def stood_still(self, seconds: float, now: float) -> None:
        """For so long nobody could have been heard: it is no silence of the gate's."""
        self._gate_seen = min(now, self._gate_seen + seconds)

    def _gate_takes_over(self, gate: str) -> bool:
        """Another gate reports: counts of the former end with it, and it is never heard again."""
        if gate in self._former_gates:
            return False
        if self._gate is not None:
            self._former_gates.add(self._gate)
            log.info("gate restarted: its counts begin anew")
            for name, service in self._services.items():
                self._before_gate[name] = service.demand.requests
                self._set(name, events.gate_changed(service))
        self._gate = gate
        return True


def _unsettled(service: Service) -> bool:
    """Can time alone change what is to be done about it?"""
    return bool(
        service.replicas
        or service.demand.waiting
        or service.start_lease
        or service.failure is not None
        or service.retired
        or service.demand.lease_until is not None
        or scaling.floor(service)
        or len(service.launches) >= service.spec.max_starts_per_hour
    )


def _steady(service: Service) -> bool:
    """Does it serve, or rest, so that a look now and then is enough?"""
    return not (
        service.demand.waiting
        or service.failure is not None
        or service.retired
        or service.unlisted
        or any(r.phase is not Phase.READY for r in service.replicas)
    )


def _new_starts(before: Service, after: Service) -> list[Start]:
    if after.recent is before.recent:
        return []
    known = {start.replica for start in before.recent}
    return [start for start in after.recent if start.replica not in known]


def _log_change(before: Service | None, after: Service) -> None:
    """Say what became of a start or of a replica that ended by itself, with its last lines."""
    name, failure = after.spec.name, after.failure
    if failure is not None and (before is None or before.failure is not failure):
        wait, tail = failure.retry_at - failure.at, _indented(failure.log)
        log.warning(
            "service %s: start failed: %s; next try in %g s%s", name, failure.reason, wait, tail
        )
    if after.last_output and (before is None or before.last_output is not after.last_output):
        tail = _indented(after.last_output)
        log.info("service %s: %s; its last lines:%s", name, after.last_end, tail)


def _indented(lines: Iterable[str]) -> str:
    return "".join(f"\n    {line}" for line in lines)


def _log_action(service: Service, action: actions.Action, now: float) -> None:
    name = service.spec.name
    match action:
        case actions.MarkReady(replica=r):
            found = service.replica(r)
            took = now - found.created_at if found is not None else 0.0
            log.info("service %s replica %s: ready, %.1f s after its start", name, r, took)
        case actions.Close(replica=r, why=why):
            log.info("service %s replica %s: draining: %s", name, r, why)
        case actions.Reopen(replica=r):
            log.info("service %s replica %s: ready again, demand came while draining", name, r)
        case actions.Stop(replica=r, reason=why) | actions.GiveUp(replica=r, reason=why):
            log.info("service %s replica %s: stopping: %s", name, r, why)
        case actions.Reconnect(replica=r):
            log.info("service %s replica %s: does not answer: opening its tunnel anew", name, r)
        case _:
            pass
