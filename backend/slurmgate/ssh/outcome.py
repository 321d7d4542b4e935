"""How a remote command can end: three ways to fail that must never be mixed up, and one to work."""

from __future__ import annotations

from dataclasses import dataclass

from slurmgate.errors import CannotStart, SlurmgateError


@dataclass(frozen=True, slots=True)
class Output:
    """What a script did; ``began`` is the monotonic time just before it was sent."""

    code: int
    out: str
    err: str
    began: float


class HostRefused(CannotStart):
    """The host cannot be used as it is configured: nothing was run, nobody need try again soon."""


class HostAway(SlurmgateError):
    """The command was not run: the host is away or busy for now."""

    reason = "host-away"
    retryable = True
    http_status = 503


class Unfinished(SlurmgateError):
    """The command was sent and nobody knows what it did."""

    reason = "outcome-unknown"
    retryable = True
    http_status = 503
