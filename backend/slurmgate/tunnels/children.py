"""One ssh process: started or taken over, followed by its pidfd, ended.

A ``Child`` belongs to the loop's thread. The functions keep no state.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from slurmgate import procfs
from slurmgate.tunnels.loop import Loop, Timer
from slurmgate.tunnels.routes import MARK, Command, read_mark

_PASSED_ON = ("HOME", "PATH", "SSH_AUTH_SOCK")

OnExit = Callable[["Child", str], None]
"""Called with the child and how it ended, in words: ``exited with code 255``."""


@dataclass(frozen=True, slots=True)
class Found:
    """An ssh of this instance that runs already, by its mark."""

    process: procfs.Process
    key: str
    kind: str
    argv: tuple[str, ...]

    @property
    def leads(self) -> bool:
        """Whether it is the ssh we started, not a proxy command of one."""
        return self.process.session == self.process.pid


class Child:
    """A running ssh; its end is told once, to ``on_exit`` or to who asked for it."""

    def __init__(
        self, loop: Loop, command: Command, process: procfs.Process, pidfd: int, on_exit: OnExit
    ) -> None:
        self.pid = process.pid
        self._loop = loop
        self._command = command
        self._pidfd = pidfd
        self._on_exit: OnExit | None = on_exit
        self._kill: Timer | None = None
        loop.watch(pidfd, self._exited)

    def end(self, patience: float, then: Callable[[], None] | None = None) -> None:
        """Ask it to end and kill it after ``patience`` seconds; ``then`` is called at its end."""
        self._on_exit = None if then is None else lambda _child, _words: then()
        if self._kill is None:
            self._signal(signal.SIGTERM)
            # Nobody would kill it later if the loop ended before.
            kill = partial(self._signal, signal.SIGKILL)
            self._kill = self._loop.after(patience, kill, at_close=True)

    def let_go(self) -> None:
        """Follow it no more and let it run."""
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # reaped by a parent that is not us
            signal.pidfd_send_signal(self._pidfd, number)

    def _exited(self) -> None:
        if self._kill is not None:
            self._kill.cancel()
        self._loop.unwatch(self._pidfd)
        if self._command.proxied:
            # While ssh itself is not reaped, nobody else can have its session.
            _end_proxies(self.pid, self._command.mark)
        words = _reap(self._pidfd)
        os.close(self._pidfd)
        if self._on_exit is not None:
            self._on_exit(self, words)


def environment() -> dict[str, str]:
    """Give what every ssh finds in its environment: little, and no language but C."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {"LANG": "C"}


def start(loop: Loop, command: Command, on_exit: OnExit) -> Child:
    """Start an ssh in a session of its own; OSError when that is not possible."""
    command.log.unlink(missing_ok=True)  # its predecessor may still be writing to it
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    fd = os.open(command.log, flags, 0o600)
    try:
        started = subprocess.Popen(
            command.argv,
            env=environment() | {MARK: command.mark},
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            start_new_session=True,
        )
    finally:
        os.close(fd)
    # Whoever has the pidfd waits for the process: this object must neither poll nor complain.
    started.returncode = 0
    try:
        pidfd = os.pidfd_open(started.pid)  # not reaped yet, so it is this very process
    except OSError:  # too many open files: do not leave it to itself
        os.kill(started.pid, signal.SIGKILL)
        os.waitpid(started.pid, 0)
        raise
    process = procfs.read(started.pid)
    assert process is not None
    return Child(loop, command, process, pidfd, on_exit)


def take_over(loop: Loop, command: Command, found: Found, on_exit: OnExit) -> Child | None:
    """Follow an ssh that runs already; None when it has ended."""
    pidfd = procfs.open_process(found.process.pid, found.process.start)
    if pidfd is None:
        return None
    return Child(loop, command, found.process, pidfd, on_exit)


def end_found(loop: Loop, found: Found, patience: float, then: Callable[[], None]) -> None:
    """End an ssh that nobody follows; ``then`` is called when it has ended."""
    command = Command(found.argv, "", Path(), proxied=False)  # its proxies are found by themselves
    child = take_over(loop, command, found, lambda _child, _words: None)
    if child is None:
        then()
    else:
        child.end(patience, then)


def find(owner: str) -> list[Found]:
    """List every ssh of this instance, the oldest first, proxy commands included."""
    found = []
    for process, value in procfs.find_variable(MARK):
        name = read_mark(value, owner)
        if name is not None:
            argv = tuple(procfs.command_line(process.pid))
            found.append(Found(process, *name, argv))
    return sorted(found, key=lambda f: (f.process.start, f.process.pid))


class Log:
    """What an ssh prints, read as it comes; the file is kept small."""

    _MAX = 256 << 10

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def restart(self) -> None:
        """Read a new file of the same name from its beginning."""
        self._offset, self._rest = 0, b""

    def new_lines(self, *, whole: bool = False) -> list[str]:
        """Give the lines that came since the last call; with ``whole`` an unfinished one too."""
        try:
            size = os.stat(self._path).st_size
            if size == self._offset and not (whole and self._rest):
                return []
            if size < self._offset:
                self.restart()
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(self._MAX)
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if whole and self._rest:
            lines.append(self._rest)
            self._rest = b""
        if self._offset >= self._MAX:
            os.truncate(self._path, 0)
            self.restart()
        return [line.decode(errors="replace").rstrip("\r") for line in lines]


def _end_proxies(leader: int, mark: str) -> None:
    for process in procfs.session_members(leader):
        if process.pid == leader or procfs.environment(process.pid).get(MARK) != mark:
            continue
        pidfd = procfs.open_process(process.pid, process.start)
        if pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def _reap(pidfd: int) -> str:
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:  # started by an earlier backend
        result = None
    if result is None:
        return "has ended"
    if result.si_code == os.CLD_EXITED:
        return f"exited with code {result.si_status}"
    return f"was killed by signal {result.si_status}"
