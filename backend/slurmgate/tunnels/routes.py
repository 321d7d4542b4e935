"""Where tunnels lead, and the command lines, names and marks that belong to one. Pure.

``<key>.sock`` is the socket of a tunnel, ``<key>.<kind>.log`` what its ssh prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from slurmgate import openssh
from slurmgate.model import SshSpec
from slurmgate.tunnels.stderr import Place

MARK = "SLURMGATE_TUNNEL"

Address = tuple[str, int]


class Kind(StrEnum):
    """What an ssh listens on: the unix socket of a replica, or a service's ``local_port``."""

    UNIX = "unix"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Route:
    """The way to a replica's port. With ``loopback`` it is a port of ``host``'s own 127.0.0.1.

    ``host`` is named as the login host reaches it; ``node_port`` is where its sshd listens, None
    as long as that is not known: clusters whose login host has a port of its own have either that
    one or the usual one on their nodes.
    """

    ssh: SshSpec
    host: str
    port: int
    loopback: bool = False
    node_port: int | None = None

    @property
    def node_ports(self) -> tuple[int, ...]:
        """Where the node's sshd may listen, the likelier port first."""
        if self.node_port is not None:
            return (self.node_port,)
        return tuple(dict.fromkeys((self.ssh.port, openssh.NODE_PORT)))

    @property
    def by_master(self) -> bool:
        """Whether the operator's running master does the forwarding, without a child of ours."""
        return self.ssh.control_path is not None and not self.loopback

    @property
    def proxied(self) -> bool:
        """Whether the ssh has a proxy command, and so a second process in its session."""
        return self.loopback or self.ssh.jump is not None


@dataclass(frozen=True, slots=True)
class Folders:
    """Where things lie: sockets and logs of the tunnels, and pinned keys of compute nodes."""

    sockets: Path
    pins: Path

    def socket(self, key: str) -> Path:
        """The unix socket of a tunnel."""
        return self.sockets / f"{key}.sock"

    def log(self, key: str, kind: Kind) -> Path:
        """What the ssh of a tunnel prints."""
        return self.sockets / f"{key}.{kind}.log"

    def pin(self, route: Route) -> Path:
        """The pinned keys of a node; the same name behind another login host is another node."""
        port = "" if route.ssh.port == 22 else f"-{route.ssh.port}"
        return self.pins / f"{route.host}@{route.ssh.host}{port}.known"


@dataclass(frozen=True, slots=True)
class Command:
    """One ssh as it is to run; ``mark`` is the value of the variable it is found by."""

    argv: tuple[str, ...]
    mark: str
    log: Path
    proxied: bool


def mark(owner: str, key: str, kind: Kind) -> str:
    """Name the ssh of a tunnel, for its environment."""
    return f"{owner}.{key}.{kind}"


def read_mark(value: str, owner: str) -> tuple[str, str] | None:
    """Give key and kind out of such a name; None when it belongs to another instance."""
    if not value.startswith(f"{owner}."):
        return None
    key, _, kind = value.removeprefix(f"{owner}.").rpartition(".")
    return key, kind


def command(
    owner: str, folders: Folders, key: str, route: Route, address: Address | None
) -> Command:
    """Build the ssh of a tunnel, for its unix socket without ``address``.

    ValueError when host or user name cannot be passed to ssh.
    """
    kind = Kind.UNIX if address is None else Kind.LOCAL
    if route.loopback:
        pin = folders.pin(route)
        options = openssh.node_options(route.ssh, route.host, pin, route.host, route.node_ports[0])
        destination = openssh.node_destination(route.ssh, route.host)
    else:
        options, destination = openssh.options(route.ssh), openssh.destination(route.ssh)
    argv = ["ssh", *options, "-N", "-o", "ExitOnForwardFailure=yes"]
    argv += ["-o", "StreamLocalBindUnlink=yes", "-o", "StreamLocalBindMask=0177"]
    argv += ["-L", forward(folders.socket(key), route, address), "--", destination]
    return Command(
        tuple(argv), mark(owner, key, kind), folders.log(key, kind), proxied=route.proxied
    )


def forward(socket: Path, route: Route, address: Address | None) -> str:
    """Spell ssh's argument of ``-L``: from a unix socket, or from an address when it is given."""
    host = "127.0.0.1" if route.loopback else route.host
    if address is None:
        listen = _escape(str(socket))
    else:
        listen = listens_on(address).removesuffix(":")
    return f"{listen}:{_bracket(host)}:{route.port}"


def listens_on(address: Address) -> str:
    """Give what ``forward`` begins with for an address."""
    return f"{_bracket(address[0])}:{address[1]}:"


def key_of_file(name: str) -> str:
    """Give the key of the tunnel that a socket or a log belongs to."""
    stem = name.removesuffix(".sock").removesuffix(".log")
    return stem if name.endswith(".sock") else stem.rpartition(".")[0]


def place(folders: Folders, route: Route) -> Place:
    """Name the ends of a route for people."""
    if route.loopback:
        return Place(f"127.0.0.1:{route.port}", route.host, str(folders.pin(route)))
    return Place(f"{_bracket(route.host)}:{route.port}", route.ssh.host)


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _escape(path: str) -> str:
    """A colon ends a field there, a backslash escapes, and % begins a value of ssh's own."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace("%", "%%")
