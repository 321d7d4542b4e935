"""What ``slurmgate status`` shows people."""

from __future__ import annotations

from typing import Any

import pytest

from slurmgate.commands import status_table

REPLICA: dict[str, Any] = {
    "id": "k3f9",
    "state": "ready",
    "job_id": None,
    "node": None,
    "reason": None,
}
REPLICA |= {"since_s": 12.0, "notice": None, "starts_in_s": None, "ends_in_s": None}


def info(*replicas: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    service = {
        "name": "LLM",
        "route_name": "llm",
        "state": "ready",
        "reason": reason,
        "waiting": 0,
        "in_flight": 2,
        "requests": 40,
        "stops_in_s": 59.6,
        "excluded_nodes": [],
        "replicas": [{**REPLICA, **replica} for replica in replicas],
    }
    return {
        "management_enabled": True,
        "config": {"error": None, "keys_error": None, "gate_note": None},
        "services": [service],
        "strangers": [],
    }


@pytest.mark.parametrize(
    ("replica", "shown"),
    [
        ({}, "k3f9 ready"),
        ({"job_id": "4711", "node": "gpu07"}, "k3f9 ready (job 4711 on gpu07)"),
        ({"state": "pending", "job_id": "4711"}, "k3f9 pending (job 4711)"),
        (
            {"state": "pending", "job_id": "4711", "starts_in_s": 591.8},
            "k3f9 pending (job 4711, expected to start in 592 s)",
        ),
    ],
)
def test_a_replica_is_shown_with_its_job_and_where_or_when_that_runs(replica, shown):
    head, line = status_table(info(replica)).splitlines()
    assert head.startswith("SERVICE")
    assert line.startswith("LLM")
    assert "  60 s" in line
    assert line.endswith(f"  {shown}")


def test_reasons_and_notices_follow_the_table():
    taken = "local_port 127.0.0.1:9000: Address already in use"
    lines = status_table(info({"notice": taken}, {}, reason="queued: Resources")).splitlines()
    assert lines[1].endswith("  k3f9 ready, k3f9 ready")
    assert lines[2:] == ["LLM: queued: Resources", f"LLM: {taken}"]


def test_a_job_of_another_state_directory_is_shown_with_the_way_to_take_it_over():
    found = info()
    found["strangers"] = [
        {"job_id": "7", "host": "login", "service": "llm", "state": "RUNNING", "owner": "0a1b"}
    ]
    assert "slurmgate adopt 0a1b" in status_table(found).splitlines()[-1]


def test_nodes_the_service_keeps_away_from_are_named():
    told = info()
    told["services"][0]["excluded_nodes"] = ["gpu07", "gpu09"]
    assert "LLM: keeps away from gpu07, gpu09: it failed there repeatedly" in status_table(told)


def test_a_broken_file_of_keys_is_told():
    told = info()
    told["config"]["keys_error"] = "keys.json: there is no such file"
    assert (
        status_table(told).splitlines()[-1] == "keys of clients: keys.json: there is no such file"
    )


def test_a_gate_that_is_to_be_restarted_is_told():
    told = info()
    told["config"]["gate_note"] = "gate: changed; restart the gate to put it in force"
    assert status_table(told).splitlines()[-1] == told["config"]["gate_note"]
