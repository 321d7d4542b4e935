"""What the schema cannot say: rules between fields, and warnings.

The rules see only parts of the document that the schema found right. Fields may be missing, and a
service or an element of a list that was wrong is None.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slurmgate.config.clients import (
    check_client_fields,
    check_keys_file,
    check_networks,
    check_origins,
)
from slurmgate.config.cluster import ONLY_SSH, check_cluster
from slurmgate.config.listen import listen_problem
from slurmgate.config.replicas import check_fixed_ports, check_replicas
from slurmgate.config.report import JsonPath, Report, show_value
from slurmgate.config.specs import parse_size, resolve

Entry = dict[str, Any]

_ROUTES_OF_THE_GATE = frozenset(
    {
        "v1",
        "info",
        "admin",
        "healthz",
        "readyz",
        "metrics",
        "enable_service_management",
        "disable_service_management",
        "kill_disable_service_management",
    }
)
_ROUTE_PREFIXES_OF_THE_GATE = ("check_", "demand_")
_ENV_OF_THE_GATE = (
    "SLURMGATE_PORT",
    "SLURMGATE_SERVICE",
    "SLURMGATE_REPLICA",
    "SLURMGATE_API_KEY",
)
_SENT_AS_IT_IS = "/%!$&'()*+,;=:@~"
# Not an escape; a dot; a slash, a backslash or a control character.
_NEVER_SENT = re.compile(r"%(?![0-9A-Fa-f]{2})|%(?:2[EeFf]|5[Cc]|7[Ff]|[01][0-9A-Fa-f])")
_LARGEST_SIZE = 10**15

_ORIGINAL = {
    "nginxFile": "is ignored: the nginx configuration is rendered by Slurmgate",
    "appPort": 'is ignored: "gate": {"listen": ...} says where the gate listens',
    "nginxPort": 'is ignored: "gate": {"listen": ...} says where the gate listens',
}
_ONLY_SLURM = (
    "remote_host",
    *ONLY_SSH,
    "local_host",
    "local_port",
    "remote_setup",
    "tunnel",
    "sbatch_args",
    "queue_timeout",
    "abandon_timeout",
    "renew_before",
    "max_pending",
)


def apply_rules(document: Entry, folder: Path, report: Report) -> None:
    """Check everything; ``folder`` is what relative paths are relative to."""
    for key, text in _ORIGINAL.items():
        if key in document:
            report.warn((key,), text)
    _missing_file(document, "admin_token_file", (), folder, report)
    keyed = "keys_file" in document or report.has_problem(("keys_file",))
    check_keys_file(document, folder, report)
    _gate(document.get("gate", {}), folder, report, keyed=keyed)
    services = list(_services(document))
    _unique_fields(services, report)
    check_fixed_ports(services, report)
    for path, entry in services:
        _paths(entry, path, report)
        _environment(entry, path, report)
        _ranges(entry, path, report)
        check_client_fields(entry, path, report, keyed=keyed)
        check_replicas(entry, path, report)
        if report.has_problem((*path, "launcher")):
            continue  # which of the two was meant is not known
        if _launcher(entry) == "process":
            _process(entry, path, folder, report)
        else:
            _slurm(entry, path, folder, report)


def _services(document: Entry) -> Iterator[tuple[JsonPath, Entry]]:
    for index, entry in enumerate(document.get("Services", [])):
        if entry is not None:
            yield ("Services", index), entry


def _launcher(entry: Entry) -> str:
    return str(entry.get("launcher", "slurm"))


class _Unique:
    """Remembers who has a value already; ``what`` names the value in messages."""

    def __init__(self, what: str, report: Report) -> None:
        self._what = what
        self._report = report
        self._owner: dict[Hashable, JsonPath] = {}

    def take(self, key: Hashable, path: JsonPath, value: object) -> None:
        owner = self._owner.setdefault(key, path)
        if owner != path:
            shown = f"{show_value(value)} is the {self._what} of Services[{owner[1]}] already"
            self._report.problem(path, f"{shown}; it should be unique")


def _unique_fields(services: list[tuple[JsonPath, Entry]], report: Report) -> None:
    names = _Unique("name", report)
    routes = _Unique("route", report)
    models = _Unique("model", report)
    local_ports = _Unique("local port", report)
    for path, entry in services:
        if "name" in entry:
            names.take(entry["name"], (*path, "name"), entry["name"])
        if "route_name" in entry:
            routes.take(entry["route_name"], (*path, "route_name"), entry["route_name"])
        for index, model in enumerate(entry.get("models", [])):
            if model is not None:
                models.take(model, (*path, "models", index), model)
        if "local_port" in entry and _launcher(entry) != "process":
            where = (entry.get("local_host", "127.0.0.1"), entry["local_port"])
            local_ports.take(where, (*path, "local_port"), entry["local_port"])


def _paths(entry: Entry, path: JsonPath, report: Report) -> None:
    route = entry.get("route_name")
    if route is not None and (
        route in _ROUTES_OF_THE_GATE or route.startswith(_ROUTE_PREFIXES_OF_THE_GATE)
    ):
        report.problem(
            (*path, "route_name"),
            f"{show_value(route)} is a word the gate uses itself; choose another, "
            f"such as {show_value('my-' + route)}",
        )
    if entry.get("api_paths") == []:
        report.warn((*path, "api_paths"), 'is empty: no request is allowed; ["/"] allows all')
    for key in ("api_paths", "no_wake"):
        for index, prefix in enumerate(entry.get(key, [])):
            if prefix is not None:
                _prefix_that_matches(prefix, (*path, key, index), report)


def _prefix_that_matches(prefix: str, path: JsonPath, report: Report) -> None:
    """Warn of a prefix that no ordinary request has: paths are compared as they are sent."""
    if not prefix.isascii():
        sent = show_value(quote(prefix, safe=_SENT_AS_IT_IS))
        report.warn(path, f"no request has this: clients send it encoded, as {sent}")
    elif _NEVER_SENT.search(prefix):
        report.warn(path, "no request has this: the gate refuses, or clients never send, such a %")


def _environment(entry: Entry, path: JsonPath, report: Report) -> None:
    for name in _ENV_OF_THE_GATE:
        if name in entry.get("env", {}):
            report.problem((*path, "env", name), "is set by the gate itself; leave it out")


def _ranges(entry: Entry, path: JsonPath, report: Report) -> None:
    health = entry.get("health", {})
    for where, bounds in (
        ((*path, "port_range"), entry.get("port_range")),
        ((*path, "health", "start_interval"), health.get("start_interval")),
    ):
        if bounds and None not in bounds and bounds[0] > bounds[1]:
            report.problem(where, f"{json.dumps(bounds)} has the larger number first; swap them")


def _process(entry: Entry, path: JsonPath, folder: Path, report: Report) -> None:
    for key in _ONLY_SLURM:
        if key in entry:
            report.warn((*path, key), 'is not used with launcher "process"')
    _missing_file(entry, "bash_file", path, folder, report)


def _slurm(entry: Entry, path: JsonPath, folder: Path, report: Report) -> None:
    check_cluster(entry, path, folder, report)
    if "remote_host" in entry:
        for key in ("ssh_key_file", "ssh_known_hosts"):
            _missing_file(entry, key, path, folder, report)
    if "local_host" in entry and "local_port" not in entry:
        report.warn((*path, "local_host"), 'is not used without "local_port"')


def _missing_file(entry: Entry, key: str, path: JsonPath, folder: Path, report: Report) -> None:
    if key not in entry:
        return
    file = resolve(entry[key], folder)
    # A folder without permission or a name too long: as good as not there.
    if not os.path.isfile(file):
        report.warn((*path, key), f"{file} is not on this machine, or is not a file")


def _gate(gate: Entry, folder: Path, report: Report, *, keyed: bool) -> None:
    if "listen" in gate:
        text = listen_problem(gate["listen"], is_open=keyed or gate.get("open", False))
        if text is not None:
            report.problem(("gate", "listen"), f"{show_value(gate['listen'])} {text}")
    check_networks(gate, report)
    check_origins(gate.get("cors", []), ("gate", "cors"), report)
    sizes = {key: parse_size(gate[key]) for key in ("max_body", "max_held_bytes") if key in gate}
    for key, size in sizes.items():
        if size > _LARGEST_SIZE:
            report.problem(("gate", key), f"{show_value(gate[key])} is too large")
    if sizes.get("max_held_bytes", 10 << 30) < sizes.get("max_body", 1 << 30):
        report.warn(
            ("gate", "max_held_bytes"),
            '"max_body" is larger: the largest requests cannot wait for a service to start',
        )
    for file in ("certificate", "key"):
        _missing_file(gate.get("tls", {}), file, ("gate", "tls"), folder, report)
