"""Rules for what clients see: models, keys, origins of web pages, proxies in front of the gate.

The fields passed the schema; elements of lists that were wrong are None. No state.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurmgate import keys
from slurmgate.config.report import JsonPath, Report, nearest, show_value
from slurmgate.config.specs import resolve
from slurmgate.errors import KeysError, KeysMissing

Entry = dict[str, Any]

_ORIGIN = re.compile(
    r"([a-z][a-z0-9+.-]*)://([a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\])(?::([0-9]+))?"
)
_USUAL_PORTS = {"http": "80", "https": "443"}
_ORIGIN_FORM = 'it should be like "https://chat.example.org" or "http://localhost:3000", or "*"'


def check_keys_file(document: Entry, folder: Path, report: Report) -> None:
    """Look into the file of the clients' keys; one that is not there yet is made by a command.

    None of this is a problem: whatever is in the file changes while the configuration stays.
    """
    if "keys_file" not in document:
        return
    file = resolve(document["keys_file"], folder)
    try:
        for key in keys.load(file):
            _services_of(key, document, report)
    except KeysMissing:
        report.warn(
            ("keys_file",),
            f"{file} is not there: every request is refused, but for those to public services; "
            "`slurmgate keys add NAME` makes it",
        )
    except KeysError as error:
        for text in error.problems:
            report.warn(("keys_file",), text)
    if document.get("gate", {}).get("open"):
        report.warn(("gate", "open"), 'has no effect: "keys_file" makes clients show a key')


def _services_of(key: keys.Key, document: Entry, report: Report) -> None:
    entries = document.get("Services", [])
    if any(entry is None or "name" not in entry for entry in entries):
        return  # a service that is wrong itself may be the one
    names = [entry["name"] for entry in entries]
    for service in key.services or ():
        if service not in names:
            close = nearest(service, names)
            hint = "" if close is None else f" (did you mean {show_value(close)}?)"
            shown = show_value(service)
            report.warn(("keys_file",), f"key {key.name}: {shown} is no service here{hint}")


def check_client_fields(entry: Entry, path: JsonPath, report: Report, *, keyed: bool) -> None:
    """Check one service; ``keyed``: the file has a ``keys_file``."""
    if entry.get("models") and "api_paths" in entry and not _allows_v1(entry["api_paths"]):
        report.warn(
            (*path, "models"), 'no request reaches them: "api_paths" allows nothing under "/v1"'
        )
    if "upstream_model" in entry and not entry.get("models"):
        report.warn((*path, "upstream_model"), 'has no effect without "models"')
    if entry.get("public") and not keyed:
        report.warn((*path, "public"), 'has no effect without "keys_file": all services are public')
    check_origins(entry.get("cors", []), (*path, "cors"), report)


def check_origins(origins: list[str | None], path: JsonPath, report: Report) -> None:
    """Refuse what no browser sends as an ``Origin``; it would allow nobody."""
    for index, origin in enumerate(origins):
        text = None if origin is None else origin_problem(origin)
        if text is not None:
            report.problem((*path, index), f"{show_value(origin)} {text}")
    if "*" in origins and len(origins) > 1:
        report.warn(path, 'the others beside "*" have no effect: it allows all')


def check_networks(gate: Entry, report: Report) -> None:
    """Check ``gate.private`` and ``gate.trusted_proxies``."""
    for key in ("private", "trusted_proxies"):
        for index, network in enumerate(gate.get(key, [])):
            text = None if network is None else _network_problem(network)
            if text is not None:
                report.problem(("gate", key, index), f"{show_value(network)} {text}")
            elif key == "trusted_proxies" and network in ("0.0.0.0/0", "::/0"):
                report.warn(
                    ("gate", key, index),
                    "believes everybody: any client can say that it comes from a private network",
                )


def origin_problem(origin: str) -> str | None:
    """Say why a browser never sends this origin, and which was meant; None when it is right."""
    if origin == "*" or _is_origin(origin):
        return None
    meant = next((guess for guess in _guesses(origin) if _is_origin(guess)), None)
    if meant is not None:
        return f"is not what browsers send; did you mean {show_value(meant)}?"
    return f"is no origin; {_ORIGIN_FORM}"


def _is_origin(text: str) -> bool:
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return False
    scheme, host, port = match.groups()
    if host.startswith("["):
        try:
            if str(ipaddress.IPv6Address(host[1:-1])) != host[1:-1]:
                return False
        except ValueError:
            return False
    if port is None:
        return True
    return port != _USUAL_PORTS.get(scheme) and str(int(port[:6])) == port and 0 < int(port) < 65536


def _guesses(text: str) -> Iterator[str]:
    scheme, mark, rest = text.strip().lower().rpartition("://")
    if not mark and "." not in rest:
        return  # a word, such as "null"
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    scheme = scheme or "https"
    yield f"{scheme}://{host}"
    yield f"{scheme}://{host.removesuffix(':' + _USUAL_PORTS.get(scheme, ''))}"


def _allows_v1(prefixes: list[str | None]) -> bool:
    """Whether any path under ``/v1`` is allowed; a prefix that is wrong itself may have been it."""
    return any(
        prefix is None or prefix.strip("/").split("/")[0] in ("", "v1") for prefix in prefixes
    )


def _network_problem(network: str) -> str | None:
    try:
        ipaddress.ip_network(network)
    except ValueError:
        try:
            meant = ipaddress.ip_network(network, strict=False)
        except ValueError:
            return 'is no IP address or network; it should be written as "10.1.0.0/16"'
        return f"has bits set beyond its prefix; did you mean {show_value(str(meant))}?"
    return 'must have no zone ("%")' if "%" in network else None
