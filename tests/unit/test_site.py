"""A site and the launcher above it, with a Slurm beyond SSH that fails in named ways."""

from __future__ import annotations

import re
import shlex
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from slurmgate.errors import CannotStart, StartRefused
from slurmgate.launchers import contact, posts
from slurmgate.launchers.slurm import SlurmLauncher
from slurmgate.launchers.slurm_format import JobName
from slurmgate.model import (
    End,
    Fault,
    LauncherKind,
    Phase,
    ReplicaBounds,
    ServiceSpec,
    Sighting,
    SshSpec,
)
from slurmgate.records import Records
from slurmgate.ssh import HostAway, HostRefused, Output, Unfinished
from slurmgate.state import StateDir
from tests.waiting import until

SPEC = ServiceSpec(
    name="LLM",
    route_name="llm",
    api_paths=("/",),
    bash_file="serve.sh",
    check_health_path="/health",
    timeout=10.0,
    folder=Path("/srv"),
)


class FakeSlurm:
    """Remotes to a cluster; ``faults`` says what goes wrong, by the command that is asked."""

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[str, str]] = {}  # id: name, state
        self.faults: dict[str, Exception | Output | threading.Event] = {}
        self.asked: Counter[str] = Counter()
        self.only_login = False
        self.extra = ""
        self.cancelled: list[str] = []
        self.lines: tuple[str, ...] = ()
        self.reasons: dict[str, str] = {}
        self.limits: dict[str, tuple[str, str]] = {}  # id: end, time left
        self.unfit = ""
        self.nodes = "n1"
        self.submissions: list[str] = []
        self.secrets: dict[str, str | None] = {}  # what the last of each kind may not tell
        self._lock = threading.Lock()

    def run(self, ssh, script, *, setup=(), timeout, login_shell=False, secret=None) -> Output:
        what = next(
            name
            for name, text in {
                "list": "squeue --noheader",
                "submit": "--job-name=",
                "cancel": "scancel --name",
                "unfit": "sinfo --noheader",
                "detail": "scontrol show job",
                "node": "scontrol show node",
                "rename": "scontrol update",
            }.items()
            if text in script
        )
        self.asked[what] += 1
        self.secrets[what] = secret
        fault = self.faults.get(what, self.faults.get("all"))
        if isinstance(fault, threading.Event):
            fault.wait(20)
            raise Unfinished("the connection was lost")
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, Output):
            return replace(fault, began=time.monotonic())
        if self.only_login and not login_shell:
            return Output(127, "", f"sh: 1: {what}: not found", time.monotonic())
        began = time.monotonic()
        with self._lock:
            out, code, err = getattr(self, f"_{what}")(script)
        return Output(code, out, err, began)

    def _submit(self, script: str) -> tuple[str, int, str]:
        found = re.search(r"--job-name=(\S+)", script)
        assert found
        job_id = str(100 + len(self.jobs))
        self.submissions.append(script)
        self.jobs[job_id] = (found[1], "PENDING")
        return f"{job_id}\n", 0, ""

    def _list(self, script: str) -> tuple[str, int, str]:
        lines = [
            f"{job_id}|{state}|{self.reasons.get(job_id, 'Resources')}"
            f"|{'n1' if state == 'RUNNING' else ''}|{self.nodes}|1700000000"
            f"|{'|'.join(self.limits.get(job_id, ('NONE', 'UNLIMITED')))}|{name}\n"
            for job_id, (name, state) in self.jobs.items()
        ]
        return "".join(lines) + self.extra, 0, ""

    def _cancel(self, script: str) -> tuple[str, int, str]:
        name, job_id = shlex.split(script.splitlines()[-1])[1:]
        assert self.jobs[job_id][0] == name.removeprefix("--name=")
        self.cancelled.append(job_id)
        self.set(job_id, "CANCELLED")
        return "", 0, ""

    def _detail(self, script: str) -> tuple[str, int, str]:
        found = re.search(r"scontrol show job -o (\d+)", script)
        assert found
        if found[1] not in self.jobs:
            return "slurm_load_jobs error: Invalid job id specified\n--slurmgate-- 1\n", 0, ""
        name, state = self.jobs[found[1]]
        text = f"JobId={found[1]} JobName={name} JobState={state} ExitCode=3:0"
        text += f" NodeList={self.nodes} BatchHost=n1 StdOut=/x\n"
        return text + "--slurmgate-- 0\n" + "".join(f"{x}\n" for x in self.lines), 0, ""

    def _unfit(self, script: str) -> tuple[str, int, str]:
        found = re.search(r"scontrol show job -o (\d+)", script)
        assert found
        name, _ = self.jobs[found[1]]
        text = f"JobId={found[1]} JobName={name} JobState=PENDING LastSchedEval=1700000010\n"
        return text + "--slurmgate-- 0\n" + self.unfit, 0, ""

    def _node(self, script: str) -> tuple[str, int, str]:
        text = "NodeName=n1 NodeAddr=127.0.0.9 NodeHostName=n1\n--slurmgate-- 0\n1000\nlogin\n"
        return text, 0, ""

    def _rename(self, script: str) -> tuple[str, int, str]:
        found = re.search(r"JobId=(\d+) JobName=(\S+)", script)
        assert found
        self.jobs[found[1]] = (found[2], self.jobs[found[1]][1])
        return "", 0, ""

    def set(self, job_id: str, state: str) -> None:
        self.jobs[job_id] = (self.jobs[job_id][0], state)

    def add(self, name: JobName | str, state: str = "RUNNING") -> str:
        job_id = str(100 + len(self.jobs))
        self.jobs[job_id] = (str(name), state)
        return job_id


