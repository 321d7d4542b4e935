"""Which TCP ports a process of ours listens on, as ``/proc`` shows it.

Keeps no state; callable from any thread.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LISTEN = "0A"


def listens(pid: int, port: int) -> bool:
    """Say whether a process listens on a port, without making a connection to it."""
    own = _sockets(pid)
    return bool(own) and any(inode in own for inode in _listening(pid, port))


def _sockets(pid: int) -> set[str]:
    """Give the inodes of the sockets a process has open, as ``/proc/net`` writes them."""
    found = set()
    folder = Path(f"/proc/{pid}/fd")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(folder / name)
                if target.startswith("socket:["):
                    found.add(target[len("socket:[") : -1])
    return found


def _listening(pid: int, port: int) -> list[str]:
    found = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    found.append(fields[9])
    return found
