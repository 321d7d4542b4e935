"""Keeps a few long-running programs running: starts them, starts them again, ends them whole.

State: the children, how often a stop was asked for, the signal handlers of this process. All of it
belongs to the main thread, which must be the only one: children are set up between fork and exec,
and the kernel ends them when the *thread* that started them dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType

from slurmgate import procfs
from slurmgate.errors import SlurmgateError
from slurmgate.model import Exit
from slurmgate.sessions import Session

_LOG = logging.getLogger(__name__)

_FIRST_DELAY = 0.1
_LONGEST_DELAY = 5.0
_STEADY_AFTER = 10.0
_READY_POLL = 0.02
_STILL_WAITING = 15.0
_TELL_AGAIN = 5.0
_PR_SET_PDEATHSIG = 1
_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here, not between fork and exec


class ChildFailed(SlurmgateError):
    """A child ended before it was ever ready: no repetition would help."""

    reason = "child-failed"


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A program to keep running.

    ``ready`` is asked every 20 ms until it says yes for the first time. ``stop`` lists signals for
    the leader, each with the seconds until the next; after the last the whole session is killed.
    ``prepare`` is called before each start, when nothing of the start before runs any more.
    ``orphaned`` is what the kernel sends when this process dies. ``reload`` is what SIGHUP becomes.
    ``held`` are signals that wait until the program itself unblocks them: it has something to end
    when it is stopped, so none that comes while it is only starting may end it without a word, and
    a stop that finds it dead starts it for that.
    """

    name: str
    argv: tuple[str, ...]
    ready: Callable[[], bool]
    stop: tuple[tuple[signal.Signals, float], ...]
    prepare: Callable[[], None] = lambda: None
    orphaned: signal.Signals = signal.SIGTERM
    reload: signal.Signals | None = None
    held: tuple[signal.Signals, ...] = ()