class Ears:
    def __init__(self) -> None:
        self.sightings: dict[str, Sighting] = {}
        self.ends: list[tuple[str, End]] = []
        self.hopeless_ones: dict[str, str] = {}
        self.listed_ones: set[str] = set()

    def seen(self, sighting: Sighting) -> None:
        self.sightings[sighting.replica] = sighting

    def ended(self, replica: str, end: End) -> None:
        self.ends.append((replica, end))

    def hopeless(self, replica: str, reason: str, code: str = "cannot-start") -> None:
        self.hopeless_ones[replica] = reason

    def listed(self, services: frozenset[str]) -> None:
        self.listed_ones |= services

    def until_phase(self, replica: str, phase: Phase) -> Sighting:
        until(lambda: replica in self.sightings and self.sightings[replica].phase is phase, 10)
        return self.sightings[replica]


@pytest.fixture
def state(tmp_path):
    return StateDir.open(tmp_path / "state")


@pytest.fixture
def slurm():
    return FakeSlurm()


@pytest.fixture
def ears():
    return Ears()


@pytest.fixture
def boot(state, slurm, ears, monkeypatch):
    """Start launchers that adopt what is there; all are closed in the end."""
    monkeypatch.setattr(contact, "RETRY_BUSY", 0.2)
    made: list[SlurmLauncher] = []

    def start(*specs: ServiceSpec) -> SlurmLauncher:
        launcher = SlurmLauncher(state, "vm", slurm)
        made.append(launcher)
        launcher.adopt(specs, ears)
        return launcher

    yield start
    for fault in slurm.faults.values():
        if isinstance(fault, threading.Event):
            fault.set()
    for launcher in made:
        launcher.close(stop_replicas=False)


def our_name(state: StateDir, replica: str, **changes) -> JobName:
    base = JobName("vm", state.owner, replica, 20001, SPEC.start_hash(), "llm")
    return replace(base, **changes)


