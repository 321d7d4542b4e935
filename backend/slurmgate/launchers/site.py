"""One login host: the jobs on it, a thread that lists them, and what follows from a listing.

State, all under one lock: the roster of jobs with their records, the last good listing, since when
the host is away. A change is saved before anything is done about it, and told before the next one
is made. What asks the host for something runs on a few threads of the site's own, or on that of who
launches, so that a submission never waits for a listing or the other way round.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from slurmgate.errors import CannotStart, SlurmgateError, StartRefused
from slurmgate.launchers import jobs, posts
from slurmgate.launchers.host import SUBMIT, Doubt, Host, Inquiry, Listed, Listing
from slurmgate.launchers.jobs import Answer, Job, Row, Stage
from slurmgate.launchers.posts import Moment, Post
from slurmgate.launchers.roster import Change, Roster
from slurmgate.launchers.slurm_format import JobName
from slurmgate.launchers.slurm_submit import Refusal, Submitted
from slurmgate.launchers.ways import Ways, address_of
from slurmgate.launchers.workers import Workers
from slurmgate.model import End, Sighting
from slurmgate.ports import Observer
from slurmgate.records import Records
from slurmgate.ssh import HostAway, Unfinished

log = logging.getLogger(__name__)

PATIENCE = 15.0
WORKERS = 4
CONNECT_MAX = 11.0
SUBMISSION_MAX = SUBMIT + 3.0
RETRY_WAITED_FOR = 2.0
RETRY_BUSY = 5.0
RETRY_AT_REST = 15.0
PORT_EARLY = 60.0


class Desk(Protocol):
    """What all sites of a launcher share."""

    instance: str
    owner: str
    records: Records
    ways: Ways
    closing: threading.Event

    @property
    def observer(self) -> Observer:
        """Who is told of replicas."""

    def is_elsewhere(self, name: JobName, site: Site) -> bool:
        """Whether another site looks after this job: two may list the same cluster."""

    def claim(self, name: JobName, site: Site) -> Post | None:
        """Make the post of a job without a record, if a service without replicas is its own."""

    def ended(self, post: Post, end: End, lines: Sequence[str]) -> None:
        """A replica is gone for good, these were its last lines."""


@dataclass(slots=True)
class _Contact:
    """How the listings go. ``tries`` counts those that have ended, ``failures`` in a row."""

    good: Listing | None = None
    tries: int = 0
    failures: int = 0
    trouble: SlurmgateError | None = None
    away_since: float | None = None
    next_at: float = 0.0
    waiting: int = 0
    asked: bool = False
    told: str = ""
    jitter: float = field(default_factory=lambda: random.uniform(0.9, 1.1))


class Site:
    """The jobs of one login host; see ``ports.Launcher`` for what launching promises."""

    def __init__(self, host: Host, desk: Desk, clock: Callable[[], float] = time.monotonic) -> None:
        self._host = host
        self._desk = desk
        self._clock = clock
        self._changed = threading.Condition()
        self._roster = Roster()
        self._posts: dict[str, Post] = {}
        self._lines: dict[str, tuple[str, ...]] = {}
        self._cancelled: set[str] = set()
        self._contact = _Contact(next_at=clock())
        self._awaited: frozenset[str] = frozenset()
        self._workers = Workers(f"site {host.name}", WORKERS)
        self._thread = threading.Thread(target=self._loop, name=f"list {host.name}", daemon=True)

    # -- from the launcher -------------------------------------------------------------------

    def start(self, awaited: frozenset[str] = frozenset()) -> None:
        """Begin to list; the first good listing is told for these services."""
        self._awaited = awaited
        self._thread.start()

    def adopt(self, post: Post, job: Job) -> None:
        """Know a replica of an earlier backend; before ``start``."""
        self._posts[job.replica] = post
        self._roster.add(job)

    def launch(self, post: Post) -> Sighting:
        """Submit the job of a new replica; its record is written."""
        deadline = self._clock() + PATIENCE
        try:
            silent = self._await_host(deadline)
        except SlurmgateError:
            self._desk.records.remove(post.replica)
            raise
        now = self._clock()
        job = Job(post.replica, Stage.SENDING, waiting_since=now)
        if silent is not None:
            job = jobs.unanswered(replace(job, submissions=0), now, silent)
        with self._changed:
            self._posts[post.replica] = post
            self._roster.add(job)
            self._changed.notify_all()
        if silent is None:
            self._submit_first(post.replica, deadline)
        with self._changed:
            found = self._roster.get(post.replica)
            return posts.sighting(post, found or job)

    def stop(self, replica: str) -> None:
        """End a replica's job as soon as it is known which one that is; returns at once."""
        self._fold(replica, lambda job: jobs.stopped(job, self._clock()))

    def connected(self, replica: str, gen: int, endpoint: str) -> None:
        """See ``WayObserver``."""
        self._fold(replica, lambda job: jobs.connected(job, gen, endpoint))

    def troubled(self, replica: str, gen: int, reason: str) -> None:
        """See ``WayObserver``."""
        self._fold(replica, lambda job: jobs.troubled(job, gen, reason))

    def blocked(self, replica: str, gen: int, reason: str) -> None:
        """See ``WayObserver``."""
        job = self.job(replica)
        if job is not None and job.gen == gen and jobs.wants_way(job):
            self._desk.observer.hopeless(replica, reason)

    def noticed(self, replica: str, text: str | None) -> None:
        """See ``WayObserver``."""
        self._fold(replica, lambda job: replace(job, notice=text))

    def job(self, replica: str) -> Job | None:
        """What is known of a replica's job."""
        with self._changed:
            return self._roster.get(replica)

    def held(self) -> list[Post]:
        """Every replica there is here."""
        with self._changed:
            return list(self._posts.values())

    def tail(self, replica: str, lines: int) -> list[str]:
        """Read the end of what a living replica printed."""
        job = self.job(replica)
        return [] if job is None or job.job_id is None else self._host.tail(job.job_id, lines)

    def strangers(self) -> list[Listed]:
        """Live jobs of our instance that have another owner, as last listed."""
        good = self._contact.good
        found = () if good is None else good.jobs
        live = [one for one in found if one.row.standing in jobs.LIVE]
        return [one for one in live if one.name.owner != self._desk.owner]

    def take_over(self, owner: str) -> int:
        """Give the jobs of another owner names with ours; a listing then finds them."""
        taken = 0
        for one in self._host.listing(self._desk.instance).jobs:
            if one.name.owner != owner or one.row.standing not in jobs.LIVE:
                continue
            if self._host.rename(one.row.job_id, str(replace(one.name, owner=self._desk.owner))):
                taken += 1
                log.info("%s: took over job %s of %s", self.name, one.row.job_id, owner)
        if taken:
            with self._changed:
                self._contact.asked = True
                self._changed.notify_all()
        return taken

    @property
    def name(self) -> str:
        """The login host, for people."""
        return self._host.name

    def cancel_all(self, deadline: float) -> list[str]:
        """Stop every replica; gives those whose cancel was not accepted by the deadline."""
        for post in self.held():
            self.stop(post.replica)

        def left() -> list[str]:
            return [job.replica for job in self._roster if job.job_id not in self._cancelled]

        with self._changed:
            self._changed.wait_for(lambda: not left(), max(0.0, deadline - self._clock()))
            return left()

    def wake(self) -> None:
        """Have whoever waits see that the launcher closes."""
        with self._changed:
            self._changed.notify_all()

    # -- submitting --------------------------------------------------------------------------

    def _await_host(self, deadline: float) -> str | None:
        """Wait for the first good listing; what is amiss when the host answers and Slurm does not.

        CannotStart when the host refuses us, or is away for longer than it is waited for.
        """
        with self._changed:
            contact, before = self._contact, self._contact.tries
            if contact.good is not None:
                return None
            contact.waiting += 1
            contact.next_at = min(contact.next_at, self._clock())
            self._changed.notify_all()
            try:
                while contact.good is None:
                    self._check_closing()
                    if contact.tries > before and contact.trouble is not None:
                        if not isinstance(contact.trouble, HostAway | CannotStart):
                            return str(contact.trouble)
                        self._give_up_if_due(contact.trouble, deadline)
                    left = deadline - self._clock()
                    if left <= 0:
                        return f"{self.name} has not answered yet"
                    self._changed.wait(left)
            finally:
                contact.waiting -= 1
        return None

    def _give_up_if_due(self, trouble: SlurmgateError, deadline: float) -> None:
        """Raise CannotStart unless the host may come back while it is waited for."""
        if not isinstance(trouble, HostAway):
            raise CannotStart(str(trouble)) from trouble
        now = self._clock()
        since = self._contact.away_since
        if now >= deadline or (since is not None and now - since > PATIENCE):
            raise CannotStart(f"login host {self.name} cannot be reached: {trouble}") from trouble

    def _check_closing(self) -> None:
        if self._desk.closing.is_set():
            raise StartRefused("the backend is stopping")

    def _submit_first(self, replica: str, deadline: float) -> None:
        """Submit it, again while the host is away; nothing is left behind when this raises."""
        pause = 0.2
        while True:
            problem = self._send(replica)
            if problem is None:
                return
            try:
                if isinstance(problem, StartRefused):
                    raise problem
                if isinstance(problem, Refusal):
                    refused = CannotStart if problem.for_good else StartRefused
                    raise refused(problem.reason)
                self._give_up_if_due(problem, deadline)
                self._desk.closing.wait(pause)
                self._check_closing()
                job = self.job(replica)
                if job is not None and job.stopping:
                    raise StartRefused("it is no longer wanted")
            except SlurmgateError:
                self._forget(replica)
                raise
            pause = min(2.0, pause * 2)

    def _forget(self, replica: str) -> None:
        """Nothing was ever submitted for this replica."""
        with self._changed:
            self._roster.drop(replica, self._clock())
            self._posts.pop(replica, None)
            self._desk.records.remove(replica)

    def _resend(self, replica: str) -> None:
        """Submit it again, after the first time came to nothing."""
        log.info("replica %s: its submission never arrived; submitting it again", replica)
        problem = self._send(replica)
        if isinstance(problem, HostAway):
            text = str(problem)
            self._fold(replica, lambda job: jobs.unsent(job, self._clock(), text))
        elif problem is not None:
            words = problem.reason if isinstance(problem, Refusal) else str(problem)
            self._fold(replica, lambda job: jobs.refused(job, words))

    def _send(self, replica: str) -> Refusal | SlurmgateError | None:
        """Send a submission: what is known to have kept it from being a job, else None."""
        with self._changed:
            post = self._posts[replica]
            post.record = posts.submitting(post.record, time.time())
            try:
                self._desk.records.write(post.record)
            except StartRefused as error:
                return error
        assert post.spec is not None
        began, known = self._clock(), False
        try:
            answer = self._host.submit(post.spec, post.name)
            known = True
        except (HostAway, CannotStart) as error:
            known = True
            self._note_trouble(error)
            return error
        except Unfinished as error:
            known = True
            self._doubt(replica, f"submission not confirmed: {error}", began)
            return None
        finally:
            if not known:
                self._doubt(replica, "submission not confirmed", began)
        with self._changed:
            self._contact.away_since = None
        if isinstance(answer, Refusal):
            return answer
        if isinstance(answer, Doubt):
            reason, now = f"submission not confirmed: {answer.reason}", self._clock()
            self._fold(replica, lambda job: jobs.unanswered(job, now, reason, refused=True))
            return None
        self._accept(replica, answer)
        return None

    def _doubt(self, replica: str, reason: str, began: float) -> None:
        overdue = min(self._clock(), began + CONNECT_MAX) + SUBMISSION_MAX
        log.info("%s: replica %s: %s", self.name, replica, reason)
        self._fold(replica, lambda job: jobs.unanswered(job, overdue, reason))

    def _accept(self, replica: str, answer: Submitted) -> None:
        log.info("%s: replica %s is job %s", self.name, replica, answer.job_id)
        self._fold(replica, lambda job: jobs.accepted(job, answer.job_id, self._clock()))

    # -- changes -----------------------------------------------------------------------------

    def _fold(self, replica: str, change: Callable[[Job], Job | jobs.Step]) -> None:
        with self._changed:
            done = self._roster.fold(replica, change, self._clock())
            if done is not None:
                self._follow(done)

    def _follow(self, change: Change) -> None:
        """Save what changed, tell it, and have done what is to be done; with the lock held."""
        job = change.after
        post = self._posts[job.replica]
        if change.end is None:
            self._save(post, job)
        for effect in change.effects:
            self._act(post, job, effect)
        if change.end is None and post.told and not job.stopping:
            self._desk.observer.seen(posts.sighting(post, job))
        self._changed.notify_all()

    def _save(self, post: Post, job: Job) -> None:
        record = posts.updated(post, job)
        if record == post.record:
            return
        post.record = record
        try:
            self._desk.records.write(record)
        except StartRefused as error:  # what runs goes on; the next backend knows less of it
            log.warning("replica %s: %s", record.replica, error)

    def _act(self, post: Post, job: Job, effect: jobs.Effect) -> None:
        replica, do = post.replica, self._workers.do
        match effect:
            case jobs.Submit():
                do(("submit", replica), lambda: self._resend(replica))
            case jobs.Cancel(job_id):
                self._cancel(str(post.name), job_id)
            case jobs.Inquire(job_id):
                do(("inquire", replica), lambda: self._inquire(post, job, job_id))
            case jobs.Connect(gen, node):
                if not self._desk.ways.has(replica, gen):
                    do(("connect", replica, gen), lambda: self._connect(replica, gen, node))
            case jobs.Disconnect(gen):
                self._desk.ways.close(replica, gen)
            case jobs.GiveUp(reason):
                self._desk.observer.hopeless(replica, reason)
            case jobs.Finish(end):
                del self._posts[replica]
                self._cancelled.discard(job.job_id or "")
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
            with self._changed:
                self._cancelled.add(job_id)
                self._changed.notify_all()

        if self._workers.do(("cancel", job_id), cancel):
            log.info("%s: cancelling job %s", self.name, job_id)

    def _inquire(self, post: Post, job: Job, job_id: str) -> None:
        early = job.running_at is None or self._clock() - job.running_at <= PORT_EARLY
        found = Inquiry(Answer(job_id, self._clock()))
        try:
            found = self._host.inquire(job_id, post.record.port, fixed=post.fixed, early=early)
        finally:
            with self._changed:
                self._lines[post.replica] = found.lines
                self._fold(post.replica, lambda known: jobs.answered(known, found.answer))

    def _connect(self, replica: str, gen: int, node: str) -> None:
        try:
            place = self._host.node(node)
        except SlurmgateError as error:
            text = f"where node {node} is cannot be found out: {error}"
            self._fold(replica, lambda job: jobs.troubled(job, gen, text))
            return
        with self._changed:
            job, post = self._roster.get(replica), self._posts.get(replica)
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
            text = str(error)
            self._fold(replica, lambda job: jobs.troubled(job, gen, text))
            return
        later = self.job(replica)
        if later is None or later.gen != gen or not jobs.wants_way(later):
            self._desk.ways.close(replica, gen)

    # -- listing -----------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._desk.closing.is_set():
            try:
                if self._due():
                    self._look()
            except Exception:
                log.exception("%s: listing met an error of its own; it goes on", self.name)
                self._desk.closing.wait(RETRY_BUSY)

    def _due(self) -> bool:
        """Wait until it may be time for a listing, and say whether it is."""
        with self._changed:
            due, now = self._next(), self._clock()
            if due is not None and due <= now:
                return True
            self._changed.wait(None if due is None else due - now)
            return False

    def _next(self) -> float | None:
        """When to list next; None: not until something changes."""
        contact = self._contact
        if contact.good is None or contact.failures:
            return contact.next_at
        if contact.asked:
            return self._clock()
        return self._roster.due(contact.good.began, self._clock(), contact.jitter)

    def _look(self) -> None:
        self._contact.asked = False
        try:
            listing = self._host.listing(self._desk.instance)
        except SlurmgateError as error:
            self._note_trouble(error)
            self._failed()
            return
        awaited, self._awaited = self._awaited, frozenset()
        with self._changed:
            self._note_good(listing)
            self._take_in(listing)
            self._changed.notify_all()
        if awaited:
            self._desk.observer.listed(awaited)

    def _note_good(self, listing: Listing) -> None:
        contact = self._contact
        if contact.told:
            log.info("%s is listed again", self.name)
        contact.told = ""
        contact.good, contact.trouble, contact.away_since = listing, None, None
        contact.failures = 0
        contact.tries += 1
        contact.jitter = random.uniform(0.9, 1.1)

    def _note_trouble(self, error: SlurmgateError) -> None:
        """Keep why the host gave no answer, and say it once."""
        with self._changed:
            contact = self._contact
            contact.trouble = error
            if not isinstance(error, HostAway):
                contact.away_since = None
            elif contact.away_since is None:
                contact.away_since = self._clock()
            if contact.told != str(error):
                contact.told = str(error)
                log.warning("%s: %s", self.name, error)

    def _failed(self) -> None:
        with self._changed:
            contact = self._contact
            contact.failures += 1
            contact.tries += 1
            most = RETRY_BUSY if len(self._roster) else RETRY_AT_REST
            if contact.waiting:
                most = RETRY_WAITED_FOR
            pause = min(most, 0.2 * 2.0 ** min(contact.failures - 1, 10))
            contact.next_at = self._clock() + pause * contact.jitter
            self._changed.notify_all()

    def _take_in(self, listing: Listing) -> None:
        """Do what follows from a good listing; with the lock held."""
        names: dict[str, JobName] = {}
        found: dict[str, list[Row]] = {}
        for one in listing.jobs:
            post = self._posts.get(one.name.replica)
            if one.name.owner == self._desk.owner and (post is None or post.name == one.name):
                names[one.name.replica] = one.name
                found.setdefault(one.name.replica, []).append(one.row)
        now = self._clock()
        outcome = self._roster.listing(found, listing.began, now, whole=listing.whole)
        for change in outcome.changes:
            self._follow(change)
        for replica, cancels in outcome.leftovers.items():
            for cancel in cancels:
                log.info(
                    "%s: job %s of replica %s has outlived it", self.name, cancel.job_id, replica
                )
                self._cancel(str(names[replica]), cancel.job_id)
        self._take_strays(outcome.strays, names, listing.began)

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
        log.info("%s: adopted job %s, %s, which has no record", self.name, ids, post.name)
        self._posts[post.replica] = post
        self._roster.add(posts.job_of(post, Moment(now, time.time()), 0.0))
        self._fold(post.replica, lambda job: jobs.listed(job, rows, began, now))
