"""Whether an address can be listened on, and who has it otherwise.

Keeps no state; callable from any thread.
"""

from __future__ import annotations

import errno
import os
import pwd
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slurmgate import procfs

_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class _Listener:
    uid: int
    inode: str


def problem(host: str, port: int) -> str | None:
    """Say in words why nobody can listen there; None when one can."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        return f"{host} is no address of this machine: {error.strerror}"
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(address)
            except OSError as error:
                return _explain(error, host, port)
    return None


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken by {holder(port)}"
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has; take one above 1023"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine"
    return f"{host}:{port}: {error.strerror}"


def holder(port: int) -> str:
    """Name who listens on a port, as well as this user may know it."""
    listeners = list(_listeners(port))
    inodes = {f"socket:[{listener.inode}]" for listener in listeners}
    for process in procfs.processes():
        if inodes & set(_open_files(process.pid)):
            return f"{process.comm} (pid {process.pid})"
    for listener in listeners:
        try:
            return f"a process of {pwd.getpwuid(listener.uid).pw_name}"
        except KeyError:
            return f"a process of uid {listener.uid}"
    return "another process"


def _listeners(port: int) -> Iterator[_Listener]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except FileNotFoundError:  # no IPv6
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                yield _Listener(int(fields[7]), fields[9])


def _open_files(pid: int) -> Iterator[str]:
    try:
        entries = list(os.scandir(f"/proc/{pid}/fd"))
    except OSError:  # gone, or another user's
        return
    for entry in entries:
        try:
            yield os.readlink(entry.path)
        except OSError:
            continue