def test_a_job_that_runs_on_this_machines_cluster_is_dialled_directly(boot, slurm, ears):
    launcher = boot(SPEC)
    sighting = launcher.launch(SPEC, "r1")
    assert (sighting.phase, sighting.job_id) == (Phase.PENDING, "100")
    slurm.set("100", "RUNNING")
    reached = ears.until_phase("r1", Phase.STARTING)
    assert reached.endpoint == f"127.0.0.9:{sighting.port}"
    slurm.set("100", "FAILED")
    slurm.lines = ("boom",)
    until(lambda: ears.ends, 20)
    assert ears.ends == [("r1", End("the service exited with code 3", node="n1"))]
    assert launcher.log_tail("r1", 5) == ["boom"]


KEYED = replace(SPEC, upstream_key=True)


def test_a_job_is_given_its_key_however_often_it_is_submitted_and_another_backend_knows_it(
    boot, slurm, ears, state, caplog
):
    caplog.set_level("DEBUG")
    slurm.faults["submit"] = Output(1, "", "sbatch: error: the moon is full", 0)
    launcher = boot(KEYED)
    key = launcher.launch(KEYED, "r1").api_key
    assert key is not None
    assert len(key) == 43
    (record,) = Records(state.replicas).read_all()
    assert record.api_key == key
    slurm.faults.clear()
    assert ears.until_phase("r1", Phase.PENDING).api_key == key
    (script,) = slurm.submissions
    assert f"export SLURMGATE_API_KEY={key}\n" in script
    assert script.count(key) == 1
    launcher.close(stop_replicas=False)
    again = boot(KEYED)
    slurm.set("100", "RUNNING")
    reached = ears.until_phase("r1", Phase.STARTING)
    assert reached.api_key == key
    again.log_tail("r1", 5)
    assert slurm.secrets["submit"] == slurm.secrets["detail"] == key
    assert again.launch(KEYED, "r2").api_key != key
    assert key not in caplog.text + repr(reached) + repr(record)


def test_a_job_whose_key_is_lost_is_cancelled_and_not_submitted_again(boot, slurm, state, ears):
    lost = slurm.add(our_name(state, "lost", start_hash=KEYED.start_hash()))
    launcher = boot(KEYED)
    until(lambda: slurm.cancelled == [lost])
    launcher.launch(KEYED, "r1")
    (record,) = Records(state.replicas).read_all()
    at = posts.Moment(0.0, record.created)
    found = [posts.recorded(one, KEYED, at) for one in (record, replace(record, api_key=None))]
    assert [post and post.spec for post in found] == [KEYED, None]


def test_commands_that_only_a_login_shell_finds_are_found_and_that_is_remembered(boot, slurm):
    slurm.only_login = True
    launcher = boot(SPEC)
    launcher.launch(SPEC, "r1")
    assert slurm.asked["list"] == 2
    assert slurm.asked["submit"] == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Output(127, "", "sh: 1: squeue: not found", 0), "remote_setup"),
        (HostRefused("the host key of login is not known"), "host key"),
    ],
)
def test_what_no_waiting_mends_is_told_at_once(boot, slurm, state, fault, words):
    slurm.faults["all"] = fault
    launcher = boot(SPEC)
    with pytest.raises(CannotStart, match=words):
        launcher.launch(SPEC, "r1")
    assert Records(state.replicas).read_all() == []


def test_sbatch_alone_missing_is_told_too(boot, slurm, state):
    slurm.faults["submit"] = Output(127, "", "sbatch: command not found", 0)
    launcher = boot(SPEC)
    with pytest.raises(CannotStart, match="sbatch is not found on this machine"):
        launcher.launch(SPEC, "r1")
    assert Records(state.replicas).read_all() == []


