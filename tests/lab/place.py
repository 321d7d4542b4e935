"""Where the parts of a lab are: addresses, ports, folders. No state."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path


def share(first: int, end: int) -> range:
    """What this process has of a range of ports: pytest-xdist runs several beside each other, and
    what one of them has chosen and not yet bound another one would take for free.
    """
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % count
    size = (end - first) // count
    return range(first + number * size, first + (number + 1) * size)


PORTS = share(15000, 20000)  # below what kernels hand out, and no port of a service


@dataclass(frozen=True, slots=True)
class Place:
    """One lab. In containers several run with the same place but for ``roles`` and ``folder``.

    ``login`` and ``nodes`` are addresses or resolvable names that all roles reach; ``listen`` is
    what the sshd of each role listens on. ``home`` must be shared between machines, as on every
    cluster. ``secret`` makes the munge key; ``authorized`` are public keys beside the lab's own.
    """

    folder: Path
    home: Path
    login: str
    nodes: Mapping[str, str]
    listen: Mapping[str, str]  # by role
    ssh_port: int
    control_port: int
    node_ports: Mapping[str, int]
    secret: str
    roles: Collection[str]  # "login", node names
    port_22_problem: str | None = None
    authorized: str = ""

    @property
    def cluster(self) -> str:
        return f"lab{self.control_port}"


def loopback(folder: Path, nodes: int, secret: str) -> Place:
    """A block of loopback addresses, so that each node has all port numbers for itself."""
    block = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}"
    login = f"{block}.1"
    addresses = {f"n{i}": f"{block}.{10 + i}" for i in range(1, nodes + 1)}
    ssh_port, control_port, *node_ports = free_ports(nodes + 2)
    listen = {"login": login, **addresses}
    return Place(
        folder=folder,
        home=folder / "home",
        login=login,
        nodes=addresses,
        listen=listen,
        ssh_port=ssh_port,
        control_port=control_port,
        node_ports=dict(zip(addresses, node_ports, strict=True)),
        secret=secret,
        roles=frozenset(listen),
        port_22_problem=bind_problem(login, 22),
    )


def bind_problem(address: str, port: int) -> str | None:
    """Why nobody can listen there just now; None when it is possible."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen()
        except OSError as error:
            return f"cannot listen on {address}:{port}: {error.strerror}"
    return None


def is_free(port: int) -> bool:
    """Whether nobody has it on any address, outgoing connections included."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("", port))
        return True
    return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody has on any address; another lab is unlikely to choose the same."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError("no free ports")
