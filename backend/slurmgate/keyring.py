"""The clients' keys in force: reads their file again when it changes, and knows what gates get.

One Keyring per backend. ``current`` is immutable and may be read by any thread; only ``follow`` and
the watching thread replace it, one at a time. What cannot be read lets nobody in: a file that is
broken or missing at first, and one that has gone; while one that breaks later leaves in force what
was read before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slurmgate import keys
from slurmgate.errors import KeysError, KeysMissing
from slurmgate.keys import Key

log = logging.getLogger(__name__)

LOOK_EVERY = 0.25
SECOND_LOOK = 0.05
GATE_WITHIN = 1.5
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Keyset:
    """Who is let in: anybody unless ``required``, else who has one of ``keys``.

    Equal versions mean equal in all that a gate acts on. ``error`` is for people.
    """

    required: bool
    keys: tuple[Key, ...] = ()
    error: str | None = None
    version: str = field(init=False)

    def __post_init__(self) -> None:
        content = json.dumps([self.required, self._entries()]).encode()
        object.__setattr__(self, "version", hashlib.sha256(content).hexdigest()[:32])

    def wire(self) -> dict[str, Any]:
        """What a gate is sent."""
        return {"version": self.version, "required": self.required, "entries": self._entries()}

    def _entries(self) -> list[dict[str, Any]]:
        return [
            {
                "name": key.name,
                "sha256": key.sha256,
                "services": None if key.services is None else list(key.services),
                "rpm": key.rpm,
                "in_flight": key.in_flight,
                "expires": key.expires,
            }
            for key in self.keys
        ]


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What a gate counted for one key: totals since its boot, and requests under way."""

    requests: int = 0
    refused: int = 0
    in_flight: int = 0


def judge(before: Keyset, found: tuple[Key, ...] | KeysError) -> Keyset:
    """Pure: who is let in after a look at the file, given who was."""
    if isinstance(found, tuple):
        return Keyset(True, found)
    if isinstance(found, KeysMissing):
        effect = "until slurmgate keys add makes it, only public services can be reached"
        return Keyset(True, (), f"{_shortened(found)}; {effect}")
    if before.keys:
        effect = f"the keys read before ({len(before.keys)}) stay in force"
    else:
        effect = "until it is mended, only public services can be reached"
    return Keyset(True, before.keys, f"{_shortened(found)}\n{effect}")


def _shortened(error: KeysError) -> str:
    more = len(error.problems) - _SHOWN
    return "\n".join(error.problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else []))


class Keyring:
    """The keys in force, and what the gate counted for each."""

    def __init__(self, path: Path | None) -> None:
        self._path: Path | None = None
        self._seen: bytes | str | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="keys", daemon=True)
        self.current = Keyset(False)
        self.use: Mapping[str, KeyUse] = MappingProxyType({})
        self._heard = threading.Condition()
        self._told: str | None = None
        self.follow(path)

    def start(self) -> None:
        """Begin to watch the file."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def follow(self, path: Path | None) -> None:
        """Take over the ``keys_file`` of a configuration; None: nobody needs a key."""
        with self._lock:
            if path == self._path:
                return
            self._path, self._seen = path, None
            if path is None:
                self._put_in_force(Keyset(False))
            else:
                self._look(path, Keyset(True))

    def heard(self, version: str | None, use: Mapping[str, KeyUse]) -> None:
        """Take in which keys the gate has and what it counted (a thread of the control socket)."""
        with self._heard:
            self._told, self.use = version, MappingProxyType(dict(use))
            self._heard.notify_all()

    def await_gate(self) -> bool:
        """Wait until the gate has the keys of now; False when it does not say so in time.

        Blocks its thread for at most ``GATE_WITHIN`` seconds.
        """
        with self._heard:
            return self._heard.wait_for(lambda: self._told == self.current.version, GATE_WITHIN)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_EVERY):
            with self._lock:
                if self._path is not None:
                    self._look(self._path, self.current)

    def _look(self, path: Path, before: Keyset) -> None:
        """Read the file; what is wrong with it counts when it is still so a moment later."""
        for patience in (SECOND_LOOK, 0.0):
            content = _read(path)
            seen = content if isinstance(content, bytes) else str(content)
            if seen == self._seen:
                return
            found = _parse(content, path)
            if isinstance(found, tuple):
                break
            self._closed.wait(patience)  # an editor may be about to finish
        self._seen = seen
        self._put_in_force(judge(before, found))

    def _put_in_force(self, fresh: Keyset) -> None:
        before, self.current = self.current, fresh
        if fresh.error is not None and fresh.error != before.error:
            log.error("keys: %s", fresh.error)
        elif fresh.error is None and fresh != before:
            log.info("keys: %s", f"{len(fresh.keys)} in force" if fresh.required else "none needed")


def _read(path: Path) -> bytes | KeysError:
    try:
        return keys.read(path)
    except KeysError as error:
        return error


def _parse(content: bytes | KeysError, path: Path) -> tuple[Key, ...] | KeysError:
    if isinstance(content, KeysError):
        return content
    try:
        return keys.parse(content, path)
    except KeysError as error:
        return error
