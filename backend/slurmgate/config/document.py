"""Read a JSON file strictly, and find what JSON can carry but a configuration must not."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

from slurmgate.config.report import JsonPath, Report
from slurmgate.errors import ConfigError

_MAX_BYTES = 16 << 20
_MAX_DEPTH = 50
_BOM = b"\xef\xbb\xbf"


def parse(content: bytes, path: Path, report: Report) -> object:
    """Parse what was in a file; raise ConfigError when it is no JSON, report keys given twice."""
    text = _decode(content, path)
    reader = _Reader()
    try:
        document = reader.parse(text)
    except json.JSONDecodeError as error:
        where = f"{path}: line {error.lineno}, column {error.colno}"
        raise ConfigError([f"{where}: not valid JSON: {error.msg}"]) from error
    except RecursionError:
        raise ConfigError([f"{path}: lists or objects are nested too deeply"]) from None
    reader.report_duplicates(document, report)
    return document


def oddities(document: object, report: Report) -> bool:
    """Report numbers and strings that no later step could handle; True when there were any."""
    before = report.count
    waiting: list[tuple[JsonPath, object]] = [((), document)]
    while waiting:
        path, value = waiting.pop()
        if len(path) > _MAX_DEPTH:
            report.problem(path[:3], f"lists or objects are nested more than {_MAX_DEPTH} deep")
        elif isinstance(value, dict):
            for key, inner in value.items():
                if _has_lone_surrogate(key):
                    report.problem(path, "a field name has half a surrogate pair in it")
                else:
                    waiting.append(((*path, key), inner))
        elif isinstance(value, list):
            waiting.extend(((*path, i), inner) for i, inner in enumerate(value))
        elif isinstance(value, str):
            if _has_lone_surrogate(value):
                report.problem(
                    path, "the text has half a surrogate pair (\\ud800 to \\udfff) in it"
                )
        elif isinstance(value, float) and not math.isfinite(value):
            report.problem(path, "NaN, Infinity and numbers beyond 1e308 are not allowed")
    return report.count > before


class _Reader:
    """One parse; remembers which objects had a key twice, for a report with paths afterwards."""

    def __init__(self) -> None:
        self._twice: list[tuple[dict[str, object], str]] = []

    def parse(self, text: str) -> object:
        return json.loads(text, object_pairs_hook=self._object, parse_int=_integer)

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        made: dict[str, object] = {}
        for key, value in pairs:
            if key in made:
                self._twice.append((made, key))
            made[key] = value
        return made

    def report_duplicates(self, document: object, report: Report) -> None:
        if not self._twice:
            return
        where: dict[int, JsonPath] = {}
        waiting: list[tuple[JsonPath, object]] = [((), document)]
        while waiting:
            path, value = waiting.pop()
            if isinstance(value, dict):
                where[id(value)] = path
                waiting.extend(((*path, key), inner) for key, inner in value.items())
            elif isinstance(value, list):
                waiting.extend(((*path, i), inner) for i, inner in enumerate(value))
        for owner, key in self._twice:
            # An object inside a value that was itself given twice is no longer in the document.
            if id(owner) in where:
                report.problem((*where[id(owner)], key), "is given twice; keep one of them")


def read(path: Path) -> bytes:
    """Read the file as it is; raise ConfigError when that cannot be done."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError([f"{path}: not a regular file"])
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError([f"{path}: not a possible file name: {error}"]) from error
    if len(content) > _MAX_BYTES:
        raise ConfigError([f"{path}: larger than {_MAX_BYTES >> 20} MiB"])
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe would wait for somebody who writes.
    return os.open(path, flags | os.O_NONBLOCK)


def _decode(content: bytes, path: Path) -> str:
    if content.startswith(_BOM):
        raise ConfigError([f"{path}: begins with a byte order mark; save it as UTF-8 without BOM"])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}: line {line}: not UTF-8 (byte {error.start})"]) from error


def _integer(digits: str) -> int | float:
    # Python refuses to convert thousands of digits; as infinity it is reported with its path.
    try:
        return int(digits)
    except ValueError:
        return math.inf


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
