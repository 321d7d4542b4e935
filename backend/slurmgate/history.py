"""The starts that have ended, in a file of the state directory: one JSON object a line.

``History`` owns the file: a thread of its own adds to it, and when it has grown to twice what is
kept replaces it by its last part. In memory are the same starts and those not written yet. A disk
that takes nothing costs the lines it did not take and nothing else. ``read``, ``entry`` and
``shown`` are for commands, which may look at the file at any time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slurmgate.files import write_atomic
from slurmgate.observed import Outcome, Start

_LOG = logging.getLogger(__name__)

KEPT = 1000
LINES_MAX = 2 * KEPT
_BYTES_MAX = 8 * 1024 * 1024  # never read more, whatever somebody put there
_REASON_MAX = 500
_WORD_MAX = 255
_SECONDS_MAX = 1e9
_NO_NAME = frozenset({"Cc", "Cs"})
_CLOCKS_APART = 60.0
_LONG_AGO = 86400.0
_TIME_MAX = 1e11  # the year 5138: any time zone's clock can still show it


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds: its last starts, oldest first, ``ended`` on the wall clock.

    ``lines`` counts all of them, ``damaged`` those that are no start.
    """

    starts: tuple[Start, ...] = ()
    lines: int = 0
    damaged: int = 0


def read(path: Path) -> Found:
    """Give the last starts in a file; nothing when there is none, OSError when it is unreadable."""
    try:
        with path.open("rb") as file:
            passed = max(0, os.fstat(file.fileno()).st_size - _BYTES_MAX)
            file.seek(passed)
            raw = file.read(_BYTES_MAX).split(b"\n")
    except FileNotFoundError:
        return Found()
    if passed:
        del raw[:1]  # it may begin anywhere within a line
    raw = [line for line in raw if line]
    starts = [_start(line) for line in raw]
    good = [start for start in starts if start is not None]
    return Found(tuple(good[-KEPT:]), len(raw), len(raw) - len(good))


def entry(start: Start) -> dict[str, Any]:
    """Give one start as the file and ``history --json`` have it; ``ended`` on the wall clock."""
    at = datetime.datetime.fromtimestamp(start.ended, datetime.UTC)
    return {
        "at": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "service": start.service,
        "replica": shown(start.replica),
        "job_id": _maybe(start.job_id, _WORD_MAX),
        "node": _maybe(start.node, _WORD_MAX),
        "queue_s": _duration(start.queue_s),
        "start_s": _duration(start.start_s),
        "outcome": start.outcome.value,
        "reason": _maybe(start.reason, _REASON_MAX),
    }


def shown(text: str, most: int = _WORD_MAX) -> str:
    """Make a text of others safe to show: one line of characters that print, not too long."""
    text = " ".join(text[: 4 * most].split())
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


