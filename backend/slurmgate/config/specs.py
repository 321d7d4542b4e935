"""Turn a document without problems into the specifications of ``model.py``, defaults filled in."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from slurmgate.model import (
    Config,
    GateSpec,
    HealthSpec,
    LauncherKind,
    ReplicaBounds,
    ServiceSpec,
    SshSpec,
    TlsSpec,
    TunnelMode,
)

_MOST_WORKERS = 4
_SIZE = re.compile(r"([0-9]+) ?([KMG]?)(?:iB)?")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def build(document: dict[str, Any], path: Path, warnings: tuple[str, ...]) -> Config:
    """Make the configuration; the document passed the schema and the rules."""
    path = path.absolute()
    folder = path.parent
    files = {
        key: resolve(document[key], folder)
        for key in ("admin_token_file", "keys_file")
        if key in document
    }
    services = tuple(_service(entry, folder) for entry in document["Services"])
    gate = _gate(document.get("gate", {}), folder)
    return Config(
        path=path,
        services=services,
        gate=replace(gate, service_cors=any(spec.cors for spec in services)),
        instance=document.get("instance"),
        watch=document.get("watch", True),
        warnings=warnings,
        **files,
    )


def resolve(path: str, folder: Path) -> Path:
    """Make a path of the file absolute: ``~`` expanded, else relative to the file's folder."""
    return Path(os.path.normpath(folder / os.path.expanduser(path)))


def parse_size(size: int | float | str) -> int:
    """Bytes of ``1048576``, ``1M``, ``1MiB`` or ``1 MiB``."""
    if isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        return int(match[1]) * _UNITS[match[2]]
    return int(size)


def _prefix(path: str) -> str:
    """A path prefix as it is compared: with a leading slash and without a trailing one."""
    return "/" + path.strip("/")


def _prefixes(paths: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_prefix(path) for path in paths))


def _leading_slash(path: str) -> str:
    return path if path.startswith("/") else "/" + path


def _port(port: int | float | str) -> int | None:
    return None if port == "auto" else int(port)


def _pair(values: list[float]) -> tuple[float, float]:
    return (float(values[0]), float(values[1]))


def _ports(values: list[float]) -> tuple[int, int]:
    return (int(values[0]), int(values[1]))


def header_of(affinity: str) -> str | None:
    """Name of the header in ``header:X-Session``; None of ``none`` and ``prefix``."""
    return affinity.partition(":")[2] or None


def _environment(env: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(env.items())


def _health(entry: dict[str, Any]) -> HealthSpec:
    return HealthSpec(**_converted(entry, _HEALTH))


def _replicas(entry: dict[str, Any]) -> ReplicaBounds:
    return ReplicaBounds(**{key: int(value) for key, value in entry.items()})


Converters = dict[str, Callable[[Any], Any]]

_HEALTH: Converters = {
    "interval": float,
    "start_interval": _pair,
    "timeout": float,
    "failures": int,
}

# JSON knows one kind of number: 5.0 is a whole one, too.
_SERVICE: Converters = {
    "name": str,
    "route_name": str,
    "api_paths": _prefixes,
    "bash_file": str,
    "check_health_path": _leading_slash,
    "timeout": float,
    "launcher": LauncherKind,
    "description": str,
    "models": tuple,
    "upstream_model": str,
    "upstream_key": bool,
    "public": bool,
    "heartbeat": float,
    "max_idle_connection": float,
    "cors": tuple,
    "remote_port": _port,
    "port_range": _ports,
    "env": _environment,
    "replicas": _replicas,
    "scale_up_after": float,
    "affinity": header_of,
    "max_starts_per_hour": int,
    "hold_timeout": float,
    "start_timeout": float,
    "drain_timeout": float,
    "max_waiting": int,
    "health": _health,
    "replace_after": float,
    "no_wake": _prefixes,
    "replay": int,
    "read_timeout": float,
}

_SLURM: Converters = {
    "remote_setup": tuple,
    "tunnel": TunnelMode,
    "sbatch_args": tuple,
    "local_host": str,
    "local_port": int,
    "renew_before": float,
    "max_pending": int,
    "queue_timeout": float,
    "abandon_timeout": float,
}


def _converted(entry: dict[str, Any], converters: Converters) -> dict[str, Any]:
    return {key: converters[key](value) for key, value in entry.items() if key in converters}


def _service(entry: dict[str, Any], folder: Path) -> ServiceSpec:
    fields = _converted(entry, _SERVICE)
    fields["prefix_affinity"] = entry.get("affinity") == "prefix"
    if fields.get("launcher", LauncherKind.SLURM) is LauncherKind.PROCESS:
        fields["bash_file"] = os.path.expanduser(fields["bash_file"])
    else:
        fields |= _converted(entry, _SLURM)
        fields["ssh"] = _ssh(entry, folder)
    return ServiceSpec(folder=folder, **fields)


def _ssh(entry: dict[str, Any], folder: Path) -> SshSpec | None:
    if "remote_host" not in entry:
        return None
    files = {
        key: resolve(entry[name], folder)
        for key, name in (
            ("key_file", "ssh_key_file"),
            ("known_hosts", "ssh_known_hosts"),
            ("control_path", "ssh_control_path"),
        )
        if name in entry
    }
    return SshSpec(
        host=entry["remote_host"],
        username=entry.get("ssh_username"),
        port=int(entry.get("ssh_port", 22)),
        jump=entry.get("ssh_jump"),
        **files,
    )


def _gate(entry: dict[str, Any], folder: Path) -> GateSpec:
    given: dict[str, Any] = {key: entry[key] for key in ("listen", "open") if key in entry}
    given |= {key: parse_size(entry[key]) for key in ("max_body", "max_held_bytes") if key in entry}
    lists = ("private", "trusted_proxies", "cors")
    given |= {key: tuple(entry[key]) for key in lists if key in entry}
    if "tls" in entry:
        given["tls"] = TlsSpec(
            certificate=resolve(entry["tls"]["certificate"], folder),
            key=resolve(entry["tls"]["key"], folder),
        )
    cores = len(os.sched_getaffinity(0))
    return GateSpec(workers=int(entry.get("workers", min(cores, _MOST_WORKERS))), **given)
