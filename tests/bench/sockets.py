"""Who is connected with whom over TCP, as /proc shows it. Keeps no state."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path

ESTABLISHED = "01"
End = tuple[str, int]


def connections(pid: int) -> list[tuple[End, End]]:
    """Own end and far end of each IPv4 connection that a process has."""
    own = _inodes(pid)
    return [ends for inode, ends in _established() if inode in own]


def partners(pid: int, candidates: Iterable[int]) -> list[int]:
    """Those candidates that hold the far end of a connection of this process."""
    far = {(there, here) for here, there in connections(pid)}
    wanted = {inode for inode, ends in _established() if ends in far}
    return [candidate for candidate in candidates if wanted & _inodes(candidate)]


def _established() -> list[tuple[str, tuple[End, End]]]:
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return [(f[9], (_end(f[1]), _end(f[2]))) for f in fields if f[3] == ESTABLISHED]


def _end(text: str) -> End:
    address, port = text.split(":")
    return socket.inet_ntoa(int(address, 16).to_bytes(4, "little")), int(port, 16)


def _inodes(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    found.add(target.removeprefix("socket:[").removesuffix("]"))
    return found
