"""What becomes of one replica's Slurm job, event by event."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slurmgate.launchers import jobs, pace, posts
from slurmgate.launchers.job import (
    Answer,
    Cancel,
    Connect,
    Disconnect,
    FindNode,
    Finish,
    GiveUp,
    Inquire,
    Job,
    Row,
    Stage,
    Standing,
    Step,
    Submit,
)
from slurmgate.launchers.posts import Moment
from slurmgate.launchers.roster import Roster
from slurmgate.launchers.slurm_format import JobName
from slurmgate.model import End, Fault, Sighting
from tests.unit.builders import spec

NOW = 1000.0
FAILED = End("the service exited with code 3")


def sending(**changes) -> Job:
    return replace(Job("r1", Stage.SENDING, waiting_since=NOW), **changes)


def unsure(**changes) -> Job:
    return replace(jobs.unanswered(sending(), NOW + 33, "no answer"), **changes)


def queued(**changes) -> Job:
    job, _ = jobs.accepted(sending(), "7", NOW)
    return replace(job, **changes)


def running(**changes) -> Job:
    job, _ = jobs.listed(queued(), [row()], NOW + 1, NOW + 1)
    return replace(jobs.connected(job, 1, "unix:/r1.1.sock"), **changes)


def suspended() -> Job:
    return running(suspended_since=NOW, suspended_seen=NOW)


def row(standing: Standing = Standing.RUNNING, job_id: str = "7", **changes) -> Row:
    runs = standing in (Standing.RUNNING, Standing.SUSPENDED)
    base = Row(job_id, standing, node="n1" if runs else None, began=5000.0 if runs else None)
    return replace(base, **changes)


def look(job: Job, *rows: Row, at: float = NOW + 60, took: float = 0.0) -> Step:
    return jobs.listed(job, rows, at, at + took)


# -- the submission --------------------------------------------------------------------------


def test_an_accepted_submission_is_a_job_that_later_listings_must_show():
    job, effects = jobs.accepted(sending(), "7", NOW)
    assert (job.stage, job.job_id, effects) == (Stage.QUEUED, "7", ())
    before, effects = look(job, at=NOW - 0.1, took=1)
    assert (before, effects) == (job, ())
    _, effects = look(job, at=NOW + 0.1)
    assert effects == (Inquire("7"),)


def test_a_submission_that_nobody_confirmed_is_waited_for_then_sent_again_under_the_same_name():
    job = unsure()
    assert look(job, at=NOW + 32) == (job, ())
    first, effects = look(job, at=NOW + 36)
    assert effects == ()
    again, effects = look(first, at=NOW + 36.5)
    assert (again.stage, effects) == (Stage.UNSURE, ())
    again, effects = look(first, at=NOW + 38.5)
    assert (again.stage, again.submissions, effects) == (Stage.SENDING, 2, (Submit(),))


def test_a_job_that_shows_up_after_all_is_taken_over():
    job, effects = look(unsure(), row(Standing.QUEUED, "9"))
    assert (job.stage, job.job_id, effects) == (Stage.QUEUED, "9", ())


def test_a_job_that_shows_up_already_ended_was_the_submission_too():
    job, effects = look(unsure(), row(Standing.ENDED, "9", end=FAILED))
    assert (job.job_id, effects) == ("9", (Inquire("9"),))


def test_after_three_submissions_that_never_arrived_it_is_over():
    job = unsure(submissions=3, absent_since=NOW + 40)
    _, effects = look(job, at=NOW + 100)
    (finish,) = effects
    assert isinstance(finish, Finish)
    assert finish.end.fault is Fault.NOBODY
    assert "no answer" in finish.end.reason


def test_what_sbatch_itself_refuses_three_times_is_the_fault_of_the_service():
    job = unsure(submissions=3, absent_since=NOW + 40, refused=True)
    _, (finish,) = look(job, at=NOW + 100)
    assert isinstance(finish, Finish)
    assert (finish.end.fault, finish.end.code) == (Fault.SERVICE, "cannot-start")
    assert not finish.end.began, "there never was a job"


def test_one_that_cannot_be_submitted_again_ends_so_that_another_replica_starts():
    job = unsure(renewable=False, absent_since=NOW + 40)
    _, (finish,) = look(job, at=NOW + 100)
    assert isinstance(finish, Finish)
    assert finish.end.fault is Fault.NOBODY


def test_what_was_never_sent_does_not_count_and_is_sent_at_the_next_good_listing():
    job = jobs.unsent(sending(), NOW, "the host is away")
    assert job.submissions == 0
    job, effects = look(job)
    assert (job.submissions, effects) == (1, (Submit(),))


def test_a_stop_while_in_doubt_cancels_what_shows_up():
    job, effects = jobs.stopped(unsure(), NOW)
    assert effects == ()
    _, effects = look(job, row(Standing.QUEUED, "9"))
    assert effects == (Cancel("9"),)


def test_a_stop_while_in_doubt_ends_when_nothing_shows_up():
    job, _ = jobs.stopped(unsure(), NOW)
    job, _ = look(job, at=NOW + 40)
    _, (finish,) = look(job, at=NOW + 43)
    assert isinstance(finish, Finish)
    assert finish.end.fault is Fault.NOBODY
    assert not finish.end.began


def test_a_stop_during_the_submission_cancels_the_job_as_soon_as_it_has_an_id():
    job, _ = jobs.stopped(sending(), NOW)
    _, effects = jobs.accepted(job, "7", NOW)
    assert effects == (Cancel("7"),)


def test_an_id_that_comes_after_the_end_is_cancelled():
    job = sending(stage=Stage.ENDED)
    assert jobs.accepted(job, "7", NOW) == (job, (Cancel("7"),))


@pytest.mark.parametrize(("answer", "kept", "cancelled"), [("9", "7", "9"), ("5", "5", "7")])
def test_of_a_listed_and_an_answered_job_the_older_one_stays(answer, kept, cancelled):
    job, _ = look(sending(), row(Standing.QUEUED, "7"))
    job, effects = jobs.accepted(job, answer, NOW + 61)
    assert job.job_id == kept
    assert effects == (Cancel(cancelled),)


def test_a_later_refusal_in_known_words_is_final():
    _, (finish,) = jobs.refused(sending(submissions=2), "Invalid account")
    assert finish == Finish(End("Invalid account", Fault.SERVICE, "cannot-start", began=False))


# -- two of one name -------------------------------------------------------------------------


def test_of_two_live_jobs_of_one_name_the_older_stays():
    job, effects = look(running(), row(), row(Standing.QUEUED, "12"))
    assert (job.job_id, effects) == ("7", (Cancel("12"),))


def test_ids_are_compared_as_numbers():
    job, effects = look(unsure(), row(Standing.QUEUED, "10"), row(Standing.QUEUED, "9"))
    assert (job.job_id, effects) == ("9", (Cancel("10"),))


def test_when_an_older_one_turns_up_it_is_used_instead():
    job, effects = look(running(), row(), row(job_id="5"))
    assert (job.job_id, job.gen) == ("5", 2)
    assert set(effects) == {Cancel("7"), Disconnect(1), Connect(2, "n1")}


def test_a_second_job_is_not_kept_when_the_first_has_ended():
    job, effects = look(running(), row(Standing.ENDED, end=FAILED), row(Standing.QUEUED, "12"))
    assert job.job_id == "7"
    assert set(effects) == {Cancel("12"), Inquire("7")}


# -- gone or not -----------------------------------------------------------------------------


def test_a_job_is_gone_when_a_listing_lacks_it_and_slurm_says_that_the_id_is_invalid():
    job, effects = look(running())
    assert effects == (Inquire("7"),)
    _, effects = jobs.answered(job, Answer("7", NOW + 60, gone=True))
    assert effects == (
        Disconnect(1),
        Finish(End("job 7 is gone from Slurm's list", Fault.NOBODY)),
    )


def test_without_a_clear_answer_it_takes_two_listings_five_seconds_apart():
    job, _ = look(running(), at=NOW + 60)
    job, effects = jobs.answered(job, Answer("7", NOW + 60))
    assert effects == ()
    job, effects = look(job, at=NOW + 64)
    assert effects == (Inquire("7"),)
    job, effects = look(job, at=NOW + 65.5)
    assert isinstance(effects[-1], Finish)


def test_a_job_that_slurm_still_shows_elsewhere_is_not_gone():
    job, _ = look(running(), at=NOW + 60)
    job, effects = jobs.answered(job, Answer("7", NOW + 61, Standing.RUNNING))
    assert (effects, job.absent_since) == ((), None)
    _, effects = look(job, at=NOW + 66)
    assert effects == (Inquire("7"),)


def test_an_answer_about_another_job_says_nothing():
    job, _ = look(running())
    other, _ = look(job, row(job_id="5"))
    after, effects = jobs.answered(other, Answer("7", NOW + 60, gone=True))
    assert (after.job_id, effects) == ("5", ())


def adopted(stage: Stage = Stage.QUEUED, **changes) -> Job:
    """The job of an earlier backend's replica, of which nothing was listed since."""
    base = Job("r1", stage, waiting_since=NOW, job_id="7", known_since=NOW + 50, unseen=True)
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("slurm", "shown"),
    [(NOW + 20, NOW + 20), (NOW - 5, NOW), (NOW + 500, NOW + 60), (None, NOW + 60)],
    ids=["meanwhile", "host's clock behind", "host's clock ahead", "not told"],
)
def test_a_job_that_began_while_nobody_looked_began_when_slurm_says(slurm, shown):
    job, _ = look(adopted(), row(ran_at=slurm))
    assert (job.running_at, job.unseen) == (shown, False)