class Child:
    """One program and what became of it; only its supervisor changes it."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.session: Session | None = None
        self.was_ready = False
        self.wanted = True
        self.last_exit: Exit | None = None
        self.started = 0.0
        self.delay = _FIRST_DELAY
        self.restart_at: float | None = None


class Supervisor:
    """Used in a ``with``, which takes over the signals of the process and gives them back.

    ``changed`` is called with the sessions that run whenever one was started or has ended, and
    again while it answers False: what could not be noted (a full disk) is noted later.
    """

    def __init__(self, changed: Callable[[Mapping[str, Session]], bool]) -> None:
        self._changed = changed
        self._tell_at: float | None = None
        self._children: list[Child] = []
        self._stops = 0
        self._handlers: dict[signal.Signals, object] = {}
        self._wake_read, self._wake_write = -1, -1
        self._wakeup_before = -1

    def __enter__(self) -> Supervisor:
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in _HEARD:
            self._handlers[number] = signal.signal(number, _heard)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wake_read)
        os.close(self._wake_write)

    @property
    def stop_requested(self) -> bool:
        """Whether SIGTERM or SIGINT came."""
        return self._stops > 0

    @property
    def hurried(self) -> bool:
        """Whether one came again."""
        return self._stops > 1

    def start(self, spec: ChildSpec) -> Child:
        """Start a program and keep it running from now on; ChildFailed when it cannot start."""
        child = Child(spec)
        self._children.append(child)
        try:
            self._spawn(child)
        except OSError as error:
            self._children.remove(child)
            raise ChildFailed(f"cannot start {spec.argv[0]}: {error.strerror}") from error
        return child

    def wait_ready(self, child: Child) -> bool:
        """Wait until a child is ready; False when a stop was asked for instead.

        ChildFailed when it ended by itself: it has said why on standard error.
        """
        complain_at = time.monotonic() + _STILL_WAITING
        while not self.stop_requested:
            if child.session is not None and child.spec.ready():
                child.was_ready = True
                return True
            if child.last_exit is not None and child.last_exit.code is not None:
                raise ChildFailed(f"{child.spec.name} {child.last_exit.describe()} while starting")
            if time.monotonic() > complain_at:
                _LOG.warning("still waiting for %s to be ready", child.spec.name)
                complain_at += _STILL_WAITING
            self._turn(_READY_POLL)
        return False

    def watch(self) -> None:
        """Keep everything running until a stop is asked for."""
        while not self.stop_requested:
            self._turn(None)

    def stop(self) -> None:
        """End all children, the last started first; nothing of them is left when this returns."""
        for child in self._children:
            child.wanted = False
            if child.restart_at is not None and child.spec.held and not self.hurried:
                self._restart(child)
            child.restart_at = None
        for child in reversed(self._children):
            if child.session is not None:
                self.end(child.spec.name, child.session, child.spec.stop)
            self._reap()

    def end(
        self, name: str, session: Session, steps: tuple[tuple[signal.Signals, float], ...]
    ) -> None:
        """End a session, a child's or not: signal the leader step by step, then kill the rest."""
        for number, seconds in steps:
            if not session.leader_runs() or self.hurried:
                break
            session.signal_leader(number)
            self._wait_for_end(session, seconds)
        if session.leader_runs():
            _LOG.warning("%s does not end by itself, killing it", name)
        if not session.kill():
            _LOG.error("cannot end %s, session %d", name, session.pid)

    def _wait_for_end(self, session: Session, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        pidfd = procfs.open_process(session.pid, session.start)
        while session.leader_runs() and not self.hurried:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._turn(left, pidfd)
        if pidfd is not None:
            os.close(pidfd)

    def _turn(self, seconds: float | None, other: int | None = None) -> None:
        """Wait for a signal, the ``other`` descriptor or a restart that is due; act on it."""
        due = [c.restart_at for c in self._children if c.restart_at is not None]
        if self._tell_at is not None:
            due.append(self._tell_at)
        if due:
            left = max(0.0, min(due) - time.monotonic())
            seconds = left if seconds is None else min(seconds, left)
        waited = [self._wake_read] if other is None else [self._wake_read, other]
        select.select(waited, [], [], seconds)
        heard = b""
        with contextlib.suppress(BlockingIOError):
            heard = os.read(self._wake_read, 4096)
        self._stops += sum(number in (signal.SIGTERM, signal.SIGINT) for number in heard)
        if signal.SIGHUP in heard:
            self._reload()
        self._reap()
        now = time.monotonic()
        for child in self._children:
            if child.restart_at is not None and child.restart_at <= now:
                self._restart(child)
        if self._tell_at is not None and self._tell_at <= now:
            self._tell()

    def _reload(self) -> None:
        for child in self._children:
            number, session = child.spec.reload, child.session
            # One that is just starting reads everything anew, and might not know the signal yet.
            if number is not None and session is not None and child.spec.ready():
                session.signal_leader(number)

    def _reap(self) -> None:
        """Take note of children that ended, and of whoever was left to us as process 1."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            for child in self._children:
                if child.session is not None and child.session.pid == ended.si_pid:
                    # Before its pid is free for others: what it leaves behind keeps its port.
                    child.session.kill()
                    child.session = None
                    self._ended(child, _exit(ended))
            os.waitid(os.P_PID, ended.si_pid, os.WEXITED | os.WNOHANG)

    def _ended(self, child: Child, how: Exit) -> None:
        child.last_exit = how
        self._tell()
        if not child.wanted:
            return
        if not child.was_ready and how.code is not None:
            child.wanted = False
            return
        if time.monotonic() - child.started >= _STEADY_AFTER:
            child.delay = _FIRST_DELAY
        self._plan_restart(child, f"{child.spec.name} {how.describe()}")

    def _plan_restart(self, child: Child, why: str) -> None:
        _LOG.warning("%s; it is started again in %g s", why, child.delay)
        child.restart_at = time.monotonic() + child.delay
        child.delay = min(child.delay * 2, _LONGEST_DELAY)

    def _restart(self, child: Child) -> None:
        child.restart_at = None
        try:
            self._spawn(child)
        except OSError as error:
            self._plan_restart(child, f"cannot start {child.spec.argv[0]}: {error.strerror}")

    def _spawn(self, child: Child) -> None:
        child.spec.prepare()
        process = subprocess.Popen(
            child.spec.argv,
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output is for the one line that says where we serve
            start_new_session=True,
            preexec_fn=_before_exec(child.spec),
        )
        process.returncode = 0  # only _reap waits: this object must neither poll nor complain
        child.session = Session.of(process.pid)
        child.started = time.monotonic()
        child.last_exit = None
        self._tell()
        _LOG.info("%s runs as process %d", child.spec.name, process.pid)

    def _tell(self) -> None:
        running = {c.spec.name: c.session for c in self._children if c.session is not None}
        self._tell_at = None if self._changed(running) else time.monotonic() + _TELL_AGAIN


def _heard(number: int, frame: FrameType | None) -> None:
    """Signals are read from the wake-up pipe; a handler must exist for that."""


def _before_exec(spec: ChildSpec) -> Callable[[], None]:
    parent = os.getpid()

    def prepare() -> None:
        if spec.held:
            signal.pthread_sigmask(signal.SIG_BLOCK, spec.held)
        _LIBC.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(spec.orphaned))
        if os.getppid() != parent:  # it died before the kernel was asked to tell
            os._exit(1)

    return prepare


def _exit(ended: os.waitid_result) -> Exit:
    if ended.si_code == os.CLD_EXITED:
        return Exit(code=ended.si_status)
    return Exit(signal=ended.si_status)
