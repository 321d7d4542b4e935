"""Replica records: one small file for each replica, written before it is started.

The files are the only state. A record outlives the backend, so that the next one knows what runs
and what each of it is. Every replica has one writer at a time: the launcher it belongs to.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from slurmgate.errors import StartRefused
from slurmgate.files import sync_folder, write_atomic
from slurmgate.model import LauncherKind, SshSpec, TunnelMode

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_REPLICA = re.compile(r"[a-z0-9]{1,16}")


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What has to be known of a Slurm job to find, reach and cancel it without the configuration.

    ``submitted`` and ``running`` are the wall clock, ``started`` is Slurm's. ``gen`` counts starts
    on a node. ``address`` is where the login host reaches that of the present one; ``endpoint`` is
    set once the gate could reach it.
    """

    name: str
    ssh: SshSpec | None
    setup: tuple[str, ...]
    tunnel: TunnelMode
    submitted: float
    job_id: str | None = None
    local: tuple[str, int] | None = None
    gen: int = 0
    node: str | None = None
    address: str | None = None
    started: float | None = None
    running: float | None = None
    endpoint: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What has to be known of a replica to adopt it later.

    ``created`` is the wall clock. ``pid`` and ``pid_start`` mean something only in the boot
    ``boot``; they are None from the moment before the start until the process is known. ``job``
    is there for replicas that are Slurm jobs. ``api_key`` is what the service demands of the gate.
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
    job: JobRecord | None = None
    api_key: str | None = field(default=None, repr=False)


class Records:
    """The records in one folder; methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, record: Record) -> None:
        """Keep a record, on the disk when this returns; StartRefused when it cannot be kept."""
        path = self._path(record.replica)
        values = dataclasses.asdict(record)
        for name in ("job", "api_key"):
            if values[name] is None:
                del values[name]
        data = json.dumps(values, indent=1, default=str).encode() + b"\n"
        try:
            self._write(path, data)
        except OSError as error:
            raise StartRefused(
                f"cannot write the replica record {path}: {error.strerror}"
            ) from error

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_atomic(path, data)
        except FileNotFoundError:  # another launcher's ``read_all`` took it for a leftover
            write_atomic(path, data)

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
        pid=_maybe(data, "pid", int),
        pid_start=_maybe(data, "pid_start", int),
        stopping=_get(data, "stopping", bool),
        job=None if data.get("job") is None else _job(_get(data, "job", dict)),
        api_key=_api_key(data),
    )
    if record.replica != path.stem or not _REPLICA.fullmatch(record.replica):
        raise ValueError(f"it is of replica {record.replica!r}")
    return record


def _api_key(data: dict[str, object]) -> str | None:
    key = data.get("api_key")
    if key is not None and not isinstance(key, str):
        raise ValueError("api_key is no text")  # what it is belongs into no log
    return key


def _job(data: dict[str, object]) -> JobRecord:
    setup = _get(data, "setup", list)
    if not all(isinstance(line, str) for line in setup):
        raise ValueError(f"setup is {setup!r}")
    return JobRecord(
        name=_get(data, "name", str),
        ssh=None if data.get("ssh") is None else _ssh(_get(data, "ssh", dict)),
        setup=tuple(setup),
        tunnel=TunnelMode(_get(data, "tunnel", str)),
        submitted=_get(data, "submitted", float),
        job_id=_maybe(data, "job_id", str),
        local=None if data.get("local") is None else _address(_get(data, "local", list)),
        gen=_get(data, "gen", int),
        node=_maybe(data, "node", str),
        address=_maybe(data, "address", str),
        started=_maybe(data, "started", float),
        running=_maybe(data, "running", float),
        endpoint=_maybe(data, "endpoint", str),
    )


def _ssh(data: dict[str, object]) -> SshSpec:
    paths = {name: _maybe(data, name, str) for name in ("key_file", "known_hosts", "control_path")}
    key_file, known_hosts, control_path = (
        None if path is None else Path(path) for path in paths.values()
    )
    return SshSpec(
        host=_get(data, "host", str),
        username=_maybe(data, "username", str),
        key_file=key_file,
        port=_get(data, "port", int),
        known_hosts=known_hosts,
        jump=_maybe(data, "jump", str),
        control_path=control_path,
    )


def _address(data: list[object]) -> tuple[str, int]:
    match data:
        case [str(host), int(port)]:
            return host, port
    raise ValueError(f"local is {data!r}")


def _maybe(data: dict[str, object], name: str, kind: type[_T]) -> _T | None:
    return None if data.get(name) is None else _get(data, name, kind)


def _get(data: dict[str, object], name: str, kind: type[_T]) -> _T:
    value = data.get(name)
    if type(value) is not kind:  # isinstance would let true pass as 1
        raise ValueError(f"{name} is {value!r}")
    return value