@pytest.mark.parametrize("command", ["all", "submit"])
def test_a_host_that_comes_back_in_time_is_waited_for(boot, slurm, command):
    slurm.faults[command] = HostAway("login is away")
    launcher = boot(SPEC)
    done: list[Sighting] = []
    thread = threading.Thread(target=lambda: done.append(launcher.launch(SPEC, "r1")))
    thread.start()
    asked = "list" if command == "all" else "submit"
    until(lambda: slurm.asked[asked] >= 3)
    slurm.faults.clear()
    thread.join(30)
    assert done[0].phase is Phase.PENDING
    assert len(slurm.jobs) == 1


def test_a_host_that_stays_away_is_named_and_later_starts_fail_fast(
    boot, slurm, state, monkeypatch
):
    monkeypatch.setattr(contact, "PATIENCE", 0.5)
    slurm.faults["all"] = HostAway("no route")
    launcher = boot(SPEC)
    for replica in ("r1", "r2"):
        with pytest.raises(CannotStart, match="login host this machine cannot be reached: no ro"):
            launcher.launch(SPEC, replica)
    assert Records(state.replicas).read_all() == []


def test_while_slurm_does_not_answer_a_start_waits_and_is_submitted_later(boot, slurm, ears):
    slurm.faults["list"] = Output(1, "", "slurm_load_jobs error: Unable to contact", 0)
    launcher = boot(SPEC)
    sighting = launcher.launch(SPEC, "r1")
    assert sighting.phase is Phase.SUBMITTED
    assert "Unable to contact" in str(sighting.reason)
    assert slurm.jobs == {}
    slurm.faults.clear()
    ears.until_phase("r1", Phase.PENDING)
    assert len(slurm.jobs) == 1


def test_what_sbatch_says_in_unknown_words_may_have_been_a_submission(boot, slurm, ears):
    launcher = boot(SPEC)
    slurm.faults["submit"] = Output(1, "", "sbatch: error: the moon is full", 0)
    assert launcher.launch(SPEC, "r1").phase is Phase.SUBMITTED
    slurm.faults.clear()
    ears.until_phase("r1", Phase.PENDING)
    assert len(slurm.jobs) == 1
    assert ears.ends == []


def test_a_lost_answer_is_found_in_the_list(boot, slurm, ears, state):
    launcher = boot(SPEC)
    launcher_said: list[Sighting] = []
    lost = threading.Event()
    slurm.faults["submit"] = lost
    thread = threading.Thread(target=lambda: launcher_said.append(launcher.launch(SPEC, "r1")))
    thread.start()
    until(lambda: slurm.asked["submit"])
    (record,) = Records(state.replicas).read_all()
    assert record.job is not None
    job_id = slurm.add(record.job.name, "PENDING")
    lost.set()
    thread.join(30)
    sighting = ears.until_phase("r1", Phase.PENDING)
    assert sighting.job_id == job_id
    assert slurm.asked["submit"] == 1


def test_submissions_and_cancels_do_not_wait_for_a_listing_that_hangs(boot, slurm, ears):
    launcher = boot(SPEC)
    launcher.launch(SPEC, "r1")
    slurm.faults["list"] = threading.Event()
    until(lambda: slurm.asked["list"] >= 2)
    launcher.launch(SPEC, "r2")
    launcher.stop("r1")
    until(lambda: slurm.cancelled == ["100"])
    assert len(slurm.jobs) == 2


def test_another_job_that_got_the_number_of_a_lost_one_is_not_taken_for_it(
    boot, slurm, state, ears
):
    launcher = boot(SPEC)
    launcher.launch(SPEC, "r1")
    slurm.set("100", "RUNNING")
    ears.until_phase("r1", Phase.STARTING)
    slurm.jobs["100"] = ("somebody's", "RUNNING")
    until(lambda: ears.ends, 20)
    assert ears.ends == [("r1", End("job 100 is gone from Slurm's list", Fault.NOBODY))]
    assert slurm.cancelled == []


def test_a_listing_that_breaks_the_program_does_not_end_the_thread(boot, slurm, ears, caplog):
    slurm.faults["list"] = ZeroDivisionError("a bug")
    launcher = boot(SPEC)
    until(lambda: "a bug" in caplog.text)
    slurm.faults.clear()
    launcher.launch(SPEC, "r1")
    ears.until_phase("r1", Phase.PENDING)


