"""Replica records: one small file for each replica, written before it is started.

The files are the only state. A record outlives the backend, so that the next one knows what runs
and what each of it is. Every replica has one writer at a time: the launcher it belongs to.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from slurmgate.errors import StartRefused
from slurmgate.files import sync_folder, write_atomic
from slurmgate.model import LauncherKind

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_REPLICA = re.compile(r"[a-z0-9]{1,16}")


@dataclass(frozen=True, slots=True)
class Record:
    """What has to be known of a replica to adopt it later.

    ``created`` is the wall clock. ``pid`` and ``pid_start`` mean something only in the boot
    ``boot``; they are None from the moment before the start until the process is known.
    """

    replica: str
    service: str
    launcher: LauncherKind
    start_hash: str
    port: int
    created: float
    log: str
    boot: str
    pid: int | None = None
    pid_start: int | None = None
    stopping: bool = False


class Records:
    """The records in one folder; methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, record: Record) -> None:
        """Keep a record, on the disk when this returns; StartRefused when it cannot be kept."""
        path = self._path(record.replica)
        data = json.dumps(dataclasses.asdict(record), indent=1).encode() + b"\n"
        try:
            write_atomic(path, data)
        except OSError as error:
            raise StartRefused(
                f"cannot write the replica record {path}: {error.strerror}"
            ) from error

    def remove(self, replica: str) -> None:
        """Forget a replica that has ended; no record, no complaint."""
        try:
            self._path(replica).unlink(missing_ok=True)
            sync_folder(self._folder)
        except OSError as error:
            _LOG.warning("replica %s: cannot remove its record: %s", replica, error)

    def read_all(self) -> list[Record]:
        """Give every record, oldest first; a damaged file is set aside, not fatal."""
        for unfinished in self._folder.glob(".*.json.*"):  # the writer died before the rename
            unfinished.unlink(missing_ok=True)
        found = []
        for path in self._folder.glob("*.json"):
            try:
                found.append(_parse(path))
            except (OSError, ValueError) as error:
                _LOG.warning("set aside the damaged replica record %s: %s", path, error)
                path.rename(path.with_suffix(".broken"))
        return sorted(found, key=lambda record: record.created)

    def _path(self, replica: str) -> Path:
        if not _REPLICA.fullmatch(replica):
            raise ValueError(f"not a replica id: {replica!r}")
        return self._folder / f"{replica}.json"


def _parse(path: Path) -> Record:
    """Read one record; ValueError when a field is missing or of another type."""
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    record = Record(
        replica=_get(data, "replica", str),
        service=_get(data, "service", str),
        launcher=LauncherKind(_get(data, "launcher", str)),
        start_hash=_get(data, "start_hash", str),
        port=_get(data, "port", int),
        created=_get(data, "created", float),
        log=_get(data, "log", str),
        boot=_get(data, "boot", str),
        pid=None if data.get("pid") is None else _get(data, "pid", int),
        pid_start=None if data.get("pid_start") is None else _get(data, "pid_start", int),
        stopping=_get(data, "stopping", bool),
    )
    if record.replica != path.stem or not _REPLICA.fullmatch(record.replica):
        raise ValueError(f"it is of replica {record.replica!r}")
    return record


def _get(data: dict[str, object], name: str, kind: type[_T]) -> _T:
    value = data.get(name)
    if type(value) is not kind:  # isinstance would let true pass as 1
        raise ValueError(f"{name} is {value!r}")
    return value
