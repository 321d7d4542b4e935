"""What the control loop needs from the world outside: protocols for adapters and fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from slurmgate.model import Exit, Running, ServiceSpec

OnExit = Callable[[str, Exit], None]
"""Called with replica id and exit once a replica's processes are known to have ended."""


class Clock(Protocol):
    """The monotonic clock, in seconds."""

    def __call__(self) -> float: ...


class Launcher(Protocol):
    """Starts, stops and adopts replicas. Methods may block; they run on pool threads.

    An end of a replica is reported through ``on_exit`` exactly once, whoever caused it.
    """

    def launch(self, spec: ServiceSpec, replica: str) -> Running:
        """Start one replica; raise StartRefused or CannotStart when nothing was started."""

    def stop(self, replica: str) -> None:
        """End the replica's processes or job; idempotent. Returns when it is done or under way."""

    def adopt(self, on_exit: OnExit) -> list[Running]:
        """Find what an earlier backend left running, and from now on report ends to ``on_exit``.

        Called once, before any other method. Records of replicas that have ended are removed.
        """

    def log_tail(self, replica: str, lines: int) -> list[str]:
        """Give the last lines of what the replica printed; empty when there is nothing."""

    def close(self, *, stop_replicas: bool) -> None:
        """Stop watching; with ``stop_replicas`` end every replica first, in parallel."""