def test_a_job_that_is_looked_after_begins_when_it_is_seen_to_run():
    waiting, _ = look(adopted(), row(Standing.QUEUED), at=NOW + 55)
    job, _ = look(waiting, row(ran_at=NOW + 20))
    assert job.running_at == NOW + 60
    assert look(queued(), row(ran_at=NOW + 20))[0].running_at == NOW + 60


@pytest.mark.parametrize("seen", [True, False])
def test_an_end_before_anybody_looked_says_so(seen):
    job = adopted(Stage.RUNNING, node="n1", started=5000.0, gen=1, running_at=NOW + 2)
    job = look(job, row())[0] if seen else job
    job, _ = look(job, row(Standing.ENDED, end=FAILED), at=NOW + 70)
    _, effects = jobs.answered(job, Answer("7", NOW + 71, Standing.ENDED, end=FAILED))
    (finish,) = (effect for effect in effects if isinstance(effect, Finish))
    assert finish.end.unseen is not seen


def test_an_unknown_state_changes_nothing():
    job = running()
    after, effects = look(job, row(Standing.UNKNOWN, node="n2"))
    assert (after, effects) == (job, ())


# -- waiting and running ---------------------------------------------------------------------


def test_why_it_waits_is_shown_with_the_estimate():
    shown = row(Standing.QUEUED, reason="Resources", starts_at=NOW + 500)
    job, effects = look(queued(), shown)
    assert (job.reason, job.starts_at, effects) == ("Resources", NOW + 500, ())


