"""Host keys of compute nodes: fetched once over the verified login, then pinned in a file.

Keeps no state but those files. A fetch runs on a thread of its own.
"""

from __future__ import annotations

import logging
import re
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from slurmgate.errors import CannotStart, SlurmgateError
from slurmgate.files import write_new
from slurmgate.model import SshSpec
from slurmgate.tunnels.loop import Loop
from slurmgate.tunnels.routes import Folders, Route
from slurmgate.tunnels.stderr import Finding, Meaning

log = logging.getLogger(__name__)

_KEY = re.compile(r"^\S+ ((?:ssh|ecdsa|sk)-\S+ [A-Za-z0-9+/=]+)\s*$", re.MULTILINE)
_TIMEOUT = 20.0
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

    def prepare(self, route: Route, then: Callable[[Finding | None], None]) -> None:
        """Call ``then``, on the loop's thread, once the keys are there or could not be had."""
        path = self._folders.pin(route)
        if path.exists():
            then(None)
            return

        def fetch() -> None:
            found = self._fetch(route, path)
            self._loop.call(lambda: then(found))

        threading.Thread(target=fetch, name="node-keys", daemon=True).start()

    def _fetch(self, route: Route, path: Path) -> Finding | None:
        what = f"the host keys of {route.host} cannot be fetched on {route.ssh.host}"
        script = shlex.join(["ssh-keyscan", "-T", "5", "-p", str(route.node_port), route.host])
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
            reason = words[-1].strip() if words else "it offers none"
            return Finding(meaning, f"{what}: {reason}")
        try:
            write_new(path, "".join(f"{route.host} {key}\n" for key in keys).encode())
        except FileExistsError:
            return None
        except OSError as error:
            return Finding(Meaning.OTHER, f"{path} cannot be written: {error.strerror}")
        log.info("host keys of %s pinned in %s", route.host, path)
        return None
