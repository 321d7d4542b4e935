"""Rules for the number of replicas and what follows from it: bounds, scaling, fixed ports.

The fields passed the schema; no state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from slurmgate.config.report import JsonPath, Report, show_path
from slurmgate.config.specs import header_of

Entry = dict[str, Any]

_HIGHEST_PORT = 65535
_DEFAULT_STARTS = 30
_DEFAULT_PORTS = (20000, 29999)
# Allowed by RFC 9110, but nginx takes a request's headers without those that have one of these.
_DROPPED_BY_NGINX = frozenset("!#$%&'*+.^_`|~")


@dataclass(frozen=True, slots=True)
class _Ports:
    """Fixed ports of one service, first and last included; ``path`` is its place in the file.

    ``renewed``: a service with one replica that may take the next port for a replacement.
    """

    first: int
    last: int
    path: JsonPath
    renewed: bool

    @property
    def owner(self) -> str:
        """What the service is called in messages about others."""
        return show_path(self.path)


def check_replicas(entry: Entry, path: JsonPath, report: Report) -> None:
    """Check the fields of one service that say how many replicas it has, and when."""
    where = (*path, "replicas")
    replicas = entry.get("replicas", {})
    if any(report.has_problem((*where, key)) for key in ("min", "max")):
        return  # how many were meant is not known
    least, most = int(replicas.get("min", 0)), int(replicas.get("max", 1))
    if least > most:
        report.problem(
            (*where, "min"),
            f'{least} is larger than "max"; it should be at most {most}, or "max" more',
        )
        return
    for place, text in _without_effect(entry, least, most):
        report.warn((*path, *place), text)
    for place, text in _at_odds(entry, most):
        report.warn((*path, *place), text)


def _without_effect(entry: Entry, least: int, most: int) -> Iterator[tuple[JsonPath, str]]:
    if least < most and most > 1:
        return
    same = '"max" is 1' if most == 1 else f'"min" and "max" are both {most}'
    if "target_in_flight" in entry.get("replicas", {}):
        yield ("replicas", "target_in_flight"), f"has no effect while {same}"
    if "scale_up_after" in entry:
        yield ("scale_up_after",), f"has no effect while {same}"
    if most == 1 and entry.get("affinity", "none") != "none":
        yield ("affinity",), f"has no effect while {same}"


def _at_odds(entry: Entry, most: int) -> Iterator[tuple[JsonPath, str]]:
    replicas = entry.get("replicas", {})
    target, bound = replicas.get("target_in_flight", 0), replicas.get("max_in_flight", 0)
    if most > 1 and target > bound > 0:
        yield (
            ("replicas", "target_in_flight"),
            f'is more than a replica ever has: "max_in_flight" {bound} decides',
        )
    starts = entry.get("max_starts_per_hour", _DEFAULT_STARTS)
    if most > starts:
        yield (
            ("replicas", "max"),
            f'{most} replicas take more than an hour to start: "max_starts_per_hour" is {starts}',
        )
    lowest, highest = entry.get("port_range", _DEFAULT_PORTS)
    if most > 1 and entry.get("remote_port", "auto") == "auto" and None not in (lowest, highest):
        ports = int(highest) - int(lowest) + 1
        if 0 < ports <= most:
            needed = f"{most} replicas and a replacement need {most + 1}"
            yield ("port_range",), f"has {ports} ports; {needed}"
    header = header_of(entry.get("affinity", "none"))
    if header is not None and _DROPPED_BY_NGINX.intersection(header):
        yield (
            ("affinity",),
            "this header never comes: nginx takes only those of letters, digits and '-'",
        )


def check_fixed_ports(services: list[tuple[JsonPath, Entry]], report: Report) -> None:
    """Refuse fixed ports that two services would use on the same nodes.

    Replicas count upward from ``remote_port``: one for each, and one for a replacement. That a
    service with one replica has another next to it is a warning only: files of the original system,
    which replaces nothing, may be so.
    """
    by_place: defaultdict[Hashable, list[_Ports]] = defaultdict(list)
    for path, entry in services:
        ports = _fixed_ports(entry, path, report)
        if ports is not None:
            by_place[_place(entry)].append(ports)
    for together in by_place.values():
        together.sort(key=lambda ports: ports.first)  # stable: of equal ones the first in the file
        for one, other in _overlaps(together):
            early, late = sorted((one, other), key=_place_in_file)
            report.problem((*late.path, "remote_port"), _overlap(late, early))
        for ports, after in pairwise(together):
            if ports.renewed and after.first == ports.first + 1:
                report.warn((*ports.path, "remote_port"), _next_to(ports, after))


def _fixed_ports(entry: Entry, path: JsonPath, report: Report) -> _Ports | None:
    port = entry.get("remote_port", "auto")
    if port == "auto":
        return None
    first, most = int(port), int(entry.get("replicas", {}).get("max", 1))
    last = first if most == 1 else first + most
    if last > _HIGHEST_PORT:
        highest = _HIGHEST_PORT - most
        right = f'at most {highest}, or "auto"' if highest > 0 else '"auto"'
        report.problem(
            (*path, "remote_port"),
            f'{first} leaves too few ports above it for {most} replicas ("max") and a '
            f"replacement; it should be {right}",
        )
        return None
    renewed = most == 1 and entry.get("launcher") != "process" and entry.get("renew_before") != 0
    return _Ports(first, last, path, renewed)


def _place(entry: Entry) -> Hashable:
    """Where the ports of a service are: services of one place may meet on a node."""
    if entry.get("launcher", "slurm") == "process":
        return "process"
    # Jobs that other arguments send to other nodes may well use the same port there.
    return (entry.get("remote_host"), tuple(entry.get("sbatch_args", ())))


def _overlaps(together: list[_Ports]) -> Iterator[tuple[_Ports, _Ports]]:
    """Give each that meets one before it, with that one; they are in the order of ports."""
    before: _Ports | None = None
    for ports in together:
        if before is not None and ports.first <= before.last:
            yield before, ports
        if before is None or ports.last > before.last:
            before = ports


def _place_in_file(ports: _Ports) -> int:
    return int(ports.path[-1])


def _overlap(late: _Ports, early: _Ports) -> str:
    if late.first == early.first:
        return f"{late.first} is the fixed port of {early.owner} already; it should be unique"
    counting = "counted upward, one for each replica and one for a replacement"
    if late.first == late.last:
        return (
            f"{late.first} is among the ports {_shown(early)} of {early.owner}, {counting}; "
            f'it should be another, or "auto"'
        )
    return (
        f"the ports {_shown(late)}, {counting}, meet {_shown(early)} of {early.owner}; "
        'they should be apart, or "auto"'
    )


def _next_to(ports: _Ports, after: _Ports) -> str:
    return (
        f"a replacement before the time limit listens on the next port, {after.first}, which is "
        f'that of {after.owner}: they meet on one node; "renew_before": 0 does without'
    )


def _shown(ports: _Ports) -> str:
    return f"{ports.first}" if ports.first == ports.last else f"{ports.first} to {ports.last}"
