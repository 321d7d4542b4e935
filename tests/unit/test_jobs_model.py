"""The jobs of a login host against a model of Slurm, SSH and a backend that dies at any point.

Hypothesis lets submissions get lost, be late, arrive without an answer; listings fail, come late
and show what was true when they were begun; jobs run, end, are requeued and forgotten. What must
hold is checked all along, and at the end everything is left alone until nothing is in doubt.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slurmgate.launchers import jobs, posts
from slurmgate.launchers.job import (
    LIVE,
    Answer,
    Cancel,
    Connect,
    Disconnect,
    Effect,
    FindNode,
    Finish,
    Inquire,
    Job,
    Row,
    Stage,
    Standing,
    Submit,
    age_of,
)
from slurmgate.launchers.posts import Moment, Post
from slurmgate.launchers.roster import Change, Roster
from slurmgate.launchers.slurm_format import JobName
from slurmgate.model import End, Fault, Phase, ServiceSpec
from slurmgate.records import Record

SPEC = ServiceSpec(
    name="S",
    route_name="s",
    api_paths=("/",),
    bash_file="serve.sh",
    check_health_path="/health",
    timeout=10.0,
    folder=Path("/x"),
)
REMOTE_LIMIT = 30.0  # no sbatch lives longer
SUBMISSION_MAX = 33.0  # nor is one waited for
THAW = 1.5  # how long after it woke up slurmctld may still take in what came while it slept
WALL = 1_700_000_000.0


@dataclass
class SlurmJob:
    """A job as slurmctld has it."""

    id: str
    replica: str
    standing: Standing = Standing.QUEUED
    node: str | None = None
    began: float | None = None
    known: bool = True
    unlaunched: bool = False

    @property
    def live(self) -> bool:
        return self.standing in LIVE

    def row(self) -> Row:
        end = End(f"job {self.id} ended") if self.standing is Standing.ENDED else None
        reason = "launch failed requeued held" if self.unlaunched else None
        return Row(
            self.id,
            self.standing,
            end=end,
            node=self.node,
            reason=reason,
            not_launched=self.unlaunched,
            began=self.began,
        )


@dataclass
class Submission:
    """One sbatch, from when it was sent until nobody can hear of it any more."""

    replica: str
    epoch: int
    sent: float
    job_id: str | None = None
    over: bool = False  # it will create no job any more
    stuck: bool = False  # slurmctld has it and sleeps
    answered: bool = False


@dataclass
class Look:
    """A listing under way; it shows what is true at some moment before it is there."""

    began: float
    rows: dict[str, list[Row]]


@dataclass
class Inquiry:
    """A question about one job under way."""

    replica: str
    job_id: str
    began: float


@dataclass
class Backend:
    """What dies with the backend."""

    epoch: int
    roster: Roster = field(default_factory=Roster)
    posts: dict[str, Post] = field(default_factory=dict)
    todo: list[tuple[str, Effect]] = field(default_factory=list)
    look: Look | None = None
    inquiries: list[Inquiry] = field(default_factory=list)


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.ids = itertools.count(100)
        self.names = (f"r{n}" for n in itertools.count())
        self.epochs = itertools.count()
        self.slurm: dict[str, SlurmJob] = {}
        self.submissions: list[Submission] = []
        self.disk: dict[str, Record] = {}
        self.launched: set[str] = set()
        self.wanted: set[str] = set()
        self.ended: set[str] = set()
        self.frozen = False
        self.thawed_at = 0.0
        self.backend = Backend(next(self.epochs))

    @initialize()
    def first_replica(self) -> None:
        self.service_is_launched()

    # -- helpers ---------------------------------------------------------------------------

    def moment(self) -> Moment:
        return Moment(self.now, WALL + self.now)

    def live_jobs(self, replica: str) -> list[SlurmJob]:
        return [job for job in self.slurm.values() if job.replica == replica and job.live]

    def pending(self, replica: str) -> list[Submission]:
        return [s for s in self.submissions if s.replica == replica and not s.over]

    def fold(self, replica: str, change) -> None:
        done = self.backend.roster.fold(replica, change, self.now)
        if done is not None:
            self.follow(done)

    def follow(self, change: Change) -> None:
        """As the site does: save, then act."""
        replica = change.after.replica
        backend = self.backend
        if change.end is not None:
            self.check_end(change)
            self.ended.add(replica)
            del self.disk[replica], backend.posts[replica]
        else:
            post = backend.posts[replica]
            post.record = posts.updated(post, change.after)
            self.disk[replica] = post.record
        for effect in change.effects:
            if isinstance(effect, Inquire):
                backend.inquiries.append(Inquiry(replica, effect.job_id, self.now))
            elif not isinstance(effect, Finish | Disconnect):
                backend.todo.append((replica, effect))

    def check_end(self, change: Change) -> None:
        job = change.after
        assert job.replica not in self.ended, "ended twice"
        if job.job_id is not None:
            found = self.slurm.get(job.job_id)
            assert found is None or not found.live, "declared gone while it lives"
        else:
            assert not self.live_jobs(job.replica), "declared never submitted while it lives"
            assert not self.pending(job.replica), "declared never submitted while on its way"

    # -- time ------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.5, 6.0, 35.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for submission in self.submissions:
            late = self.now - submission.sent > REMOTE_LIMIT
            if late and not submission.stuck:
                submission.over = True
            if submission.stuck and not self.frozen and self.now - self.thawed_at > THAW:
                submission.over = True

    # -- the core --------------------------------------------------------------------------

    @precondition(lambda self: len(self.backend.roster) < 2)
    @rule()
    def service_is_launched(self) -> None:
        replica = next(self.names)
        name = JobName("lab", "me", replica, 20001, SPEC.start_hash(), "s")
        post = posts.new(SPEC, name, "boot", self.moment())
        self.disk[replica] = post.record
        self.backend.posts[replica] = post
        self.backend.roster.add(Job(replica, Stage.SENDING, waiting_since=self.now))
        self.launched.add(replica)
        self.wanted.add(replica)
        self.send(replica)

    def send(self, replica: str) -> None:
        post = self.backend.posts[replica]
        post.record = posts.submitting(post.record, WALL + self.now)
        self.disk[replica] = post.record
        self.submissions.append(Submission(replica, self.backend.epoch, self.now))

    @precondition(lambda self: self.backend.posts)
    @rule(data=st.data())
    def service_is_stopped(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(sorted(self.backend.posts)))
        self.wanted.discard(replica)
        self.fold(replica, lambda job: jobs.stopped(job, self.now))

    @rule()
    def backend_is_killed(self) -> None:
        self.backend = Backend(next(self.epochs))
        for replica, record in self.disk.items():
            post = posts.recorded(record, SPEC, self.moment())
            assert post is not None
            self.backend.posts[replica] = post
            self.backend.roster.add(posts.job_of(post, self.moment(), SUBMISSION_MAX))

    # -- submissions -----------------------------------------------------------------------

    def open_submissions(self) -> list[Submission]:
        return [s for s in self.submissions if not s.over]

    @precondition(lambda self: self.open_submissions())
    @rule(data=st.data())
    def submission_arrives(self, data: st.DataObject) -> None:
        submission = data.draw(st.sampled_from(self.open_submissions()))
        if self.frozen:
            submission.stuck = True
        else:
            self.create(submission)

    def create(self, submission: Submission) -> None:
        job_id = str(next(self.ids))
        self.slurm[job_id] = SlurmJob(job_id, submission.replica)
        submission.job_id = job_id
        submission.over = True

    @precondition(lambda self: self.open_submissions())
    @rule(data=st.data())
    def submission_is_lost(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.open_submissions())).over = True

    def unanswered(self) -> list[Submission]:
        mine = self.backend.epoch
        return [s for s in self.submissions if s.epoch == mine and not s.answered]

    @precondition(lambda self: self.unanswered())
    @rule(data=st.data(), lost=st.booleans())
    def submission_is_answered(self, data: st.DataObject, lost: bool) -> None:
        submission = data.draw(st.sampled_from(self.unanswered()))
        submission.answered = True
        job_id, replica = submission.job_id, submission.replica
        if job_id is not None and not lost:
            self.fold(replica, lambda job: jobs.accepted(job, job_id, self.now))
        elif submission.stuck or submission.over:  # sbatch itself said that it failed
            self.fold(replica, lambda job: jobs.unanswered(job, self.now, "?", refused=True))
        else:  # the connection broke
            overdue = submission.sent + SUBMISSION_MAX
            self.fold(replica, lambda job: jobs.unanswered(job, overdue, "?"))

    # -- what is done about it -------------------------------------------------------------

    @precondition(lambda self: self.backend.todo)
    @rule(data=st.data(), works=st.booleans())
    def effect_is_carried_out(self, data: st.DataObject, works: bool) -> None:
        place = data.draw(st.integers(0, len(self.backend.todo) - 1))
        self.carry_out(*self.backend.todo.pop(place), works=works and not self.frozen)

    def carry_out(self, replica: str, effect: Effect, *, works: bool) -> None:
        if isinstance(effect, Cancel):
            if works:
                self.cancel(replica, effect.job_id)
        elif isinstance(effect, Submit):
            self.resubmit(replica, works)
        elif isinstance(effect, FindNode):
            node = "n1" if works else None
            self.fold(replica, lambda job: jobs.node_found(job, effect.job_id, node, self.now))
        elif isinstance(effect, Connect) and works:
            endpoint = f"unix:{replica}.{effect.gen}"
            self.fold(replica, lambda job: jobs.connected(job, effect.gen, endpoint))

    def cancel(self, replica: str, job_id: str) -> None:
        job = self.slurm.get(job_id)
        if job is not None and job.live:
            assert job.replica == replica, "a job of another replica was cancelled"
            job.standing = Standing.ENDED

    def resubmit(self, replica: str, works: bool) -> None:
        if replica not in self.backend.posts:
            return
        live = self.live_jobs(replica)
        assert not live, "submitted again while a job lives"
        assert not self.pending(replica), "submitted again while a submission is on its way"
        if works:
            self.send(replica)
        else:
            self.fold(replica, lambda job: jobs.unsent(job, self.now, "away"))

    # -- listings and questions ------------------------------------------------------------

    def rows(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for job in self.slurm.values():
            if job.known:
                found.setdefault(job.replica, []).append(job.row())
        return found

    @precondition(lambda self: self.backend.look is None and not self.frozen)
    @rule()
    def listing_begins(self) -> None:
        self.backend.look = Look(self.now, self.rows())

    @precondition(lambda self: self.backend.look is not None)
    @rule(how=st.sampled_from(["old", "new", "unknown words", "failed"]))
    def listing_comes(self, how: str) -> None:
        look, self.backend.look = self.backend.look, None
        assert look is not None
        if how == "failed" or (how == "new" and self.frozen):
            return
        rows = self.rows() if how == "new" else look.rows
        if how == "unknown words":
            rows = {
                r: [Row(x.job_id, Standing.UNKNOWN) for x in found] for r, found in rows.items()
            }
        self.take_in(rows, look.began)

    def take_in(self, rows: dict[str, list[Row]], began: float) -> None:
        before = len(self.backend.todo)
        outcome = self.backend.roster.listing(rows, began, self.now)
        for change in outcome.changes:
            self.follow(change)
        for replica, cancels in outcome.leftovers.items():
            self.backend.todo += [(replica, cancel) for cancel in cancels]
        for replica, found in outcome.strays.items():
            assert replica in self.ended, "a job of ours was taken for nobody's"
            self.backend.todo += [(replica, Cancel(row.job_id)) for row in found]
        self.check_cancels(rows, self.backend.todo[before:])

    def check_cancels(self, rows: dict[str, list[Row]], todo: list[tuple[str, Effect]]) -> None:
        """Of several live jobs all but the oldest are cancelled, and of one only on purpose."""
        cancelled = {e.job_id for _, e in todo if isinstance(e, Cancel)}
        for replica, found in rows.items():
            live = sorted((r.job_id for r in found if r.standing in LIVE), key=age_of)
            if replica in self.backend.posts and live:
                assert set(live[1:]) <= cancelled, "a second job may live on"
                job = self.backend.roster.get(replica)
                assert job is not None
                if not job.stopping and job.job_id == live[0]:
                    assert live[0] not in cancelled, "a job was cancelled that is wanted"

    @precondition(lambda self: self.backend.inquiries)
    @rule(data=st.data(), clear=st.booleans())
    def question_is_answered(self, data: st.DataObject, clear: bool) -> None:
        asked = data.draw(st.sampled_from(self.backend.inquiries))
        self.answer(asked, clear=clear and not self.frozen)

    def answer(self, asked: Inquiry, *, clear: bool) -> None:
        self.backend.inquiries.remove(asked)
        job = self.slurm.get(asked.job_id)
        answer = Answer(asked.job_id, asked.began)
        if clear and (job is None or not job.known):
            answer = Answer(asked.job_id, asked.began, gone=True)
        elif clear and job is not None:
            end = None if job.live else End("ended", Fault.SERVICE)
            answer = Answer(asked.job_id, asked.began, job.standing, end=end)
        self.fold(asked.replica, lambda known: jobs.answered(known, answer))

    # -- what jobs do ----------------------------------------------------------------------

    def some(self, data: st.DataObject, *standings: Standing) -> SlurmJob | None:
        found = sorted(j.id for j in self.slurm.values() if j.standing in standings and j.known)
        return self.slurm[data.draw(st.sampled_from(found))] if found else None

    @precondition(lambda self: not self.frozen)
    @rule(data=st.data(), node=st.sampled_from(["n1", "n2"]))
    def job_starts(self, data: st.DataObject, node: str) -> None:
        job = self.some(data, Standing.QUEUED)
        if job is not None:
            job.standing, job.node, job.began = Standing.RUNNING, node, self.now
            job.unlaunched = False  # a person released it

    @precondition(lambda self: not self.frozen)
    @rule(data=st.data(), standing=st.sampled_from([Standing.ENDED, Standing.COMPLETING]))
    def job_ends(self, data: st.DataObject, standing: Standing) -> None:
        job = self.some(data, Standing.RUNNING, Standing.QUEUED, Standing.COMPLETING)
        if job is not None:
            job.standing = standing
            job.unlaunched = False

    @precondition(lambda self: not self.frozen)
    @rule(data=st.data())
    def second_job_of_a_name_appears(self, data: st.DataObject) -> None:
        """However that came about."""
        sure = sorted(job.replica for job in self.backend.roster if job.job_id is not None)
        if sure:
            job_id = str(next(self.ids))
            self.slurm[job_id] = SlurmJob(job_id, data.draw(st.sampled_from(sure)))

    @precondition(lambda self: not self.frozen)
    @rule(data=st.data())
    def job_is_requeued(self, data: st.DataObject) -> None:
        job = self.some(data, Standing.RUNNING, Standing.SUSPENDED, Standing.COMPLETING)
        if job is not None:
            job.standing, job.node, job.began = Standing.QUEUED, None, None

    @precondition(lambda self: not self.frozen)
    @rule(data=st.data())
    def job_cannot_be_launched(self, data: st.DataObject) -> None:
        job = self.some(data, Standing.RUNNING, Standing.QUEUED, Standing.COMPLETING)
        if job is not None:
            job.standing, job.node, job.began = Standing.QUEUED, None, None
            job.unlaunched = True

    @precondition(lambda self: not self.frozen)
    @rule(data=st.data())
    def job_is_suspended(self, data: st.DataObject) -> None:
        job = self.some(data, Standing.RUNNING)
        if job is not None:
            job.standing = Standing.SUSPENDED

    @precondition(lambda self: not self.frozen)
    @rule(data=st.data())
    def job_is_forgotten(self, data: st.DataObject) -> None:
        job = self.some(data, Standing.ENDED)
        if job is not None:
            job.known = False

    @rule()
    def slurmctld_stops_or_goes_on(self) -> None:
        self.frozen = not self.frozen
        if not self.frozen:
            self.thawed_at = self.now

    # -- what must hold --------------------------------------------------------------------

    @invariant()
    def every_live_job_is_known(self) -> None:
        known = set(self.disk) | self.ended
        assert {job.replica for job in self.slurm.values()} <= known

    @invariant()
    def an_endpoint_means_that_it_runs(self) -> None:
        for job in self.backend.roster:
            shown = posts.sighting(self.backend.posts[job.replica], job)
            assert (shown.phase is Phase.STARTING) == (job.endpoint is not None)
            if job.endpoint is not None:
                assert job.endpoint == f"unix:{job.replica}.{job.gen}"

    def teardown(self) -> None:
        """Left alone with everything working, nothing stays in doubt; stopped, nothing stays."""
        if self.frozen:
            self.slurmctld_stops_or_goes_on()
        self.settle()
        for job in self.backend.roster:
            live = [found.id for found in self.live_jobs(job.replica)]
            assert job.stage in (Stage.QUEUED, Stage.RUNNING), job
            assert job.completing_since is not None or live == [job.job_id], (job, live)
            if job.completing_since is None and job.stage is Stage.RUNNING:
                assert job.endpoint is not None
            assert not self.slurm[job.job_id or ""].unlaunched, "a held job is waited for"
        for replica in self.launched - self.wanted:
            assert not self.live_jobs(replica), "a job that was stopped lives on"
        for job in list(self.backend.roster):
            self.fold(job.replica, lambda j: jobs.stopped(j, self.now))
        for found in self.slurm.values():
            if found.standing is Standing.COMPLETING:
                found.standing = Standing.ENDED
        self.settle()
        assert not [job for job in self.slurm.values() if job.live]
        assert not len(self.backend.roster)
        assert not self.disk
        assert self.ended == self.launched

    def settle(self) -> None:
        """Everything that is under way comes to its end, and listings show what there is."""
        for _ in range(120):
            for submission in self.unanswered():
                if not submission.over and not submission.stuck:
                    self.create(submission)
                submission.answered = True
                job_id, replica = submission.job_id, submission.replica
                if job_id is not None:
                    self.fold(replica, lambda j, i=job_id: jobs.accepted(j, i, self.now))
                else:
                    self.fold(replica, lambda j: jobs.unanswered(j, self.now, "?"))
            while self.backend.todo:
                self.carry_out(*self.backend.todo.pop(0), works=True)
            while self.backend.inquiries:
                self.answer(self.backend.inquiries[0], clear=True)
            self.time_passes(1.0)
            self.take_in(self.rows(), self.now)


TestCluster = pytest.mark.timeout(600)(Cluster.TestCase)  # a slow machine takes minutes
TestCluster.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
