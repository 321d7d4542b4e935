"""Ports for tests: out of those that connections do not get by themselves, and whatever runs beside
this process, a port that was chosen here is not chosen there before it is bound.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
from collections.abc import Iterator

from tests.lab.place import is_free, share

_MINE = share(10_000, 15_000)
_ORDER = itertools.cycle(random.sample(_MINE, len(_MINE)))


def free_port() -> int:
    """A port nobody listens on; none comes twice before all others have come."""
    return next(port for port in _ORDER if is_free(port))


def free_ports(count: int) -> int:
    """The first of ``count`` consecutive ports nobody listens on."""
    while True:
        first = free_port()
        if all(port in _MINE and is_free(port) for port in range(first, first + count)):
            return first


@contextlib.contextmanager
def dead_port() -> Iterator[int]:
    """A port that refuses connections, and that nobody else gets until the block ends."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", free_port()))
        yield int(bound.getsockname()[1])


def service_ports() -> list[int]:
    """A ``port_range`` for services of this process, which bind theirs only once they run."""
    mine = share(20_000, 30_000)
    return [mine[0], mine[-1]]
