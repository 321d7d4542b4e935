"""The configuration of several replicas: bounds, scaling, affinity, guards, ports that count up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurmgate.config import Findings, validate
from slurmgate.errors import ConfigError
from slurmgate.model import ReplicaBounds, ServiceSpec
from slurmgate.share import schema_file
from tests.unit.test_config import SERVICE, SLURM, findings, only_service, problems, service, slurm

Document = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "serve.sh").touch()
    return tmp_path


def several(*entries: Document) -> Document:
    """Slurm services that differ in name and route, and in these fields."""
    return {
        "Services": [
            SLURM | {"name": f"S{number}", "route_name": f"s{number}"} | entry
            for number, entry in enumerate(entries)
        ]
    }


def ports(first: int, most: int = 1, **fields: object) -> Document:
    return {"remote_port": first, "replicas": {"max": most}, **fields}


def warnings(document: Document, folder: Path) -> tuple[str, ...]:
    found: Findings = findings(document, folder)
    assert found.problems == ()
    return found.warnings


def outcome(document: Document, folder: Path) -> list[str]:
    try:
        validate(document, folder / "services.json")
    except ConfigError as refused:
        return refused.problems
    return []


# Fields


def test_what_is_not_written_has_its_default(folder: Path):
    spec = only_service(slurm(), folder)
    assert spec.replicas == ReplicaBounds(min=0, max=1, target_in_flight=8, max_in_flight=0)
    assert (spec.scale_up_after, spec.affinity, spec.renew_before) == (5.0, None, None)
    assert (spec.max_starts_per_hour, spec.max_pending) == (30, 3)


def test_a_default_that_the_schema_names_is_the_one_that_is_taken(folder: Path):
    properties = json.loads(schema_file().read_text())["$defs"]["service"]["properties"]
    named = {name: field["default"] for name, field in properties.items() if "default" in field}
    bounds = properties["replicas"]["properties"]
    named["replicas"] = {name: field["default"] for name, field in bounds.items()}
    assert {"scale_up_after", "affinity", "max_starts_per_hour", "max_pending"} < named.keys()
    host = {"remote_host": "login.example"}
    assert only_service(slurm(**named, **host), folder) == only_service(slurm(**host), folder)


def test_bounds_that_are_not_written_keep_their_default_beside_those_that_are(folder: Path):
    assert only_service(slurm(replicas={"max": 4}), folder).replicas == ReplicaBounds(max=4)


@pytest.mark.parametrize(
    ("written", "header"),
    [
        ("none", None),
        ("header:X-Session", "X-Session"),
        ("header:x-session", "x-session"),
        ("header:none", "none"),
        ("header:prefix", "prefix"),
        ("prefix", None),
        ("header:header", "header"),
        ("header:a!#$%&'*+.^_`|~9", "a!#$%&'*+.^_`|~9"),
    ],
)
def test_affinity_is_none_or_a_header_or_the_prefix(folder: Path, written: str, header: str | None):
    spec = only_service(slurm(affinity=written), folder)
    assert (spec.affinity, spec.prefix_affinity) == (header, written == "prefix")


@pytest.mark.parametrize(
    "written",
    [
        "",
        "X-Session",
        "header",
        "header:",
        "header: X-Session",
        "header:X Session",
        "header:X-Session:",
        "header:X-Session\n",
        "header:X\u00e9",
        "header:(X)",
        'header:"X"',
        "cookie:session",
        "prefix:",
        "prefix:256",
        "none\n",
        "header:" + "x" * 100,
        None,
        7,
        ["header:X"],
    ],
)
def test_another_affinity_is_refused_with_what_would_be_right(folder: Path, written: object):
    [problem] = problems(slurm(affinity=written), folder)
    assert problem.startswith("Services[0].affinity: ")
    assert (
        '"none", "prefix" or "header:" with the name of a header, such as "header:X-Session"'
        in problem
    )


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"replicas": {"min": -1}}, "replicas.min: -1 is too small; it should be a whole number"),
        ({"replicas": {"max": 0}}, "replicas.max: 0 is too small; it should be a whole number, 1"),
        ({"replicas": {"target_in_flight": 0}}, "replicas.target_in_flight: 0 is too small"),
        ({"replicas": {"max_in_flight": -1}}, "replicas.max_in_flight: -1 is too small"),
        ({"replicas": {"max": 1.5}}, "replicas.max: 1.5 is a number; it should be a whole"),
        ({"scale_up_after": -1}, "scale_up_after: -1 is too small; it should be a number of sec"),
        ({"renew_before": -1}, "renew_before: -1 is too small; it should be a number of seconds"),
        ({"renew_before": "auto"}, 'renew_before: "auto" is a string; it should be a number of'),
        ({"max_starts_per_hour": 0}, "max_starts_per_hour: 0 is too small; it should be a whole"),
        ({"max_pending": 0}, "max_pending: 0 is too small; it should be a whole number, 1 to"),
        ({"renew_befor": 1}, 'renew_befor: unknown field; did you mean "renew_before"?'),
    ],
)
def test_a_value_out_of_its_range_is_refused(folder: Path, fields: Document, line: str):
    [problem] = problems(slurm(**fields), folder)
    assert problem.startswith(f"Services[0].{line}")


def test_zero_means_at_once_never_and_no_bound(folder: Path):
    document = slurm(scale_up_after=0, renew_before=0, replicas={"max": 2, "max_in_flight": 0})
    spec = only_service(document, folder)
    assert (spec.scale_up_after, spec.renew_before, spec.replicas.max_in_flight) == (0.0, 0.0, 0)


def test_more_replicas_at_least_than_at_most(folder: Path):
    [problem] = problems(service(replicas={"min": 3, "max": 2}), folder)
    assert problem.startswith('Services[0].replicas.min: 3 is larger than "max"; it should be at')
    [problem] = problems(service(replicas={"min": 2}), folder)
    assert "at most 1" in problem


def test_a_bound_that_is_wrong_itself_is_not_compared(folder: Path):
    [problem] = problems(service(replicas={"min": 3, "max": "5"}), folder)
    assert problem.startswith('Services[0].replicas.max: "5" is a string')


@pytest.mark.parametrize("launcher", [SERVICE, SLURM])
def test_what_only_says_how_many_replicas_replaces_none_of_them(folder: Path, launcher: Document):
    [plain] = validate({"Services": [launcher]}, folder / "services.json").services
    scaled = dataclasses.replace(
        plain,
        replicas=ReplicaBounds(1, 5, 2, 3),
        scale_up_after=1.0,
        affinity="X-Session",
        renew_before=300.0,
        max_starts_per_hour=5,
        max_pending=1,
    )
    assert scaled.start_hash() == plain.start_hash()


# Warnings


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (
            slurm(replicas={"target_in_flight": 2}),
            'replicas.target_in_flight: has no effect while "max" is 1',
        ),
        (slurm(replicas={"min": 1}, scale_up_after=9), 'scale_up_after: has no effect while "max"'),
        (slurm(affinity="header:X"), 'affinity: has no effect while "max" is 1'),
        (slurm(affinity="prefix"), 'affinity: has no effect while "max" is 1'),
        (
            slurm(replicas={"min": 3, "max": 3, "target_in_flight": 2}),
            'replicas.target_in_flight: has no effect while "min" and "max" are both 3',
        ),
        (
            slurm(replicas={"max": 2, "target_in_flight": 5, "max_in_flight": 4}),
            'replicas.target_in_flight: is more than a replica ever has: "max_in_flight" 4 decides',
        ),
        (
            slurm(replicas={"max": 9}, max_starts_per_hour=8),
            "replicas.max: 9 replicas take more than an hour to start",
        ),
        (
            slurm(replicas={"max": 2}, affinity="header:X_Session"),
            "affinity: this header never comes: nginx takes only those of letters, digits and '-'",
        ),
        (
            slurm(replicas={"max": 3}, port_range=[3000, 3002]),
            "port_range: has 3 ports; 3 replicas and a replacement need 4",
        ),
        (service(renew_before=1), 'renew_before: is not used with launcher "process"'),
        (service(max_pending=1), 'max_pending: is not used with launcher "process"'),
    ],
)
def test_what_has_no_effect_or_another_than_it_seems_is_a_warning(
    folder: Path, document: Document, line: str
):
    [warning] = warnings(document, folder)
    assert warning.startswith(f"Services[0].{line}")


@pytest.mark.parametrize(
    "fields",
    [
        {"replicas": {"max": 4, "target_in_flight": 4, "max_in_flight": 4}},
        {"replicas": {"max": 4, "target_in_flight": 100, "max_in_flight": 0}},
        {"replicas": {"max": 4, "max_in_flight": 2}},
        {"replicas": {"min": 2, "max": 2}, "affinity": "header:X-Session"},
        {"replicas": {"min": 1, "max_in_flight": 3}},
        {"affinity": "none"},
        {"renew_before": 0, "max_pending": 1, "max_starts_per_hour": 1},
        {"replicas": {"max": 3}, "port_range": [3000, 3003]},
        {"replicas": {"max": 3}, "port_range": [3000, 3001], "remote_port": 8000},
        {"port_range": [3000, 3000]},
    ],
)
def test_what_makes_sense_is_no_warning(folder: Path, fields: Document):
    assert warnings(slurm(**fields), folder) == ()


def test_fields_of_slurm_do_not_reach_a_process(folder: Path):
    spec: ServiceSpec = only_service(service(renew_before=1, max_pending=1), folder)
    assert (spec.renew_before, spec.max_pending) == (None, 3)


# Fixed ports


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (ports(8000, 4), ports(8000), "8000 is the fixed port of Services[0] already"),
        (ports(8000, 4), ports(8001), "8001 is among the ports 8000 to 8004 of Services[0]"),
        (ports(8000, 4), ports(8004), "8004 is among the ports 8000 to 8004 of Services[0]"),
        (ports(8000, 4), ports(8004, 2), "the ports 8004 to 8006, counted upward, one for each"),
        (ports(8000), ports(7998, 2), "the ports 7998 to 8000, counted upward, one for each"),
        (ports(8000, 2), ports(7000, 2000), "meet 8000 to 8002 of Services[0]; they should be"),
    ],
)
def test_ports_that_count_upward_into_those_of_another_service_are_refused(
    folder: Path, first: Document, second: Document, text: str
):
    [problem] = problems(several(first, second), folder)
    assert problem.startswith("Services[1].remote_port: ")
    assert text in problem


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ports(8000, 4), ports(8005)),
        (ports(8000, 4), ports(8005, 4)),
        (ports(8000), ports(8001)),
        (ports(8000, 4), ports(8002, remote_host="login.example")),
        (ports(8000, 4), ports(8002, sbatch_args=["--nodelist=n2"])),
        (ports(8000, 4), ports(8002, launcher="process")),
        (ports(8000, 4), {"replicas": {"max": 4}, "port_range": [8000, 8010]}),
    ],
)
def test_ports_that_do_not_meet_are_accepted(folder: Path, first: Document, second: Document):
    assert outcome(several(first, second), folder) == []


def test_each_service_in_the_ports_of_another_is_told_once(folder: Path):
    document = several(ports(8000, 9), ports(8001), ports(8003, 2), ports(8009), ports(8020))
    found = problems(document, folder)
    assert [line.partition(":")[0] for line in found] == [
        "Services[1].remote_port",
        "Services[2].remote_port",
        "Services[3].remote_port",
    ]
    assert all("of Services[0]" in line for line in found)


def test_the_other_service_is_named_by_its_place_in_the_file(folder: Path):
    document = several(ports(8000, 4), ports(8002))
    document["Services"].insert(0, {"name": 5})
    assert any(
        line.startswith("Services[2].remote_port: 8002 is among the ports 8000 to 8004 of Service")
        and "Services[1]" in line
        for line in problems(document, folder)
    )


@given(st.lists(st.tuples(st.integers(8000, 8020), st.integers(1, 4)), max_size=6))
def test_services_are_refused_exactly_when_their_ports_meet(chosen: list[tuple[int, int]]):
    used = [set(range(port, port + (most if most > 1 else 0) + 1)) for port, most in chosen]
    meeting = {
        late for late in range(len(used)) for early in range(late) if used[early] & used[late]
    }
    told = outcome(several(*(ports(*pair) for pair in chosen)), Path("/nowhere"))
    places = {int(line.removeprefix("Services[").partition("]")[0]) for line in told}
    assert bool(places) == bool(meeting)
    assert places <= meeting


def test_processes_share_the_ports_of_this_machine(folder: Path):
    here, there = ports(8000, 4), ports(8003, sbatch_args=["-x"])
    document = several(here | {"launcher": "process"}, there | {"launcher": "process"})
    [problem] = problems(document, folder)
    assert "among the ports 8000 to 8004" in problem


@pytest.mark.parametrize(
    ("port", "most", "text"),
    [
        (65534, 4, '65534 leaves too few ports above it for 4 replicas ("max") and a replacement'),
        (65532, 4, 'it should be at most 65531, or "auto"'),
        (8000, 1000000, 'it should be "auto"'),
    ],
)
def test_a_fixed_port_needs_room_above_it(folder: Path, port: int, most: int, text: str):
    fields = ports(port, most, max_starts_per_hour=most)
    [problem] = problems(slurm(**fields), folder)
    assert problem.startswith("Services[0].remote_port: ")
    assert text in problem


def test_the_highest_port_is_enough_for_one_replica(folder: Path):
    assert only_service(slurm(remote_port=65535), folder).remote_port == 65535
    assert only_service(slurm(**ports(65531, 4)), folder).remote_port == 65531


def test_a_replacement_that_takes_the_port_of_another_service_is_a_warning(folder: Path):
    [warning] = warnings(several(ports(8001), ports(8000)), folder)
    assert warning.startswith(
        "Services[1].remote_port: a replacement before the time limit listens"
    )
    assert "8001, which is that of Services[0]" in warning


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ports(8000), ports(8002)),
        (ports(8000, renew_before=0), ports(8001)),
        (ports(8000, sbatch_args=["-w", "n1"]), ports(8001, sbatch_args=["-w", "n2"])),
        (ports(8000, launcher="process"), ports(8001, launcher="process")),
        (ports(8000, 4), ports(8005)),
    ],
)
def test_ports_that_no_replacement_takes_are_no_warning(
    folder: Path, first: Document, second: Document
):
    assert warnings(several(first, second), folder) == ()


def test_a_local_port_is_no_matter_of_how_many_replicas(folder: Path):
    spec = only_service(slurm(local_port=8001, replicas={"max": 4}), folder)
    assert spec.local_port == 8001
