"""How many replicas a load brings, which are replaced before their end, what guards hold back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slurmgate import events, nodes, scaling, snapshot, transitions
from slurmgate.actions import Close, GiveUp, Launch, MarkReady, Reopen, Stop
from slurmgate.lifecycle import decide
from slurmgate.model import End, Fault, Health, LauncherKind, Phase, ReplicaBounds
from slurmgate.observed import (
    Demand,
    Drain,
    Need,
    Outcome,
    Refusal,
    Replica,
    Service,
    ServiceReport,
    Start,
    recorded,
)
from tests.unit.builders import NOW, replica, service, sighting, spec, starting

HOUR = 3600.0


def several(*replicas: Replica, low: int = 0, high: int = 4, target: int = 8, **changes) -> Service:
    """A Slurm service with these bounds, its parameters those of the replicas."""
    fields = changes.pop("fields", {})
    bounds = ReplicaBounds(low, high, target, fields.pop("max_in_flight", 0))
    made = spec(launcher=LauncherKind.SLURM, replicas=bounds, **fields)
    matched = (replace(r, start_hash=made.start_hash()) for r in replicas)
    return service(*matched, spec=made, **changes)


def ready(name: str, **changes) -> Replica:
    return replica(id=name, **changes)


def loaded(found: Service, now: float, *, in_flight: int = 0, waiting: int = 0) -> Service:
    """The gate reports this load."""
    return events.reported(found, ServiceReport(1, waiting, in_flight, idle_s=0.0), now)


def lasting(found: Service, seconds: float, *, in_flight: int) -> Service:
    """The same load for some seconds that end now, reported four times a second."""
    for step in range(int(seconds * 4) + 1):
        found = loaded(found, NOW - seconds + step / 4, in_flight=in_flight)
    return found


def launches(found: Service, now: float = NOW) -> int:
    return sum(isinstance(action, Launch) for action in decide(found, now, now))


# up


def test_a_cold_service_starts_as_many_as_wait_for_at_once():
    assert launches(loaded(several(), NOW, waiting=17)) == 3


def test_never_more_than_max():
    assert launches(loaded(several(high=2), NOW, waiting=1000)) == 2


def test_what_is_in_flight_brings_more_only_once_it_has_lasted():
    found = lasting(several(ready("r1")), 4.75, in_flight=20)
    assert launches(found) == 0
    assert launches(lasting(several(ready("r1")), 5.0, in_flight=20)) == 2


def test_requests_that_wait_bring_more_at_once_even_while_some_are_served():
    found = loaded(several(ready("r1")), NOW - 0.3, in_flight=8, waiting=3)
    found = loaded(found, NOW, in_flight=8, waiting=3)
    assert launches(found) == 1


def test_a_moment_in_the_waiting_room_brings_nothing():
    assert launches(loaded(several(ready("r1")), NOW, in_flight=8, waiting=3)) == 0


def test_a_short_dip_does_not_begin_the_time_anew_a_long_one_does():
    found = lasting(several(ready("r1")), 5.0, in_flight=9)
    dipped = loaded(found, NOW + 0.2, in_flight=8)
    assert launches(loaded(dipped, NOW + 0.9, in_flight=9), NOW + 0.9) == 1
    assert launches(loaded(dipped, NOW + 2.0, in_flight=9), NOW + 2.0) == 0


def test_a_bound_below_the_target_is_the_target():
    found = several(fields={"max_in_flight": 1})
    assert launches(loaded(found, NOW, waiting=3)) == 3


def test_a_lost_replica_is_replaced_at_once_while_the_load_lasts():
    found = lasting(several(ready("r1"), ready("r2"), ready("r3")), 8.0, in_flight=20)
    after = events.ended(found, "r2", End("job 7 was cancelled", Fault.NOBODY), (), NOW)
    assert launches(after) == 1


def test_some_are_kept_warm_without_any_demand():
    assert launches(several(low=2)) == 2
    assert launches(several(low=1, enabled=False)) == 0
    idle = several(ready("r1", ready_at=NOW - HOUR, since=NOW - HOUR), low=1)
    assert decide(idle, NOW, NOW) == ()


def test_an_operators_stop_holds_until_somebody_asks():
    stopped = transitions.stop_by_admin(several(ready("r1"), low=1), 60.0, NOW)
    assert launches(replace(stopped, replicas=()), NOW + 5) == 0
    asked = loaded(replace(stopped, replicas=()), NOW + 5, waiting=1)
    assert launches(asked, NOW + 5) == 1
    assert launches(transitions.start_by_admin(replace(stopped, replicas=()))) == 1


def test_what_is_still_in_flight_after_a_stop_starts_nothing():
    found = lasting(several(ready("r1")), 8.0, in_flight=3)
    stopped = transitions.stop_by_admin(found, 60.0, NOW)
    for step in range(40):
        stopped = loaded(stopped, NOW + step / 4, in_flight=3)
    assert launches(stopped, NOW + 10) == 0


# down

IDLE_FOR_LONG = tuple(Need(NOW - 100, NOW - 50) for _ in range(4))


def aged(name: str, **changes) -> Replica:
    return ready(name, **{"since": NOW - 90, "ready_at": NOW - 90} | changes)


def test_what_was_not_needed_for_timeout_goes_one_at_a_time():
    found = several(aged("r1", in_flight=2), aged("r2"), aged("r3"), needs=IDLE_FOR_LONG)
    found = loaded(found, NOW, in_flight=2)
    (action,) = decide(found, NOW, NOW)
    assert action == Close("r2", Drain.IDLE)
    assert decide(transitions.apply(found, action, NOW), NOW, NOW) == ()


def test_one_that_was_needed_a_moment_ago_stays():
    needs = (*IDLE_FOR_LONG[:1], Need(NOW - 100, NOW - 9.9))
    found = several(aged("r1", in_flight=1), aged("r2", in_flight=1), needs=needs)
    found = loaded(found, NOW, in_flight=2)
    assert decide(found, NOW, NOW) == ()
    later = loaded(found, NOW + 0.1, in_flight=2)
    assert decide(later, NOW + 0.1, NOW + 0.1) == (Close("r2", Drain.IDLE),) or decide(
        later, NOW + 0.1, NOW + 0.1
    ) == (Close("r1", Drain.IDLE),)


def test_the_victim_has_the_fewest_in_flight_and_then_the_least_time():
    def victim(*replicas: Replica) -> str:
        found = loaded(several(*replicas, needs=IDLE_FOR_LONG), NOW, in_flight=3)
        (action,) = decide(found, NOW, NOW)
        assert isinstance(action, Close)
        return action.replica

    assert victim(aged("r1", in_flight=2), aged("r2", in_flight=1)) == "r2"
    soon, late = NOW + 5 * HOUR, NOW + 9 * HOUR
    assert victim(aged("r1", ends_at=soon), aged("r2", ends_at=late)) == "r1"
    assert victim(aged("r1"), aged("r2", ends_at=late)) == "r2"


def test_load_takes_one_of_several_back_before_another_is_started():
    going = replace(aged("r2", phase=Phase.DRAINING, drain=Drain.IDLE), in_flight=3)
    found = several(aged("r1", in_flight=8), going)
    assert decide(loaded(found, NOW, in_flight=7), NOW, NOW) == ()
    assert decide(lasting(found, 6.0, in_flight=11), NOW, NOW) == (Reopen("r2"),)


def test_a_queued_job_is_cancelled_once_the_load_it_was_for_has_gone():
    queued = starting(id="r2", phase=Phase.PENDING, endpoint=None, running_at=None)
    found = several(aged("r1", in_flight=1), replace(queued, created_at=NOW - 70))
    found = loaded(replace(found, needs=IDLE_FOR_LONG), NOW, in_flight=1)
    assert decide(found, NOW, NOW) == ()
    (action,) = decide(loaded(found, NOW + 10, in_flight=1), NOW + 10, NOW + 10)
    assert isinstance(action, Stop)
    assert action.replica == "r2"


# hand-over


def ends(name: str, seconds: float, **changes) -> Replica:
    """One whose job ends in so many seconds, after an hour."""
    end = NOW + seconds
    return aged(
        name, **{"running_at": end - HOUR, "created_at": end - HOUR, "ends_at": end} | changes
    )


def test_a_successor_is_started_before_the_time_limit_of_one_in_use():
    used = loaded(several(ends("r1", 121), high=1), NOW, in_flight=1)
    assert decide(used, NOW, NOW) == ()
    assert launches(loaded(used, NOW + 1, in_flight=1), NOW + 1) == 1


def test_the_usual_time_of_a_start_is_allowed_for():
    took = [Start("LLM", f"s{n}", NOW, Outcome.READY, 100.0, float(n)) for n in range(1, 101)]
    found = several(ends("r1", 256), high=1, recent=tuple(took))  # 100 + 95 + 60 = 255
    assert launches(loaded(found, NOW, in_flight=1)) == 0
    assert launches(loaded(found, NOW + 1, in_flight=1), NOW + 1) == 1


@pytest.mark.parametrize(("before", "started"), [(0.0, False), (100.0, False), (130.0, True)])
def test_the_configuration_may_say_how_long_before(before, started):
    found = several(ends("r1", 125), high=1, fields={"renew_before": before})
    assert launches(loaded(found, NOW, in_flight=1)) == int(started)


def test_a_short_job_is_not_replaced_in_the_first_half_of_its_time():
    short = ends("r1", 31, running_at=NOW - 29)
    found = several(short, high=1)
    assert launches(loaded(found, NOW, in_flight=1)) == 0
    assert launches(loaded(found, NOW + 1, in_flight=1), NOW + 1) == 1


def test_one_that_would_be_idle_by_then_gets_no_successor():
    unused = several(ends("r1", 60), high=1, demand=Demand(last_use=NOW - 9))
    assert decide(unused, NOW, NOW) == ()
    warm = several(ends("r1", 60), low=1, high=1, demand=Demand(last_use=NOW - 9))
    assert launches(warm) == 1


def test_the_old_one_drains_as_soon_as_the_new_one_is_ready():
    old, new = ends("r1", 60, in_flight=2), starting(id="r2")
    assert decide(loaded(several(old, new, high=1), NOW, in_flight=2), NOW, NOW) == ()
    both = loaded(several(old, ready("r2"), high=1), NOW, in_flight=2)
    (action,) = decide(both, NOW, NOW)
    assert action == Close("r1", Drain.ENDING)
    drained = transitions.apply(both, action, NOW)
    assert launches(drained) == 0
    assert decide(loaded(drained, NOW + 1, in_flight=2), NOW + 1, NOW + 1) == ()


def test_only_one_surplus_job_exists_while_several_are_replaced():
    old = [ends(f"r{n}", 100, in_flight=8) for n in range(3)]
    busy = lasting(several(*old, high=3), 8.0, in_flight=24)
    assert launches(busy) == 1
    coming = replace(busy, replicas=(*busy.replicas, starting(id="r9")))
    assert launches(coming) == 0


def test_of_several_that_end_together_the_first_is_replaced_so_early_that_all_can_be():
    def due(seconds: float) -> int:
        old = [ends(f"r{n}", seconds) for n in range(3)]
        return len(scaling.ending(several(*old, high=3), NOW))

    assert [due(s) for s in (361, 359, 241, 239, 121, 119)] == [0, 1, 1, 2, 2, 3]


def test_a_successor_does_not_count_as_use():
    old = ends("r1", 60, ready_at=NOW - 50)
    found = several(old, starting(id="r2"), high=1, demand=Demand(last_use=NOW - 5))
    after = transitions.apply(found, MarkReady("r2"), NOW)
    successor = after.replica("r2")
    assert successor is not None
    assert successor.ready_at == NOW - 50
    alone = replace(after, replicas=(successor,))
    assert decide(alone, NOW + 4.9, NOW + 4.9) == ()
    assert decide(alone, NOW + 5, NOW + 5) == (Close("r2", Drain.IDLE),)


# guards


def test_no_more_starts_within_an_hour_than_configured():
    lately = tuple(NOW - 60 * n for n in range(2))
    found = several(launches=lately, fields={"max_starts_per_hour": 2})
    waiting = loaded(found, NOW, waiting=1)
    assert launches(waiting) == 0
    refusal = snapshot.refusal(waiting, NOW)
    assert refusal is not None
    assert refusal["code"] == "cannot-start"
    assert "max_starts_per_hour" in refusal["reason"]
    assert snapshot.state(waiting, NOW) == "failed"
    assert snapshot.wire(waiting, NOW)["refusal"]["retry_after_s"] == HOUR - 60
    assert launches(waiting, NOW + HOUR - 60) == 1
    assert snapshot.refusal(waiting, NOW + HOUR - 60) is None


def test_a_start_is_counted_when_it_begins():
    found = transitions.launching(several(), "r1", NOW)
    assert found.launches == (NOW,)
    assert transitions.launching(found, "r2", NOW + HOUR).launches == (NOW + HOUR,)


def test_a_launch_that_left_nothing_running_is_no_start():
    both = transitions.launching(transitions.launching(several(), "r1", NOW), "r2", NOW)
    failed = events.launch_failed(both, "r1", "cannot-start", "the login host is away", NOW + 9)
    assert failed.launches == (NOW,)


@pytest.mark.parametrize("phase", [Phase.SUBMITTED, Phase.STOPPING])
def test_a_submission_in_doubt_that_came_to_nothing_is_no_start_after_all(phase):
    found = transitions.launching(several(), "r1", NOW)
    doubted = replace(found, replicas=(replace(found.replicas[0], phase=phase),))
    nothing = End("sbatch failed (no answer)", Fault.NOBODY, "cannot-start", began=False)
    assert events.ended(doubted, "r1", nothing, (), NOW + 60).launches == ()
    cancelled = End("job 7 was cancelled", Fault.NOBODY)
    assert events.ended(doubted, "r1", cancelled, (), NOW + 60).launches == (NOW,)


def test_no_more_jobs_in_the_queue_than_configured():
    queued = starting(id="r1", phase=Phase.PENDING, endpoint=None, running_at=None)
    found = several(queued, fields={"max_pending": 2})
    assert launches(loaded(found, NOW, waiting=100)) == 1
    both = several(queued, replace(queued, id="r2"), fields={"max_pending": 2})
    assert launches(loaded(both, NOW, waiting=100)) == 0
    assert snapshot.refusal(loaded(both, NOW, waiting=100), NOW) is None


def test_jobs_that_are_to_leave_the_queue_count_until_they_have():
    leaving = starting(id="r1", phase=Phase.STOPPING, endpoint=None, running_at=None)
    found = loaded(several(leaving, fields={"max_pending": 1}), NOW, waiting=1)
    assert launches(found) == 0
    refusal = snapshot.refusal(found, NOW)
    assert refusal is not None
    assert "max_pending" in refusal["reason"]


def test_a_reload_while_all_jobs_wait_in_the_queue_refuses_nobody():
    queued = starting(id="r1", phase=Phase.PENDING, endpoint=None, running_at=None)
    found = loaded(several(queued, fields={"max_pending": 1}), NOW, waiting=1)
    found = events.configured(found, replace(found.spec, bash_file="other.sh"))
    (stop,) = decide(found, NOW, NOW)
    assert isinstance(stop, Stop)
    leaving = transitions.apply(found, stop, NOW)
    assert launches(leaving, NOW + 1) == 0
    assert snapshot.refusal(leaving, NOW + 1) is None
    stuck = snapshot.refusal(leaving, NOW + 60)
    assert stuck is not None
    assert "max_pending" in stuck["reason"]


@pytest.mark.parametrize(
    ("fields", "lately"), [({"max_pending": 1}, ()), ({"max_starts_per_hour": 1}, (NOW - 60,))]
)
def test_those_who_wait_for_a_job_that_is_given_up_in_the_queue_hear_why_whatever_guards_say(
    fields, lately
):
    queued = starting(id="r1", phase=Phase.PENDING, endpoint=None, running_at=None)
    found = loaded(several(queued, high=1, fields=fields, launches=lately), NOW, waiting=1)
    found = events.hopeless(found, "r1", Refusal("cannot-start", "JobHeldAdmin"))
    (given_up,) = decide(found, NOW, NOW)
    assert isinstance(given_up, GiveUp)
    leaving = transitions.apply(found, given_up, NOW)
    assert snapshot.refusal(leaving, NOW + 1) is None, "its last lines are being fetched"
    assert "max_pending" not in (snapshot.reason(leaving, NOW + 1) or "")
    told = snapshot.refusal(events.last_words(leaving, "r1", (), NOW + 1), NOW + 1)
    assert told is not None
    assert told["reason"] == "JobHeldAdmin"


def test_a_night_of_failed_starts_does_not_make_hand_overs_come_late():
    took = tuple(Start("LLM", f"s{n}", NOW, Outcome.READY, 600.0, 600.0) for n in range(5))
    found = several(ends("r1", 1200), high=1, recent=took)
    for number in range(200):
        away = transitions.launching(found, f"f{number}", NOW)
        found = events.launch_failed(away, f"f{number}", "cannot-start", "host away", NOW)
    assert launches(loaded(replace(found, failure=None), NOW, in_flight=1)) == 1
    assert len(found.recent) == 100
    for number in range(200):
        found = recorded(found, Start("LLM", f"g{number}", NOW, Outcome.READY, 1.0, 1.0))
    assert sum(start.outcome is Outcome.FAILED for start in found.recent) == 50
    assert found.recent[-1].replica == "g199"


# nodes


def failing(found: Service, name: str, node: str, now: float) -> Service:
    added = replace(found, replicas=(starting(id=name, node=node, created_at=now - 1),))
    return events.ended(added, name, End("job 1 exited with code 1"), (), now)


def test_a_node_where_starts_fail_again_and_again_is_kept_away_from():
    once = failing(several(), "a1", "n1", NOW)
    assert nodes.avoided(once, NOW) == ()
    twice = failing(once, "a2", "n1", NOW + 10)
    assert nodes.avoided(twice, NOW + 10) == ("n1",)
    assert nodes.avoided(twice, NOW + 10 + HOUR) == ()


def test_one_that_ends_before_it_was_seen_on_a_node_counts_against_that_node_too():
    found = several()
    for name in ("a1", "a2"):
        queued = replace(found, replicas=(starting(id=name, node=None, created_at=NOW - 1),))
        found = events.ended(queued, name, End("exited with code 1", node="n1"), (), NOW)
    assert nodes.avoided(found, NOW) == ("n1",)
    assert found.recent[-1].node == "n1"


def test_processes_run_on_this_machine_whatever_fails_there():
    here = service()
    found = failing(failing(here, "a1", "localhost", NOW), "a2", "localhost", NOW)
    assert nodes.avoided(found, NOW) == ()


def test_a_service_that_fails_everywhere_is_kept_from_no_node():
    found = several()
    for index, node in enumerate(("n1", "n1", "n2", "n2", "n3", "n3")):
        found = failing(found, f"a{index}", node, NOW + index)
    assert len(nodes.avoided(found, NOW + 6)) <= 1


def test_the_nodes_own_failures_count_whatever_else_fails():
    lost = End("node n1 failed", Fault.NOBODY, bad_node="n1")
    found = several()
    for name in ("a1", "a2"):
        found = events.ended(
            replace(found, replicas=(ready(name, node="n1"),)), name, lost, (), NOW
        )
    found = failing(found, "b1", "n2", NOW)
    assert nodes.avoided(found, NOW) == ("n1",)


def test_one_good_start_forgives_a_node():
    found = failing(failing(several(), "a1", "n1", NOW), "a2", "n1", NOW)
    coming = replace(found, replicas=(starting(id="a3", node="n1"),))
    after = transitions.apply(coming, MarkReady("a3"), NOW)
    assert nodes.avoided(after, NOW) == ()


# what is kept of starts


def test_what_became_of_a_start_is_kept_once():
    coming = several(starting(id="a1", created_at=NOW - 9, running_at=NOW - 4, node="n1"))
    after = transitions.apply(coming, MarkReady("a1"), NOW)
    (start,) = after.recent
    assert (start.outcome, start.queue_s, start.start_s) == (Outcome.READY, 5.0, 4.0)
    assert events.ended(after, "a1", End("x"), (), NOW + 5).recent == (start,)


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (End("exited with code 3"), Outcome.FAILED),
        (End("node n1 failed", Fault.NOBODY), Outcome.LOST),
        (End("port taken", Fault.PORT), Outcome.LOST),
    ],
)
def test_how_a_start_ended_that_never_served(end, outcome):
    coming = several(starting(id="a1", created_at=NOW - 9, running_at=None))
    (start,) = events.ended(coming, "a1", end, (), NOW).recent
    assert (start.outcome, start.queue_s, start.start_s) == (outcome, 9.0, None)
    assert end.reason in (start.reason or "")


def test_a_start_nobody_wanted_any_more_is_cancelled_not_failed():
    coming = several(starting(id="a1", phase=Phase.STOPPING, reason="no longer wanted"))
    (start,) = events.ended(coming, "a1", End("x", Fault.NOBODY), (), NOW).recent
    assert (start.outcome, start.reason) == (Outcome.CANCELLED, "no longer wanted")


# a configuration read again, a restart in the midst of a hand-over


def test_a_lower_max_lets_go_what_waits_in_the_queue_and_not_what_serves():
    queued = starting(id="r3", phase=Phase.PENDING, created_at=NOW - 1, endpoint=None)
    found = several(aged("r1", in_flight=8), aged("r2", in_flight=8), queued, high=1)
    closed = {a.replica for a in decide(found, NOW, NOW) if isinstance(a, Close)}
    assert len(closed) == 2
    assert "r3" in closed


def test_a_time_limit_that_was_raised_costs_the_successor_in_the_queue():
    queued = starting(id="r2", phase=Phase.PENDING, endpoint=None)
    found = several(ends("r1", 5000, in_flight=1), queued, high=1)
    assert Close("r1", Drain.SURPLUS) not in decide(found, NOW, NOW)
    assert Close("r2", Drain.SURPLUS) in decide(found, NOW, NOW)


def test_a_successor_stays_though_the_time_that_is_left_is_told_in_whole_seconds_only():
    found = several(ends("r1", 119.9), high=1)
    queued = starting(id="r2", phase=Phase.PENDING, start_hash=found.spec.start_hash())
    both = loaded(replace(found, replicas=(*found.replicas, queued)), NOW, in_flight=2)
    r1 = found.replicas[0]
    told = sighting("r1", running_at=r1.running_at, ends_at=NOW + 120.8)
    assert decide(events.seen(both, told, NOW + 0.5), NOW + 0.5, NOW + 0.5) == ()


@pytest.mark.parametrize("way", [Phase.PENDING, Phase.STARTING])
def test_a_backend_that_finds_a_hand_over_keeps_both_until_it_knows_more(way):
    """That the time of the old one ends is known once its host was listed."""
    old = starting(id="r1", closed_at=None, adopted=True)
    reached = way is Phase.STARTING
    new = starting(id="r2", phase=way, created_at=NOW - 2, adopted=reached)
    new = replace(new, closed_at=None) if reached else replace(new, endpoint=None)
    assert decide(several(old, new, high=1, unlisted=True, last_demand=NOW), NOW, NOW) == ()
    serving = replace(old, phase=Phase.READY, health=Health.UP, adopted=False, ready_at=NOW)
    assert decide(several(serving, new, high=1, unlisted=True), NOW, NOW) == ()
    known = replace(serving, running_at=NOW - HOUR, ends_at=NOW + 60)
    listed = several(known, new, high=1)
    assert decide(loaded(listed, NOW, in_flight=1), NOW, NOW) == ()


def test_changed_ones_beyond_a_lower_max_go_at_once_and_the_rest_is_replaced():
    old = [aged(f"r{n}", in_flight=8) for n in range(3)]
    found = several(*old, high=1)
    changed = replace(found, spec=replace(found.spec, bash_file="other.sh"))
    busy = loaded(changed, NOW, in_flight=24)
    closing = decide(busy, NOW, NOW)
    assert [type(a) for a in closing] == [Close, Close]
    left = replace(busy, replicas=busy.replicas[:1])
    assert launches(left) == 1


def test_a_warm_service_has_its_successor_before_the_changed_one_goes_though_nobody_asks():
    found = several(aged("r1"), low=1, high=1)
    changed = replace(found, spec=replace(found.spec, bash_file="other.sh"))
    assert decide(changed, NOW, NOW) == (Launch(),)
    new = ready("r2", start_hash=changed.spec.start_hash())
    both = replace(changed, replicas=(*changed.replicas, new))
    assert decide(both, NOW, NOW) == (Close("r1", Drain.CHANGED),)


def test_one_who_asks_now_and_then_is_in_use_though_timeout_is_shorter_than_a_start():
    found = several(ends("r1", 119), high=1, fields={"timeout": 60.0})
    assert launches(replace(found, demand=Demand(last_use=NOW - 20))) == 1
    assert launches(replace(found, demand=Demand(last_use=NOW - 40))) == 0


def test_with_a_fixed_port_one_whose_time_ends_keeps_no_other_from_being_started():
    leaving = ends("r1", 60, phase=Phase.DRAINING, drain=Drain.ENDING, in_flight=1)
    found = several(leaving, high=1, fields={"remote_port": 8000})
    assert launches(loaded(found, NOW, waiting=1)) == 1


def test_requests_wait_for_one_that_is_out_of_reach_for_a_moment_whatever_guards_say():
    away = aged("r1", health=Health.DOWN, down_since=NOW - 1)
    found = several(away, high=1, fields={"max_starts_per_hour": 1}, launches=(NOW - 60,))
    assert scaling.guard(found, NOW) is not None
    assert snapshot.refusal(found, NOW) is None
    assert snapshot.refusal(replace(found, replicas=()), NOW) is not None


def test_an_operators_start_holds_though_whoever_asked_first_hangs_up():
    queued = starting(id="r1", phase=Phase.PENDING, endpoint=None)
    found = transitions.start_by_admin(several(queued, high=1, last_demand=NOW - 120))
    assert decide(found, NOW, NOW) == ()
    assert not transitions.start_by_admin(several(aged("r1"))).start_lease


def test_a_successor_that_went_silent_replaces_nobody_and_is_the_first_to_go():
    silent = ready("r2", health=Health.DOWN, down_since=NOW - 1, reconnected_at=NOW)
    handing = loaded(several(ends("r1", 60), silent, high=1), NOW, in_flight=1)
    assert decide(handing, NOW, NOW) == ()
    two = several(aged("r1"), aged("r2", **{"health": Health.DOWN, "down_since": NOW - 1}), high=2)
    assert Close("r2", Drain.IDLE) in decide(loaded(two, NOW, in_flight=1), NOW, NOW)


def test_a_start_under_way_counts_against_the_hour_after_a_restart_too():
    on_the_way = sighting("r1", created_at=NOW - 60)
    found = events.adopted(several(), on_the_way, NOW)
    assert found.launches == (NOW - 60,)
    ended = Start("LLM", "r1", NOW - 50, Outcome.READY, 1.0, 2.0)
    assert events.adopted(several(recent=(ended,)), on_the_way, NOW).launches == ()


@pytest.mark.parametrize("why", [Drain.IDLE, Drain.UNHEALTHY])
def test_one_that_can_serve_is_taken_back_while_its_successor_waits_in_the_queue(why):
    leaving = aged("r1", phase=Phase.DRAINING, drain=why, in_flight=1)
    queued = starting(id="r2", phase=Phase.PENDING, endpoint=None)
    found = several(leaving, queued, high=1, last_demand=NOW)
    assert Reopen("r1") in decide(loaded(found, NOW, waiting=1), NOW, NOW)
    serving = several(leaving, ready("r2"), high=1)
    assert decide(loaded(serving, NOW, waiting=1), NOW, NOW) == ()


def test_a_node_that_fails_after_each_good_start_there_is_kept_away_from():
    lost = End("node n1 failed", Fault.NOBODY, bad_node="n1")
    found = several()
    for name in ("a1", "a2"):
        coming = replace(found, replicas=(starting(id=name, node="n1"),))
        up = transitions.apply(coming, MarkReady(name), NOW)
        found = events.ended(up, name, lost, (), NOW)
    assert nodes.avoided(found, NOW) == ("n1",)


@pytest.mark.parametrize("phase", [Phase.DRAINING, Phase.STOPPING])
def test_the_next_one_stays_until_the_one_before_is_gone(phase):
    leaving = aged("r3", phase=phase, drain=Drain.IDLE, closed_at=3)
    found = loaded(several(aged("r1"), aged("r2"), leaving, needs=IDLE_FOR_LONG), NOW)
    assert not any(isinstance(action, Close) for action in decide(found, NOW, NOW))
    last = loaded(several(aged("r1"), leaving), NOW + 100)
    assert not any(isinstance(action, Close) for action in decide(last, NOW + 100, NOW + 100))


def test_what_holds_back_more_replicas_is_said_although_some_are_ready():
    lately = tuple(NOW - 60 * n for n in range(2))
    found = several(ready("r1"), launches=lately, fields={"max_starts_per_hour": 2})
    assert snapshot.reason(loaded(found, NOW, in_flight=1), NOW) is None
    busy = lasting(found, 6.0, in_flight=20)
    assert "max_starts_per_hour" in (snapshot.reason(busy, NOW) or "")


def test_one_that_an_operator_holds_down_says_so():
    stopped = replace(transitions.stop_by_admin(several(low=1), 0.0, NOW), replicas=())
    assert "the next request or slurmgate start" in (snapshot.reason(stopped, NOW + 5) or "")
    killed = replace(stopped, enabled=False)
    assert "slurmgate enable brings it back" in (snapshot.reason(killed, NOW + 5) or "")


def test_nobody_is_refused_while_what_could_serve_is_only_drained_for_nothing():
    leaving = aged("r1", phase=Phase.DRAINING, drain=Drain.IDLE, closed_at=3)
    assert snapshot.refusal(several(leaving, enabled=False), NOW) is None
    assert snapshot.refusal(several(enabled=False), NOW) is not None


def test_a_scale_down_ends_no_lease_the_last_one_does():
    leased = Demand(wanted_at=NOW - 1, lease_until=NOW + 100)
    one_of_two = several(aged("r1"), aged("r2"), demand=leased)
    assert transitions.apply(one_of_two, Close("r2", Drain.IDLE), NOW).leased(NOW)
    last = several(aged("r1"), demand=leased)
    assert not transitions.apply(last, Close("r1", Drain.IDLE), NOW).leased(NOW)