def test_nothing_is_listed_at_rest_without_jobs(boot, slurm, ears):
    launcher = boot(SPEC)
    until(lambda: ears.listed_ones == {"LLM"})
    launcher.launch(SPEC, "r1")
    launcher.stop("r1")
    until(lambda: ears.ends)

    def at_rest() -> bool:
        """nothing is listed for a while"""
        asked = slurm.asked["list"]
        time.sleep(2.5)
        return slurm.asked["list"] == asked

    until(at_rest)  # one listing may have been under way
    assert at_rest()


def test_a_listing_with_a_damaged_line_of_ours_declares_nothing_gone(boot, slurm, ears):
    launcher = boot(SPEC)
    launcher.launch(SPEC, "r1")
    name, _ = slurm.jobs.pop("100")
    slurm.extra = f"10|{name}\n"
    seen = slurm.asked["list"]
    until(lambda: slurm.asked["list"] >= seen + 3)
    assert ears.ends == []
    slurm.extra = ""
    until(lambda: ears.ends)


def test_a_state_that_is_not_known_changes_nothing_and_is_logged_once(boot, slurm, ears, caplog):
    launcher = boot(SPEC)
    launcher.launch(SPEC, "r1")
    slurm.set("100", "LEVITATING")
    seen = slurm.asked["list"]
    until(lambda: slurm.asked["list"] >= seen + 3)
    assert caplog.text.count("LEVITATING") == 1
    assert ears.ends == []
    assert slurm.cancelled == []


def test_two_setups_on_one_cluster_leave_each_others_jobs_alone(boot, slurm, state, ears):
    other = replace(SPEC, name="Other", route_name="other", remote_setup=("module load slurm",))
    name = our_name(state, "lost", route="other", start_hash=other.start_hash())
    lost = slurm.add(name)
    launcher = boot(SPEC, other)
    launcher.launch(SPEC, "r1")
    ears.until_phase("lost", Phase.STARTING)
    until(lambda: ears.listed_ones == {"LLM", "Other"})
    seen = slurm.asked["list"]
    until(lambda: slurm.asked["list"] >= seen + 2)
    assert slurm.cancelled == []
    assert ears.sightings["lost"].job_id == lost


def test_only_what_has_our_instance_and_owner_is_cancelled(boot, slurm, state, ears):
    mine = our_name(state, "x1", route="gone")
    for name in (
        replace(mine, owner="other"),
        replace(mine, instance="other"),
        f"{mine}|",
        f"a{mine}",
        str(mine).replace(".20001.", ".99999."),
    ):
        slurm.add(name)
    unwanted = slurm.add(mine)
    boot(SPEC)
    until(lambda: slurm.cancelled == [unwanted])
    assert ears.sightings == {}


def test_ports_of_one_service_count_upward_where_it_may_have_several_replicas(boot, slurm):
    fixed = replace(SPEC, remote_port=8000, replicas=ReplicaBounds(max=3))
    launcher = boot(fixed)
    ports = [launcher.launch(fixed, replica).port for replica in ("r1", "r2", "r3")]
    assert ports == [8000, 8001, 8002]


def test_one_that_replaces_another_counts_upward_too_and_the_port_is_free_again(boot, slurm, ears):
    fixed = replace(SPEC, remote_port=8000)
    launcher = boot(fixed)
    assert [launcher.launch(fixed, replica).port for replica in ("r1", "r2")] == [8000, 8001]
    launcher.stop("r1")
    until(lambda: ears.ends)
    assert launcher.launch(fixed, "r3").port == 8000


