"""One thread that calls functions: at a time, when a file descriptor is ready, or when asked to.

The thread owns everything in this module. Only ``call`` may be used by other threads; the rest is
for functions that the thread itself calls.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import queue
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

Work = Callable[[], None]


@dataclass(order=True, slots=True)
class Timer:
    """A call to be made; ``cancel`` makes it nothing. ``at_close``: then at the latest."""

    at: float
    number: int
    work: Work | None = field(compare=False)
    at_close: bool = field(compare=False)

    def cancel(self) -> None:
        """Forget the call; harmless when it was made already."""
        self.work = None


class Loop:
    """The thread; a function that fails is logged and the others are called all the same."""

    def __init__(self, name: str) -> None:
        self._timers: list[Timer] = []
        self._numbers = itertools.count()
        self._calls: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, self._do_calls)
        self._wake_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Work) -> None:
        """Have the thread call this soon; from any thread. After ``close`` nothing happens."""
        self._calls.put(work)
        with self._wake_lock:  # a closed number may be another file by now
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def after(self, seconds: float, work: Work, *, at_close: bool = False) -> Timer:
        """Call this in so many seconds, with ``at_close`` when the loop is closed before."""
        timer = Timer(time.monotonic() + seconds, next(self._numbers), work, at_close)
        heapq.heappush(self._timers, timer)
        return timer

    def watch(self, fd: int, work: Work) -> None:
        """Call this whenever ``fd`` is readable, until ``unwatch``."""
        self._selector.register(fd, selectors.EVENT_READ, work)

    def unwatch(self, fd: int) -> None:
        """Watch ``fd`` no more; it must still be open."""
        self._selector.unregister(fd)

    def close(self) -> None:
        """End the thread after what it was asked to call, and wait for its end."""
        self.call(self._shut)
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(self._time_left()):
                if self._closed:
                    return
                # What was called before may have closed this one, and opened another as the same.
                if self._selector.get_map().get(key.fd) is key:
                    self._guard(key.data)
            self._do_timers()

    def _do_calls(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with contextlib.suppress(queue.Empty):
            while not self._closed:
                self._guard(self._calls.get_nowait())

    def _do_timers(self) -> None:
        now = time.monotonic()
        while not self._closed and self._timers and self._timers[0].at <= now:
            work = heapq.heappop(self._timers).work
            if work is not None:
                self._guard(work)

    def _time_left(self) -> float | None:
        while self._timers and self._timers[0].work is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0].at - time.monotonic()) if self._timers else None

    def _guard(self, work: Work) -> None:
        try:
            work()
        except Exception:
            log.exception("a tunnel could not be looked after")

    def _shut(self) -> None:
        for timer in self._timers:
            if timer.work is not None and timer.at_close:
                self._guard(timer.work)
        self._selector.close()
        with self._wake_lock:
            self._closed = True
            os.close(self._wake)
