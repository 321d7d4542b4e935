"""What is decided in each situation of a service, one situation a test."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slurmgate import events, snapshot, transitions
from slurmgate.actions import Close, GiveUp, Launch, MarkReady, Reconnect, Reopen, Stop
from slurmgate.lifecycle import decide
from slurmgate.model import End, Fault, Health, LauncherKind, Phase
from slurmgate.observed import (
    Demand,
    Drain,
    Outcome,
    Refusal,
    ReplicaReport,
    ServiceReport,
    with_replica,
)
from slurmgate.starts import cold_start_s
from tests.unit.builders import NOW, replica, service, sighting, spec, starting

WAITING = Demand(waiting=1)
DIED = End("the service died")


def test_a_waiting_request_starts_a_cold_service():
    assert decide(service(demand=WAITING), NOW, NOW) == (Launch(),)


def test_nobody_waiting_starts_nothing():
    assert decide(service(), NOW, NOW) == ()


def test_a_disabled_service_is_not_started():
    assert decide(service(demand=WAITING, enabled=False), NOW, NOW) == ()


def test_a_start_under_way_is_not_doubled():
    assert decide(service(starting(), demand=WAITING), NOW, NOW) == ()


def test_the_first_healthy_answer_makes_it_ready():
    assert decide(service(starting(health=Health.UP)), NOW, NOW) == (MarkReady("r1"),)


def test_a_start_that_takes_too_long_is_given_up_with_what_the_polls_saw():
    slow = starting(running_at=NOW - 1800, health_detail="last poll: status 503")
    (action,) = decide(service(slow, demand=WAITING), NOW, NOW)
    assert isinstance(action, GiveUp)
    assert "start_timeout" in action.reason
    assert "status 503" in action.reason


def test_after_the_last_words_the_failure_is_known_and_the_replica_ends():
    given_up = transitions.apply(service(starting()), GiveUp("r1", "too slow"), NOW)
    after = events.last_words(given_up, "r1", ("out of memory",), NOW)
    assert after.failure is not None
    assert after.failure.log == ("out of memory",)
    assert after.replicas[0].phase is Phase.STOPPING


@pytest.mark.parametrize(("failures", "backoff"), [(0, 1), (1, 2), (5, 32), (6, 60), (20, 60)])
def test_the_backoff_doubles_up_to_a_minute(failures, backoff):
    before = service(starting(), failures=failures)
    after = events.ended(before, "r1", End("the service exited with code 3"), ("bye",), NOW)
    assert after.failure is not None
    assert after.failure.retry_at - NOW == backoff
    assert "exited with code 3" in after.failure.reason
    assert decide(replace(after, demand=WAITING), NOW, NOW) == ()
    assert decide(replace(after, demand=WAITING), NOW, NOW + backoff) == (Launch(),)


def test_a_failed_start_ends_all_leases():
    leased = Demand(wanted_at=NOW - 1, lease_until=NOW + 100)
    before = service(starting(), demand=leased, start_lease=True)
    after = events.ended(before, "r1", DIED, (), NOW)
    assert decide(after, NOW, NOW + 90) == ()


def test_a_lease_keeps_the_service_wanted_without_a_waiting_client():
    leased = service(demand=Demand(wanted_at=NOW - 1, lease_until=NOW + 100))
    assert decide(leased, NOW, NOW) == (Launch(),)
    assert decide(leased, NOW, NOW + 100) == ()


def test_a_death_while_ready_is_nobodys_failed_start():
    after = events.ended(service(replica()), "r1", DIED, (), NOW)
    assert after.failure is None
    assert decide(replace(after, demand=WAITING), NOW, NOW) == (Launch(),)


def test_idle_counts_from_the_end_of_the_last_request():
    used = service(replica(ready_at=NOW - 100), demand=Demand(last_use=NOW - 9.9))
    assert decide(used, NOW, NOW) == ()
    assert decide(used, NOW, NOW + 0.1) == (Close("r1", Drain.IDLE),)


@pytest.mark.parametrize("demand", [Demand(in_flight=1), Demand(waiting=1)])
def test_a_service_in_use_is_never_idle(demand):
    used = service(replica(ready_at=NOW - 100), demand=demand)
    assert not any(isinstance(a, Close) for a in decide(used, NOW, NOW))


def test_a_stream_counts_as_use_although_it_began_long_ago():
    told = ServiceReport(requests=1, in_flight=1, idle_s=500.0)
    busy = events.reported(service(replica(ready_at=NOW - 600)), told, NOW)
    assert decide(busy, NOW, NOW) == ()


def test_who_was_sent_away_while_it_started_finds_it_ready_until_the_lease_ends():
    leased = service(
        replica(ready_at=NOW - 50), demand=Demand(wanted_at=NOW - 60, lease_until=NOW + 60)
    )
    assert decide(leased, NOW, NOW) == ()
    assert decide(leased, NOW, NOW + 60) == (Close("r1", Drain.IDLE),)


def drained(**changes):
    return replica(
        **{"phase": Phase.DRAINING, "drain": Drain.IDLE, "closed_at": 7, "ready_at": NOW - 99}
        | changes
    )


def test_only_the_gates_proof_ends_a_draining_replica():
    seen = ReplicaReport(1, 0, Health.UP)
    before = events.replica_reported(drained(), seen, 6, NOW)
    assert decide(service(before), NOW, NOW) == ()
    other_epoch = events.replica_reported(drained(), seen, None, NOW)
    assert decide(service(other_epoch), NOW, NOW) == ()
    busy = events.replica_reported(drained(), ReplicaReport(1, 1, Health.UP), 7, NOW)
    assert not busy.quiet
    proven = events.replica_reported(drained(), seen, 7, NOW)
    assert decide(service(proven), NOW, NOW) == (Stop("r1", "idle"),)


def test_demand_takes_an_idle_drain_back_even_when_it_was_proven():
    proven = service(drained(acked=True, quiet=True), demand=WAITING)
    assert decide(proven, NOW, NOW) == (Reopen("r1"),)


def test_a_request_that_ended_unseen_before_the_drain_takes_it_back():
    used = service(drained(), demand=Demand(last_use=NOW - 1))
    assert decide(used, NOW, NOW) == (Reopen("r1"),)


def test_a_stop_by_an_operator_is_not_taken_back_and_ends_after_its_time():
    stopped = transitions.stop_by_admin(service(replica()), 60.0, NOW)
    stopping = replace(stopped, replicas=(replace(stopped.replicas[0], closed_at=3, acked=True),))
    assert decide(stopping, NOW, NOW + 59) == ()
    assert decide(stopping, NOW, NOW + 60) == (Stop("r1", Drain.ADMIN.value),)


def test_a_new_replica_starts_beside_one_that_an_operator_stops():
    stopped = transitions.stop_by_admin(service(replica(), demand=WAITING), 60.0, NOW)
    assert decide(stopped, NOW, NOW) == (), "what was told before the stop is no demand after it"
    asked = events.reported(stopped, ServiceReport(requests=2, waiting=1), NOW + 1)
    assert Launch() in decide(asked, NOW, NOW + 1)


def test_a_stop_during_a_start_tells_those_who_wait_and_does_not_begin_anew():
    stopped = transitions.stop_by_admin(service(starting(), demand=WAITING), 60.0, NOW)
    assert decide(stopped, NOW, NOW) == (Stop("r1", "no longer wanted"),)
    ended = events.ended(stopped, "r1", DIED, (), NOW)
    refusal = snapshot.refusal(ended, NOW)
    assert refusal is not None
    assert refusal["reason"] == Drain.ADMIN.value
    assert ended.failures == 0


def test_with_a_fixed_port_the_old_one_must_be_gone_first():
    fixed = service(replica(), spec=spec(remote_port=8001), demand=WAITING)
    stopped = transitions.stop_by_admin(fixed, 60.0, NOW)
    asked = events.reported(stopped, ServiceReport(requests=2, waiting=1), NOW + 1)
    assert Launch() not in decide(asked, NOW, NOW + 1)


def test_changed_start_parameters_replace_it_at_once_while_nobody_uses_it():
    changed = spec(bash_file="other.sh")
    busy = service(replica(), spec=changed, demand=Demand(in_flight=1))
    assert decide(busy, NOW, NOW) == (Launch(),)
    quiet = service(replica(), spec=changed)
    assert decide(quiet, NOW, NOW) == (Close("r1", Drain.CHANGED), Launch())


def test_changed_parameters_of_a_fixed_port_wait_until_the_port_is_free():
    changed = spec(bash_file="other.sh", remote_port=8000)
    busy = service(replica(), spec=changed, demand=Demand(in_flight=1))
    assert decide(busy, NOW, NOW) == ()
    quiet = service(replica(), spec=changed)
    (action,) = decide(quiet, NOW, NOW)
    assert action == Close("r1", Drain.CHANGED)
    closed = transitions.apply(quiet, action, NOW)
    assert Launch() not in decide(closed, NOW, NOW)
    assert decide(replace(closed, replicas=()), NOW, NOW) == (Launch(),)


def test_a_start_with_old_parameters_is_begun_anew():
    assert decide(service(starting(), spec=spec(bash_file="b.sh")), NOW, NOW) == (
        Stop("r1", "no longer wanted"),
    )


def test_changed_limits_leave_the_replica_alone():
    assert decide(service(replica(), spec=spec(max_waiting=5, replay=0)), NOW, NOW) == ()


def test_a_removed_service_drains_and_is_not_started_again():
    removed = events.retired(service(replica(), demand=WAITING))
    assert decide(removed, NOW, NOW) == (Close("r1", Drain.REMOVED),)


def test_an_unhealthy_replica_is_replaced_only_after_its_time():
    down = replica(health=Health.DOWN, down_since=NOW - 119)
    assert decide(service(down, demand=Demand(in_flight=1)), NOW, NOW) == ()
    assert not down.routable
    (action,) = decide(service(down, demand=Demand(in_flight=1)), NOW, NOW + 1)
    assert action == Close("r1", Drain.UNHEALTHY)


def test_a_silent_gate_ends_nothing_before_timeout_and_five_minutes():
    idle = service(drained())
    assert decide(idle, NOW - 309, NOW) == ()
    assert [type(a) for a in decide(idle, NOW - 310, NOW)] == [Stop]


def test_a_stop_that_had_no_effect_is_tried_again():
    stuck = service(replica(phase=Phase.STOPPING, since=NOW, reason="idle"))
    assert decide(stuck, NOW, NOW + 19) == ()
    assert decide(stuck, NOW, NOW + 20) == (Stop("r1", "idle"),)


def test_a_pending_job_whose_clients_have_all_hung_up_is_cancelled():
    pending = starting(phase=Phase.PENDING)
    alone = service(pending, last_demand=NOW - 59)
    assert decide(alone, NOW, NOW) == ()
    assert [type(a) for a in decide(alone, NOW, NOW + 1)] == [Stop]
    assert decide(replace(alone, demand=WAITING), NOW, NOW + 1) == ()


def test_a_pending_job_fails_after_the_queue_timeout():
    pending = starting(phase=Phase.PENDING, created_at=NOW - 30)
    queued = service(pending, spec=spec(queue_timeout=30), demand=WAITING)
    (action,) = decide(queued, NOW, NOW)
    assert isinstance(action, GiveUp)


def test_an_adopted_replica_is_ready_with_the_first_report_and_keeps_its_idle_time():
    began = sighting("r9", running_at=NOW - 60)
    adopted = events.adopted(service(), began, NOW, on_record=True)
    told = events.reported(adopted, ServiceReport(requests=5, idle_s=8.0), NOW)
    heard = events.replica_reported(told.replicas[0], ReplicaReport(1, 0, Health.UP), None, NOW)
    ready = with_replica(told, heard)
    (action,) = decide(ready, NOW, NOW)
    assert isinstance(action, MarkReady)
    after = transitions.apply(ready, action, NOW)
    assert after.idle_since(after.replicas[0].ready_at or 0) == NOW - 8
    assert after.starts == {}
    assert after.recent == ()


def adopted_while_starting(**changes):
    began = sighting("r9", created_at=NOW - 100, running_at=NOW - 60, **changes)
    return events.adopted(service(), began, NOW)


def polled(found, health, detail, now):
    report = ReplicaReport(1, 0, health, detail)
    return with_replica(found, events.replica_reported(found.replicas[0], report, None, now))


def test_a_start_that_went_on_while_the_backend_was_replaced_is_recorded_with_its_true_length():
    loading = polled(adopted_while_starting(), Health.DOWN, "last poll: status 503", NOW + 1)
    up = polled(loading, Health.UP, "", NOW + 20)
    after = transitions.apply(up, MarkReady("r9"), NOW + 20)
    (start,) = after.recent
    assert (start.outcome, start.queue_s, start.start_s) == (Outcome.READY, 40.0, 80.0)
    assert after.starts == {"ready": 1}
    assert sum(after.cold_start_histogram.counts) == 1


def test_when_a_replica_became_ready_that_no_backend_looked_after_is_left_out():
    up = polled(adopted_while_starting(), Health.UP, "", NOW + 1)
    after = transitions.apply(up, MarkReady("r9"), NOW + 1)
    (start,) = after.recent
    assert (start.outcome, start.queue_s, start.start_s) == (Outcome.READY, 40.0, None)
    assert cold_start_s(after.recent) == {"p50": None, "p95": None, "n": 0}
    assert sum(after.cold_start_histogram.counts) == 0


@pytest.mark.parametrize(("ran", "queue_s"), [(None, None), (NOW - 60, 40.0)])
def test_how_long_a_start_took_that_ended_while_no_backend_looked_is_left_out(ran, queue_s):
    phase = Phase.PENDING if ran is None else Phase.RUNNING
    gone = sighting("r9", created_at=NOW - 100, running_at=ran, phase=phase, endpoint=None)
    found = events.adopted(service(), gone, NOW)
    (start,) = events.ended(found, "r9", replace(DIED, unseen=True), (), NOW + 1).recent
    assert (start.outcome, start.queue_s, start.start_s) == (Outcome.FAILED, queue_s, None)
    (start,) = events.ended(found, "r9", DIED, (), NOW + 1).recent
    assert (start.queue_s, start.start_s) == ((101.0, None) if ran is None else (40.0, 61.0))


def test_a_job_that_began_while_no_backend_looked_has_its_whole_start_timeout():
    began = sighting(
        "r9", created_at=NOW - 7200, running_at=NOW - 7000, phase=Phase.RUNNING, endpoint=None
    )
    limited = service(spec=spec(start_timeout=60.0), demand=WAITING, last_demand=NOW)
    found = events.adopted(limited, began, NOW)
    assert decide(found, NOW + 59, NOW + 59) == ()
    (action,) = decide(found, NOW + 60, NOW + 60)
    assert isinstance(action, GiveUp)


@pytest.mark.parametrize(
    ("drain", "outcome"),
    [
        (None, Outcome.LOST),
        (Drain.ADMIN, Outcome.CANCELLED),
        (Drain.UNHEALTHY, Outcome.FAILED),
    ],
)
def test_an_adopted_start_that_comes_to_nothing_is_recorded_once(drain, outcome):
    found = adopted_while_starting()
    found = with_replica(found, replace(found.replicas[0], drain=drain))
    (start,) = events.ended(found, "r9", DIED, (), NOW + 5).recent
    assert (start.replica, start.outcome) == ("r9", outcome)
    known = with_replica(found, replace(found.replicas[0], on_record=True))
    assert events.ended(known, "r9", DIED, (), NOW + 5).recent == ()


def adopted_when_told(began, report):
    """A replica that began then, ready with the first report to the backend that adopted it."""
    adopted = events.adopted(service(), sighting("r9", created_at=began, running_at=began), NOW)
    told = events.reported(adopted, report, NOW)
    return transitions.apply(told, MarkReady("r9"), NOW)


def test_a_start_that_a_restarted_backend_adopted_is_kept_for_whom_it_was_made():
    sent_away = ServiceReport(requests=5, idle_s=39.99, wanted_s=40.0, lease_s=80.0)
    ready = adopted_when_told(NOW - 40, sent_away)
    assert decide(ready, NOW, NOW) == ()
    assert decide(ready, NOW + 79, NOW + 79) == ()


def test_a_lease_that_was_used_up_does_not_come_back_when_the_first_report_was_late():
    late = ServiceReport(requests=5, idle_s=400.0, wanted_s=500.0, lease_s=3000.0)
    ready = adopted_when_told(NOW - 490, late)
    in_time = ServiceReport(requests=5, idle_s=400.6, wanted_s=500.6, lease_s=2999.4)
    known = events.reported(ready, in_time, NOW + 0.1)
    (action,) = decide(known, NOW + 300, NOW + 300)
    assert isinstance(action, Close)
    assert action.why is Drain.IDLE


def test_a_start_that_was_given_up_is_not_repeated_before_its_failure_is_known():
    slow = service(starting(running_at=NOW - 1800), demand=WAITING)
    (give_up,) = decide(slow, NOW, NOW)
    assert isinstance(give_up, GiveUp)
    assert decide(transitions.apply(slow, give_up, NOW), NOW, NOW) == ()


def test_a_failure_whose_log_never_comes_counts_all_the_same():
    given_up = transitions.apply(service(starting(), demand=WAITING), GiveUp("r1", "slow"), NOW)
    (stop,) = decide(given_up, NOW, NOW + 5)
    assert isinstance(stop, Stop)
    after = transitions.apply(given_up, stop, NOW + 5)
    assert after.failure is not None
    assert after.replicas[0].phase is Phase.STOPPING


def test_an_adopted_replica_is_not_judged_by_the_time_before_its_adoption():
    old = events.adopted(
        service(), sighting("r9", created_at=NOW - 7200, running_at=NOW - 7200), NOW
    )
    assert decide(old, NOW, NOW) == ()
    assert snapshot.state(old, NOW) == "unknown"


def test_an_adopted_replica_that_cannot_be_reached_is_not_replaced_at_once():
    adopted = events.adopted(service(), sighting("r9"), NOW)
    refused = events.hopeless(adopted, "r9", Refusal("cannot-start", "the login was refused"))
    assert decide(refused, NOW, NOW + 119) == ()
    assert decide(refused, NOW, NOW + 120)[0] == Close("r9", Drain.UNHEALTHY)


def test_an_adopted_replica_that_ends_before_the_first_report_is_no_failed_start():
    old = events.adopted(service(demand=WAITING), sighting("r9"), NOW)
    after = events.ended(old, "r9", DIED, (), NOW)
    assert after.failure is None
    assert decide(after, NOW, NOW) == (Launch(),)


def test_a_service_that_dies_again_and_again_is_started_ever_more_rarely():
    dying, now, pauses = service(demand=WAITING), NOW, []
    for _ in range(5):
        ready = replace(dying, replicas=(replica(since=now),))
        dying = events.ended(ready, "r1", DIED, (), now + 1)
        pauses.append(dying.not_before - now - 1)
        assert decide(dying, now, now + 1) == (() if pauses[-1] else (Launch(),))
        now = max(dying.not_before, now + 1)
        assert decide(dying, now, now) == (Launch(),)
    assert pauses == [0, 1, 2, 4, 8]
    steady = replace(dying, replicas=(replica(since=now - 61),))
    assert events.ended(steady, "r1", DIED, (), now).not_before == now


def test_of_two_adopted_replicas_the_older_one_drains():
    older = starting(id="r1", created_at=NOW - 60, closed_at=None)
    newer = starting(id="r2", created_at=NOW - 10, closed_at=None)
    assert decide(service(older, newer), NOW, NOW) == (Close("r1", Drain.SURPLUS),)


def test_the_snapshot_has_a_refusal_only_while_nothing_can_start():
    failed = events.failed(service(), starting(), "start-failed", "exited", ("line",), NOW)
    refusal = snapshot.refusal(failed, NOW)
    assert refusal == {"code": "start-failed", "reason": "exited", "log": ["line"]}
    assert snapshot.refusal(failed, NOW + 1) is None
    disabled = snapshot.refusal(service(enabled=False), NOW)
    assert disabled is not None
    assert disabled["code"] == "disabled"


def test_ages_are_no_reason_for_a_new_snapshot():
    ready = service(replica())
    assert snapshot.essence(ready, NOW) == snapshot.essence(ready, NOW + 5)
    assert snapshot.wire(ready, NOW) != snapshot.wire(ready, NOW + 5)


@pytest.mark.parametrize(
    ("found", "state"),
    [
        (service(), "cold"),
        (service(enabled=False), "disabled"),
        (service(demand=WAITING), "waking"),
        (service(starting()), "waking"),
        (service(replica()), "ready"),
        (service(drained()), "draining"),
        (events.failed(service(), starting(), "start-failed", "x", (), NOW), "failed"),
    ],
)
def test_the_state_in_one_word(found, state):
    assert snapshot.state(found, NOW) == state


# replicas that are Slurm jobs

PENDING = sighting("r1", phase=Phase.PENDING, endpoint=None, running_at=None)


def submitted(**changes):
    return replace(transitions.launching(service(**changes), "r1", NOW), demand=WAITING)


def test_a_job_goes_through_the_queue_to_its_start():
    waiting = events.launched(submitted(), replace(PENDING, reason="Resources"), NOW)
    assert snapshot.state(waiting, NOW) == "waking"
    assert snapshot.reason(waiting, NOW) == "queued: Resources"
    runs = events.seen(waiting, replace(PENDING, phase=Phase.RUNNING, running_at=NOW + 9), NOW + 9)
    assert runs.replicas[0].phase is Phase.RUNNING
    reached = events.seen(runs, sighting("r1", running_at=NOW + 9), NOW + 10)
    assert reached.replicas[0].phase is Phase.STARTING
    assert snapshot.essence(reached, NOW)["replicas"][0]["endpoint"] == "127.0.0.1:20001"


def test_an_answer_of_sbatch_that_comes_late_does_not_put_a_running_job_back_in_the_queue():
    seen = events.seen(submitted(), sighting("r1"), NOW)
    assert events.launched(seen, PENDING, NOW) == seen


def test_time_in_the_queue_is_no_start_time():
    waiting = events.launched(submitted(spec=spec(start_timeout=60.0)), PENDING, NOW)
    assert decide(waiting, NOW, NOW + 86_400) == ()


def test_of_a_service_that_answered_in_the_end_nobody_is_told_that_nothing_listened():
    loading = starting(health=Health.DOWN, health_detail="last poll: status 503")
    given_up = transitions.apply(service(loading), GiveUp("r1", "not healthy"), NOW)
    told = events.last_words(given_up, "r1", (), NOW, "nothing listened on n1:8000")
    assert told.failure is not None
    assert told.failure.reason == "not healthy"


def test_a_queue_timeout_ends_the_wait_in_the_queue():
    waiting = events.launched(submitted(spec=spec(queue_timeout=60.0)), PENDING, NOW)
    assert decide(waiting, NOW, NOW + 59) == ()
    (given_up,) = decide(waiting, NOW, NOW + 60)
    assert isinstance(given_up, GiveUp)
    assert "queue_timeout" in given_up.reason


@pytest.mark.parametrize(
    "changes", [{}, {"retired": True}, {"demand": WAITING, "spec": spec(queue_timeout=60.0)}]
)
def test_what_waits_for_slurm_to_answer_is_given_up_like_what_waits_in_its_queue(changes):
    found = replace(submitted(), **{"last_demand": NOW, "demand": Demand(), **changes})
    assert decide(found, NOW, NOW + 60) == ()  # its launch is under way
    silent = replace(PENDING, phase=Phase.SUBMITTED, created_at=NOW, reason="no answer")
    known = events.launched(found, silent, NOW)
    (action,) = decide(known, NOW, NOW + 60)
    assert isinstance(action, Stop | GiveUp)


def test_a_job_that_is_queued_again_may_wait_as_long_as_a_new_one():
    served = service(replica(created_at=NOW - 7200), spec=spec(queue_timeout=60.0), demand=WAITING)
    queued = events.seen(served, replace(PENDING, queued_at=NOW), NOW)
    assert decide(queued, NOW, NOW + 59) == ()
    assert [type(a) for a in decide(queued, NOW, NOW + 60)] == [GiveUp]


def test_a_queued_job_is_cancelled_once_every_client_has_hung_up():
    waiting = events.launched(submitted(spec=spec(abandon_timeout=60.0)), PENDING, NOW)
    left = events.reported(waiting, ServiceReport(requests=1), NOW)
    assert decide(left, NOW, NOW + 59) == ()
    assert decide(left, NOW, NOW + 60) == (Stop("r1", "every waiting client has hung up"),)


def test_a_client_that_was_sent_away_with_a_retry_after_keeps_its_place_in_the_queue():
    waiting = events.launched(submitted(), PENDING, NOW)
    sent_away = events.reported(waiting, ServiceReport(wanted_s=0.0, lease_s=180.0), NOW)
    assert decide(sent_away, NOW, NOW + 120) == ()


def test_a_job_that_can_never_run_is_given_up_at_once_in_slurms_words():
    waiting = events.launched(submitted(), PENDING, NOW)
    hopeless = events.hopeless(waiting, "r1", Refusal("cannot-start", "BadConstraints"))
    (given_up,) = decide(hopeless, NOW, NOW)
    assert given_up == GiveUp("r1", "BadConstraints")
    told = events.last_words(transitions.apply(hopeless, given_up, NOW), "r1", (), NOW)
    refusal = snapshot.refusal(told, NOW)
    assert refusal is not None
    assert refusal["code"] == "cannot-start"
    assert refusal["reason"] == "BadConstraints"


def test_a_hint_of_the_launcher_is_told_with_the_reason():
    given_up = transitions.apply(service(starting()), GiveUp("r1", "not healthy"), NOW)
    told = events.last_words(given_up, "r1", (), NOW, "nothing listened on n1:8000")
    assert told.failure is not None
    assert told.failure.reason == "not healthy; nothing listened on n1:8000"


def test_a_hint_that_the_reason_says_already_is_not_told_twice():
    given_up = transitions.apply(service(starting()), GiveUp("r1", "job 7 waits: Held"), NOW)
    told = events.last_words(given_up, "r1", (), NOW, "Held")
    assert told.failure is not None
    assert told.failure.reason == "job 7 waits: Held"


def test_a_job_queued_again_has_a_place_of_its_own_when_it_runs_again():
    used = service(replica(in_flight=1), demand=WAITING)
    queued = events.seen(used, PENDING, NOW)
    assert not queued.replicas[0].routable
    assert decide(queued, NOW, NOW) == ()
    back = events.seen(queued, sighting("r1", gen=2, endpoint="unix:/r1.2.sock"), NOW + 30)
    late = events.replica_reported(back.replicas[0], ReplicaReport(1, 0, Health.UP), None, NOW + 30)
    assert late.health is Health.UNKNOWN, "that was the place before"
    heard = events.replica_reported(back.replicas[0], ReplicaReport(2, 0, Health.UP), None, NOW)
    assert decide(with_replica(back, heard), NOW, NOW + 30) == (MarkReady("r1"),)


def test_a_job_queued_again_that_nobody_waits_for_is_cancelled_after_a_while():
    queued = events.seen(service(replica(ready_at=NOW - 500)), PENDING, NOW)
    assert decide(queued, NOW, NOW + 59) == ()
    assert decide(queued, NOW, NOW + 60) == (Stop("r1", "every waiting client has hung up"),)


def test_a_job_queued_again_while_it_drains_is_cancelled():
    draining = transitions.apply(service(replica()), Close("r1", Drain.IDLE), NOW)
    queued = events.seen(draining, PENDING, NOW)
    assert decide(queued, NOW, NOW) == (Stop("r1", "no longer wanted"),)


def test_news_of_the_same_place_leaves_a_ready_replica_ready():
    before = service(replica(gen=1))
    after = events.seen(before, sighting("r1", ends_at=NOW + 600), NOW)
    assert after.replicas[0] == replace(
        before.replicas[0], ends_at=NOW + 600, running_at=NOW, job_id="1", node="n"
    )


def test_a_start_that_nobody_is_to_blame_for_is_made_again():
    before = service(starting(), demand=WAITING)
    cancelled = End("job 1 was cancelled", Fault.NOBODY)
    after = events.ended(before, "r1", cancelled, (), NOW)
    assert after.failure is None
    assert snapshot.reason(after, NOW) == "job 1 was cancelled"
    assert decide(after, NOW, NOW) == (Launch(),)


def test_a_taken_port_is_tried_again_at_once_and_not_for_ever():
    taken = End("port 20001 is taken", Fault.PORT)
    trying, tries = service(demand=WAITING), 0
    while trying.failure is None:
        assert decide(trying, NOW, NOW) == (Launch(),)
        assert snapshot.refusal(trying, NOW) is None
        trying = events.ended(replace(trying, replicas=(starting(),)), "r1", taken, (), NOW)
        tries += 1
    assert tries == events.PORTS_TRIED + 1
    assert trying.ports_taken == 0, "the next start may try as often"


def test_the_way_to_a_silent_replica_is_made_anew_once_and_never_while_it_is_in_use():
    silent = replica(health=Health.DOWN, down_since=NOW - 1)
    on_slurm = spec(launcher=LauncherKind.SLURM)
    before = service(replace(silent, start_hash=on_slurm.start_hash()), spec=on_slurm)
    assert decide(before, NOW, NOW) == (Reconnect("r1"),)
    assert decide(transitions.apply(before, Reconnect("r1"), NOW), NOW, NOW) == ()
    in_use = with_replica(before, replace(before.replicas[0], in_flight=1))
    assert decide(in_use, NOW, NOW) == ()


def test_a_retry_after_counts_on_slurms_own_estimate():
    waiting = events.launched(submitted(), replace(PENDING, starts_at=NOW + 600), NOW)
    assert snapshot.estimate(waiting, NOW) >= 600


def test_a_start_that_is_late_brings_nobody_back_each_second():
    waiting = events.launched(submitted(), PENDING, NOW)
    assert snapshot.estimate(waiting, NOW + 6) == 4
    assert snapshot.estimate(waiting, NOW + 600) > 500
    served = service(replica(created_at=NOW - 7200), demand=WAITING)
    queued = events.seen(served, replace(PENDING, queued_at=NOW), NOW)
    assert snapshot.estimate(queued, NOW + 4) == 6, "it waits anew"


def test_a_silent_replica_is_not_replaced_while_its_login_host_is_away():
    silent = replica(health=Health.DOWN, down_since=NOW - 500, reconnected_at=NOW, progress="away")
    cut_off = service(silent, demand=Demand(in_flight=1))
    assert decide(cut_off, NOW, NOW) == ()
    assert snapshot.reason(cut_off, NOW) == "not healthy: away"
    back = with_replica(cut_off, replace(silent, progress=None))
    assert decide(back, NOW, NOW) == (Close("r1", Drain.UNHEALTHY),)


def suspended(seconds: float, **changes):
    """One replica that was ready when it was suspended; it is replaced after 120 s of that."""
    held = changes.pop("demand", Demand(waiting=1, in_flight=1))
    return service(
        replica(suspended_s=seconds, progress="suspended by Slurm", **changes), demand=held
    )


def test_a_suspended_replica_gets_no_requests_and_says_why_until_it_goes_on():
    before = service(replica(), demand=WAITING)
    stopped = events.seen(before, sighting("r1", suspended_s=0.0, reason="suspended by Slurm"), NOW)
    (shown,) = snapshot.essence(stopped, NOW)["replicas"]
    assert (shown["routable"], stopped.replicas[0].phase) == (False, Phase.READY)
    assert snapshot.reason(stopped, NOW) == "suspended by Slurm"
    assert decide(stopped, NOW, NOW) == ()
    again = events.seen(stopped, sighting("r1"), NOW + 1)
    assert again.replicas[0].routable
    assert snapshot.reason(again, NOW) is None


def test_while_a_replica_is_suspended_its_silence_is_not_held_against_it():
    on_slurm = spec(launcher=LauncherKind.SLURM)
    silent = replica(health=Health.DOWN, down_since=NOW - 500, suspended_s=119.0, progress="…")
    known = replace(silent, start_hash=on_slurm.start_hash())
    assert decide(service(known, spec=on_slurm, demand=WAITING), NOW, NOW) == ()


def test_one_that_stays_suspended_is_cut_off_and_another_takes_its_place():
    before = suspended(120.0, in_flight=1)
    (close, *_) = decide(before, NOW, NOW)
    assert close == Close("r1", Drain.SUSPENDED)
    closed = with_replica(before, events.published(before.replicas[0], 7))
    closed = transitions.apply(closed, close, NOW)
    assert decide(closed, NOW, NOW) == (Launch(),), "the gate may still send it requests"
    launched = transitions.launching(closed, "r2", NOW)
    (old, new) = launched.replicas
    heard = events.replica_reported(old, ReplicaReport(1, 1, Health.UP), 7, NOW)
    assert decide(with_replica(launched, heard), NOW, NOW) == (Stop("r1", "suspended by Slurm"),)
    goes_on = with_replica(launched, replace(heard, suspended_s=None))
    assert decide(goes_on, NOW, NOW) == (), "it answers what it has"
    over = transitions.apply(with_replica(launched, heard), Stop("r1", "suspended by Slurm"), NOW)
    over = events.ended(over, "r1", End("job 1 was cancelled", Fault.NOBODY), (), NOW)
    assert (over.replicas, over.failures, over.crashes) == ((new,), 0, 0)


def test_nothing_is_started_in_place_of_a_suspended_replica_that_nobody_asks_for():
    before = suspended(120.0, demand=Demand(last_use=NOW - 1))
    (close,) = decide(before, NOW, NOW)
    assert close == Close("r1", Drain.SUSPENDED)
    assert decide(transitions.apply(before, close, NOW), NOW, NOW) == ()


def test_a_draining_replica_that_is_suspended_is_neither_waited_for_nor_taken_back():
    idle = {"phase": Phase.DRAINING, "drain": Drain.IDLE, "closed_at": 7, "in_flight": 1}
    assert decide(suspended(119.0, acked=True, **idle), NOW, NOW) == (Reopen("r1"),)
    assert decide(suspended(120.0, **idle), NOW, NOW) == ()
    assert decide(suspended(120.0, acked=True, **idle), NOW, NOW) == (Stop("r1", "idle"),)


def test_a_start_that_is_suspended_fails_by_nobodys_fault():
    late = starting(running_at=NOW - 5000, suspended_s=119.0)
    assert decide(service(late, demand=WAITING), NOW, NOW) == ()
    stuck = service(replace(late, suspended_s=120.0), demand=WAITING)
    assert decide(stuck, NOW, NOW) == (Stop("r1", "suspended by Slurm"),)
    served = service(replace(late, suspended_s=120.0, closed_at=3), demand=WAITING)
    assert decide(served, NOW, NOW) == (Close("r1", Drain.SUSPENDED),)


def test_the_gate_hears_of_another_estimate_of_the_scheduler_but_not_of_each_second():
    def told(starts_at):
        waiting = events.launched(submitted(), replace(PENDING, starts_at=starts_at), NOW)
        return snapshot.essence(waiting, NOW)

    assert told(NOW + 10) == told(NOW + 11)
    assert told(NOW + 10) != told(NOW + 600)
