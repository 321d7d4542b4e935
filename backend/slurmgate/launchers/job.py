"""What is known of one replica's Slurm job, what Slurm may show of it, and what may be to be done.

Immutable values. ``jobs`` says how they change.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from slurmgate.model import End


class Standing(StrEnum):
    """What a state word of Slurm means for a replica."""

    QUEUED = "queued"
    RUNNING = "running"
    SUSPENDED = "suspended"
    COMPLETING = "completing"
    ENDED = "ended"
    UNKNOWN = "unknown"


LIVE = frozenset({Standing.QUEUED, Standing.RUNNING, Standing.SUSPENDED})


@dataclass(frozen=True, slots=True)
class Row:
    """One job in a listing. ``began`` is when it started to run, on Slurm's own clock; ``ran_at``
    is the same, ``ends_at`` and ``starts_at`` are on ours. ``permanent``: its pending reason will
    not pass by itself; ``not_launched``: because a node could not run it. ``end``: what its state
    alone says of how it ended.
    """

    job_id: str
    standing: Standing
    end: End | None = None
    node: str | None = None
    reason: str | None = None
    permanent: bool = False
    not_launched: bool = False
    began: float | None = None
    ran_at: float | None = None
    starts_at: float | None = None
    ends_at: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What ``scontrol show job`` said: a standing, or ``gone``, or neither (no clear answer).

    ``end`` is there when it has ended and everything about that could be found out. ``began``
    is when the question was asked.
    """

    job_id: str
    began: float
    standing: Standing = Standing.UNKNOWN
    gone: bool = False
    end: End | None = None


class Stage(StrEnum):
    """How much is known of the job of a replica."""

    SENDING = "sending"
    UNSURE = "unsure"
    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Job:
    """The job of one replica.

    ``known_since``: a good listing that began later must show it. ``overdue_at``: no submission
    can still be on its way after it. ``final``: how it ended by what a listing shows.
    ``gen`` counts its starts on a node, 0 before the first; ``started`` is when Slurm says that
    one was. ``waiting_since`` is when it came into the queue. ``doubted_at`` is when it was last
    found not to be reached though it runs, ``doubted_since`` since when that is so. ``unseen``: an
    earlier backend knew of it, and no listing has shown it waiting or running yet. ``given_up`` is
    why it is cancelled though nobody asked for that. ``was_at`` is where it was last seen to run
    since it was last seen to wait. ``unlaunched`` says that a node could not run it, while it is
    being found out which one: ``blamed``. ``suspended_since`` and ``suspended_seen`` are when the
    first and the last of the listings came that showed its processes stopped, None while they run.
    """

    replica: str
    stage: Stage
    waiting_since: float
    job_id: str | None = None
    known_since: float = float("inf")
    overdue_at: float = float("-inf")
    submissions: int = 1
    resubmit_at: float = float("-inf")
    refused: bool = False
    renewable: bool = True
    stopping: bool = False
    unseen: bool = False
    cancelled_at: float = float("-inf")
    absent_since: float | None = None
    inquiring: bool = False
    final: End | None = None
    completing_since: float | None = None
    doubted_at: float = float("-inf")
    doubted_since: float = float("-inf")
    gen: int = 0
    node: str | None = None
    started: float | None = None
    running_at: float | None = None
    endpoint: str | None = None
    hopeless: bool = False
    given_up: str | None = None
    was_at: str | None = None
    unlaunched: str | None = None
    blamed: str | None = None
    reason: str | None = None
    notice: str | None = None
    starts_at: float | None = None
    ends_at: float | None = None
    suspended_since: float | None = None
    suspended_seen: float | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    """Send the submission again, under the same name and port."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel this job of the replica's name."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Inquire:
    """Ask what is known of this job, and if it has ended how, with its last lines."""

    job_id: str


@dataclass(frozen=True, slots=True)
class FindNode:
    """Find out which node could not run this job."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Connect:
    """Find the node's address and open a tunnel to it, unless that is under way."""

    gen: int
    node: str


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the tunnel."""

    gen: int


@dataclass(frozen=True, slots=True)
class Finish:
    """It is gone for good: forget it and say so, once."""

    end: End


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It will never serve, though it lives: say so."""

    reason: str


Effect = Submit | Cancel | Inquire | FindNode | Connect | Disconnect | Finish | GiveUp
Step = tuple[Job, tuple[Effect, ...]]


def age_of(job_id: str) -> tuple[int, str]:
    """Order job ids by age: Slurm counts upward."""
    number = job_id.split("_")[0].split("+")[0]
    return (int(number) if number.isdecimal() else 0, job_id)
