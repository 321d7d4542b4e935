"""A model of what may become of a request: pure, from the request and the faults beside it.

A request is answered in whole, whatever happens, but for these:

- its connection ends with the nginx worker or master that has it, and while no nginx listens;
- what a service had begun to answer is cut when that replica, or the way to it, goes;
- 502 ``upstream-failed`` when that happened to it twice;
- 503 ``start-failed`` when an operator stopped the service, or its program died during a start,
  and until the backoff after that has passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

# How long after a fault it may still be felt: until a job has ended, until its end was seen.
FELT = 6.0


class Outcome(StrEnum):
    """What became of a request. ``CUT``: a status came, but not all of the answer."""

    WHOLE = "whole"
    WRONG = "another answer"
    RESET = "connection ended"
    CUT = "cut"
    UNANSWERED = "never answered"
    TWICE_FAILED = "502 upstream-failed"
    START_FAILED = "503 start-failed"


class Kind(StrEnum):
    """What was done to the product."""

    BACKEND_KILLED = "backend killed"
    BACKEND_FROZEN = "backend frozen"
    MASTER_KILLED = "nginx master killed"
    WORKER_KILLED = "nginx worker killed"
    TUNNEL_KILLED = "tunnel killed"
    JOB_CANCELLED = "job cancelled"
    SERVICE_KILLED = "service killed"
    CHANGED = "changed environment"
    RESIZED = "changed bounds"
    STOPPED = "slurmgate stop"
    STARTED = "slurmgate start"


WAY_GONE = frozenset({Kind.TUNNEL_KILLED, Kind.JOB_CANCELLED, Kind.SERVICE_KILLED})
START_FAILS = frozenset({Kind.SERVICE_KILLED, Kind.STOPPED})
GATE_GONE = frozenset({Kind.MASTER_KILLED, Kind.WORKER_KILLED})


@dataclass(frozen=True, slots=True)
class Fault:
    """Something done to the product, in monotonic seconds; an nginx serves again at ``ended``."""

    kind: Kind
    began: float
    ended: float
    target: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """A request and what became of it, in monotonic seconds."""

    path: str
    began: float
    ended: float
    outcome: Outcome
    detail: str = ""


def allowed(request: Request, faults: Iterable[Fault]) -> frozenset[Outcome]:
    """All that may have become of it."""
    faults = list(faults)
    found = {Outcome.WHOLE}
    if any(_meets(request, fault, 0.2) for fault in faults if fault.kind in GATE_GONE):
        found |= {Outcome.RESET, Outcome.CUT}
    ways = sum(_meets(request, fault, FELT) for fault in faults if fault.kind in WAY_GONE)
    if ways:
        found.add(Outcome.CUT)
    if ways > 1:
        found.add(Outcome.TWICE_FAILED)
    failures = 0
    for fault in faults:
        if fault.kind in START_FAILS:
            failures += 1
            backoff = 2.0 ** (failures - 1)
            if _meets(request, fault, FELT + backoff):
                found.add(Outcome.START_FAILED)
    return frozenset(found)


def _meets(request: Request, fault: Fault, felt: float) -> bool:
    return request.began <= fault.ended + felt and request.ended >= fault.began
