"""The ways to replicas that run on nodes: tunnels, direct addresses, and who has a ``local_port``.

State: the way to each replica, under a lock that is never held while the observer is told.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from slurmgate.errors import CannotStart
from slurmgate.launchers.slurm_format import NodePlace
from slurmgate.model import TunnelMode
from slurmgate.records import JobRecord, Record
from slurmgate.ssh import HostAway, Remotes
from slurmgate.tunnels import Route, Tunnels

LOGIN_HOST = "localhost"


class WayObserver(Protocol):
    """Told of ways by the tunnels' thread, or by the one that opens; must not block."""

    def connected(self, replica: str, gen: int, endpoint: str) -> None:
        """The gate can dial it there."""

    def troubled(self, replica: str, gen: int, reason: str) -> None:
        """The way is broken for now."""

    def blocked(self, replica: str, gen: int, reason: str) -> None:
        """Nothing will ever come through."""

    def noticed(self, replica: str, text: str | None) -> None:
        """Say why its ``local_port`` is not listened on; None when it is."""


@dataclass(frozen=True, slots=True)
class _Way:
    replica: str
    gen: int
    service: str
    created: float
    port: int
    node: str
    route: Route | None
    tunnelled: bool
    endpoint: str
    local: tuple[str, int] | None
    is_open: bool = False

    @property
    def key(self) -> str:
        return f"{self.replica}.{self.gen}"


