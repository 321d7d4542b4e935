"""How the listings of one login host go: the last good one, what is amiss, when to try again.

A ``Contact`` belongs to a site, which calls it with its lock held and passes the time.
"""

from __future__ import annotations

import logging
import random

from slurmgate.errors import CannotStart, SlurmgateError
from slurmgate.launchers.host import Listing
from slurmgate.ssh import HostAway

log = logging.getLogger(__name__)

PATIENCE = 15.0
RETRY_FIRST = 0.2
RETRY_WAITED_FOR = 2.0
RETRY_BUSY = 5.0
RETRY_AT_REST = 15.0


class Contact:
    """``tries`` counts listings that have ended, ``failures`` those that failed in a row.

    ``waiting`` is how many starts wait for the first good listing; ``asked``: somebody wants one
    as soon as possible. ``jitter`` is a factor, new for each listing, so that hosts with many
    instances are not asked by all of them at once.
    """

    def __init__(self, host: str, now: float) -> None:
        self.good: Listing | None = None
        self.trouble: SlurmgateError | None = None
        self.tries = self.failures = self.waiting = 0
        self.asked = False
        self.jitter = 1.0
        self._host = host
        self._next_at = now
        self._away_since: float | None = None
        self._told = ""

    def due(self, roster_due: float | None, now: float) -> float | None:
        """Say when to list next; None: not until something changes."""
        if self.good is None or self.failures:
            return self._next_at
        return now if self.asked else roster_due

    def hurry(self, now: float) -> None:
        """Somebody waits for a listing."""
        self.asked = True
        self._next_at = min(self._next_at, now)

    def listed(self, listing: Listing) -> None:
        """A good listing is here."""
        if self._told:
            log.info("%s is listed again", self._host)
        self.good, self.trouble = listing, None
        self._told, self._away_since = "", None
        self.failures = 0
        self.tries += 1
        self.jitter = random.uniform(0.9, 1.1)

    def failed(self, error: SlurmgateError, now: float, *, busy: bool) -> None:
        """A listing failed; ``busy``: there are jobs to look after."""
        self.note(error, now)
        self.failures += 1
        self.tries += 1
        most = RETRY_BUSY if busy else RETRY_AT_REST
        if self.waiting:
            most = RETRY_WAITED_FOR
        pause = min(most, RETRY_FIRST * 2.0 ** min(self.failures - 1, 10))
        self._next_at = now + pause * random.uniform(0.9, 1.1)

    def note(self, error: SlurmgateError, now: float) -> None:
        """Keep why the host gave no answer, and say it once."""
        self.trouble = error
        if not isinstance(error, HostAway):
            self._away_since = None
        elif self._away_since is None:
            self._away_since = now
        if self._told != str(error):
            self._told = str(error)
            log.warning("%s: %s", self._host, error)

    def answered(self) -> None:
        """It ran a command."""
        self._away_since = None

    def check(self, trouble: SlurmgateError, deadline: float, now: float) -> None:
        """Raise CannotStart unless the host may come back while it is waited for."""
        if not isinstance(trouble, HostAway):
            raise CannotStart(str(trouble)) from trouble
        since = self._away_since
        if now >= deadline or (since is not None and now - since > PATIENCE):
            raise CannotStart(f"login host {self._host} cannot be reached: {trouble}") from trouble