class History:
    """Keeps the last starts over restarts; every method may be called from any thread.

    ``clock`` is that of the starts given and taken, ``wall`` that of the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._clock = clock
        self._wall = wall
        found = self._read()
        now = clock()
        self._recent = deque(
            (replace(start, ended=_monotonic(start.ended, now, wall())) for start in found.starts),
            maxlen=KEPT,
        )
        self._changed = threading.Condition()
        self._unwritten: deque[bytes] = deque(maxlen=KEPT)
        self._closed = False
        self._lines = found.lines  # this and ``_failing`` belong to the writing thread
        self._failing = False
        self._writer = threading.Thread(target=self._write, name="history", daemon=True)
        self._writer.start()

    def recent(self) -> Sequence[Start]:
        """Give the starts that are kept, oldest first, ``ended`` on ``clock``."""
        with self._changed:
            return tuple(self._recent)

    def add(self, start: Start) -> None:
        """Keep one more; it is on the disk a moment later, if the disk takes it."""
        ended = self._wall() - max(0.0, self._clock() - start.ended)
        line = _line(replace(start, ended=ended))
        with self._changed:
            self._recent.append(start)
            if not self._closed:
                self._unwritten.append(line)
                self._changed.notify()

    def close(self, timeout: float) -> None:
        """Write what is not written yet, for at most ``timeout`` seconds, then write no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._writer.join(timeout)

    def _read(self) -> Found:
        try:
            found = read(self._path)
        except OSError as error:
            _LOG.warning("cannot read the recent starts in %s: %s", self._path, error.strerror)
            return Found()
        if found.damaged:
            _LOG.warning("%s: %d damaged lines passed over", self._path, found.damaged)
        return found

    def _write(self) -> None:
        """Write until it is closed; runs on the thread ``history``."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten or self._closed)
                lines = tuple(self._unwritten)
                self._unwritten.clear()
            if not lines:
                return
            try:
                self._keep(lines)
            except OSError as error:
                self._complain(error)
            else:
                self._rejoice()

    def _keep(self, lines: Sequence[bytes]) -> None:
        size = self._append(lines)
        if self._lines > LINES_MAX or size > _BYTES_MAX:
            starts = read(self._path).starts
            write_atomic(self._path, b"".join(map(_line, starts)))
            self._lines = len(starts)

    def _append(self, lines: Sequence[bytes]) -> int:
        """Put whole lines at the end of the file, on the disk when this returns; its size then."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        try:
            end = os.fstat(fd).st_size
            if end and os.pread(fd, 1, end - 1) != b"\n":  # somebody died in the middle of it
                end += _append_whole(fd, b"\n", end)
            for line in lines:
                end += _append_whole(fd, line, end)
                self._lines += 1
            os.fsync(fd)
        finally:
            os.close(fd)
        return end

    def _complain(self, error: OSError) -> None:
        if not self._failing:
            _LOG.warning(
                "cannot keep recent starts in %s: %s; until that works those that end are"
                " missing there",
                self._path,
                error.strerror,
            )
        self._failing = True

    def _rejoice(self) -> None:
        if self._failing:
            _LOG.info("recent starts are kept in %s again", self._path)
        self._failing = False


def _append_whole(fd: int, data: bytes, end: int) -> int:
    """Append to a file that ends at ``end``, all or nothing; how much it was."""
    done = 0
    try:
        while done < len(data):
            done += os.write(fd, data[done:])
    except OSError:
        with contextlib.suppress(OSError):  # then the next line begins with a line end
            os.ftruncate(fd, end)
        raise
    return done


def _line(start: Start) -> bytes:
    return json.dumps(entry(start), separators=(",", ":")).encode() + b"\n"


def _start(line: bytes) -> Start | None:
    """Read one line; None when it is no start."""
    try:
        data = json.loads(line)
        if not isinstance(data, dict):
            return None
        return Start(
            service=_name(data["service"]),
            replica=shown(_word(data["replica"])),
            ended=_point(data["at"]),
            outcome=Outcome(data["outcome"]),
            queue_s=_seconds(data["queue_s"]),
            start_s=_seconds(data["start_s"]),
            reason=_maybe(data["reason"], _REASON_MAX),
            job_id=_maybe(data["job_id"], _WORD_MAX),
            node=_maybe(data["node"], _WORD_MAX),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _point(value: object) -> float:
    at = datetime.datetime.fromisoformat(_word(value))
    if at.tzinfo is None or not 0 <= at.timestamp() < _TIME_MAX:
        raise ValueError(f"at is {value!r}")
    return at.timestamp()


def _seconds(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("not a number")
    if not 0 <= value <= _SECONDS_MAX:  # nor is NaN one
        raise ValueError("not a duration")
    return float(value)


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a string")
    return value


def _duration(value: float | None) -> float | None:
    """Give a duration that can be read back: two machines' clocks may make it less than none."""
    return None if value is None else round(min(max(value, 0.0), _SECONDS_MAX), 3)


def _maybe(value: object, most: int) -> str | None:
    return None if value is None else shown(_word(value), most)


def _name(value: object) -> str:
    """Check a service's name; it is compared with what people give, so it is never changed."""
    name = _word(value)
    if not 1 <= len(name) <= _WORD_MAX or any(unicodedata.category(c) in _NO_NAME for c in name):
        raise ValueError("not a service's name")
    return name


def _monotonic(ended: float, now: float, wall: float) -> float:
    """Give a time of the file on this process's clock. One that is yet to come was written while
    the machine's clock was wrong: nobody knows how long ago.
    """
    age = wall - ended
    return now - (_LONG_AGO if age < -_CLOCKS_APART else max(0.0, age))