def test_a_reason_that_never_passes_is_told_once_and_the_job_waits_on():
    shown = row(Standing.QUEUED, reason="BadConstraints", permanent=True)
    job, effects = look(queued(), shown)
    assert effects == (GiveUp("job 7 cannot start: BadConstraints"),)
    assert look(job, shown)[1] == ()


def test_a_job_whose_node_could_not_run_it_makes_room_for_another_and_nobody_is_at_fault():
    why = "launch failed requeued held"
    shown = row(Standing.QUEUED, reason=why, permanent=True, not_launched=True)
    job, effects = look(running(), shown)
    assert (job.stopping, effects) == (True, (Disconnect(1), Cancel("7")))
    assert look(job, shown, at=NOW + 61)[1] == ()
    _, effects = look(job, row(Standing.ENDED), at=NOW + 62)
    assert effects == (Disconnect(1), Finish(End(f"job 7: {why}", Fault.NOBODY, bad_node="n1")))


LAUNCH_FAILED = row(
    Standing.QUEUED, reason="launch failed requeued held", permanent=True, not_launched=True
)


@pytest.mark.parametrize("node", ["n2", None])
def test_which_node_could_not_run_it_is_found_out_before_it_is_cancelled(node):
    job, effects = look(queued(), LAUNCH_FAILED)
    assert (job.stopping, effects) == (False, (FindNode("7"),))
    assert look(job, LAUNCH_FAILED, at=NOW + 61)[1] == ()
    assert jobs.node_found(job, "8", "n3", NOW + 62) == (job, ())
    job, effects = jobs.node_found(job, "7", node, NOW + 62)
    assert (job.stopping, effects) == (True, (Cancel("7"),))
    _, (finish,) = look(job, row(Standing.ENDED), at=NOW + 63)
    assert isinstance(finish, Finish)
    assert (finish.end.fault, finish.end.bad_node) == (Fault.NOBODY, node)