class Ways:
    """Every way of one launcher; callable from any thread, and never waits for a host."""

    def __init__(
        self, owner: str, sockets: Path, pins: Path, remotes: Remotes, observer: WayObserver
    ) -> None:
        self._observer = observer
        self._lock = threading.Lock()
        self._ways: dict[str, _Way] = {}
        self._lent: dict[tuple[str, int], str] = {}
        self._tunnels = Tunnels(owner, sockets, pins, remotes, self)

    def open(self, record: Record) -> str:
        """Have a way to a running replica whose ``address`` is known; its endpoint.

        CannotStart when that is no address one could dial, HostAway when it cannot be looked up
        just now. A direct one is open at once.
        """
        job = record.job
        assert job is not None
        assert job.address is not None
        route, tunnelled = _route(job, record.port)
        way = _Way(
            replica=record.replica,
            gen=job.gen,
            service=record.service,
            created=record.created,
            port=record.port,
            node=job.node or job.address,
            route=route,
            tunnelled=tunnelled,
            endpoint="",
            local=job.local,
        )
        if route is not None and tunnelled:
            with self._lock:  # so that nobody hears of it before it is known here
                way = replace(way, endpoint=self._tunnels.open(way.key, route))
                self._ways[record.replica] = way
            return way.endpoint
        way = replace(way, endpoint=_direct(job.address, record.port))
        with self._lock:
            self._ways[record.replica] = way
        self.opened(way.key)
        return way.endpoint

    def has(self, replica: str, gen: int) -> bool:
        """Whether there is a way to this start of a replica, open or not yet."""
        way = self._ways.get(replica)
        return way is not None and way.gen == gen

    def close(self, replica: str, gen: int) -> None:
        """End the way to this start of a replica; idempotent."""
        self._tunnels.close(f"{replica}.{gen}")
        with self._lock:
            way = self._ways.get(replica)
            if way is None or way.gen != gen:
                return
            del self._ways[replica]
            heirs = self._inherit(way)
        for address, heir in heirs:
            self._lend(address, heir)

    def reopen(self, replica: str) -> None:
        """Open the way anew."""
        way = self._ways.get(replica)
        if way is not None and way.tunnelled:
            self._tunnels.reopen(way.key)

    def refused(self, replica: str) -> int:
        """How many connections through it the far end has refused."""
        way = self._ways.get(replica)
        return 0 if way is None or not way.tunnelled else self._tunnels.refusals(way.key)[0]

    def explain(self, replica: str) -> str | None:
        """Say why nothing was ever reached through an open way."""
        way = self._ways.get(replica)
        if way is None or not way.tunnelled or way.route is None:
            return None
        refused, other = self._tunnels.refusals(way.key)
        if not refused:
            return other
        if way.route.loopback:
            return (
                f"nothing listened on 127.0.0.1:{way.port} of {way.node}; the service has to"
                " listen on the port it is given as $1"
            )
        return (
            f"nothing listened on {way.node}:{way.port}; if the service binds 127.0.0.1 only, let"
            ' it bind 0.0.0.0 (or the node\'s address), or set "tunnel": "node-loopback"'
        )

    def sweep(self, keys: Collection[str]) -> None:
        """End what an earlier backend left that is not the way to any of these."""
        self._tunnels.sweep(keys)

    def close_all(self) -> None:
        """End every way; the replicas go on."""
        for way in tuple(self._ways.values()):
            self._tunnels.close(way.key)

    def shutdown(self) -> None:
        """Look after nothing any more; the tunnels live on."""
        self._tunnels.shutdown()

    # -- told by the tunnels -----------------------------------------------------------------

    def opened(self, key: str) -> None:
        """See ``TunnelObserver``."""
        with self._lock:
            way = self._find(key)
            if way is None:
                return
            self._ways[way.replica] = replace(way, is_open=True)
            lend = way.local if way.local is not None and way.local not in self._lent else None
            if lend is not None and way.route is not None:
                self._lent[lend] = way.replica
        self._observer.connected(way.replica, way.gen, way.endpoint)
        if lend is not None:
            self._lend(lend, way)

    def lost(self, key: str, reason: str) -> None:
        """See ``TunnelObserver``."""
        way = self._find(key)
        if way is not None:
            self._observer.troubled(way.replica, way.gen, reason)

    def hopeless(self, key: str, reason: str) -> None:
        """See ``TunnelObserver``."""
        way = self._find(key)
        if way is not None:
            self._observer.blocked(way.replica, way.gen, reason)

    def notice(self, key: str, text: str | None) -> None:
        """See ``TunnelObserver``."""
        way = self._find(key)
        if way is not None:
            self._observer.noticed(way.replica, text)

    def _find(self, key: str) -> _Way | None:
        replica, _, gen = key.rpartition(".")
        way = self._ways.get(replica)
        return way if way is not None and str(way.gen) == gen else None

    # -- local ports -------------------------------------------------------------------------

    def _inherit(self, gone: _Way) -> list[tuple[tuple[str, int], _Way]]:
        """Choose who listens where the replica that ended did; called with the lock held."""
        if gone.local is None or self._lent.get(gone.local) != gone.replica:
            return []
        del self._lent[gone.local]
        able = [w for w in self._ways.values() if w.is_open and w.local == gone.local and w.route]
        heir = min(able, key=lambda way: way.created, default=None)
        if heir is None:
            return []
        self._lent[gone.local] = heir.replica
        return [(gone.local, heir)]

    def _lend(self, address: tuple[str, int], way: _Way) -> None:
        if way.route is not None:
            self._tunnels.listen(way.key, way.route, address)


def address_of(job: JobRecord, node: str, place: NodePlace) -> str:
    """Name the node of a job as it is dialled: by the login host, or directly."""
    through_login = job.tunnel is not TunnelMode.NONE
    if place.is_login_host and through_login:
        return LOGIN_HOST
    return place.address or node


def _route(job: JobRecord, port: int) -> tuple[Route | None, bool]:
    """Give the way through the login host, if there is one, and whether the gate goes it."""
    if job.ssh is None or job.address is None:
        return None, False
    loopback = job.tunnel is TunnelMode.NODE_LOOPBACK and job.address != LOGIN_HOST
    route = Route(job.ssh, job.address, port, loopback=loopback)
    return route, job.tunnel is not TunnelMode.NONE


def _direct(address: str, port: int) -> str:
    """Give an endpoint nginx can dial: it resolves no names."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        text = f"node {address} is not known on this machine: {error.strerror}"
        if error.errno == socket.EAI_NONAME:
            raise CannotStart(text) from error
        raise HostAway(text) from error
    ip = min((str(entry[4][0]) for entry in found), key=lambda text: ":" in text)
    return f"[{ip}]:{port}" if ipaddress.ip_address(ip).version == 6 else f"{ip}:{port}"
