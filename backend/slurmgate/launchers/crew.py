"""The jobs on one login host, and what follows from what becomes known of them.

State, all under one lock, which the site shares: the roster of jobs with their records. A change is
saved before anything is done about it, and told before the next one is made; what asks the host for
something is done by a few threads of the crew's own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from slurmgate.errors import CannotStart, SlurmgateError, StartRefused
from slurmgate.launchers import jobs, posts
from slurmgate.launchers.host import Host, Inquiry, Listing
from slurmgate.launchers.job import (
    Answer,
    Cancel,
    Connect,
    Disconnect,
    Effect,
    FindNode,
    Finish,
    GiveUp,
    Inquire,
    Job,
    Row,
    Stage,
    Step,
    Submit,
)
from slurmgate.launchers.posts import Moment, Post
from slurmgate.launchers.roster import Change, Roster
from slurmgate.launchers.slurm_format import JobName
from slurmgate.launchers.ways import Ways, address_of
from slurmgate.launchers.workers import Workers
from slurmgate.model import End
from slurmgate.ports import Clock, Observer
from slurmgate.records import Records
from slurmgate.ssh import HostAway

log = logging.getLogger(__name__)

WORKERS = 4
PORT_EARLY = 60.0


class Desk(Protocol):
    """What all login hosts of a launcher share."""

    instance: str
    owner: str
    records: Records
    ways: Ways
    closing: threading.Event

    @property
    def observer(self) -> Observer:
        """Who is told of replicas."""

    def is_elsewhere(self, name: JobName, crew: Crew) -> bool:
        """Whether others look after this job: two may list the same cluster."""

    def claim(self, name: JobName, crew: Crew) -> Post | None:
        """Make the post of a job without a record, if a service without replicas is its own."""

    def ended(self, post: Post, end: End, lines: Sequence[str]) -> None:
        """A replica is gone for good, these were its last lines."""


class Crew:
    """Every replica on one login host; callable from any thread.

    ``submit_again`` sends a submission once more; it is called on a thread of the crew's.
    """

    def __init__(
        self,
        host: Host,
        desk: Desk,
        clock: Clock,
        submit_again: Callable[[str], None],
    ) -> None:
        self.changed = threading.Condition()
        self.roster = Roster()
        self.name = host.name
        self._host = host
        self._desk = desk
        self._clock = clock
        self._submit_again = submit_again
        self._posts: dict[str, Post] = {}
        self._lines: dict[str, tuple[str, ...]] = {}
        self._cancelled: set[str] = set()
        self._refused: dict[str, int] = {}
        self._workers = Workers(f"site {host.name}", WORKERS)

    def add(self, post: Post, job: Job) -> None:
        """Know a replica from now on."""
        with self.changed:
            self._posts[job.replica] = post
            self.roster.add(job)
            self.changed.notify_all()

    def forget(self, replica: str) -> None:
        """Nothing was ever submitted for this replica."""
        with self.changed:
            self.roster.drop(replica, self._clock())
            self._posts.pop(replica, None)
            self._desk.records.remove(replica)

    def submitting(self, replica: str) -> Post | None:
        """Note on the disk that a submission is sent now; None when its job is known by now.

        StartRefused when it cannot be noted, or nobody wants the replica any more.
        """
        with self.changed:
            job = self.roster.get(replica)
            if job is None or job.stage is not Stage.SENDING:
                return None
            if job.stopping:
                raise StartRefused("it is no longer wanted")
            post = self._posts[replica]
            post.record = posts.submitting(post.record, time.time())
            self._desk.records.write(post.record)
            return post

    def stop(self, replica: str) -> None:
        """End a replica's job as soon as it is known which one that is; returns at once."""
        self.fold(replica, lambda job: jobs.stopped(job, self._clock()))

    def connected(self, replica: str, gen: int, endpoint: str) -> None:
        """See ``WayObserver``."""
        self.fold(replica, lambda job: jobs.connected(job, gen, endpoint))

    def troubled(self, replica: str, gen: int, reason: str) -> None:
        """See ``WayObserver``."""
        self.fold(replica, lambda job: jobs.troubled(job, gen, reason, self._clock()))

    def blocked(self, replica: str, gen: int, reason: str) -> None:
        """See ``WayObserver``."""
        job = self.job(replica)
        if job is not None and job.gen == gen and jobs.wants_way(job):
            self._desk.observer.hopeless(replica, reason)

    def noticed(self, replica: str, text: str | None) -> None:
        """See ``WayObserver``."""
        self.fold(replica, lambda job: replace(job, notice=text))

    def job(self, replica: str) -> Job | None:
        """What is known of a replica's job."""
        with self.changed:
            return self.roster.get(replica)

    def held(self) -> list[Post]:
        """Every replica there is here."""
        with self.changed:
            return list(self._posts.values())

    def tail(self, replica: str, lines: int) -> list[str]:
        """Read the end of what a living replica printed."""
        job = self.job(replica)
        if job is None or job.job_id is None:
            return []
        with self.changed:
            post = self._posts.get(replica)
        return self._host.tail(job.job_id, lines, None if post is None else post.key)

    def fold(self, replica: str, change: Callable[[Job], Job | Step]) -> None:
        """Let something become known of a job, and do what follows."""
        with self.changed:
            done = self.roster.fold(replica, change, self._clock())
            if done is not None:
                self._follow(done)

    def cancel_all(self, deadline: float) -> list[str]:
        """Stop every replica; gives those whose cancel was not accepted by the deadline."""
        for post in self.held():
            self.stop(post.replica)

        def left() -> list[str]:
            return [job.replica for job in self.roster if job.job_id not in self._cancelled]

        with self.changed:
            self.changed.wait_for(lambda: not left(), max(0.0, deadline - self._clock()))
            return left()

    def tell_trouble(self, text: str) -> None:
        """Say it of every replica that does not get on without an answer of the host."""
        for job in self.roster:
            post = self._posts[job.replica]
            if post.told and not job.stopping and job.endpoint is None:
                self._desk.observer.seen(replace(posts.sighting(post, job), reason=text))

    def note_refusals(self) -> bool:
        """Doubt the jobs at which connections were refused; whether there are any to be watched.

        With the lock held.
        """
        now, watched = self._clock(), False
        for job in self.roster:
            if job.endpoint is None:
                continue
            watched = True
            refused = self._desk.ways.refused(job.replica)
            if refused > self._refused.get(job.replica, 0):
                self.roster.fold(job.replica, lambda known: jobs.doubted(known, now), now)
            self._refused[job.replica] = refused
        return watched

    def take_in(self, listing: Listing) -> None:
        """Do what follows from a good listing; with the lock held."""
        names: dict[str, JobName] = {}
        found: dict[str, list[Row]] = {}
        for one in listing.jobs:
            post = self._posts.get(one.name.replica)
            if one.name.owner == self._desk.owner and (post is None or post.name == one.name):
                names[one.name.replica] = one.name
                found.setdefault(one.name.replica, []).append(one.row)
        now = self._clock()
        outcome = self.roster.listing(found, listing.began, now, whole=listing.whole)
        for change in outcome.changes:
            self._follow(change)
        for replica, cancels in outcome.leftovers.items():
            for cancel in cancels:
                log.info("%s: job %s has outlived replica %s", self.name, cancel.job_id, replica)
                self._cancel(str(names[replica]), cancel.job_id)
        self._take_strays(outcome.strays, names, listing.began)

    # -- changes -----------------------------------------------------------------------------

    def _follow(self, change: Change) -> None:
        """Save what changed, tell it, and have done what is to be done; with the lock held."""
        job = change.after
        post = self._posts[job.replica]
        if change.end is None:
            self._save(post, job)
        # First of all where it is: that it will never serve is about the job as it is now.
        if change.end is None and post.told and not job.stopping:
            self._desk.observer.seen(posts.sighting(post, job))
        for effect in change.effects:
            self._act(post, job, effect)
        self.changed.notify_all()

    def _save(self, post: Post, job: Job) -> None:
        record = posts.updated(post, job)
        if record == post.record:
            return
        post.record = record
        try:
            self._desk.records.write(record)
        except StartRefused as error:  # what runs goes on; the next backend knows less of it
            log.warning("service %s replica %s: %s", record.service, record.replica, error)

    def _act(self, post: Post, job: Job, effect: Effect) -> None:
        replica, do = post.replica, self._workers.do
        match effect:
            case Submit():
                do(None, lambda: self._submit_again(replica))
            case Cancel(job_id):
                self._cancel(str(post.name), job_id)
            case Inquire(job_id):
                do(None, lambda: self._inquire(post, job, job_id))
            case FindNode(job_id):
                do(None, lambda: self._find_node(post, job_id))
            case Connect(gen, node):
                if not self._desk.ways.has(replica, gen):
                    do(("connect", replica, gen), lambda: self._connect(replica, gen, node))
            case Disconnect(gen):
                self._desk.ways.close(replica, gen)
            case GiveUp(reason):
                self._desk.observer.hopeless(replica, reason)
            case Finish(end):
                del self._posts[replica]
                self._cancelled.discard(job.job_id or "")
                self._refused.pop(replica, None)
                self._desk.records.remove(replica)
                self._desk.ended(post, end, self._lines.pop(replica, ()))
                if post.told:
                    self._desk.observer.ended(replica, end)

    def _cancel(self, name: str, job_id: str) -> None:
        def cancel() -> None:
            try:
                self._host.cancel(name, job_id)
            except SlurmgateError as error:
                log.info("%s: %s", self.name, error)
                return
            with self.changed:
                self._cancelled.add(job_id)
                self.changed.notify_all()

        if self._workers.do(("cancel", job_id), cancel):
            log.info("%s: cancelling job %s", self.name, job_id)

    def _inquire(self, post: Post, job: Job, job_id: str) -> None:
        early = job.running_at is None or self._clock() - job.running_at <= PORT_EARLY
        found = Inquiry(Answer(job_id, self._clock()))
        try:
            found = self._host.inquire(
                post.name, job_id, fixed=post.fixed, early=early, key=post.key
            )
        finally:
            with self.changed:
                if post.replica in self._posts:
                    self._lines[post.replica] = found.lines
                self.fold(post.replica, lambda known: jobs.answered(known, found.answer))

    def _find_node(self, post: Post, job_id: str) -> None:
        node = None
        try:
            node = self._host.unfit_node(post.name, job_id)
        finally:
            self.fold(
                post.replica, lambda known: jobs.node_found(known, job_id, node, self._clock())
            )

    def _connect(self, replica: str, gen: int, node: str) -> None:
        try:
            place = self._host.node(node)
        except SlurmgateError as error:
            text = f"where node {node} is cannot be found out: {error}"
            self.troubled(replica, gen, text)
            return
        with self.changed:
            job, post = self.roster.get(replica), self._posts.get(replica)
            if job is None or post is None or job.gen != gen or not jobs.wants_way(job):
                return
            assert post.record.job is not None
            address = address_of(post.record.job, node, place)
            post.address = (gen, address)
            self._save(post, job)
            record = post.record
        try:
            self._desk.ways.open(record)
        except CannotStart as error:
            self.blocked(replica, gen, str(error))
            return
        except HostAway as error:
            self.troubled(replica, gen, str(error))
            return
        later = self.job(replica)
        if later is None or later.gen != gen or not jobs.wants_way(later):
            self._desk.ways.close(replica, gen)

    def _take_strays(
        self, strays: Mapping[str, Sequence[Row]], names: Mapping[str, JobName], began: float
    ) -> None:
        """Adopt jobs of ours that no record tells of, or cancel them."""
        for replica, rows in strays.items():
            if self._desk.is_elsewhere(names[replica], self):
                continue
            post = self._desk.claim(names[replica], self)
            if post is not None:
                self._take_stray(post, rows, began)
                continue
            for row in rows:
                log.info("%s: nobody wants job %s, %s", self.name, row.job_id, names[replica])
                self._cancel(str(names[replica]), row.job_id)

    def _take_stray(self, post: Post, rows: Sequence[Row], began: float) -> None:
        ids, now = [row.job_id for row in rows], self._clock()
        shown = ", ".join(ids)
        log.info("%s: adopted job %s, %s, which has no record", self.name, shown, post.name)
        self._posts[post.replica] = post
        self.roster.add(posts.job_of(post, Moment(now, time.time()), 0.0))
        self.fold(post.replica, lambda job: jobs.listed(job, rows, began, now))
