"""Whole sessions of processes: a leader that was started in one, and whoever it left in it.

Keeps no state but the file ``remember`` writes: who runs, for a process that did not start them.
Callable from any thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurmgate import procfs
from slurmgate.files import write_atomic

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """A session by its leader: pid, start time and name; the leader may have ended meanwhile."""

    pid: int
    start: int
    comm: str

    @classmethod
    def of(cls, pid: int) -> Session | None:
        """Describe the session a process leads; None when it is gone."""
        process = procfs.read(pid)
        return None if process is None else cls(pid, process.start, process.comm)

    def leader_runs(self) -> bool:
        """Say whether the leader, this very process, has not ended yet."""
        return procfs.alive(self.pid, self.start)

    def members(self) -> list[procfs.Process]:
        """List who runs in it.

        Once the leader is gone altogether the members must also have its name, as the workers of
        nginx do: if all of the session had ended, the pid could name another one by now.
        """
        leader = procfs.read(self.pid)
        found = procfs.session_members(self.pid)
        if leader is None:
            return [process for process in found if process.comm == self.comm]
        return found if leader.start == self.start else []

    def signal_leader(self, number: signal.Signals) -> None:
        """Send a signal to the leader, never to somebody who got its pid."""
        pidfd = procfs.open_process(self.pid, self.start)
        if pidfd is None:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        os.close(pidfd)

    def kill(self, patience: float = 5.0) -> bool:
        """Kill everybody in it; say whether all were gone within ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while members := self.members():
            with contextlib.ExitStack() as stack:
                gone = select.poll()
                for member in members:
                    pidfd = procfs.open_process(member.pid, member.start)
                    if pidfd is None:
                        continue
                    stack.callback(os.close, pidfd)
                    gone.register(pidfd, select.POLLIN)
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                gone.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if time.monotonic() > deadline:
                return False
        return True


def remember(path: Path, running: Mapping[str, Session]) -> bool:
    """Keep the sessions that run, by name, in a file; False, and a log line, when that fails."""
    boot = procfs.boot_id()
    entries = {name: {**dataclasses.asdict(s), "boot": boot} for name, s in running.items()}
    try:
        write_atomic(path, json.dumps(entries).encode())
    except OSError as error:
        _LOG.warning("cannot write %s: %s", path, error.strerror)
        return False
    return True


def remembered(path: Path) -> dict[str, Session]:
    """Read the sessions of this boot out of such a file; none when it is missing or damaged."""
    try:
        entries = json.loads(path.read_bytes())
        return {
            str(name): Session(int(entry["pid"]), int(entry["start"]), str(entry["comm"]))
            for name, entry in entries.items()
            if entry["boot"] == procfs.boot_id()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("%s is damaged and ignored: %s", path, error)
        return {}
