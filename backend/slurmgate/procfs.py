"""Processes of this machine as ``/proc`` shows them, told apart by pid *and* start time.

A pid alone names nobody for long: it is given out again. A pid with its start time names one
process of one boot. Nothing here keeps state; every function reads ``/proc`` anew and may be called
from any thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
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
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The name is in parentheses and may itself hold spaces and parentheses: look from the end.
    head, _, tail = stat.rpartition(b")")
    fields = tail.split()
    return Process(
        pid=pid,
        comm=head.partition(b"(")[2].decode(errors="replace"),
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


def session_members(leader: int) -> list[Process]:
    """List who runs in the session or process group that ``leader`` opened, itself included.

    The kernel gives the pid of a leader to nobody else while a member is left.
    """
    return [p for p in processes() if leader in (p.session, p.group)]


def environment(pid: int) -> dict[str, str]:
    """Give the environment a process was started with; empty when it is gone or somebody else's."""
    try:
        raw = (_PROC / str(pid) / "environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    pairs = (item.partition(b"=") for item in raw.split(b"\0") if b"=" in item)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def find_marked(marks: Mapping[str, str]) -> list[Process]:
    """List the running processes of this user whose environment holds all of ``marks``."""
    uid = os.geteuid()
    return [p for p in processes() if _owner(p.pid) == uid and _has(p.pid, marks)]


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


def _owner(pid: int) -> int | None:
    try:
        return (_PROC / str(pid)).stat().st_uid
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def _has(pid: int, marks: Mapping[str, str]) -> bool:
    environ = environment(pid)
    return all(environ.get(name) == value for name, value in marks.items())
