"""All tunnels of a backend, looked after by one thread.

That thread owns the links and what was found of an earlier backend; the methods of ``Tunnels`` put
calls into its queue or read single values, and return at once.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from pathlib import Path

from slurmgate.errors import CannotStart
from slurmgate.tunnels import children, routes
from slurmgate.tunnels.children import Found
from slurmgate.tunnels.link import LocalLink, Means, Prepare, UnixLink
from slurmgate.tunnels.loop import Loop
from slurmgate.tunnels.master import MasterLink
from slurmgate.tunnels.observer import TunnelObserver
from slurmgate.tunnels.pins import Pins, Runner
from slurmgate.tunnels.routes import Address, Command, Folders, Kind, Route
from slurmgate.tunnels.stderr import Finding, Place
from slurmgate.tunnels.tellers import PortTeller, ReplicaTeller, Teller
from slurmgate.tunnels.turns import Turn, Turns

log = logging.getLogger(__name__)

_TICK = 0.5
_PATIENCE = 2.0

AnyLink = UnixLink | LocalLink | MasterLink
Name = tuple[str, str]
"""Key and kind of a tunnel."""


class Tunnels:
    """Every tunnel of one instance; callable from any thread.

    ``sockets`` is a folder for nothing else, ``pins`` one in the state directory. The observer is
    called on the supervisor's thread.
    """

    def __init__(
        self, owner: str, sockets: Path, pins: Path, remotes: Runner, observer: TunnelObserver
    ) -> None:
        for folder in (sockets, pins):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._owner = owner
        self._folders = Folders(sockets, pins)
        self._observer = observer
        self._links: dict[Name, AnyLink] = {}
        self._tellers: dict[str, ReplicaTeller] = {}
        self._found: dict[Name, list[Found]] = {}
        self._ports: dict[Address, str] = {}
        self._leaving: Counter[Address] = Counter()
        self._next: dict[Address, Callable[[], None]] = {}
        self._turns: defaultdict[Address, Turns] = defaultdict(Turns)
        self._loop = Loop("tunnels")
        self._pins = Pins(self._loop, self._folders, remotes)
        self._loop.call(self._look_around)
        self._loop.call(self._tick)

    def open(self, key: str, route: Route) -> str:
        """Have a tunnel open from now on; give the endpoint that leads into it.

        A running ssh of an earlier backend for the same key and the same command is taken over.
        CannotStart when ssh cannot be given such a host or user name.
        """
        route = self._pins.known(route)
        command = self._command(key, route, None)
        self._loop.call(lambda: self._open(key, route, command))
        return f"unix:{self._folders.socket(key)}"

    def listen(self, key: str, route: Route, address: Address) -> None:
        """Have a ``local_port`` lead to the same place; whoever had the address gives it up.

        If it cannot be listened on, only ``notice`` says so. CannotStart as in ``open``.
        """
        route = self._pins.known(route)
        command = self._command(key, route, address)
        self._loop.call(lambda: self._listen(key, route, address, command))

    def unlisten(self, key: str) -> None:
        """End the listener of ``listen``; idempotent."""
        self._loop.call(lambda: self._close((key, Kind.LOCAL)))

    def is_open(self, key: str) -> bool:
        """Say whether the tunnel's socket accepts connections, as far as is known."""
        link = self._links.get((key, Kind.UNIX))
        return link is not None and link.is_open

    def reopen(self, key: str) -> None:
        """End the ssh of a tunnel and start another one at once."""
        self._loop.call(lambda: self._reopen(key))

    def refusals(self, key: str) -> tuple[int, str | None]:
        """Give how many connections the far end has refused, and what else went wrong last."""
        teller = self._tellers.get(key)
        return (0, None) if teller is None else (teller.refused, teller.other)

    def close(self, key: str) -> None:
        """End a tunnel and its ``local_port`` and remove its socket; idempotent."""
        self._loop.call(lambda: self._close((key, Kind.LOCAL)))
        self._loop.call(lambda: self._close((key, Kind.UNIX)))

    def sweep(self, wanted: Collection[str]) -> None:
        """End what an earlier backend left whose key is not wanted, and remove its files."""
        keys = frozenset(wanted)
        self._loop.call(lambda: self._sweep(keys))

    def shutdown(self) -> None:
        """Look after nothing any more; every ssh lives on for the next backend."""
        self._loop.call(self._let_go)
        self._loop.close()

    def _command(self, key: str, route: Route, address: Address | None) -> Command:
        try:
            return routes.command(self._owner, self._folders, key, route, address)
        except ValueError as error:
            raise CannotStart(f"no tunnel can be opened: {error}") from error

    def _look_around(self) -> None:
        for found in children.find(self._owner):
            self._found.setdefault((found.key, found.kind), []).append(found)

    def _tick(self) -> None:
        self._loop.after(_TICK, self._tick)
        for link in self._links.values():
            link.tick()

    def _open(self, key: str, route: Route, command: Command) -> None:
        name = (key, Kind.UNIX)
        place = routes.place(self._folders, route)
        teller = ReplicaTeller(self._observer, key, place)
        path = self._folders.socket(key)
        link: AnyLink
        if route.by_master:
            forward = routes.forward(path, route, None)
            link = MasterLink(self._loop, teller, route.ssh, forward, place, path)
        else:
            prepare = self._prepare(key, route, None)
            link = UnixLink(self._means(route, teller, command, place, prepare), path)
        if self._known(name, link):
            if self._links[name].is_open:
                self._observer.opened(key)  # who asks once more may not have heard
            return
        self._close(name, found_too=False)
        self._links[name] = link
        self._tellers[key] = teller
        link.start(self._choose(name, command))

    def _listen(self, key: str, route: Route, address: Address, command: Command) -> None:
        name = (key, Kind.LOCAL)
        place = routes.place(self._folders, route)
        teller = PortTeller(self._observer, key, address)
        link: AnyLink
        if route.by_master:
            forward = routes.forward(self._folders.socket(key), route, address)
            link = MasterLink(self._loop, teller, route.ssh, forward, place, None)
        else:
            prepare = self._prepare(key, route, address)
            link = LocalLink(self._means(route, teller, command, place, prepare), address)
        if self._known(name, link):
            return
        self._close(name, found_too=False)
        if address in self._ports:
            self._close((self._ports[address], Kind.LOCAL))
        chosen = self._choose(name, command, address)
        self._end_listeners(address, routes.listens_on(address))
        self._links[name] = link
        self._ports[address] = key
        if self._leaving[address]:
            self._next[address] = link.start
        else:
            link.start(chosen)

    def _prepare(self, key: str, route: Route, address: Address | None) -> Prepare | None:
        """What must be done first: with the keys of a node comes the port of its sshd."""
        if not route.loopback:
            return None

        def prepare(then: Callable[[Command | Finding], None]) -> None:
            def pinned(hindrance: Finding | None) -> None:
                then(hindrance or self._command(key, self._pins.known(route), address))

            self._pins.prepare(route, pinned)

        return prepare

    def _means(
        self, route: Route, teller: Teller, command: Command, place: Place, prepare: Prepare | None
    ) -> Means:
        turn = Turn(self._turns[(route.ssh.host, route.ssh.port)])
        return Means(self._loop, teller, command, place, turn, prepare)

    def _known(self, name: Name, link: AnyLink) -> bool:
        """Whether this very tunnel is looked after already."""
        known = self._links.get(name)
        return known is not None and known.command == link.command

    def _choose(self, name: Name, command: Command, address: Address | None = None) -> Found | None:
        """Pick the ssh to take over, the newest that runs this command, and end all others.

        Two of one name are left when a backend dies while it replaces one; the newer is then the
        one that listens.
        """
        found = self._found.pop(name, [])
        fitting = [f for f in found if f.leads and f.argv == command.argv]
        chosen = fitting[-1] if fitting else None
        for other in found:
            if chosen is None or other.process.session != chosen.process.session:
                self._end_found(other, address)
        return chosen

    def _end_found(self, found: Found, address: Address | None = None) -> None:
        if address is None:
            children.end_found(self._loop, found, _PATIENCE, lambda: None)
            return
        self._leaving[address] += 1
        children.end_found(self._loop, found, _PATIENCE, lambda: self._left(address))

    def _end_listeners(self, address: Address, prefix: str) -> None:
        """End what an earlier backend left listening on an address, for whatever key."""
        for name, entries in list(self._found.items()):
            if any(word.startswith(prefix) for found in entries for word in found.argv):
                del self._found[name]
                for found in entries:
                    self._end_found(found, address)

    def _left(self, address: Address) -> None:
        """Somebody who listened there has ended; the next one starts after the last."""
        self._leaving[address] -= 1
        if self._leaving[address] <= 0:
            del self._leaving[address]
            start = self._next.pop(address, None)
            if start is not None:
                start()

    def _reopen(self, key: str) -> None:
        link = self._links.get((key, Kind.UNIX))
        if link is not None:
            link.reopen()

    def _close(self, name: Name, *, found_too: bool = True) -> None:
        link = self._links.pop(name, None)
        key, kind = name
        if kind == Kind.UNIX:
            self._tellers.pop(key, None)
        if link is not None:
            self._end_link(key, kind, link)
        if found_too:
            left = self._found.pop(name, [])
            for found in left:
                self._end_found(found)
            if left and kind == Kind.UNIX:
                self._folders.socket(key).unlink(missing_ok=True)
            if left:
                self._folders.log(key, Kind(kind)).unlink(missing_ok=True)

    def _end_link(self, key: str, kind: str, link: AnyLink) -> None:
        address = next((a for a, k in self._ports.items() if k == key), None)
        if kind == Kind.UNIX or address is None:
            link.close()
            return
        del self._ports[address]
        self._next.pop(address, None)
        self._leaving[address] += 1
        link.close(lambda: self._left(address))

    def _sweep(self, wanted: frozenset[str]) -> None:
        ours = {link.pid for link in self._links.values()}
        for found in children.find(self._owner):
            if found.process.session in ours:
                continue
            name = (found.key, found.kind)
            if found.key not in wanted or name in self._links:
                log.info("ending ssh %d of tunnel %s: not wanted", found.process.pid, found.key)
                self._found.pop(name, None)
                self._end_found(found)
        kept = wanted | {key for key, _ in self._links}
        for path in self._folders.sockets.iterdir():
            if routes.key_of_file(path.name) not in kept:
                path.unlink(missing_ok=True)

    def _let_go(self) -> None:
        for link in self._links.values():
            link.let_go()
        self._links.clear()
