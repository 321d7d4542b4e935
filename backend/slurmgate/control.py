"""The control loop: one thread that owns the fleet, the state of all services and replicas.

Other threads hand it events and wait for the outcome, or read ``view``, an immutable picture it
publishes after every change. It never blocks on the world: launching, stopping and reading logs
happen on pool threads whose results come back as events.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from slurmgate import events, scaling, transitions
from slurmgate.errors import BackendAway, CannotStart, Disabled, SlurmgateError, StartRefused
from slurmgate.fleet import (
    Effect,
    FetchLastWords,
    Fleet,
    LaunchReplica,
    ReconnectReplica,
    Report,
    View,
)
from slurmgate.model import Config, End, LauncherKind, Phase, ServiceSpec, Sighting, Stranger
from slurmgate.observed import LAUNCHING, Refusal, Service
from slurmgate.ports import Clock, History, Launcher

log = logging.getLogger(__name__)

ANSWER_WITHIN = 5.0
BUSY_TICK = 0.1
REST_TICK = 1.0
GATE_WITHIN = 1.5
GATE_LOOK = 0.05
GATE_SILENT = 3.0
STOOD_STILL = 5.0
LOG_LINES = 20
POOL_THREADS = 32
ID_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"


def new_replica_id() -> str:
    """Make a short random id, free of look-alike characters."""
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(6))


class Control:
    """Owner of all state. Public methods may be called from any thread."""

    def __init__(
        self,
        launchers: Mapping[LauncherKind, Launcher],
        clock: Clock,
        epoch: str,
        history: History,
        *,
        enabled: bool,
    ) -> None:
        self._launchers = launchers
        self._clock = clock
        self._history = history
        self._fleet = Fleet(epoch, new_replica_id, clock(), enabled=enabled)
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pools = {
            kind: ThreadPoolExecutor(POOL_THREADS, thread_name_prefix=f"launcher-{kind.value}")
            for kind in launchers
        }
        self._folder = Path()
        self._thread = threading.Thread(target=self._loop, name="control", daemon=True)
        self._answers: list[Future[None]] = []
        self._reported = threading.Event()
        self._tick_every = BUSY_TICK
        self._ticked = self._turned = clock()
        self.view: View = self._fleet.view()

    # -- from any thread -------------------------------------------------------------------

    def start(self, config: Config) -> None:
        """Adopt what runs, take over the configuration and begin to decide. Call it once."""
        self._folder = config.path.parent
        self._fleet.remember(self._history.recent())
        self._fleet.configure(config.services)
        for kind, launcher in self._launchers.items():
            own = [spec for spec in config.services if spec.launcher is kind]
            found = launcher.adopt(own, _Ears(self, kind))
            for sighting in found.sightings:
                self._fleet.adopt(kind, sighting, self._folder, self._clock())
            self._fleet.unlisted(found.unlisted)
        self._turned = self._clock()
        self._turn(_nothing)
        self._thread.start()

    def configure(self, config: Config) -> None:
        """Take over a configuration; services that did not change keep their replicas."""
        self._ask(lambda: self._fleet.configure(config.services, self._clock()))

    def notify(self, report: Report) -> dict[str, Any] | None:
        """Take in a gate's report; give the snapshot when the gate's is another one.

        None too while it is not known yet what an earlier backend left: a gate keeps what it has.
        """
        self._ask(lambda: self._fleet.report(report, self._clock()))
        view = self.view
        if not view.settled:
            return None
        if report.epoch == view.epoch and report.number == view.number:
            return None
        return view.wire(self._clock())

    def start_service(self, name: str) -> None:
        """Start a service by name or route without a request to it.

        Disabled or CannotStart if nothing may be started; the wish stands in the latter case.
        """
        if not self.view.enabled:
            raise Disabled("service management is disabled; slurmgate enable switches it on")
        self._ask(lambda: self._fleet.change_configured(name, transitions.start_by_admin))
        service = self.view.find(name)
        guard = scaling.guard(service, self._clock())
        if guard is not None and not scaling.going(service):
            raise CannotStart(f"{service.spec.name} is not started yet: {guard.reason}")

    def stop_service(self, name: str) -> None:
        """Stop a service by name or route; requests in flight get a minute to end."""

        def stopped(service: Service) -> Service:
            return transitions.stop_by_admin(service, transitions.ADMIN_DRAIN, self._clock())

        self._ask(lambda: self._fleet.change_configured(name, stopped))

    def manage(self, *, enabled: bool, kill: bool = False) -> None:
        """Switch management of all services on or off; with ``kill`` end every replica too."""
        self._ask(lambda: self._fleet.manage(self._clock(), enabled=enabled, kill=kill))

    def last_lines(self, name: str, lines: int) -> tuple[str | None, list[str]]:
        """Give the newest replica of a service, by name or route, and what it printed last.

        Without a replica: the last lines of the last that ended by itself. May ask a host.
        """
        service = self.view.find(name)
        if service.replicas:
            newest = max(service.replicas, key=lambda replica: replica.created_at)
            return newest.id, list(self._log_tail(newest.id, lines))
        failure = service.failure
        kept = service.last_output if failure is None else failure.log
        return None, list(kept[-lines:] if lines > 0 else ())

    def strangers(self) -> tuple[Stranger, ...]:
        """Jobs of this instance that have another owner."""
        return tuple(s for launcher in self._launchers.values() for s in launcher.strangers())

    def take_over(self, owner: str) -> int:
        """Make the jobs of another owner ours; how many. Blocks while hosts are asked."""
        return sum(launcher.take_over(owner) for launcher in self._launchers.values())

    def hears_gate(self) -> bool:
        """Say whether a gate has reported a moment ago."""
        return self._clock() - self.view.gate_seen < GATE_SILENT

    def await_gate(self) -> bool:
        """Wait until the gate has the snapshot of now; False when it does not say so in time.

        For whoever has just changed something and wants the next request to see it. Blocks its
        thread for at most ``GATE_WITHIN`` seconds.
        """
        number, deadline = self.view.number, self._clock() + GATE_WITHIN
        while (self.view.gate_stored or 0) < number:
            if self._clock() >= deadline or not self.hears_gate():
                return False
            self._reported.wait(GATE_LOOK)
        return True

    def close(self, *, stop_replicas: Mapping[LauncherKind, bool], keep_ways: bool = True) -> None:
        """End the loop, then let every launcher end or leave its replicas as said.

        Without ``keep_ways`` nothing is left of the ways to those that go on.
        """
        self._events.put(None)
        self._thread.join(ANSWER_WITHIN)
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for kind, launcher in self._launchers.items():
            stop = stop_replicas.get(kind, False)
            launcher.close(stop_replicas=stop, keep_ways=keep_ways)

    def _ask(self, change: Callable[[], None]) -> None:
        """Have the control thread make a change; return once all that follows was decided."""
        done: Future[None] = Future()

        def event() -> None:
            try:
                change()
            except SlurmgateError as error:
                done.set_exception(error)
            else:
                self._answers.append(done)

        self._events.put(event)
        try:
            done.result(ANSWER_WITHIN)
        except TimeoutError as error:
            raise BackendAway("the control loop did not answer in time; try again") from error

    # -- the control thread ----------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=self._tick_every)
            except queue.Empty:
                event = _nothing
            if event is None:
                return
            self._turn(event)

    def _turn(self, event: Callable[[], None]) -> None:
        """Handle one event, decide, publish, start the work, and only then answer who asked."""
        self._answers = []
        self._notice_standstill()
        try:
            event()
            self._tick()
            self._notice_standstill()
            effects = self._fleet.settle(self._clock())
            self.view = self._fleet.view()
            self._reported.set()
            self._reported.clear()
            for effect in effects:
                self._submit(effect)
            for start in self._fleet.take_starts():
                self._history.add(start)
        except Exception:
            log.exception("the control loop met an error of its own; it goes on")
        for done in self._answers:
            done.set_result(None)

    def _notice_standstill(self) -> None:
        """Who was stopped, or waited for somebody to read its log, has heard no gate meanwhile."""
        began, self._turned = self._turned, self._clock()
        if self._turned - began > STOOD_STILL:
            log.warning("this backend stood still for %.0f s", self._turned - began)
            self._fleet.stood_still(self._turned - began, self._turned)

    def _tick(self) -> None:
        """Now and then look at what only time has changed."""
        now = self._clock()
        if now - self._ticked >= self._tick_every:
            self._ticked = now
            self._tick_every = BUSY_TICK if self._fleet.look_at_unsettled() else REST_TICK

    def hear(self, change: Callable[[], None]) -> None:
        """Queue what a launcher told (on one of its threads)."""
        self._events.put(change)

    def _seen(self, kind: LauncherKind, sighting: Sighting) -> None:
        self._fleet.seen(kind, sighting, self._folder, self._clock())

    def _ended(self, replica: str, end: End) -> None:
        self._fleet.ended(replica)
        service = self._fleet.owner_of(replica)
        found = service.replica(replica) if service is not None else None
        if service is None or found is None:
            return
        name, kind, phase = service.spec.name, service.spec.launcher, found.phase
        log.info("service %s replica %s: %s (was %s)", name, replica, end.reason, phase.value)

        def with_log() -> None:
            lines = self._log_tail(replica)
            self._change(name, lambda s, now: events.ended(s, replica, end, lines, now))

        def log_later() -> None:
            lines = self._log_tail(replica)
            self._change(name, lambda s, now: events.last_output(s, end.reason, lines))

        expected = found.drain is not None or phase is Phase.STOPPING
        if phase in LAUNCHING and found.never_routable and not expected:
            self._run(kind, with_log)
            return
        self._fleet.change(name, lambda s: events.ended(s, replica, end, (), self._clock()))
        if not expected and phase is not Phase.FAILED:
            self._run(kind, log_later)

    def _hopeless(self, replica: str, refusal: Refusal) -> None:
        service = self._fleet.owner_of(replica)
        if service is not None:
            name = service.spec.name
            self._fleet.change(name, lambda s: events.hopeless(s, replica, refusal))

    def _listed(self, services: frozenset[str]) -> None:
        for name in services:
            self._fleet.change(name, events.listed)

    # -- pool threads ----------------------------------------------------------------------

    def _submit(self, effect: Effect) -> None:
        spec, replica = effect.spec, effect.replica
        match effect:
            case LaunchReplica(avoid=avoid):
                self._run(spec.launcher, lambda: self._launch(spec, replica, avoid))
            case FetchLastWords():
                self._run(spec.launcher, lambda: self._last_words(spec, replica))
            case ReconnectReplica():
                self._run(spec.launcher, lambda: self._reconnect(spec, replica))
            case _:
                self._run(spec.launcher, lambda: self._stop(replica))

    def _run(self, kind: LauncherKind, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception:
                log.exception("work on a replica failed; what is due is decided again")

        try:
            self._pools[kind].submit(guarded)
        except RuntimeError:
            log.info("shutting down: no more work is begun")

    def _launch(self, spec: ServiceSpec, replica: str, avoid: tuple[str, ...]) -> None:
        try:
            sighting = self._launchers[spec.launcher].launch(spec, replica, avoid)
        except (StartRefused, CannotStart) as error:
            self._launch_failed(spec, replica, error.reason, str(error))
        except Exception as error:
            log.exception("service %s replica %s: launching broke", spec.name, replica)
            self._stop(replica)
            self._launch_failed(spec, replica, StartRefused.reason, f"internal error: {error!r}")
        else:
            self._change(spec.name, lambda s, now: events.launched(s, sighting, now))

    def _launch_failed(self, spec: ServiceSpec, replica: str, code: str, why: str) -> None:
        self._change(spec.name, lambda s, now: events.launch_failed(s, replica, code, why, now))

    def _stop(self, replica: str) -> None:
        """Have whoever runs it end it: its service may have another launcher by now."""
        for launcher in self._launchers.values():
            launcher.stop(replica)

    def _reconnect(self, spec: ServiceSpec, replica: str) -> None:
        self._launchers[spec.launcher].reconnect(replica)

    def _last_words(self, spec: ServiceSpec, replica: str) -> None:
        lines = self._log_tail(replica)
        told = (launcher.explain(replica) for launcher in self._launchers.values())
        hint = next((text for text in told if text is not None), None)
        self._change(spec.name, lambda s, now: events.last_words(s, replica, lines, now, hint))
        self._stop(replica)

    def _log_tail(self, replica: str, lines: int = LOG_LINES) -> tuple[str, ...]:
        tails = (launcher.log_tail(replica, lines) for launcher in self._launchers.values())
        return tuple(next((tail for tail in tails if tail), ()))

    def _change(self, name: str, fold: Callable[[Service, float], Service]) -> None:
        """Queue a change of one service."""
        self._events.put(
            lambda: self._fleet.change(name, lambda service: fold(service, self._clock()))
        )


class _Ears:
    """Hears what one launcher tells of its replicas, and queues it for the control thread."""

    def __init__(self, control: Control, kind: LauncherKind) -> None:
        self._control = control
        self._kind = kind

    def seen(self, sighting: Sighting) -> None:
        self._control.hear(lambda: self._control._seen(self._kind, sighting))

    def ended(self, replica: str, end: End) -> None:
        self._control.hear(lambda: self._control._ended(replica, end))

    def hopeless(self, replica: str, reason: str, code: str = "cannot-start") -> None:
        self._control.hear(lambda: self._control._hopeless(replica, Refusal(code, reason)))

    def listed(self, services: frozenset[str]) -> None:
        self._control.hear(lambda: self._control._listed(services))


def _nothing() -> None:
    """The event of a turn in which only time has passed."""
