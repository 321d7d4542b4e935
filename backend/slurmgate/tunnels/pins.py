"""Host keys of compute nodes: fetched once over the verified login, then pinned in a file.

State: those files, and, for the loop's thread, since when the keys of a node could not be had. A
fetch runs on a thread of its own.
"""

from __future__ import annotations

import logging
import re
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from slurmgate.errors import CannotStart, SlurmgateError
from slurmgate.files import write_new
from slurmgate.model import SshSpec
from slurmgate.openssh import NODE_PORT
from slurmgate.tunnels.loop import Loop
from slurmgate.tunnels.routes import Folders, Route
from slurmgate.tunnels.stderr import Finding, Meaning

log = logging.getLogger(__name__)

_KEY = re.compile(r"^\S+ ((?:ssh|ecdsa|sk)-\S+ [A-Za-z0-9+/=]+)\s*$", re.MULTILINE)
_PORT = re.compile(r"^# port (\d+)$", re.MULTILINE)
_TIMEOUT = 20.0
_PATIENCE = 60.0
_NOT_FOUND = 127


class Result(Protocol):
    """What a remote command left."""

    @property
    def code(self) -> int: ...
    @property
    def out(self) -> str: ...
    @property
    def err(self) -> str: ...


class Runner(Protocol):
    """Runs commands on login hosts, blocking."""

    def run(self, ssh: SshSpec | None, script: str, *, timeout: float) -> Result: ...


class Pins:
    """Makes sure that the keys of a node are pinned before ssh asks for them."""

    def __init__(self, loop: Loop, folders: Folders, remotes: Runner) -> None:
        self._loop = loop
        self._folders = folders
        self._remotes = remotes
        self._failing: dict[Path, float] = {}

    def known(self, route: Route) -> Route:
        """Give the route with the port at which the pinned keys were found, if they are."""
        if not route.loopback or route.node_port is not None:
            return route
        try:
            port = _PORT.search(self._folders.pin(route).read_text())
        except OSError:
            return route
        return replace(route, node_port=int(port[1]) if port else NODE_PORT)

    def prepare(self, route: Route, then: Callable[[Finding | None], None]) -> None:
        """Call ``then``, on the loop's thread, once the keys are there or could not be had."""
        path = self._folders.pin(route)
        if path.exists():
            then(None)
            return

        def fetch() -> None:
            found = self._fetch(route, path)
            self._loop.call(lambda: then(self._judge(path, found)))

        threading.Thread(target=fetch, name="node-keys", daemon=True).start()

    def _judge(self, path: Path, found: Finding | None) -> Finding | None:
        """A node may be slow to boot its sshd, but most that offer no keys never will."""
        if found is None:
            self._failing.pop(path, None)
            return None
        now = time.monotonic()
        if now - self._failing.setdefault(path, now) < _PATIENCE:
            return found
        del self._failing[path]
        return Finding(Meaning.HOPELESS, found.text)

    def _fetch(self, route: Route, path: Path) -> Finding | None:
        found = None
        for port in route.node_ports:
            found = self._fetch_from(route, port, path)
            if found is None or found.meaning is Meaning.HOPELESS:
                break
        return found

    def _fetch_from(self, route: Route, port: int, path: Path) -> Finding | None:
        what = f"the host keys of {route.host} cannot be fetched on {route.ssh.host}"
        script = shlex.join(["ssh-keyscan", "-T", "5", "-p", str(port), route.host])
        try:
            result = self._remotes.run(route.ssh, script, timeout=_TIMEOUT)
        except CannotStart as error:
            return Finding(Meaning.HOPELESS, f"{what}: {error}")
        except SlurmgateError as error:
            return Finding(Meaning.OTHER, f"{what}: {error}")
        keys = _KEY.findall(result.out)
        if not keys:
            meaning = Meaning.HOPELESS if result.code == _NOT_FOUND else Meaning.OTHER
            words = [line for line in result.err.splitlines() if not line.startswith("#")]
            ports = " and ".join(str(port) for port in route.node_ports)
            reason = words[-1].strip() if words else f"no sshd answers there on port {ports}"
            return Finding(meaning, f"{what}: {reason}")
        try:
            lines = [f"# port {port}\n", *(f"{route.host} {key}\n" for key in keys)]
            write_new(path, "".join(lines).encode())
        except FileExistsError:
            return None
        except OSError as error:
            return Finding(Meaning.OTHER, f"{path} cannot be written: {error.strerror}")
        log.info("host keys of %s pinned in %s", route.host, path)
        return None