def test_a_node_where_it_ran_before_it_waited_again_is_not_to_blame():
    job, _ = look(running(), row(Standing.QUEUED), at=NOW + 60)
    _, effects = look(job, LAUNCH_FAILED, at=NOW + 70)
    assert effects == (FindNode("7"),)


def test_a_node_seen_while_the_failed_launch_was_cleaned_up_is_to_blame():
    job, _ = look(queued(), row(Standing.COMPLETING, node="n2"))
    job, _ = look(job, LAUNCH_FAILED, at=NOW + 61)
    assert (job.stopping, job.blamed) == (True, "n2")


def test_a_job_that_runs_after_all_while_its_node_is_looked_for_goes_on():
    job, _ = look(queued(), LAUNCH_FAILED)
    job, _ = look(job, row(), at=NOW + 61)
    assert jobs.node_found(job, "7", "n1", NOW + 62) == (job, ())


def test_the_end_by_its_time_limit_follows_what_slurm_says_and_goes_with_the_run():
    job, _ = look(running(), row(ends_at=NOW + 600))
    assert job.ends_at == NOW + 600
    job, _ = look(job, row(ends_at=NOW + 90), at=NOW + 61)
    assert job.ends_at == NOW + 90
    again, _ = look(job, row(), at=NOW + 62)
    assert again.ends_at is None
    job, _ = look(job, row(Standing.QUEUED, starts_at=NOW + 300), at=NOW + 62)
    assert (job.ends_at, job.starts_at) == (None, NOW + 300)


def test_a_running_job_is_connected_to_until_the_tunnel_is_open():
    job, effects = look(queued(), row())
    assert (job.stage, job.gen, job.node, effects) == (Stage.RUNNING, 1, "n1", (Connect(1, "n1"),))
    job, effects = look(job, row(), at=NOW + 61)
    assert effects == (Connect(1, "n1"),)
    job = jobs.connected(job, 1, "unix:/r1.1.sock")
    assert look(job, row(), at=NOW + 62) == (job, ())


def told(job: Job) -> Sighting:
    name = JobName("vm", "owner", job.replica, 20001, "hash", "llm")
    return posts.sighting(posts.new(spec(), name, "boot", Moment(NOW, NOW)), job)


