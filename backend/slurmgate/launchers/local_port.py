"""Chooses the port a process replica listens on.

Keeps no state; the caller sees to it that no two choices run at the same time.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Container

from slurmgate.errors import StartRefused
from slurmgate.model import ServiceSpec

HIGHEST = 65535


def choose(spec: ServiceSpec, held: Container[int]) -> int:
    """Give a port that nobody listens on and that is not ``held``; StartRefused if there is none.

    A fixed port counts upward over those held, and where a service may have several replicas over
    those of others as well. An automatic one comes out of ``port_range``, at random, so that
    several gates on one machine rarely try the same.
    """
    if spec.remote_port is not None:
        return _counted(spec.remote_port, held, others=spec.replicas.max > 1)
    low, high = spec.port_range
    count = high - low + 1
    first = random.randrange(count)
    for step in range(count):
        port = low + (first + step) % count
        if port not in held and _refusal(port) is None:
            return port
    raise StartRefused(f"no port of {low}-{high} is free")


def _counted(first: int, held: Container[int], *, others: bool) -> int:
    """Give the first port from there that is not held; with ``others``, that nobody listens on."""
    for port in (p for p in range(first, HIGHEST + 1) if p not in held):
        refusal = _refusal(port)
        if refusal is None:
            return port
        if not others:
            raise StartRefused(f"port {port} is not free: {refusal}")
    raise StartRefused(f"no port from {first} upward is free")


def _refusal(port: int) -> str | None:
    """Say why nobody could listen on a port of this machine; None when somebody could."""
    for host in ("127.0.0.1", ""):  # a listener on another address shows on the wildcard only
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                return error.strerror or str(error)
    return None
