"""The log files of process replicas: reading their ends, bounding them, removing old ones.

A replica writes to ``<replica>.log``; when that became too long, what it had is in
``<replica>.log.1``. Keeps no state; callable from any thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Container
from pathlib import Path
from typing import BinaryIO

from slurmgate import upstream_keys

_LOG = logging.getLogger(__name__)

_BLOCK = 64 * 1024
_MOST = 4 * 1024 * 1024  # of a file, however few line ends there are
_KEPT = 64 * 1024 * 1024  # never keep more bytes of what a log had before
_LINE_MAX = 2000
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def tail(path: Path, lines: int, key: str | None = None) -> list[str]:
    """Give the last lines of a log as plain text without ``key``; none of one that is not there.

    What a log says is never worth an error: one that cannot be read is told of in its place.
    """
    try:
        with path.open("rb") as file:
            found = last_lines(file, lines, key)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"][:lines]
    return [clean(line) for line in found]


def last_lines(
    file: BinaryIO, lines: int, key: str | None = None, most: int = _MOST
) -> list[bytes]:
    """Give the last lines of an open log without their ends, and without ``key``.

    Not more than about ``most`` bytes of a file are read. It is left at the end of what was read.
    """
    read = _last_bytes(file, lines, most)
    raw = upstream_keys.hide(read, key)
    found = raw.removesuffix(b"\n").split(b"\n")[-lines:] if raw and lines > 0 else []
    missing = lines - len(found)
    if missing > 0 and len(read) == file.tell():  # else what is missing is of this file
        with (
            contextlib.suppress(FileNotFoundError),
            _earlier(Path(file.name)).open("rb") as earlier,
        ):
            return last_lines(earlier, missing, key, most) + found
    return found


def clean(line: bytes) -> str:
    """Make one line safe to show: valid text, no control characters, at most 2,000 characters.

    What a terminal would not show either is left out: colours, and what was overwritten after a
    carriage return (progress bars).
    """
    text = _ESCAPES.sub("", line.decode("utf-8", errors="replace"))
    text = text.rstrip("\r").rpartition("\r")[2]
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= _LINE_MAX else text[: _LINE_MAX - 1] + "…"


def bound(path: Path, limit: int) -> None:
    """Move what a log has to where its earlier part is, if it has over ``limit`` bytes.

    Its writer goes on in the same file, which is opened for appending. What it writes between the
    copy and the cut is lost, and of very much only the end is kept: however fast it is, the copy
    does not run after it. If there is no room for the copy the log is cut all the same.
    """
    try:
        size = path.stat().st_size
        if size <= limit:
            return
    except FileNotFoundError:  # its folder was cleared by hand
        return
    earlier = _earlier(path)
    try:
        _copy(path, min(size, _KEPT), size, earlier)
    except OSError as error:
        _LOG.warning("%s is cut without keeping what it had: %s", path, error.strerror)
        earlier.unlink(missing_ok=True)
    os.truncate(path, 0)


def _copy(path: Path, left: int, end: int, target: Path) -> None:
    """Copy the last ``left`` bytes before ``end``."""
    with path.open("rb") as source, open(target, "wb", opener=_private) as copy:
        source.seek(end - left)
        while left > 0 and (block := source.read(min(_BLOCK, left))):
            copy.write(block)
            left -= len(block)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _earlier(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def prune(folder: Path, keep: int, spare: Container[str]) -> None:
    """Remove all but the newest ``keep`` logs of a service, never one of a replica in ``spare``."""
    logs = sorted(folder.glob("*.log"), key=_modified, reverse=True)
    for path in logs[keep:]:
        if path.stem not in spare:
            _LOG.debug("remove the old log %s", path)
            path.unlink(missing_ok=True)
            _earlier(path).unlink(missing_ok=True)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another start of the service removed it
        return 0.0


def _last_bytes(file: BinaryIO, lines: int, most: int) -> bytes:
    """Read back from the end until there are enough line ends."""
    end = position = file.seek(0, os.SEEK_END)
    blocks: list[bytes] = []
    size = ends = 0
    while position > 0 and ends <= lines and size < most:
        step = min(_BLOCK, position)
        position = file.seek(position - step)
        blocks.append(file.read(step))
        size += step
        ends += blocks[-1].count(b"\n")
    file.seek(end)
    return b"".join(reversed(blocks))
