"""The pure core against a model: gate, launcher, lost and late messages, restarts, crashes.

Hypothesis drives a Fleet together with a gate whose workers count, check and route in separate
steps, and a launcher whose work takes as long as it likes: what it starts may wait in a queue, run,
be reached, be queued again, and end at its time limit. What must hold is checked all along. In the
end everything works and only time passes: then as many replicas exist as the load needs, others
take over before a time limit, and without a load the fewest are left.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from slurmgate import events, observed, scaling, snapshot
from slurmgate.fleet import Effect, FetchLastWords, Fleet, LaunchReplica, Report, StopReplica
from slurmgate.model import (
    End,
    Fault,
    Health,
    LauncherKind,
    Phase,
    ReplicaBounds,
    ServiceSpec,
    Sighting,
)
from slurmgate.observed import ReplicaReport, ServiceReport
from slurmgate.transitions import start_by_admin, stop_by_admin

NAME = "S"
KIND = LauncherKind.SLURM
DIED = End("the service died")
CANCELLED = End("the job was cancelled", Fault.NOBODY)
TIMED_OUT = End("its time limit was reached", Fault.NOBODY)
NODES = ("n1", "n2")
TARGET = 2
HOUR = 3600.0
CALM = 12  # seconds without any change: longer than the timeout, and than scale_up_after
SPEC = ServiceSpec(
    name=NAME,
    route_name="s",
    api_paths=("/",),
    bash_file="serve.sh",
    check_health_path="/health",
    timeout=10.0,
    folder=Path("/x"),
    launcher=KIND,
    start_timeout=60.0,
    replace_after=30.0,
)


@dataclass
class Worker:
    """One nginx worker's request on its way: picked, then counted, then checked."""

    version: tuple[str, int]
    replica: str
    gen: int
    counted: bool = False


