"""Follows process replicas to their end, in one thread.

The thread owns all state in this module: which replicas are followed, their deadlines and the
pidfds waited on. Other threads only put calls into its queue. A replica has ended when its leader
(the process we started), all of the leader's session and whatever else carries the replica's marks
are gone; then, and once, its end is reported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from slurmgate import procfs
from slurmgate.model import Exit

log = logging.getLogger(__name__)

_TRY_AGAIN = 1.0  # after an error, such as too many open files, in what is done for one replica


@dataclass(slots=True)
class _Followed:
    """One replica; ``pidfd`` is its leader's, ``members`` the pidfds of those who outlived it."""

    replica: str
    pid: int
    pidfd: int
    marks: Mapping[str, str]
    leader_ended: bool = False
    kill_at: float | None = None
    sweep_at: float | None = None
    members: set[int] = field(default_factory=set)
    terminated: set[tuple[int, int]] = field(default_factory=set)


class Watcher:
    """The thread; ``on_end`` is called on it, so it must not block for long."""

    def __init__(self, on_end: Callable[[str, Exit], None]) -> None:
        self._on_end = on_end
        self._ours = procfs.ancestors(os.getpid())
        self._followed: dict[str, _Followed] = {}
        self._calls: queue.SimpleQueue[tuple[str, Callable[[], None]]] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._wake_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="process-watcher", daemon=True)
        self._thread.start()

    def follow(self, replica: str, pid: int, pidfd: int, marks: Mapping[str, str]) -> None:
        """Follow a replica by the pidfd of its leader, which is the watcher's from now on."""
        followed = _Followed(replica, pid, pidfd, marks)
        self._call(replica, lambda: self._add(followed))

    def stop(self, replica: str, kill_after: float) -> None:
        """Ask a replica's processes to end; what is left after ``kill_after`` is killed."""
        self._call(replica, lambda: self._terminate(replica, kill_after))

    def close(self) -> None:
        """Stop following; what still runs is left running."""
        self._call("", self._shut)
        self._thread.join()

    def _call(self, replica: str, call: Callable[[], None]) -> None:
        self._calls.put((replica, call))
        with self._wake_lock:  # a closed number may be another file by now
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(self._time_left()):
                if key.data is None:
                    os.eventfd_read(self._wake)
                    self._do_calls()
                else:
                    self._guard(key.data, partial(self._process_ended, key.data, key.fd))
            now = time.monotonic()
            for followed in list(self._followed.values()):
                if followed.kill_at is not None and followed.kill_at <= now:
                    self._guard(followed.replica, partial(self._kill, followed))
                if followed.sweep_at is not None and followed.sweep_at <= now:
                    self._guard(followed.replica, partial(self._sweep, followed))

    def _do_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._guard(*self._calls.get_nowait())

    def _guard(self, replica: str, work: Callable[[], None]) -> None:
        """Do something for one replica; if that fails the others are followed all the same.

        What was due for this one is tried again, so that its end is reported in the end.
        """
        try:
            work()
        except Exception:
            log.exception("replica %s: following it failed", replica)
            followed = self._followed.get(replica)
            if followed is None:
                return
            again = time.monotonic() + _TRY_AGAIN
            if followed.leader_ended and not followed.members:
                followed.sweep_at = again
            if followed.kill_at is not None:
                followed.kill_at = max(followed.kill_at, again)

    def _time_left(self) -> float | None:
        times = [at for f in self._followed.values() for at in (f.kill_at, f.sweep_at)]
        deadlines = [at for at in times if at is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _add(self, followed: _Followed) -> None:
        self._followed[followed.replica] = followed
        self._selector.register(followed.pidfd, selectors.EVENT_READ, followed.replica)

    def _shut(self) -> None:
        for followed in self._followed.values():
            for fd in (followed.pidfd, *followed.members):
                os.close(fd)
        self._followed.clear()
        self._selector.close()
        with self._wake_lock:
            self._closed = True
            os.close(self._wake)

    def _terminate(self, replica: str, kill_after: float) -> None:
        followed = self._followed.get(replica)
        if followed is None or followed.kill_at is not None:
            return
        followed.kill_at = time.monotonic() + kill_after
        if not followed.leader_ended:
            _send_to_leader(followed, signal.SIGTERM)
            for process in self._others(followed):
                self._send(followed, process, signal.SIGTERM)

    def _kill(self, followed: _Followed) -> None:
        """The time to end by itself is over."""
        log.warning("replica %s did not end when asked to, killing it", followed.replica)
        if not followed.leader_ended:
            _send_to_leader(followed, signal.SIGKILL)
        for process in self._others(followed):
            self._send(followed, process, signal.SIGKILL)
        followed.kill_at = None

    def _process_ended(self, replica: str, fd: int) -> None:
        followed = self._followed.get(replica)
        if followed is None:
            return
        self._selector.unregister(fd)
        if fd == followed.pidfd:
            followed.leader_ended = True
        else:
            followed.members.discard(fd)
            os.close(fd)
        if followed.leader_ended and not followed.members:
            self._sweep(followed)

    def _sweep(self, followed: _Followed) -> None:
        """The leader has ended: end and await the others, or report when nobody is left.

        A child that is the leader stays a zombie until ``_finish``, so that nobody else can get
        its pid, and with it the name of the session, as long as we look for members.
        """
        followed.sweep_at = None
        stopping = followed.kill_at is not None
        number = signal.SIGTERM if stopping else signal.SIGKILL
        for process in self._others(followed):
            fd = self._send(followed, process, number, keep=True)
            if fd is not None:
                followed.members.add(fd)
                self._selector.register(fd, selectors.EVENT_READ, followed.replica)
        if not followed.members:
            self._finish(followed)

    def _finish(self, followed: _Followed) -> None:
        del self._followed[followed.replica]
        end = _reap(followed.pidfd)
        os.close(followed.pidfd)
        self._on_end(followed.replica, end)

    def _others(self, followed: _Followed) -> Iterable[procfs.Process]:
        """Everybody who belongs to the replica, the leader left out.

        Never this very process: it may have been started in a shell of the replica.
        """
        found = procfs.session_members(followed.pid) + procfs.find_marked(followed.marks)
        spared = {followed.pid, *self._ours}
        return {(p.pid, p.start): p for p in found if p.pid not in spared}.values()

    def _send(
        self, followed: _Followed, process: procfs.Process, number: int, *, keep: bool = False
    ) -> int | None:
        """Signal one process, TERM only once; with ``keep`` give its pidfd to wait for its end."""
        fd = procfs.open_process(process.pid, process.start)
        if fd is None:
            return None
        key = (process.pid, process.start)
        try:
            if number != signal.SIGTERM or key not in followed.terminated:
                signal.pidfd_send_signal(fd, number)
                followed.terminated.add(key)
        except ProcessLookupError:
            keep = False
        except PermissionError:
            log.warning(
                "replica %s leaves process %d (%s) behind: it runs as another user",
                followed.replica, process.pid, process.comm,
            )  # fmt: skip
            keep = False
        if keep:
            return fd
        os.close(fd)
        return None


def _send_to_leader(followed: _Followed, number: signal.Signals) -> None:
    # An adopted leader is reaped by its own parent, maybe before its end was seen here.
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(followed.pidfd, number)


def _reap(pidfd: int) -> Exit:
    """Learn how a leader ended; only a process we are the parent of tells."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return Exit()
    if result is None:
        return Exit()
    if result.si_code == os.CLD_EXITED:
        return Exit(code=result.si_status)
    return Exit(signal=result.si_status)
