"""Clients' keys, and how they stand in a file: names and SHA-256, never a secret.

No state. Errors name the entry and the field, and show no value: it might be a secret that
somebody put there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock_time
from pathlib import Path
from typing import Any

from slurmgate.errors import KeysError, KeysMissing

MAX_BYTES = 4 << 20
MOST = 10**9
NAME_IS = "1 to 64 letters, digits, '.', '_', '@' or '-'"
EXPIRES_IS = (
    "a day such as 2027-03-31, to whose end it is valid, or a time with its offset from UTC such as"
    " 2027-03-31T18:00:00+02:00"
)
_YEAR_10000 = 253402300800
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_TIME = re.compile(
    r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d{1,6})?([Zz]|[+-]\d{2}:\d{2})", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Key:
    """What one client's key is for. ``services`` None: all of them; ``rpm`` (requests a minute)
    and ``in_flight`` 0: no limit; ``expires`` and ``created`` are unix seconds.
    """

    name: str
    sha256: str = field(repr=False)
    services: tuple[str, ...] | None = None
    rpm: int = 0
    in_flight: int = 0
    expires: int | None = None
    created: int | None = None


def new_secret() -> str:
    """Make what a client sends: 32 random bytes."""
    return f"sg-{secrets.token_urlsafe(32)}"


def digest(secret: str) -> str:
    """Give what is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def is_name(text: str) -> bool:
    """Say whether a key may be called so."""
    return _NAME.fullmatch(text) is not None


def parse_expiry(text: str) -> int:
    """Turn a day (its end, local time) or an RFC 3339 time into unix seconds; ValueError."""
    moment = -1.0
    with contextlib.suppress(ValueError, OverflowError):  # there is no 31st of February
        if _DAY.fullmatch(text):
            after = date.fromisoformat(text) + timedelta(days=1)
            moment = datetime.combine(after, clock_time()).timestamp()
        elif _TIME.fullmatch(text):
            moment = datetime.fromisoformat(text.upper()).timestamp()
    if not 0 <= moment < _YEAR_10000:
        raise ValueError(f"{text!a} should be {EXPIRES_IS}")
    return int(moment)


def show_time(moment: int) -> str:
    """Write unix seconds as RFC 3339 does."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


# -- the file ------------------------------------------------------------------------------


def load(path: Path) -> tuple[Key, ...]:
    """Read the keys; KeysMissing or another KeysError when that cannot be done."""
    return parse(read(path), path)


def read(path: Path) -> bytes:
    """Read the file as it is; KeysMissing when there is none, else KeysError."""
    try:
        # A named pipe would wait for somebody who writes.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return content(fd, path)
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise KeysMissing([f"{path}: there is no such file"]) from error
    except OSError as error:
        raise KeysError([f"{path}: cannot be read: {error.strerror}"]) from error


def content(fd: int, path: Path) -> bytes:
    """Read the opened file ``path`` from where it stands; KeysError when it cannot be one."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise KeysError([f"{path}: not a regular file"])
    with open(fd, "rb", closefd=False) as file:
        found = file.read(MAX_BYTES + 1)
    if len(found) > MAX_BYTES:
        raise KeysError([f"{path}: larger than {MAX_BYTES >> 20} MiB"])
    return found


def parse(text: bytes, path: Path) -> tuple[Key, ...]:
    """Read what was in the file; KeysError with everything that is wrong with it."""
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_Object)
    except UnicodeDecodeError as error:
        raise KeysError([f"{path}: not UTF-8 (byte {error.start})"]) from error
    except json.JSONDecodeError as error:
        where = f"{path}: line {error.lineno}, column {error.colno}"
        raise KeysError([f"{where}: not valid JSON: {error.msg}"]) from error
    except (ValueError, RecursionError):  # thousands of digits; thousands of brackets
        raise KeysError([f"{path}: has a number too long or lists too deep to be read"]) from None
    entries = document.get("keys") if isinstance(document, _Object) else None
    if not isinstance(entries, list) or document.twice or len(document) != 1:
        raise KeysError([f'{path}: should be {{"keys": [...]}} and nothing else'])
    found: list[Key] = []
    wrong: list[str] = []
    taken: set[str] = set()
    for place, given in enumerate(entries):
        key, said = _entry(given)
        name = ""
        if key is not None:
            name = f" ({key.name})"
            for what, value in (("name", key.name), ("sha256", key.sha256)):
                if f"{what} {value}" in taken:
                    said.append(f"{what}: an entry before this one has the same")
            taken |= {f"name {key.name}", f"sha256 {key.sha256 or place}"}
            found.append(key)
        wrong += [f"{path}: keys[{place}]{name}: {text}" for text in said]
    if wrong:
        raise KeysError(wrong)
    return tuple(found)


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its fields were given twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]


def _entry(given: object) -> tuple[Key | None, list[str]]:
    """Read one entry; what can be read of it, if it has a name, and what is wrong."""
    if not isinstance(given, _Object):
        return None, ["should be an object"]
    wrong = [f"{name!a} is given twice; keep one of them" for name in given.twice]
    wrong += [f"unknown field {name!a}" for name in given if name not in _READERS]
    values: dict[str, Any] = {}
    for name, reader in _READERS.items():
        if name not in given:
            if name in _REQUIRED:
                wrong.append(f"{name}: is missing")
            continue
        try:
            values[name] = reader(given[name])
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if "name" not in values:
        return None, wrong
    return Key(**{"sha256": ""} | values), wrong


def _read_name(value: object) -> str:
    if not isinstance(value, str) or not is_name(value):
        raise ValueError(f"should be {NAME_IS}")
    return value


def _read_sha256(value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError("should be 64 digits 0-9a-f, the SHA-256 of the secret")
    return value


def _read_services(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(map(_is_service, value)):
        raise ValueError("should be a list of names of services, or null for all")
    return tuple(dict.fromkeys(value))


def _is_service(value: object) -> bool:
    """A string that can be sent on: in JSON there can also be half a surrogate pair."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_limit(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MOST:  # True is an int
        raise ValueError(f"should be a whole number from 0 (no limit) to {MOST}")
    return value


def _read_time(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"should be null or {EXPIRES_IS}")
    return parse_expiry(value)


_REQUIRED = ("name", "sha256")
_READERS: dict[str, Callable[[object], object]] = {
    "name": _read_name,
    "sha256": _read_sha256,
    "services": _read_services,
    "rpm": _read_limit,
    "in_flight": _read_limit,
    "expires": _read_time,
    "created": _read_time,
}


def serialise(keys: tuple[Key, ...]) -> bytes:
    """Write the keys as the file holds them."""
    return json.dumps({"keys": [entry(key) for key in keys]}, indent=1).encode() + b"\n"


def entry(key: Key) -> dict[str, Any]:
    """Give a key as JSON values, times as RFC 3339 writes them."""
    times = {name: getattr(key, name) for name in ("expires", "created")}
    return asdict(key) | {n: None if t is None else show_time(t) for n, t in times.items()}
