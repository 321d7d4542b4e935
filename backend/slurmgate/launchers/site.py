"""One login host: submissions to it, and the thread that lists its jobs.

State: how the listings go, under the lock of the crew, which has the jobs. A submission runs on the
thread of who launches or on one of the crew's, so that it never waits for a listing, nor the other
way round.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from slurmgate.errors import CannotStart, SlurmgateError, StartRefused
from slurmgate.launchers import contact, jobs, posts
from slurmgate.launchers.contact import Contact
from slurmgate.launchers.crew import Crew, Desk
from slurmgate.launchers.host import SUBMIT, Doubt, Host, Listed
from slurmgate.launchers.job import LIVE, Job, Stage
from slurmgate.launchers.posts import Post
from slurmgate.launchers.slurm_submit import Refusal, Submitted
from slurmgate.model import Sighting
from slurmgate.ports import Clock
from slurmgate.ssh import HostAway, Unfinished

log = logging.getLogger(__name__)

CONNECT_MAX = 11.0  # a command is sent so long after it was asked for, or never
SUBMISSION_MAX = SUBMIT + 3.0
UNCONFIRMED_MAX = CONNECT_MAX + SUBMISSION_MAX
AWAY_TOLD_AFTER = 2  # failed listings in a row
AFTER_ERROR = 5.0
WATCH = 1.0  # how often it is seen whether running jobs refuse connections


class Site:
    """A login host; see ``ports.Launcher`` for what launching promises."""

    def __init__(self, host: Host, desk: Desk, clock: Clock) -> None:
        self.name = host.name
        self.crew = Crew(host, desk, clock, self._submit_again)
        self._host = host
        self._desk = desk
        self._clock = clock
        self._changed = self.crew.changed
        self._contact = Contact(host.name, clock())
        self._awaited: frozenset[str] = frozenset()
        self._thread = threading.Thread(target=self._loop, name=f"list {host.name}", daemon=True)

    # -- from the launcher -------------------------------------------------------------------

    def start(self, awaited: frozenset[str] = frozenset()) -> None:
        """Begin to list; the first good listing is told for these services."""
        self._awaited = awaited
        self._thread.start()

    def launch(self, post: Post) -> Sighting:
        """Submit the job of a new replica; when this raises, nothing of it is left."""
        deadline = self._clock() + contact.PATIENCE
        silent = self._await_host(deadline)
        now = self._clock()
        job = Job(post.replica, Stage.SENDING, waiting_since=now)
        if silent is not None:
            self._desk.records.write(post.record)
            job = jobs.unanswered(replace(job, submissions=0), now, silent)
        self.crew.add(post, job)
        if silent is None:
            self._submit_first(post.replica, deadline)
        with self._changed:
            return posts.sighting(post, self.crew.job(post.replica) or job)

    def strangers(self) -> list[Listed]:
        """Live jobs of our instance that have another owner, as last listed."""
        good = self._contact.good
        found = () if good is None else good.jobs
        live = [one for one in found if one.row.standing in LIVE]
        return [one for one in live if one.name.owner != self._desk.owner]

    def take_over(self, owner: str) -> int:
        """Give the jobs of another owner names with ours; a listing then finds them."""
        taken = 0
        for one in self._host.listing(self._desk.instance).jobs:
            if one.name.owner != owner or one.row.standing not in LIVE:
                continue
            if self._host.rename(one.row.job_id, str(replace(one.name, owner=self._desk.owner))):
                taken += 1
                log.info("%s: took over job %s of %s", self.name, one.row.job_id, owner)
        return taken

    def look(self) -> None:
        """List soon: jobs may be there that another site, or nobody of us, brought about."""
        self._hurry()

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
            state, before = self._contact, self._contact.tries
            if state.good is not None:
                return None
            state.waiting += 1
            self._hurry()
            try:
                while state.good is None:
                    self._check_closing()
                    if state.tries > before and state.trouble is not None:
                        if not isinstance(state.trouble, HostAway | CannotStart):
                            return str(state.trouble)
                        state.check(state.trouble, deadline, self._clock())
                    left = deadline - self._clock()
                    if left <= 0:
                        return f"{self.name} has not answered yet"
                    self._changed.wait(left)
            finally:
                state.waiting -= 1
        return None

    def _hurry(self) -> None:
        with self._changed:
            self._contact.hurry(self._clock())
            self._changed.notify_all()

    def _check_closing(self) -> None:
        if self._desk.closing.is_set():
            raise StartRefused("the backend is stopping")

    def _submit_first(self, replica: str, deadline: float) -> None:
        """Submit it, again while the host is away."""
        pause = 0.2
        while True:
            problem = self._send(replica)
            if problem is None:
                return
            try:
                self._wait_or_raise(problem, pause, deadline)
            except SlurmgateError:
                self.crew.forget(replica)
                raise
            pause = min(2.0, pause * 2)

    def _wait_or_raise(
        self, problem: Refusal | SlurmgateError, pause: float, deadline: float
    ) -> None:
        """Wait before the next try, or say why there is none."""
        if isinstance(problem, Refusal):
            raise (CannotStart if problem.for_good else StartRefused)(problem.reason)
        if isinstance(problem, StartRefused):
            raise problem
        with self._changed:
            self._contact.check(problem, deadline, self._clock())
        self._desk.closing.wait(pause)
        self._check_closing()

    def _submit_again(self, replica: str) -> None:
        """Submit it again, after the last time came to nothing."""
        problem = self._send(replica)
        if isinstance(problem, HostAway):
            text = str(problem)
            self.crew.fold(replica, lambda job: jobs.unsent(job, self._clock(), text))
        elif problem is not None:
            words = problem.reason if isinstance(problem, Refusal) else str(problem)
            self.crew.fold(replica, lambda job: jobs.refused(job, words))

    def _send(self, replica: str) -> Refusal | SlurmgateError | None:
        """Send a submission: what is known to have kept it from being a job, else None."""
        began, known = self._clock(), False
        try:
            post = self.crew.submitting(replica)
            if post is None or post.spec is None:
                known = True
                return None
            who = f"service {post.record.service} replica {replica}"
            where = f"not on {', '.join(post.avoid)}" if post.avoid else "wherever it may run"
            log.info("%s: submitting it to %s, %s", who, self.name, where)
            answer = self._host.submit(post.spec, post.name, post.avoid, post.key)
            known = True
        except (HostAway, CannotStart, StartRefused) as error:
            known = True
            if not isinstance(error, StartRefused):
                with self._changed:
                    self._contact.note(error, self._clock())
            return error
        except Unfinished as error:
            known = True
            log.warning("%s: submission not confirmed: %s", who, error)
            self._doubt(replica, f"submission not confirmed: {error}", began)
            return None
        finally:
            if not known:  # an error of our own, after it was sent perhaps
                self._doubt(replica, "submission not confirmed", began)
        with self._changed:
            self._contact.answered()
        if isinstance(answer, Refusal):
            return answer
        self._read(replica, who, answer)
        return None

    def _read(self, replica: str, who: str, answer: Submitted | Doubt) -> None:
        now = self._clock()
        if isinstance(answer, Doubt):
            reason = f"submission not confirmed: {answer.reason}"
            log.warning("%s: %s", who, reason)
            self.crew.fold(replica, lambda job: jobs.unanswered(job, now, reason, refused=True))
            return
        log.info("%s: it is job %s", who, answer.job_id)
        self.crew.fold(replica, lambda job: jobs.accepted(job, answer.job_id, now))

    def _doubt(self, replica: str, reason: str, began: float) -> None:
        overdue = min(self._clock(), began + CONNECT_MAX) + SUBMISSION_MAX
        self.crew.fold(replica, lambda job: jobs.unanswered(job, overdue, reason))

    # -- listing -----------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._desk.closing.is_set():
            try:
                if self._due():
                    self._look()
            except Exception:
                log.exception("%s: listing met an error of its own; it goes on", self.name)
                self._desk.closing.wait(AFTER_ERROR)

    def _due(self) -> bool:
        """Wait until it may be time for a listing, and say whether it is."""
        with self._changed:
            state, now = self._contact, self._clock()
            last = 0.0 if state.good is None else state.good.began
            watched = self.crew.note_refusals()
            due = state.due(self.crew.roster.due(last, state.jitter), now)
            if due is not None and due <= now:
                return True
            if not self._desk.closing.is_set():
                left = None if due is None else due - now
                self._changed.wait(min(left or WATCH, WATCH) if watched else left)
            return False

    def _look(self) -> None:
        self._contact.asked = False
        try:
            listing = self._host.listing(self._desk.instance)
        except SlurmgateError as error:
            with self._changed:
                self._contact.failed(error, self._clock(), busy=len(self.crew.roster) > 0)
                if self._contact.failures == AWAY_TOLD_AFTER:
                    self.crew.tell_trouble(str(error))
                self._changed.notify_all()
            return
        with self._changed:
            awaited, self._awaited = self._awaited, frozenset()
            self._contact.listed(listing)
            self.crew.take_in(listing)
            self._changed.notify_all()
        if awaited:
            self._desk.observer.listed(awaited)