def test_a_suspended_job_keeps_its_endpoint_and_says_for_how_long():
    before = running()
    job, effects = look(before, row(Standing.SUSPENDED))
    assert (job.endpoint, effects) == ("unix:/r1.1.sock", ())
    assert (told(job).reason, told(job).suspended_s) == ("suspended by Slurm", 0)
    job = jobs.troubled(job, 1, "the tunnel is down", NOW + 61)
    job, _ = look(jobs.connected(job, 1, "unix:/r1.1.sock"), row(Standing.UNKNOWN), at=NOW + 500)
    assert (told(job).reason, told(job).suspended_s) == ("suspended by Slurm", 0), "it may go on"
    job, _ = look(job, row(Standing.SUSPENDED), at=NOW + 100)
    assert told(job).suspended_s == 40
    job, effects = look(job, row(), at=NOW + 160)
    assert (told(job).reason, told(job).suspended_s, effects) == (None, None, ())
    assert (job.gen, job.endpoint) == (1, "unix:/r1.1.sock")


def test_the_time_in_which_a_job_is_suspended_is_none_in_which_it_starts():
    job, _ = look(running(), row(Standing.SUSPENDED))
    job, _ = look(job, row(Standing.SUSPENDED), at=NOW + 100)
    job, _ = look(job, row(), at=NOW + 101)
    assert job.running_at == NOW + 1 + 40


@pytest.mark.parametrize(
    "later", [row(Standing.QUEUED), row(Standing.SUSPENDED, node="n2"), row(job_id="6")]
)
def test_another_run_of_a_suspended_job_has_not_been_suspended_for_as_long(later):
    job, _ = look(running(), row(Standing.SUSPENDED))
    job, _ = look(job, later, at=NOW + 100)
    assert told(job).suspended_s == (0 if later.standing is Standing.SUSPENDED else None)


def test_a_requeued_job_loses_its_endpoint_and_gets_a_new_one_elsewhere():
    job, effects = look(running(), row(Standing.QUEUED))
    assert (job.stage, job.endpoint, effects) == (Stage.QUEUED, None, (Disconnect(1),))
    job, effects = look(job, row(node="n2", began=6000.0))
    assert (job.gen, effects) == (2, (Connect(2, "n2"),))


@pytest.mark.parametrize("change", [{"node": "n2"}, {"began": 6000.0}])
def test_a_requeue_that_no_listing_saw_is_noticed(change):
    job, effects = look(running(), row(**change))
    assert (job.gen, job.endpoint) == (2, None)
    assert effects[0] == Disconnect(1)


def test_what_an_old_tunnel_says_is_not_heard():
    job, _ = look(running(), row(node="n2"))
    assert jobs.connected(job, 1, "unix:/r1.1.sock") == job
    assert jobs.troubled(job, 1, "lost", NOW + 61) == job


def test_a_tunnel_that_broke_keeps_the_endpoint():
    job = jobs.troubled(running(), 1, "the tunnel is down", NOW + 61)
    assert (job.endpoint, job.reason) == ("unix:/r1.1.sock", "the tunnel is down")


def test_a_completing_job_is_waited_for():
    job, effects = look(running(), row(Standing.COMPLETING))
    assert (job.stage, effects) == (Stage.RUNNING, ())


# -- ends ------------------------------------------------------------------------------------


def test_how_it_ended_is_found_out_before_it_is_told():
    job, effects = look(running(), row(Standing.ENDED, end=End("it failed")))
    assert effects == (Inquire("7"),)
    assert look(job, row(Standing.ENDED, end=End("it failed")), at=NOW + 61)[1] == ()
    job, effects = jobs.answered(job, Answer("7", NOW + 60, Standing.ENDED, end=FAILED))
    assert effects == (Disconnect(1), Finish(FAILED))
    assert look(job, row())[1] == ()


def test_if_nothing_is_found_out_the_listing_has_said_enough():
    job, _ = look(running(), row(Standing.ENDED, end=End("it failed")))
    _, effects = jobs.answered(job, Answer("7", NOW + 60))
    assert effects[-1] == Finish(End("it failed"))


