"""Keeps the logs of running process replicas from filling the disk, in a thread of its own.

The thread owns nothing: which logs are written to is asked for at each look.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from slurmgate.launchers import logs

_LOG = logging.getLogger(__name__)

LIMIT = 64 * 1024 * 1024  # bytes; as many again are kept of what was before
EVERY = 5.0  # seconds


class LogKeeper:
    """The thread; ``written`` gives the logs that are being written to, from any thread."""

    def __init__(
        self, written: Callable[[], Iterable[Path]], *, limit: int = LIMIT, every: float = EVERY
    ) -> None:
        self._written = written
        self._limit = limit
        self._every = every
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave the logs alone from now on."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._every):
            for path in self._written():
                try:
                    logs.bound(path, self._limit)
                except OSError as error:
                    _LOG.warning("%s cannot be kept from growing: %s", path, error.strerror)
