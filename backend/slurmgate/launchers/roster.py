"""The jobs of one login host together: which of those in a listing is whose. Pure.

Not thread-safe: a site owns its roster and calls it with its lock held. A job of ours that belongs
to no replica is a *stray*: of a replica that has ended it is cancelled, of one that nobody knows
the site decides.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from slurmgate.launchers import jobs, pace
from slurmgate.launchers.job import LIVE, Cancel, Effect, Finish, Job, Row, Step

REMEMBERED_ENDS = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """What an event did to a job, and what is to be done about it."""

    before: Job
    after: Job
    effects: tuple[Effect, ...]

    @property
    def end(self) -> Finish | None:
        """Its end, when this was the end of it."""
        return next((e for e in self.effects if isinstance(e, Finish)), None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a listing led to: changes of known jobs, what is left of replicas that have ended, and
    the live jobs of replicas that nobody knows.
    """

    changes: tuple[Change, ...]
    leftovers: Mapping[str, tuple[Cancel, ...]]
    strays: Mapping[str, tuple[Row, ...]]


class Roster:
    """Every job of one site, by replica."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._past: OrderedDict[str, float] = OrderedDict()

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, replica: str) -> Job | None:
        """Find the job of a replica."""
        return self._jobs.get(replica)

    def add(self, job: Job) -> None:
        """Know a job from now on, from before its submission."""
        self._jobs[job.replica] = job

    def drop(self, replica: str, now: float) -> None:
        """Forget a job that has ended or was never submitted."""
        if self._jobs.pop(replica, None) is not None:
            self._past[replica] = now
            while len(self._past) > REMEMBERED_ENDS:
                self._past.popitem(last=False)

    def fold(self, replica: str, change: Callable[[Job], Job | Step], now: float) -> Change | None:
        """Change one job; None when there is none (any more)."""
        before = self._jobs.get(replica)
        if before is None:
            return None
        outcome = change(before)
        after, effects = outcome if isinstance(outcome, tuple) else (outcome, ())
        self._jobs[replica] = after
        done = Change(before, after, effects)
        if done.end is not None:
            self.drop(replica, now)
        return done

    def listing(
        self, found: Mapping[str, Sequence[Row]], began: float, now: float, *, whole: bool = True
    ) -> Outcome:
        """Take in a good listing: all jobs of ours in it, by the replica in their names.

        Not ``whole``: a line of ours was not understood, so what is missing may be there.
        """
        changes = []
        for replica in list(self._jobs):
            rows = found.get(replica, ())
            if rows or whole:
                change = self.fold(replica, _listed(rows, began, now), now)
                changes += [change] if change is not None else []
        leftovers: dict[str, tuple[Cancel, ...]] = {}
        strays: dict[str, tuple[Row, ...]] = {}
        for replica in found.keys() - {change.before.replica for change in changes}:
            live = tuple(row for row in found[replica] if row.standing in LIVE)
            if live and replica not in self._past:
                strays[replica] = live
            elif live and began > self._past[replica]:
                leftovers[replica] = tuple(Cancel(row.job_id) for row in live)
        return Outcome(tuple(changes), leftovers, strays)

    def due(self, last: float, jitter: float) -> float | None:
        """Say when to list next, after a listing begun at ``last``; None: nothing is looked for."""
        return min((pace.due(job, last, jitter) for job in self._jobs.values()), default=None)


def _listed(rows: Sequence[Row], began: float, now: float) -> Callable[[Job], Step]:
    return lambda job: jobs.listed(job, rows, began, now)