def test_one_that_was_put_back_into_the_queue_meanwhile_has_not_ended():
    job, _ = look(running(), row(Standing.ENDED, end=End("it failed")))
    job, effects = jobs.answered(job, Answer("7", NOW + 60, Standing.QUEUED))
    assert (job.stage, job.final, effects) == (Stage.RUNNING, None, ())


def test_a_stop_closes_the_way_cancels_and_waits_for_the_end():
    job, effects = jobs.stopped(running(), NOW + 60)
    assert effects == (Disconnect(1), Cancel("7"))
    assert look(job, row(), at=NOW + 61)[1] == ()
    job, effects = look(job, row(), at=NOW + 63)
    assert effects == (Cancel("7"),)
    _, effects = look(job, row(Standing.ENDED, end=FAILED), at=NOW + 64)
    assert effects[-1] == Finish(End("job 7 was cancelled", Fault.NOBODY))


# -- several ---------------------------------------------------------------------------------


def test_a_listing_is_sorted_by_replica_and_leftovers_are_cancelled():
    roster = Roster()
    roster.add(running())
    roster.add(Job("r2", Stage.QUEUED, waiting_since=NOW, job_id="8", known_since=NOW))
    roster.drop("r2", NOW + 50)
    rows = {"r1": [row()], "r2": [row(job_id="8")], "r3": [row(job_id="9")]}
    before_its_end = roster.listing(rows, NOW + 49, NOW + 51)
    assert before_its_end.leftovers == {}
    assert set(before_its_end.strays) == {"r3"}
    after = roster.listing(rows, NOW + 52, NOW + 52)
    assert after.leftovers == {"r2": (Cancel("8"),)}


def test_a_listing_with_a_damaged_line_says_nothing_of_jobs_it_lacks():
    roster = Roster()
    roster.add(running())
    assert roster.listing({}, NOW + 60, NOW + 60, whole=False).changes == ()
    assert roster.listing({}, NOW + 60, NOW + 60).changes[0].effects == (Inquire("7"),)


@pytest.mark.parametrize(
    ("job", "age", "pause"),
    [
        (queued(), 0.5, 0.5),
        (queued(), 1, 1.0),
        (queued(), 2, 1.0),
        (queued(), 10, 2.0),
        (queued(), 200, 10.0),
        (queued(), 2000, 30.0),
        (running(), 2, 1.0),
        (running(), 20, 15.0),
        (running(endpoint=None), 3, 1.0),
        (running(endpoint=None), 20, 2.0),
        (suspended(), 20, 2.0),
        (suspended(), 200, 10.0),
        (suspended(), 2000, 15.0),
        (jobs.stopped(running(), NOW)[0], 2, 1.0),
        (jobs.stopped(running(), NOW)[0], 20, 2.0),
    ],
)
def test_the_pace_of_listings(job, age, pause):
    last = NOW + age
    assert pace.due(job, last, 1.0) == pytest.approx(last + pause)


def test_after_a_long_rest_a_submission_or_stop_is_looked_at_within_a_second():
    long_ago = NOW - 500
    assert pace.due(queued(), long_ago, 1.0) == NOW + 0.5
    assert pace.due(jobs.stopped(running(), NOW)[0], long_ago, 1.0) == NOW + 0.5


def test_a_job_that_refuses_connections_is_looked_at_soon_but_not_for_ever():
    job = jobs.doubted(running(), NOW + 1000)
    assert pace.due(job, NOW + 995, 1.0) == NOW + 995.5
    assert pace.due(job, NOW + 1001, 1.0) == NOW + 1016
    for age in range(400):
        job = jobs.doubted(job, NOW + 1000 + age)
    assert pace.due(job, NOW + 1398, 1.0) == NOW + 1413
    again = jobs.doubted(job, NOW + 1500)
    assert pace.due(again, NOW + 1499, 1.0) == NOW + 1499.5


def test_nothing_is_listed_where_there_is_no_job():
    assert Roster().due(NOW, 1.0) is None
