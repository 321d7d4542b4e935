"""The log files of process replicas: reading their ends and throwing the oldest away.

Keeps no state; callable from any thread.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Container
from pathlib import Path

from slurmgate import upstream_keys

_LOG = logging.getLogger(__name__)

_BLOCK = 64 * 1024
_MOST = 4 * 1024 * 1024  # never read more, however few line ends there are
_LINE_MAX = 2000
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def tail(path: Path, lines: int, key: str | None = None) -> list[str]:
    """Give the last lines of a log as plain text without ``key``; empty without such a file."""
    if lines <= 0:
        return []
    try:
        raw = upstream_keys.hide(_last_bytes(path, lines), key)
    except FileNotFoundError:
        return []
    found = raw.removesuffix(b"\n").split(b"\n") if raw else []
    return [clean(line) for line in found[-lines:]]


def clean(line: bytes) -> str:
    """Make one line safe to show: valid text, no control characters, at most 2,000 characters.

    What a terminal would not show either is left out: colours, and what was overwritten after a
    carriage return (progress bars).
    """
    text = _ESCAPES.sub("", line.decode("utf-8", errors="replace"))
    text = text.rstrip("\r").rpartition("\r")[2]
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= _LINE_MAX else text[: _LINE_MAX - 1] + "…"


def prune(folder: Path, keep: int, spare: Container[str]) -> None:
    """Remove all but the newest ``keep`` logs of a service, never one of a replica in ``spare``."""
    logs = sorted(folder.glob("*.log"), key=_modified, reverse=True)
    for path in logs[keep:]:
        if path.stem not in spare:
            _LOG.debug("remove the old log %s", path)
            path.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another start of the service removed it
        return 0.0


def _last_bytes(path: Path, lines: int) -> bytes:
    """Read back from the end until there are enough line ends."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        blocks: list[bytes] = []
        size = ends = 0
        while position > 0 and ends <= lines and size < _MOST:
            step = min(_BLOCK, position)
            position = file.seek(position - step)
            blocks.append(file.read(step))
            size += step
            ends += blocks[-1].count(b"\n")
    return b"".join(reversed(blocks))