def test_one_that_replaces_another_passes_over_the_port_of_another_service(boot, slurm):
    fixed = replace(SPEC, remote_port=8000)
    beside = replace(SPEC, name="Beside", route_name="beside", remote_port=8001)
    launcher = boot(fixed, beside)
    assert launcher.launch(beside, "b1").port == 8001
    assert [launcher.launch(fixed, replica).port for replica in ("r1", "r2")] == [8000, 8002]


def test_a_single_replica_gets_its_port_while_the_one_before_is_still_being_cancelled(boot, slurm):
    fixed = replace(SPEC, remote_port=8000)
    launcher = boot(fixed)
    launcher.launch(fixed, "r1")
    slurm.faults["cancel"] = threading.Event()
    launcher.stop("r1")
    assert launcher.launch(fixed, "r2").port == 8000
    several = replace(fixed, replicas=ReplicaBounds(max=2))
    assert launcher.launch(several, "r3").port == 8001


def test_a_counted_port_that_somebody_else_has_on_a_node_is_passed_over_next_time(
    boot, slurm, ears
):
    several = replace(SPEC, remote_port=8000, replicas=ReplicaBounds(max=2))
    launcher = boot(several)
    assert launcher.launch(several, "r1").port == 8000
    slurm.lines = ("OSError: [Errno 98] Address already in use",)
    slurm.set("100", "FAILED")
    until(lambda: ears.ends)
    assert ears.ends[0][1].fault is Fault.PORT
    assert [launcher.launch(several, replica).port for replica in ("r2", "r3")] == [8001, 8002]


@pytest.mark.parametrize("many", [1, 3])
def test_jobs_without_records_are_adopted_up_to_one_more_than_may_be(
    boot, slurm, state, ears, many
):
    spec = replace(SPEC, replicas=ReplicaBounds(max=many))
    for n in range(many + 3):
        slurm.add(our_name(state, f"lost{n}", port=20001 + n))
    boot(spec)
    until(lambda: len(slurm.cancelled) == 2)
    until(lambda: len(ears.sightings) == many + 1)
    kept = {sighting.job_id for sighting in ears.sightings.values()}
    assert kept.isdisjoint(slurm.cancelled)


def test_a_submission_that_is_sent_again_avoids_the_same_nodes(boot, slurm, ears):
    launcher = boot(SPEC)
    slurm.faults["submit"] = Output(1, "", "sbatch: error: the moon is full", 0)
    launcher.launch(SPEC, "r1", avoid=("n8", "n[1-9]", "n9"))
    slurm.faults.clear()
    ears.until_phase("r1", Phase.PENDING)
    (script,) = slurm.submissions
    assert "for sg_node in n8 n9; do" in script


HELD = "launch failed requeued held"


@pytest.mark.parametrize(
    ("told", "node"),
    [
        ("n3|1700000009|Prolog error\nn4|1700000012|Prolog error\n", "n4"),
        ("n5|1700000013|Prolog error\nn4|1700000012|batch job complete failure\n", "n4"),
        ("n3|Unknown|Prolog error\n", None),
        ("", None),
        (HostAway("login is away"), None),
    ],
)
def test_which_node_could_not_run_a_job_is_told_with_its_end(boot, slurm, ears, told, node):
    if isinstance(told, str):
        slurm.unfit = told
    else:
        slurm.faults["unfit"] = told
    launcher = boot(SPEC)
    launcher.launch(SPEC, "r1")
    slurm.reasons["100"] = HELD
    until(lambda: ears.ends, 20)
    ((_, end),) = ears.ends
    assert (end.fault, end.bad_node) == (Fault.NOBODY, node)
    assert HELD in end.reason
    assert slurm.cancelled == ["100"]
    assert slurm.asked["unfit"] == 1


@pytest.mark.parametrize("state_word", ["NODE_FAIL", "BOOT_FAIL"])
def test_a_node_that_failed_is_named(boot, slurm, ears, state_word):
    launcher = boot(SPEC)
    launcher.launch(SPEC, "r1")
    slurm.set("100", state_word)
    until(lambda: ears.ends, 20)
    assert (ears.ends[0][1].fault, ears.ends[0][1].bad_node) == (Fault.NOBODY, "n1")


