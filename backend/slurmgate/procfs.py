"""Processes of this machine as ``/proc`` shows them, told apart by pid *and* start time.

A pid alone names nobody for long: it is given out again. A pid with its start time names one
process of one boot. Nothing here keeps state; every function reads ``/proc`` anew and may be called
from any thread.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_VSIZE, _ENV_END = 20, 48
_LOOKS = 3
_LOADING_MAX = 1.0
_ENVIRON_MAX = 1 << 20
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table; ``start`` is in clock ticks since boot."""

    pid: int
    comm: str
    state: str
    parent: int
    group: int
    session: int
    start: int

    @property
    def ended(self) -> bool:
        """Whether it runs no more and only waits to be reaped."""
        return self.state in "ZX"


def read(pid: int) -> Process | None:
    """Describe one process; None when there is none with this pid, or none we may see."""
    stat = _stat(pid)
    if stat is None:
        return None
    name, fields = stat
    return Process(
        pid=pid,
        comm=name.decode(errors="replace"),
        state=fields[0].decode(),
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        start=int(fields[19]),
    )


def start_time(pid: int) -> int | None:
    """Give the start time in clock ticks since boot; None when there is no such process."""
    process = read(pid)
    return None if process is None else process.start


def alive(pid: int, start: int) -> bool:
    """Say whether this very process still runs; a zombie or a recycled pid does not count."""
    process = read(pid)
    return process is not None and process.start == start and not process.ended


def processes() -> Iterator[Process]:
    """List every process that runs, zombies left out."""
    for entry in os.listdir(_PROC):
        if entry.isdigit():
            process = read(int(entry))
            if process is not None and not process.ended:
                yield process


def catches(pid: int, number: signal.Signals) -> bool:
    """Say whether a process has a handler for a signal, so that it will not die of it."""
    try:
        status = (_PROC / str(pid) / "status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def session_members(leader: int) -> list[Process]:
    """List who runs in the session or process group that ``leader`` opened, itself included.

    The kernel gives the pid of a leader to nobody else while a member is left.
    """
    return [p for p in processes() if leader in (p.session, p.group)]


def environment(pid: int) -> dict[str, str]:
    """Give the environment a process was started with; empty when it is gone or somebody else's.

    While a process loads another program it seems to have none: this waits until it is loaded, and
    looks again to tell a process without environment from one that is about to have one.
    """
    deadline = time.monotonic() + _LOADING_MAX
    looks = 0
    raw = _environ(pid)
    while raw == b"" and looks < _LOOKS and time.monotonic() < deadline:
        stat = _stat(pid)
        if stat is None or stat[1][_VSIZE] == b"0":  # gone, or a thread of the kernel
            break
        time.sleep(0.001)
        looks += stat[1][_ENV_END] != b"0"
        raw = _environ(pid)
    return _parse_environment(raw or b"")


def find_marked(marks: Mapping[str, str]) -> list[Process]:
    """List the running processes of this user whose environment holds all of ``marks``."""
    uid = os.geteuid()
    return [p for p in processes() if _owner(p.pid) == uid and _has(p.pid, marks)]


def find_variable(name: str) -> list[tuple[Process, str]]:
    """List the running processes of this user that have an environment variable, with its value."""
    uid = os.geteuid()
    found = ((p, environment(p.pid).get(name)) for p in processes() if _owner(p.pid) == uid)
    return [(process, value) for process, value in found if value is not None]


def command_line(pid: int) -> list[str]:
    """Give the argv of a process; empty when it is gone or has none."""
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
    return [os.fsdecode(word) for word in raw.removesuffix(b"\0").split(b"\0")] if raw else []


def ancestors(pid: int) -> set[int]:
    """Give ``pid`` and every parent above it."""
    found: set[int] = set()
    process = read(pid)
    while process is not None and process.pid not in found:
        found.add(process.pid)
        process = read(process.parent)
    return found


def open_process(pid: int, start: int) -> int | None:
    """Open a pidfd of this very process, zombies included; None when it is gone.

    Signals sent through a pidfd never reach a process that was given the pid later.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if start_time(pid) != start:
        os.close(fd)
        return None
    return fd


def boot_id() -> str:
    """Name this boot of the machine: start times of different boots say nothing of each other."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def monotonic(start: int) -> float:
    """Convert a start time to seconds of ``time.monotonic``, which may stand still in a suspend."""
    since_start = time.clock_gettime(time.CLOCK_BOOTTIME) - start / _TICKS_PER_SECOND
    return time.monotonic() - since_start


def _stat(pid: int) -> tuple[bytes, list[bytes]] | None:
    """Give name and fields of a process; the first field is its state, number 3 of proc(5)."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The name is in parentheses and may itself hold spaces and parentheses: look from the end.
    head, _, tail = stat.rpartition(b")")
    return head.partition(b"(")[2], tail.split()


def _parse_environment(raw: bytes) -> dict[str, str]:
    items = [os.fsdecode(item) for item in raw.split(b"\0")]
    found = dict(item.split("=", 1) for item in items if "=" in item)
    for name, value in itertools.pairwise(items):
        if "=" not in name:  # a shell that reads its environment cuts it there for a moment
            found.setdefault(name, value)
    return found


def _environ(pid: int) -> bytes | None:
    """Read the environment as it is just now; None when it is not for us."""
    try:
        fd = os.open(_PROC / str(pid) / "environ", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    try:
        # In one piece: between two reads the process may exchange its memory for another.
        return os.read(fd, _ENVIRON_MAX)
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)


def _owner(pid: int) -> int | None:
    try:
        return (_PROC / str(pid)).stat().st_uid
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def _has(pid: int, marks: Mapping[str, str]) -> bool:
    environ = environment(pid)
    return all(environ.get(name) == value for name, value in marks.items())
