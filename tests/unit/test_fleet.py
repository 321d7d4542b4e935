"""Many services together: who is looked at when, and what a report without news costs."""

from __future__ import annotations

import itertools

import pytest

from slurmgate.fleet import Fleet, Report
from slurmgate.model import Health, LauncherKind, Phase
from slurmgate.observed import Outcome, ReplicaReport, ServiceReport, Start
from tests.unit.builders import NOW, sighting, spec

MANY = 300


@pytest.fixture
def fleet(tmp_path):
    """Many services, each with a ready replica."""
    ids = (f"new{n}" for n in itertools.count())
    made = Fleet("e", lambda: next(ids), NOW, enabled=True)
    made.configure([spec(name=f"s{n}", route_name=f"s{n}") for n in range(MANY)])
    for n in range(MANY):
        found = sighting(f"r{n}", service=f"s{n}")
        made.adopt(LauncherKind.PROCESS, found, tmp_path, NOW)
    made.report(told(made), NOW)
    made.settle(NOW)
    return made


def told(fleet: Fleet, **services: ServiceReport) -> Report:
    up = {f"r{n}": ReplicaReport(1, 0, Health.UP) for n in range(MANY)}
    return Report("gate", "e", fleet.view().number, services, up)


def phases(fleet: Fleet) -> set[Phase]:
    return {r.phase for service in fleet.view().services for r in service.replicas}


def test_a_route_that_is_the_name_of_another_service_leads_to_its_own():
    fleet = Fleet("e", lambda: "r", NOW, enabled=True)
    fleet.configure([spec(name="a", route_name="b"), spec(name="b", route_name="a")])
    view = fleet.view()
    for word in "ab":
        assert view.find(word).spec.name == word
        assert view.routed(word).spec.route_name == word
    fleet.configure([spec(name="LLM", route_name="llm")])
    assert fleet.view().find("llm").spec.name == fleet.view().routed("LLM").spec.name == "LLM"


def test_of_many_that_only_serve_each_is_looked_at_within_ten_turns(fleet):
    assert phases(fleet) == {Phase.READY}
    later = NOW + 20  # idle for longer than their timeout
    for _ in range(10):
        assert Phase.READY in phases(fleet)
        assert fleet.look_at_unsettled() == MANY
        fleet.settle(later)
    assert phases(fleet) == {Phase.DRAINING}


def test_one_that_is_on_the_move_is_looked_at_each_time(fleet):
    fleet.report(told(fleet, s7=ServiceReport(1, waiting=0, in_flight=1)), NOW + 15)
    for turn in range(3):
        fleet.look_at_unsettled()
        fleet.settle(NOW + 20 + turn)
    moving = [s.spec.name for s in fleet.view().services if s.replicas[0].phase is Phase.DRAINING]
    assert moving
    for replica in (r for s in fleet.view().services for r in s.replicas):
        assert replica.phase in (Phase.READY, Phase.DRAINING)
    name = moving[0]
    replica = next(s.replicas[0] for s in fleet.view().services if s.spec.name == name)
    quiet = Report(
        "gate", "e", fleet.view().number, {}, {replica.id: ReplicaReport(1, 0, Health.UP)}
    )
    fleet.report(quiet, NOW + 23)
    assert [e.replica for e in fleet.settle(NOW + 23)] == [replica.id]


def test_an_age_that_only_grew_is_no_news(fleet):
    fleet.report(told(fleet, s7=ServiceReport(1, idle_s=2.0)), NOW + 3)
    fleet.settle(NOW + 3)
    before = fleet.view().find("s7")
    fleet.report(told(fleet, s7=ServiceReport(1, idle_s=2.501)), NOW + 3.5)
    assert fleet.view().find("s7") is before
    fleet.report(told(fleet, s7=ServiceReport(2, idle_s=0.0)), NOW + 4)
    assert fleet.view().find("s7").demand.last_use == NOW + 4


def test_a_start_of_long_ago_is_not_recorded_again_after_a_restart(tmp_path):
    made = Fleet("e", lambda: "new", NOW, enabled=True)
    later = [Start("LLM", f"s{n}", NOW - 60, Outcome.READY, 1.0, 1.0) for n in range(200)]
    made.remember([Start("LLM", "r1", NOW - 7200, Outcome.READY, 1.0, 1.0), *later])
    made.configure([spec()])
    made.adopt(LauncherKind.PROCESS, sighting("r1", created_at=NOW - 7202), tmp_path, NOW)
    made.report(Report("gate", "e", 0, {}, {"r1": ReplicaReport(1, 0, Health.UP)}), NOW)
    made.settle(NOW)
    assert phases(made) == {Phase.READY}
    assert made.take_starts() == []


@pytest.mark.parametrize(("job", "counted"), [("7", 1), (None, 0)])
def test_of_the_starts_before_a_restart_those_that_never_were_a_job_do_not_count(job, counted):
    made = Fleet("e", lambda: "new", NOW, enabled=True)
    made.remember([Start("LLM", "r1", NOW - 60, Outcome.FAILED, job_id=job)])
    made.configure([spec()])
    assert len(made.view().services[0].launches) == counted