def test_of_several_nodes_none_is_blamed(boot, slurm, ears):
    slurm.nodes = "n[1-2]"
    launcher = boot(SPEC)
    launcher.launch(SPEC, "r1")
    slurm.set("100", "NODE_FAIL")
    until(lambda: ears.ends, 20)
    assert (ears.ends[0][1].fault, ears.ends[0][1].bad_node) == (Fault.NOBODY, None)


@pytest.mark.parametrize(
    ("end", "left", "seconds"),
    [
        ("1700000000", "10:00", 600),
        ("later", "INVALID", 300),
        ("NONE", "UNLIMITED", None),
        ("N/A", "NOT_SET", None),
    ],
)
def test_when_a_job_ends_is_read_from_what_is_left_or_else_from_its_end(
    boot, slurm, ears, end, left, seconds
):
    launcher = boot(SPEC)
    launcher.launch(SPEC, "r1")
    slurm.limits["100"] = (str(int(time.time()) + 300) if end == "later" else end, left)
    slurm.set("100", "RUNNING")
    reached = ears.until_phase("r1", Phase.STARTING)
    if seconds is None:
        assert reached.ends_at is None
    else:
        assert reached.ends_at == pytest.approx(time.monotonic() + seconds, abs=10)


def test_a_port_that_was_taken_is_not_tried_again_soon(boot, slurm, ears):
    spec = replace(SPEC, port_range=(20000, 20001))
    launcher = boot(spec)
    first = launcher.launch(spec, "r1").port
    slurm.lines = ("OSError: [Errno 98] Address already in use",)
    slurm.set("100", "FAILED")
    until(lambda: ears.ends)
    assert ears.ends[0][1].fault is Fault.PORT
    assert launcher.launch(spec, "r2").port == 20000 + 20001 - (first or 0)
    assert launcher.launch(spec, "r3").port == first
    with pytest.raises(CannotStart, match="every port of port_range 20000-20001 is in use"):
        launcher.launch(spec, "r4")


def test_a_record_that_cannot_be_kept_keeps_the_job_from_being_submitted(
    boot, slurm, state, monkeypatch
):
    launcher = boot(SPEC)
    until(lambda: slurm.asked["list"])

    def full(record):
        raise StartRefused("cannot write the replica record: No space left on device")

    monkeypatch.setattr(launcher.records, "write", full)
    with pytest.raises(StartRefused, match="No space left"):
        launcher.launch(SPEC, "r1")
    assert slurm.asked["submit"] == 0
    monkeypatch.undo()
    launcher.launch(SPEC, "r1")


def test_the_launcher_closes_quickly_while_a_host_hangs(boot, slurm):
    launcher = boot(SPEC)
    launcher.launch(SPEC, "r1")
    slurm.faults["all"] = threading.Event()
    seen = slurm.asked["list"]
    until(lambda: slurm.asked["list"] > seen)
    began = time.monotonic()
    launcher.close(stop_replicas=False)
    assert time.monotonic() - began < 10.0
    with pytest.raises(StartRefused, match="the backend is stopping"):
        launcher.launch(SPEC, "r2")


def test_a_restart_knows_everything_without_asking_the_host(boot, slurm, state, ears):
    first = boot(SPEC)
    sighting = first.launch(SPEC, "r1")
    slurm.set("100", "RUNNING")
    ears.until_phase("r1", Phase.STARTING)
    first.close(stop_replicas=False)
    slurm.faults["all"] = HostAway("login is away")

    second = SlurmLauncher(state, "vm", slurm)
    adoption = second.adopt([SPEC], ears)
    second.close(stop_replicas=False)
    (found,) = adoption.sightings
    assert adoption.unlisted == {"LLM"}
    assert (found.phase, found.job_id, found.port, found.gen) == (
        Phase.STARTING,
        "100",
        sighting.port,
        1,
    )
    assert found.running_at is not None
    assert found.created_at == pytest.approx(sighting.created_at, abs=60)


