"""Clients' keys and the file they are kept in: JSON, mode 0600, names and SHA-256, never a secret.

The file alone holds state. It is always complete: whoever changes it writes it anew and renames,
under a lock on the file itself, so that of changes made at once none is lost. Errors name the
entry and the field, and never show a value of which somebody may have made a secret.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock_time
from pathlib import Path
from typing import Any

from slurmgate.errors import KeysError, KeysMissing
from slurmgate.files import Owner, write_atomic, write_new

MAX_BYTES = 4 << 20
MOST = 10**9
NAME_IS = "1 to 64 letters, digits, '.', '_', '@' or '-'"
EXPIRES_IS = (
    "a day such as 2027-03-31, to whose end it is valid, or a time with its offset from UTC such as"
    " 2027-03-31T18:00:00+02:00"
)
_YEAR_10000 = 253402300800
_LOCK_PATIENCE = 10.0
_LOCK_LOOK = 0.02
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


def problems(path: Path) -> list[str]:
    """Say what is wrong with a file of keys; nothing: an empty list."""
    try:
        load(path)
    except KeysError as error:
        return error.problems
    return []


def load(path: Path) -> tuple[Key, ...]:
    """Read the keys; KeysMissing or another KeysError when that cannot be done."""
    return parse(read(path), path)


def read(path: Path) -> bytes:
    """Read the file as it is; KeysMissing when there is none, else KeysError."""
    try:
        # A named pipe would wait for somebody who writes.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _content(fd, path)
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise KeysMissing([f"{path}: there is no such file"]) from error
    except OSError as error:
        raise KeysError([f"{path}: cannot be read: {error.strerror}"]) from error


def _content(fd: int, path: Path) -> bytes:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise KeysError([f"{path}: not a regular file"])
    with open(fd, "rb", closefd=False) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise KeysError([f"{path}: larger than {MAX_BYTES >> 20} MiB"])
    return content


def parse(content: bytes, path: Path) -> tuple[Key, ...]:
    """Read what was in the file; KeysError with everything that is wrong with it."""
    try:
        document = json.loads(content.decode("utf-8"), object_pairs_hook=_Object)
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
    for place, entry in enumerate(entries):
        key, said = _entry(entry)
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


def _entry(entry: object) -> tuple[Key | None, list[str]]:
    """Read one entry; what can be read of it, if it has a name, and what is wrong."""
    if not isinstance(entry, _Object):
        return None, ["should be an object"]
    wrong = [f"{name!a} is given twice; keep one of them" for name in entry.twice]
    wrong += [f"unknown field {name!a}" for name in entry if name not in _READERS]
    values: dict[str, Any] = {}
    for name, reader in _READERS.items():
        if name not in entry:
            if name in _REQUIRED:
                wrong.append(f"{name}: is missing")
            continue
        try:
            values[name] = reader(entry[name])
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
    entries = []
    for key in keys:
        entry = asdict(key)
        for name in ("expires", "created"):
            entry[name] = None if entry[name] is None else show_time(entry[name])
        entries.append(entry)
    return json.dumps({"keys": entries}, indent=1).encode() + b"\n"


# -- changing it ---------------------------------------------------------------------------


def change(path: Path, fold: Callable[[tuple[Key, ...]], tuple[Key, ...]]) -> None:
    """Have ``fold`` make the new keys of those in the file, and write them; KeysError.

    A file that is missing or empty has no keys. What ``fold`` raises leaves the file as it is.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    try:
        while True:
            with _locked(path) as found:
                if found is None:
                    with contextlib.suppress(FileExistsError):  # another one was quicker
                        write_new(path, serialise(fold(())), _owner_for(path.parent.stat()))
                        return
                else:
                    content = _content(found, path)
                    known = parse(content, path) if content.strip() else ()
                    fresh = serialise(fold(known))
                    write_atomic(path, fresh, _owner_for(os.fstat(found)))
                    return
    except FileNotFoundError as error:
        raise KeysError([f"{path}: there is no folder {path.parent}; make it first"]) from error
    except PermissionError as error:
        whom = "the user that Slurmgate runs as, or as root"
        raise KeysError([f"{path}: cannot be written; run this as {whom}"]) from error
    except OSError as error:
        raise KeysError([f"{path}: cannot be written: {error.strerror}"]) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """Give the file opened and locked; None when there is none. KeysError when that takes long."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        try:
            if _lock(fd) and _is_at(fd, path):
                _must_be_ours(fd, path)
                yield fd
                return
        finally:
            os.close(fd)
        if time.monotonic() > deadline:
            raise KeysError([f"{path}: another command has been changing it for long; try again"])
        time.sleep(_LOCK_LOOK)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Say whether nobody has put another file there before we had the lock."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _must_be_ours(fd: int, path: Path) -> None:
    """A file that we wrote anew would be closed to its owner."""
    owner = os.fstat(fd).st_uid
    if os.geteuid() not in (0, owner):
        raise KeysError([f"{path}: belongs to uid {owner}; run this as that user or as root"])


def _owner_for(found: os.stat_result) -> Owner | None:
    """Root writes for whom the file, or its folder, is."""
    return (found.st_uid, found.st_gid) if os.geteuid() == 0 else None
