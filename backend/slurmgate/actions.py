"""What may be decided about a service's replicas: values without behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from slurmgate.observed import Drain


@dataclass(frozen=True, slots=True)
class Launch:
    """Start one more replica."""


@dataclass(frozen=True, slots=True)
class MarkReady:
    """Its first healthy answer came: let requests to it."""

    replica: str


@dataclass(frozen=True, slots=True)
class Close:
    """Give it no new requests and end it once none is left, at ``by`` at the latest."""

    replica: str
    why: Drain
    by: float | None = None


@dataclass(frozen=True, slots=True)
class Reopen:
    """Demand came before it was ended: let requests to it again."""

    replica: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End its processes or job now."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Its start has failed: fetch the last lines of its log, then end it."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reconnect:
    """It runs and answers nothing: have the way to it made anew, once each time."""

    replica: str


Action = Launch | MarkReady | Close | Reopen | Stop | GiveUp | Reconnect
