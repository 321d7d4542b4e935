"""A few daemon threads for calls that may hang: they never keep the backend from ending.

State: the queue, and which pieces of work wait or run, by key.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Hashable

log = logging.getLogger(__name__)


class Workers:
    """At most ``most`` threads, started when they are needed; callable from any thread."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[Hashable, Callable[[], None]]] = queue.SimpleQueue()
        self._busy: set[Hashable] = set()
        self._threads = 0

    def do(self, key: Hashable | None, work: Callable[[], None]) -> bool:
        """Have something done soon; False when work of this key waits or runs already.

        Without a key it is done in any case: nobody asks again for what was noted as begun.
        """
        key = object() if key is None else key
        with self._lock:
            if key in self._busy:
                return False
            self._busy.add(key)
            self._queue.put((key, work))
            fresh = self._threads < min(self._most, len(self._busy))
            self._threads += fresh
        if fresh:
            threading.Thread(target=self._loop, name=self._name, daemon=True).start()
        return True

    def _loop(self) -> None:
        while True:
            key, work = self._queue.get()
            try:
                work()
            except Exception:
                log.exception("%s: work on %s failed", self._name, key)
            finally:
                with self._lock:
                    self._busy.discard(key)
