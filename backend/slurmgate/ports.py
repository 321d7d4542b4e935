"""What the control loop needs from the world outside: protocols for adapters and fakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from slurmgate.model import End, ServiceSpec, Sighting, Stranger
from slurmgate.observed import Start


class Clock(Protocol):
    """The monotonic clock, in seconds."""

    def __call__(self) -> float: ...


class Observer(Protocol):
    """Told by a launcher what becomes of its replicas; callable from any thread, never blocks."""

    def seen(self, sighting: Sighting) -> None:
        """Progress, or any other change. Of a replica nobody knows: it is to be taken over."""

    def ended(self, replica: str, end: End) -> None:
        """Its job or process is gone; told exactly once, whoever caused it."""

    def hopeless(self, replica: str, reason: str, code: str = "cannot-start") -> None:
        """It will never serve, though its job lives: it is to be stopped, and why is shown."""

    def listed(self, services: frozenset[str]) -> None:
        """What runs of these services is known from now on."""


@dataclass(frozen=True, slots=True)
class Adoption:
    """What a launcher found of an earlier backend's replicas without asking any host.

    ``unlisted``: services of which nobody can say yet whether more runs, or whether that still
    does.
    """

    sightings: tuple[Sighting, ...] = ()
    unlisted: frozenset[str] = frozenset()


class History(Protocol):
    """Keeps the starts that have ended; callable from any thread, never blocks, never fails."""

    def recent(self) -> Sequence[Start]:
        """Those that are kept, oldest first, ``ended`` on this process's clock."""

    def add(self, start: Start) -> None:
        """Keep one more."""


class Launcher(Protocol):
    """Starts, stops and adopts replicas. Methods may block; they run on pool threads."""

    def launch(self, spec: ServiceSpec, replica: str, avoid: Sequence[str] = ()) -> Sighting:
        """Start one replica; raise StartRefused or CannotStart when nothing was started.

        ``avoid`` names nodes where it shall not run.
        """

    def stop(self, replica: str) -> None:
        """End the replica's processes or job; idempotent. Returns when it is done or under way."""

    def reconnect(self, replica: str) -> None:
        """Make the way to a replica anew: it runs, and does not answer."""

    def adopt(self, specs: Sequence[ServiceSpec], observer: Observer) -> Adoption:
        """Find what an earlier backend left running, and from now on tell ``observer`` of it.

        Called once, before any other method; waits for no host. Records of replicas that have
        ended are removed.
        """

    def log_tail(self, replica: str, lines: int) -> list[str]:
        """Give the last lines of what the replica printed; empty when there is nothing."""

    def explain(self, replica: str) -> str | None:
        """Say what is known of why a running replica was never reached."""

    def take_over(self, owner: str) -> int:
        """Make the jobs of another owner of this instance ours; how many there were."""

    def strangers(self) -> tuple[Stranger, ...]:
        """Jobs of this instance that have another owner, as last listed."""

    def close(self, *, stop_replicas: bool, keep_ways: bool = True) -> None:
        """Stop watching; with ``stop_replicas`` end every replica first, in parallel.

        Without ``keep_ways`` no gate is left that could use the ways to those which go on.
        """
