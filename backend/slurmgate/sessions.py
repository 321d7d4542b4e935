"""Ends whole sessions of processes: a leader that was started in one, and whoever it left in it.

Keeps no state; callable from any thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass

from slurmgate import procfs


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