@dataclass
class Gate:
    """The shared dict of one nginx master, and what its workers are doing."""

    boot: str
    version: tuple[str, int] | None = None
    services: list[dict] = field(default_factory=list)
    in_flight: dict[str, int] = field(default_factory=dict)
    health: dict[str, Health] = field(default_factory=dict)
    waiting: int = 0
    requests: int = 0
    last_use: float | None = None
    workers: list[Worker] = field(default_factory=list)

    def routable(self) -> list[str]:
        return [
            replica["id"]
            for service in self.services
            if not service["retired"]
            for replica in service["replicas"]
            if replica["routable"]
        ]

    def shown(self) -> dict[str, dict]:
        return {r["id"]: r for service in self.services for r in service["replicas"]}

    def pick(self) -> Worker:
        assert self.version is not None
        replica = min(self.routable(), key=lambda r: self.in_flight.get(r, 0))
        return Worker(self.version, replica, self.shown()[replica]["gen"])

    def store(self, answer: dict) -> None:
        version = (answer["version"]["epoch"], answer["version"]["n"])
        if self.version is None or version > self.version:
            self.version, self.services = version, answer["services"]


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.ids = (f"r{n}" for n in itertools.count())
        self.epochs = (f"{n:04d}" for n in itertools.count(1))
        self.gates = (f"gate{n}" for n in itertools.count(1))
        self.spec = self.base = SPEC
        self.limit: float | None = None
        self.launches: list[float] = []
        self.bad_nodes: Counter[str] = Counter()
        self.todo: list[Effect] = []
        self.alive: dict[str, Sighting] = {}
        self.cancelled: set[str] = set()
        self.healthy: set[str] = set()
        self.reports: list[Report] = []
        self.answers: list[tuple[str, dict]] = []
        self.gate = Gate(next(self.gates))
        self.boot_backend()

    @initialize(
        least=st.integers(0, 1),
        most=st.integers(1, 3),
        max_in_flight=st.sampled_from([0, 1]),
        limit=st.sampled_from([None, 40.0, 300.0]),
        renew_before=st.sampled_from([0.0, 5.0, 20.0]),
        max_pending=st.integers(1, 3),
        max_starts=st.sampled_from([2, 1000]),
    )
    def service_is_configured(
        self,
        least: int,
        most: int,
        max_in_flight: int,
        limit: float | None,
        renew_before: float,
        max_pending: int,
        max_starts: int,
    ) -> None:
        self.limit = limit
        self.spec = self.base = replace(
            SPEC,
            replicas=ReplicaBounds(least, most, TARGET, max_in_flight),
            renew_before=renew_before,
            max_pending=max_pending,
            max_starts_per_hour=max_starts,
        )
        self.fleet.configure([self.spec])
        self.settle()

    # -- the backend -----------------------------------------------------------------------

    def boot_backend(self) -> None:
        self.epoch = next(self.epochs)
        self.fleet = Fleet(self.epoch, lambda: next(self.ids), self.now, enabled=True)
        self.fleet.configure([self.spec])
        self.launches = []
        self.heard: set[str] = set()
        self.todo = []
        for replica, running in list(self.alive.items()):
            if replica in self.cancelled:  # the launcher ends it and never speaks of it again
                self.vanish(replica)
            else:
                self.fleet.adopt(KIND, running, Path("/x"), self.now)
        self.settle()

    def settle(self) -> None:
        self.fleet.look_at_unsettled()
        given_up = any(r.phase is Phase.FAILED for r in self.service().replicas)
        effects = self.fleet.settle(self.now)
        for effect in effects:
            if isinstance(effect, LaunchReplica):
                assert not given_up, "a failure was not awaited"
                self.note_launch(effect)
            if isinstance(effect, StopReplica):
                self.cancelled.add(effect.replica)
                assert self.reach(effect.replica) == 0 or self.may_cut(effect.replica)
        self.todo += effects

    def note_launch(self, launch: LaunchReplica) -> None:
        self.launches.append(self.now)
        lately = sum(self.now - at < HOUR for at in self.launches)
        assert lately <= self.spec.max_starts_per_hour, "started too often"
        queued = sum(r.phase in scaling.QUEUED for r in self.service().replicas)
        # One that was queued again and is being cancelled is not waited for.
        waiting = sum(
            s.phase is Phase.PENDING and (s.gen == 1 or s.replica not in self.cancelled)
            for s in self.alive.values()
        )
        assert max(queued, waiting + 1) <= self.spec.max_pending, "too many in the queue"
        for node in launch.avoid:
            assert self.bad_nodes[node] > 1, "a node is avoided that did not fail several times"

    def service(self) -> observed.Service:
        return self.fleet.view().find(NAME)

    def may_cut(self, replica: str) -> bool:
        """Only an operator's deadline and a gate silent for long end a replica in use, or that the
        scheduler has stopped it for long.
        """
        found = self.service().replica(replica)
        silent = self.now - self.fleet.view().gate_seen
        by_admin = found is not None and found.drain is observed.Drain.ADMIN
        stopped_s = None if found is None else found.suspended_s
        suspended = stopped_s is not None and stopped_s >= self.spec.replace_after
        return by_admin or suspended or silent >= self.spec.timeout + 300

    def reach(self, replica: str) -> int:
        """Requests at the replica and such as nothing can keep from it any more."""
        return self.gate.in_flight.get(replica, 0) - sum(
            w.counted and w.replica == replica and w.version != self.gate.version
            for w in self.gate.workers
        )

    def event(self, fold) -> None:
        self.fleet.change(NAME, fold)
        self.settle()

    # -- rules: time and faults ------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 11.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.settle()
        self.time_limits_are_enforced()

    def time_limits_are_enforced(self) -> None:
        for replica, known in list(self.alive.items()):
            if known.ends_at is not None and known.ends_at <= self.now:
                self.end(replica, TIMED_OUT)

    @rule()
    def backend_is_killed(self) -> None:
        self.reports = []  # calls to it end with it
        self.boot_backend()

    @rule()
    def gate_is_killed(self) -> None:
        if self.gate.boot not in self.heard:  # its first call ends with it
            self.reports = [r for r in self.reports if r.gate != self.gate.boot]
        self.gate = Gate(next(self.gates))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), how=st.sampled_from([DIED, CANCELLED]))
    def replica_crashes(self, data: st.DataObject, how: End) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.alive))), how)

    @precondition(lambda self: any(s.node for s in self.alive.values()))
    @rule(data=st.data())
    def node_fails(self, data: st.DataObject) -> None:
        on_nodes = sorted(r for r, sighting in self.alive.items() if sighting.node)
        replica = data.draw(st.sampled_from(on_nodes))
        node = self.alive[replica].node
        assert node is not None
        self.end(replica, End("its node failed", Fault.NOBODY, bad_node=node))

    def end(self, replica: str, how: End) -> None:
        node = self.alive[replica].node
        if node is not None:  # any end there may be counted against it
            self.bad_nodes[node] += 1
        self.vanish(replica)
        self.event(lambda s: events.ended(s, replica, how, (), self.now))

    def vanish(self, replica: str) -> None:
        del self.alive[replica]
        self.fleet.ended(replica)
        self.cut(replica)

    def cut(self, replica: str) -> None:
        self.gate.in_flight.pop(replica, None)
        self.gate.workers = [w for w in self.gate.workers if w.replica != replica]

    # -- rules: clients and workers --------------------------------------------------------

    @rule()
    def request_comes(self) -> None:
        self.gate.requests += 1
        routable = self.gate.routable()
        if routable and self.gate.version is not None:
            self.gate.workers.append(self.gate.pick())
        else:
            self.gate.waiting += 1

    @precondition(lambda self: self.gate.waiting and self.gate.routable())
    @rule()
    def waiter_is_released(self) -> None:
        self.gate.waiting -= 1
        self.gate.workers.append(self.gate.pick())

    @precondition(lambda self: self.gate.waiting)
    @rule()
    def waiting_client_hangs_up(self) -> None:
        self.gate.waiting -= 1

    @precondition(lambda self: any(not w.counted for w in self.gate.workers))
    @rule()
    def worker_counts(self) -> None:
        worker = next(w for w in self.gate.workers if not w.counted)
        worker.counted = True
        in_flight = self.gate.in_flight
        in_flight[worker.replica] = in_flight.get(worker.replica, 0) + 1

    @precondition(lambda self: any(w.counted for w in self.gate.workers))
    @rule()
    def worker_checks_and_sends(self) -> None:
        worker = next(w for w in self.gate.workers if w.counted)
        self.gate.workers.remove(worker)
        if worker.version == self.gate.version and self.is_there(worker):
            if worker.replica in self.cancelled:
                assert self.may_cut(worker.replica), "a request reached a cancelled replica"
            return
        self.gate.in_flight[worker.replica] -= 1
        self.gate.waiting += 1

    def is_there(self, worker: Worker) -> bool:
        """Is somebody at the place it dials? Else it comes back unsent."""
        known = self.alive.get(worker.replica)
        return known is None or (known.endpoint is not None and known.gen == worker.gen)

    @precondition(lambda self: any(self.gate.in_flight.values()))
    @rule()
    def request_ends(self) -> None:
        busy = {w.replica for w in self.gate.workers if w.counted}
        for replica, count in self.gate.in_flight.items():
            if count > 0 and replica not in busy:
                self.gate.in_flight[replica] -= 1
                self.gate.last_use = self.now
                return

    # -- rules: the exchange ---------------------------------------------------------------

    def report(self) -> Report:
        gate = self.gate
        shown = gate.shown()
        return Report(
            gate=gate.boot,
            epoch=gate.version[0] if gate.version else None,
            number=gate.version[1] if gate.version else None,
            services={
                NAME: ServiceReport(
                    requests=gate.requests,
                    waiting=gate.waiting,
                    in_flight=sum(gate.in_flight.values()),
                    idle_s=None if gate.last_use is None else self.now - gate.last_use,
                )
            },
            replicas={
                r: ReplicaReport(
                    shown[r]["gen"],
                    gate.in_flight.get(r, 0),
                    Health.UP if r in self.healthy and r in self.alive else Health.UNKNOWN,
                )
                for r in shown
            },
        )

    @rule()
    def gate_reports(self) -> None:
        self.reports.append(self.report())

    @precondition(lambda self: self.reports)
    @rule(data=st.data(), lost=st.booleans())
    def report_arrives(self, data: st.DataObject, lost: bool) -> None:
        place = data.draw(st.integers(0, len(self.reports) - 1))
        report = self.reports.pop(place)
        if lost:
            return
        self.heard.add(report.gate)
        self.fleet.report(report, self.now)
        self.settle()
        view = self.fleet.view()
        if (report.epoch, report.number) != (view.epoch, view.number):
            self.answers.append((report.gate, view.wire(self.now)))

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), lost=st.booleans())
    def answer_arrives(self, data: st.DataObject, lost: bool) -> None:
        boot, answer = self.answers.pop(data.draw(st.integers(0, len(self.answers) - 1)))
        if not lost and boot == self.gate.boot:
            self.gate.store(answer)

    # -- rules: the launcher ---------------------------------------------------------------

    @precondition(lambda self: self.todo)
    @rule(data=st.data(), succeeds=st.booleans(), queued=st.booleans())
    def work_is_done(self, data: st.DataObject, succeeds: bool, queued: bool) -> None:
        effect = self.todo.pop(data.draw(st.integers(0, len(self.todo) - 1)))
        replica = effect.replica
        match effect:
            case LaunchReplica() if succeeds:
                running = Sighting(replica, NAME, effect.spec.start_hash(), Phase.PENDING, self.now)
                if not queued:
                    running = self.reached(running)
                self.alive[replica] = running
                self.event(lambda s: events.launched(s, running, self.now))
            case LaunchReplica():
                known = self.service().replica(replica)
                if known is not None:  # nothing was started
                    self.launches.remove(known.created_at)
                self.event(
                    lambda s: events.launch_failed(s, replica, "start-failed", "no", self.now)
                )
            case FetchLastWords():
                self.event(lambda s: events.last_words(s, replica, ("bye",), self.now))
                self.cancelled.add(replica)
                self.stop(replica)
            case StopReplica():
                self.stop(replica)

    def stop(self, replica: str) -> None:
        if replica in self.alive:
            self.end(replica, DIED)

    def reached(self, sighting: Sighting) -> Sighting:
        return replace(
            self.running(sighting), phase=Phase.STARTING, endpoint=f"127.0.0.1:{sighting.gen}"
        )

    def running(self, sighting: Sighting) -> Sighting:
        if sighting.running_at is not None:
            return replace(sighting, phase=Phase.RUNNING)
        return replace(
            sighting,
            phase=Phase.RUNNING,
            running_at=self.now,
            node=NODES[len(self.launches) % len(NODES)],
            ends_at=None if self.limit is None else self.now + self.limit,
        )

    def tell(self, sighting: Sighting) -> None:
        self.alive[sighting.replica] = sighting
        self.fleet.seen(KIND, sighting, Path("/x"), self.now)
        self.settle()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def job_goes_on(self, data: st.DataObject) -> None:
        known = self.alive[data.draw(st.sampled_from(sorted(self.alive)))]
        if known.phase is Phase.PENDING:
            self.tell(self.running(known))
        elif known.phase is Phase.RUNNING:
            self.tell(self.reached(known))
        else:
            self.tell(known)

    @precondition(lambda self: any(s.endpoint for s in self.alive.values()))
    @rule(data=st.data())
    def job_is_queued_again(self, data: st.DataObject) -> None:
        reached = sorted(r for r, sighting in self.alive.items() if sighting.endpoint)
        replica = data.draw(st.sampled_from(reached))
        known = self.alive[replica]
        self.healthy.discard(replica)
        self.cut(replica)
        fresh = replace(known, phase=Phase.PENDING, endpoint=None, gen=known.gen + 1)
        self.tell(replace(fresh, running_at=None, node=None, ends_at=None, suspended_s=None))

    @precondition(lambda self: any(s.node for s in self.alive.values()))
    @rule(data=st.data(), seconds=st.sampled_from([1.0, 31.0]))
    def job_is_suspended(self, data: st.DataObject, seconds: float) -> None:
        """A listing shows it so for the first time, or for so many seconds more."""
        running = sorted(r for r, sighting in self.alive.items() if sighting.node)
        known = self.alive[data.draw(st.sampled_from(running))]
        before = known.suspended_s
        self.tell(replace(known, suspended_s=0.0 if before is None else before + seconds))

    @precondition(lambda self: any(s.suspended_s is not None for s in self.alive.values()))
    @rule()
    def suspended_jobs_go_on(self) -> None:
        for known in list(self.alive.values()):
            self.tell(replace(known, suspended_s=None))

    @precondition(lambda self: set(self.alive) - self.healthy)
    @rule()
    def replica_becomes_healthy(self) -> None:
        self.healthy |= {r for r, sighting in self.alive.items() if sighting.endpoint}

    # -- rules: operators ------------------------------------------------------------------

    @rule(what=st.sampled_from(["start", "stop"]))
    def operator_acts(self, what: str) -> None:
        if what == "start":
            self.event(start_by_admin)
        else:
            self.event(lambda s: stop_by_admin(s, 60.0, self.now))

    @rule(script=st.sampled_from(["serve.sh", "other.sh"]))
    def configuration_changes(self, script: str) -> None:
        self.spec = replace(self.base, bash_file=script)
        self.fleet.configure([self.spec])
        self.settle()

    # -- what must hold --------------------------------------------------------------------

    @invariant()
    def never_more_than_allowed(self) -> None:
        service, most = self.service(), self.spec.replicas.max
        meant, old = scaling.going(service), scaling.outdated(service, self.now)
        unproven = any(r.adopted for r in meant)  # which of two serves is not known yet
        assert len(meant) <= most + (bool(old) or unproven)
        assert len(service.replicas) <= most + 1

    @invariant()
    def nobody_is_refused_for_jobs_that_are_just_leaving(self) -> None:
        service = self.service()
        refusal = snapshot.refusal(service, self.now)
        if refusal is not None and "max_pending" in refusal["reason"]:
            told = [r.stopping_since for r in service.replicas if r.stopping_since is not None]
            assert max(told, default=0.0) <= self.now - 30

    @invariant()
    def every_process_is_known(self) -> None:
        known = {r.id for r in self.service().replicas}
        assert set(self.alive) <= known

    @invariant()
    def counts_are_never_negative(self) -> None:
        assert all(count >= 0 for count in self.gate.in_flight.values())

    # -- left alone ------------------------------------------------------------------------

    def teardown(self) -> None:
        """From now on everything works. What the rules left behind is no excuse."""
        self.spec = replace(self.spec, max_starts_per_hour=1000)
        self.fleet.configure([self.spec])
        self.limit = None
        self.suspended_jobs_go_on()
        self.comes_to_rest_at(4)
        self.replaces_what_stays_suspended(4)
        self.renews_in_time(4, every=1)
        self.comes_to_rest_at(1)
        self.renews_in_time(1, every=5)
        self.comes_to_rest_at(0)

    def comes_to_rest_at(self, load: int) -> None:
        """So many requests all the time: exactly so many replicas as they need, and for good."""
        calm, before = 0, len(self.launches)
        for _ in range(600):
            self.benign_second(load)
            calm = calm + 1 if self.rests(load) else 0
            if calm == CALM:
                break
        assert calm == CALM, f"not at rest with {load}: {self.service()}"
        started = len(self.launches) - before
        assert started <= 2 * (self.spec.replicas.max + 1), "it went on starting replicas"

    def rests(self, load: int) -> bool:
        service, bounds = self.service(), self.spec.replicas
        per_replica = min(TARGET, bounds.max_in_flight or TARGET)
        least = 0 if service.stopped else bounds.min
        wanted = max(least, min(bounds.max, math.ceil(load / per_replica)))
        ready = [r for r in service.replicas if r.phase is Phase.READY]
        rest = len(ready) == len(service.replicas) == len(self.alive) == wanted
        return rest and not self.todo

    def replaces_what_stays_suspended(self, load: int) -> None:
        victim = min(self.alive)
        self.tell(replace(self.alive[victim], suspended_s=0.0))
        before = len(self.launches)
        for _ in range(3):
            self.benign_second(load)
            assert victim in self.alive
            assert victim not in self.gate.routable()
        assert len(self.launches) == before, "one was started, and it may go on at any time"
        self.tell(replace(self.alive[victim], suspended_s=self.spec.replace_after))
        self.comes_to_rest_at(load)
        assert victim not in self.alive

    def renews_in_time(self, load: int, every: int) -> None:
        """The time of all that serve ends: others serve before that, never fewer. The load is
        there in one of ``every`` seconds.
        """
        lead = self.spec.renew_before
        if not lead:
            return
        serving, before = len(self.alive), len(self.launches)
        end = self.now + lead * (serving + 0.5)
        old = set(self.alive)
        for known in list(self.alive.values()):
            self.tell(replace(known, running_at=2 * self.now - end - HOUR, ends_at=end))
        for second in itertools.count():
            if self.now >= end + CALM:
                break
            self.benign_second(0 if second % every else load)
            ready = sum(r.phase is Phase.READY for r in self.service().replicas)
            assert ready >= serving, f"fewer serve: {self.service()}"
        assert not old & set(self.alive)
        assert len(self.launches) - before == serving, "more were started than had to be replaced"

    def benign_second(self, load: int) -> None:
        self.now += 1.0
        self.settle()
        self.time_limits_are_enforced()
        for known in list(self.alive.values()):
            if known.endpoint is None:
                self.tell(self.reached(known))
        self.healthy |= set(self.alive)
        while self.todo:
            self.carry_out(self.todo.pop(0))
        self.spread(load)
        number = None
        while number != self.fleet.view().number:  # what a report changes, the next acknowledges
            number = self.fleet.view().number
            self.fleet.report(self.report(), self.now)
            self.settle()
            view = self.fleet.view()
            if self.gate.version != (view.epoch, view.number):
                self.gate.store(view.wire(self.now))

    def carry_out(self, effect: Effect) -> None:
        if isinstance(effect, StopReplica | FetchLastWords):
            self.stop(effect.replica)
        elif isinstance(effect, LaunchReplica):
            hash_, replica = effect.spec.start_hash(), effect.replica
            running = self.reached(Sighting(replica, NAME, hash_, Phase.PENDING, self.now))
            self.alive[replica] = running
            self.event(lambda s: events.launched(s, running, self.now))

    def spread(self, load: int) -> None:
        """So many requests, as many as may be in flight at the replicas of now."""
        gate, routable = self.gate, self.gate.routable()
        gate.workers = []
        most = self.spec.replicas.max_in_flight or load
        gate.in_flight = dict.fromkeys(routable, 0)
        for n in range(min(load, most * len(routable))):
            gate.in_flight[routable[n % len(routable)]] += 1
        gate.waiting = load - sum(gate.in_flight.values())
        gate.requests += load
        if load:
            gate.last_use = self.now


TestLife = pytest.mark.timeout(600)(Life.TestCase)  # a slow machine takes minutes
TestLife.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
