"""Tell the observer what became of a tunnel, once each time it changes.

A teller belongs to the supervisor's thread; ``refused`` and ``other`` may be read by any.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

from slurmgate.tunnels.observer import TunnelObserver
from slurmgate.tunnels.routes import Address
from slurmgate.tunnels.stderr import Finding, Meaning, Place

log = logging.getLogger(__name__)

_FORGIVEN = 60.0  # how long a login that worked before may be refused
_DOUBTED = 30.0  # how long a trouble that may pass must last to be for good
_PASSED = 30.0  # it has passed if nothing was heard of it for so long: who asks name servers
# that are silent hears of it after ten seconds for each of them


class Teller(Protocol):
    """What a tunnel reports; repeating something is harmless."""

    def opened(self) -> None:
        """It is open."""

    def failed(self, found: Finding) -> None:
        """It broke, or could not be opened."""

    def connection_failed(self, found: Finding | None) -> None:
        """A connection through it failed just now."""

    def count(self, found: Finding | None) -> None:
        """A connection through it failed under an earlier backend."""


class ReplicaTeller:
    """Of the tunnel that a replica is reached by."""

    def __init__(self, observer: TunnelObserver, key: str, place: Place) -> None:
        self.refused = 0
        self.other: str | None = None
        self._observer = observer
        self._key = key
        self._place = place
        self._told: str | None = None
        self._hopeless: set[str] = set()
        self._worked = False
        self._refused_since: float | None = None
        self._doubted: tuple[float, float] | None = None  # since when, and heard of last

    def opened(self) -> None:
        place = self._place
        log.info("tunnel %s to %s through %s is open", self._key, place.target, place.via)
        self._worked = True
        self._told = self._refused_since = None
        self._hopeless.clear()
        self._observer.opened(self._key)

    def failed(self, found: Finding) -> None:
        if found.meaning is Meaning.HOPELESS and self._for_good():
            self._give_up(found.text)
        text = f"the tunnel to {self._place.target} is down: {found.text}"
        if text != self._told:
            self._told = text
            log.warning("tunnel %s: %s", self._key, text)
            self._observer.lost(self._key, text)

    def connection_failed(self, found: Finding | None) -> None:
        self.count(found)
        if found is None:
            return
        if found.meaning is not Meaning.DOUBTFUL:
            self._doubted = None
        if found.meaning is Meaning.HOPELESS or self._lasts(found):
            self._give_up(found.text)

    def count(self, found: Finding | None) -> None:
        if found is not None and found.meaning is Meaning.REFUSED:
            self.refused += 1
        elif found is not None:
            self.other = found.text

    def _for_good(self) -> bool:
        """Whether a refused login is final: one that worked before is given some time."""
        now = time.monotonic()
        if self._refused_since is None:
            self._refused_since = now
        return not self._worked or now - self._refused_since > _FORGIVEN

    def _lasts(self, found: Finding) -> bool:
        """Whether a trouble that may pass has not passed for long."""
        if found.meaning is not Meaning.DOUBTFUL:
            return False
        now = time.monotonic()
        since, heard = self._doubted or (now, now)
        if now - heard > _PASSED:
            since = now
        self._doubted = since, now
        return now - since >= _DOUBTED

    def _give_up(self, text: str) -> None:
        if text not in self._hopeless:
            self._hopeless.add(text)
            log.warning("tunnel %s: %s", self._key, text)
            self._observer.hopeless(self._key, text)


class PortTeller:
    """Of the listener of a ``local_port``: nothing else depends on it."""

    def __init__(self, observer: TunnelObserver, key: str, address: Address) -> None:
        self._observer = observer
        self._key = key
        self._address = address
        self._told: str | None = None

    def opened(self) -> None:
        if self._told is not None:
            self._told = None
            self._observer.notice(self._key, None)

    def failed(self, found: Finding) -> None:
        host, port = self._address
        text = f"local_port {host}:{port}: {found.text}"
        if text != self._told:
            self._told = text
            log.warning("tunnel %s: %s", self._key, text)
            self._observer.notice(self._key, text)

    def connection_failed(self, found: Finding | None) -> None:
        """What people who use the port run into is theirs."""

    def count(self, found: Finding | None) -> None:
        """Nobody asks."""
