"""Reading the configuration again: all or nothing, by command, signal or because the file changed.

One Reloader per backend; its methods may be called from any thread and run one at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from slurmgate import config as configuration
from slurmgate.errors import ConfigError, SlurmgateError
from slurmgate.model import Config

log = logging.getLogger(__name__)

WATCH_EVERY = 0.5
RESTART_THE_GATE = "gate: changed; restart the gate to put it in force"

Signature = tuple[int, int, int, int]
GateChange = Callable[[Config, Config], "Callable[[], list[str]]"]
"""Tries a configuration's changed gate section, given with the configuration in force (ConfigError
if it cannot be used); the result puts it in force and gives notes for the operator. Both may raise
ConfigError or OSError."""


class Reloader:
    """Holds the configuration in force, and what was wrong with the last one that was refused.

    ``admit`` raises ConfigError for one that this machine cannot put in force, before any part is.
    ``serving`` names the gate that serves just now, if it reads its section only when it starts.
    """

    def __init__(
        self,
        config: Config,
        apply: Callable[[Config, bytes], None],
        try_gate: GateChange,
        *,
        admit: Callable[[Config], None] = lambda config: None,
        serving: Callable[[], str | None] = lambda: None,
        error: str | None = None,
    ) -> None:
        self.config = config
        self.error = error
        self.loaded_at = _now()
        self._apply = apply
        self._admit = admit
        self._serving = serving
        self._outdated_gate: str | None = None
        self._try_gate = try_gate
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._seen = signature(config.path)
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch the file."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    @property
    def gate_note(self) -> str | None:
        """What is still to be done to put the ``gate`` section in force."""
        if self._outdated_gate is None or self._outdated_gate != self._serving():
            return None
        return RESTART_THE_GATE

    def reload(self) -> list[str]:
        """Read and apply the file; give notes for the operator.

        Raises ConfigError, and everything stays as it was, when anything in it is wrong or cannot
        be applied.
        """
        with self._lock:
            self._seen = signature(self.config.path)
            try:
                fresh, content = configuration.load_with_content(self.config.path)
                notes = list(fresh.warnings) + self._put_in_force(fresh, content)
            except (SlurmgateError, OSError) as error:
                self.error = str(error)
                log.error("configuration refused, the running one stays:\n%s", error)
                if isinstance(error, OSError):
                    raise ConfigError([f"cannot be applied: {error}"]) from error
                raise
            self.error = None
            self.loaded_at = _now()
            log.info("configuration loaded: %d services", len(fresh.services))
            for note in notes:
                log.warning("%s", note)
            return notes

    def _put_in_force(self, fresh: Config, content: bytes) -> list[str]:
        notes = []
        running = self.config
        if fresh.instance != running.instance:
            notes.append("instance: takes effect at the next start of the backend")
        self._admit(fresh)
        if fresh.gate != running.gate:
            commit = self._try_gate(fresh, running)
            notes += commit()
            self._outdated_gate = self._serving()
        self._apply(fresh, content)
        self.config = fresh
        return notes

    def _watch(self) -> None:
        """Reload once the file has changed and then kept still for a round."""
        before: Signature | None = self._seen
        while not self._closed.wait(WATCH_EVERY):
            current = signature(self.config.path)
            still = current == before
            before = current
            if not self.config.watch or not still or current == self._seen or current is None:
                continue
            try:
                self.reload()
            except ConfigError:
                continue
            except SlurmgateError as error:
                log.error("configuration not applied: %s", error)


def signature(path: Path) -> Signature | None:
    """Tell one version of a file from another; None while there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