def test_of_a_job_that_began_between_two_backends_slurm_says_when(boot, slurm, ears):
    first = boot(SPEC)
    first.launch(SPEC, "r1")
    first.close(stop_replicas=False)
    later = time.monotonic()
    slurm.set("100", "RUNNING")  # long ago, by the clock of that host
    boot(SPEC)
    assert (ears.until_phase("r1", Phase.STARTING).running_at or later) < later


def test_a_job_that_is_queued_again_is_new_in_the_queue_for_the_next_backend_too(
    boot, slurm, state, ears
):
    first = boot(SPEC)
    first.launch(SPEC, "r1")
    slurm.set("100", "RUNNING")
    ears.until_phase("r1", Phase.STARTING)
    before = time.monotonic()
    slurm.set("100", "PENDING")
    assert (ears.until_phase("r1", Phase.PENDING).queued_at or 0) >= before
    first.close(stop_replicas=False)
    later = time.monotonic()
    boot(SPEC)
    until(lambda: (ears.sightings["r1"].queued_at or 0) >= later)


def test_that_a_job_is_held_is_told_after_it_was_told_to_be_queued_again(boot, slurm, ears):
    told: list[object] = []

    class Listener(Ears):
        def seen(self, sighting: Sighting) -> None:
            told.append(sighting.phase)
            ears.seen(sighting)

        def hopeless(self, replica: str, reason: str, code: str = "cannot-start") -> None:
            told.append(reason)

    launcher = boot(SPEC)
    launcher._observer = Listener()
    launcher.launch(SPEC, "r1")
    slurm.set("100", "RUNNING")
    ears.until_phase("r1", Phase.STARTING)
    slurm.reasons["100"] = "JobHeldUser"
    slurm.set("100", "PENDING")
    until(lambda: any("JobHeldUser" in str(word) for word in told))
    words = [str(word) for word in told]
    assert words[words.index(next(w for w in words if "JobHeldUser" in w)) - 1] == "pending"


def test_a_job_that_one_site_takes_over_is_adopted_by_the_service_of_another(
    boot, slurm, state, ears
):
    other = replace(SPEC, name="Other", route_name="other", remote_setup=("module load slurm",))
    job = slurm.add(replace(our_name(state, "r9"), owner="stranger", route="other"))
    launcher = boot(SPEC, other)
    until(lambda: ears.listed_ones == {"LLM", "Other"})
    assert launcher.take_over("stranger") == 1
    assert ears.until_phase("r9", Phase.STARTING).job_id == job
    until(lambda: not launcher.strangers())
    assert not slurm.cancelled


def test_a_record_that_is_of_no_job_is_removed_and_the_job_adopted(boot, slurm, state, ears):
    first = boot(SPEC)
    first.launch(SPEC, "r1")
    first.close(stop_replicas=False)
    (record,) = Records(state.replicas).read_all()
    assert record.launcher is LauncherKind.SLURM
    Records(state.replicas).write(replace(record, job=None))
    slurm.set("100", "RUNNING")
    ears.sightings.clear()
    boot(SPEC)
    assert ears.until_phase("r1", Phase.STARTING).job_id == "100"


def test_a_service_behind_a_login_host_is_named_in_what_fails(boot, slurm, monkeypatch):
    monkeypatch.setattr(contact, "PATIENCE", 0.3)
    spec = replace(SPEC, ssh=SshSpec("login.example.org"))
    slurm.faults["all"] = HostAway("no route")
    launcher = boot(spec)
    with pytest.raises(CannotStart, match=r"login host login\.example\.org cannot be reached"):
        launcher.launch(spec, "r1")
