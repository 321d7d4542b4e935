"""The Slurm launcher against a real cluster: what it starts, sees, survives and leaves alone."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from slurmgate.errors import CannotStart, StartRefused
from slurmgate.launchers.host import Host
from slurmgate.launchers.slurm import SlurmLauncher
from slurmgate.launchers.slurm_format import JobName
from slurmgate.model import (
    End,
    Fault,
    Phase,
    ReplicaBounds,
    ServiceSpec,
    Sighting,
    SshSpec,
    TunnelMode,
)
from slurmgate.records import Records
from slurmgate.ssh import Remotes
from slurmgate.state import StateDir
from tests.lab.lab import Lab
from tests.ports import dead_port, free_port
from tests.waiting import until

INSTANCE = "lab"


class Ears:
    """An observer that keeps everything it was told."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sightings: list[Sighting] = []
        self.ends: list[tuple[str, End]] = []
        self.hopeless_ones: dict[str, str] = {}
        self.listed_ones: set[str] = set()

    def seen(self, sighting: Sighting) -> None:
        with self.lock:
            self.sightings.append(sighting)

    def ended(self, replica: str, end: End) -> None:
        with self.lock:
            self.ends.append((replica, end))

    def hopeless(self, replica: str, reason: str, code: str = "cannot-start") -> None:
        self.hopeless_ones[replica] = reason

    def listed(self, services: frozenset[str]) -> None:
        self.listed_ones |= services

    def last(self, replica: str) -> Sighting | None:
        with self.lock:
            return next((s for s in reversed(self.sightings) if s.replica == replica), None)

    def ends_of(self, replica: str) -> list[End]:
        with self.lock:
            return [end for name, end in self.ends if name == replica]

    def until_phase(self, replica: str, phase: Phase, seconds: float = 20) -> Sighting:
        def reached() -> Sighting | None:
            found = self.last(replica)
            return found if found is not None and found.phase is phase else None

        reached.__doc__ = f"{replica} {phase}"
        return until(reached, seconds)

    def until_end(self, replica: str, seconds: float = 20) -> End:
        until(lambda: self.ends_of(replica), seconds)
        (end,) = self.ends_of(replica)
        return end


class Backend:
    """One life of a backend's launcher; ``die`` leaves everything as kill -9 does."""

    def __init__(self, state: StateDir, *specs: ServiceSpec) -> None:
        self.ears = Ears()
        self.remotes = Remotes()
        self.launcher = SlurmLauncher(state, INSTANCE, self.remotes)
        self.adoption = self.launcher.adopt(specs, self.ears)

    def die(self) -> None:
        self.launcher.close(stop_replicas=False)
        self.remotes.close()


@pytest.fixture
def state(tmp_path):
    return StateDir.open(tmp_path / "state")


@pytest.fixture
def boot(state):
    """Start backends, one after the other; the last one cancels what is left."""
    lives: list[Backend] = []

    def start(*specs: ServiceSpec) -> Backend:
        lives.append(Backend(state, *specs))
        return lives[-1]

    yield start
    for life in lives[:-1]:
        life.die()
    if lives:
        lives[-1].launcher.close(stop_replicas=True)
        lives[-1].remotes.close()


def login(lab: Lab) -> SshSpec:
    fields = lab.ssh_fields()
    return SshSpec(
        host=fields["remote_host"],
        username=fields["ssh_username"],
        key_file=Path(fields["ssh_key_file"]),
        port=fields["ssh_port"],
        known_hosts=Path(fields["ssh_known_hosts"]),
    )


def service(lab: Lab, **changes) -> ServiceSpec:
    base = ServiceSpec(
        name="LLM",
        route_name="llm",
        api_paths=("/",),
        bash_file=lab.probe_script("node"),
        check_health_path="/health",
        timeout=10.0,
        folder=Path("/srv"),
        ssh=login(lab),
    )
    return replace(base, **changes)


def answers(sighting: Sighting) -> bool:
    """Ask the service for its health through the endpoint."""
    endpoint = sighting.endpoint
    assert endpoint is not None
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        if endpoint.startswith("unix:"):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(5)
            sock.connect(endpoint.removeprefix("unix:"))
        else:
            host, _, port = endpoint.rpartition(":")
            sock = stack.enter_context(socket.create_connection((host, int(port)), 5))
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        return b" 200 " in sock.recv(100)
    return False


def ours(lab: Lab) -> list[str]:
    return [job.id for job in lab.queue() if job.state != "COMPLETING"]


def test_a_job_is_submitted_reached_through_a_tunnel_and_cancelled(lab, boot, state):
    spec = service(lab)
    backend = boot(spec)
    sighting = backend.launcher.launch(spec, "r1")
    assert sighting.phase in (Phase.PENDING, Phase.RUNNING)
    assert sighting.job_id is not None
    reached = backend.ears.until_phase("r1", Phase.STARTING)
    assert reached.node in lab.nodes
    assert reached.gen == 1
    until(lambda: answers(reached))
    (job,) = lab.queue()
    name = JobName.parse(job.name)
    assert name is not None
    assert (name.instance, name.owner, name.replica) == (INSTANCE, state.owner, "r1")

    backend.launcher.stop("r1")
    assert backend.ears.until_end("r1").fault is Fault.NOBODY
    assert not ours(lab)
    assert Records(state.replicas).read_all() == []
    until(lambda: not any(state.tunnel_sockets.iterdir()))


def test_a_later_backend_adopts_job_and_tunnel(lab, boot, state):
    spec = service(lab)
    first = boot(spec)
    first.launcher.launch(spec, "r1")
    reached = first.ears.until_phase("r1", Phase.STARTING)
    until(lambda: answers(reached))
    first.die()

    second = boot(spec)
    (adopted,) = second.adoption.sightings
    assert second.adoption.unlisted == {"LLM"}
    assert (adopted.phase, adopted.endpoint, adopted.gen, adopted.job_id) == (
        Phase.STARTING,
        reached.endpoint,
        1,
        reached.job_id,
    )
    assert answers(adopted)
    until(lambda: "LLM" in second.ears.listed_ones)
    until(lambda: answers(adopted))
    assert len(ours(lab)) == 1
    second.launcher.stop("r1")
    second.ears.until_end("r1")


# -- ends --------------------------------------------------------------------------------------


def test_a_job_that_fails_says_how_with_its_last_lines(lab, boot):
    spec = service(lab, bash_file=lab.script("fails.sh", "echo about to fail\nexit 3"))
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    end = backend.ears.until_end("r1")
    assert (end.reason, end.fault) == ("the service exited with code 3", Fault.SERVICE)
    assert backend.launcher.log_tail("r1", 20) == ["about to fail"]


def test_the_output_of_a_running_job_can_be_read(lab, boot):
    script = lab.script("talks.sh", "echo one\nprintf '\\033[1mtwo\\033[0m\\n'\nexec sleep 600")
    spec = service(lab, bash_file=script)
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    until(lambda: backend.launcher.log_tail("r1", 20) == ["one", "two"])
    assert backend.launcher.log_tail("r1", 1) == ["two"]
    assert backend.launcher.log_tail("nobody", 1) == []


def test_a_job_cancelled_from_outside_is_nobodys_fault(lab, boot):
    spec = service(lab)
    backend = boot(spec)
    sighting = backend.launcher.launch(spec, "r1")
    backend.ears.until_phase("r1", Phase.STARTING)
    lab.run("scancel", str(sighting.job_id))
    end = backend.ears.until_end("r1", 40)
    assert end.reason == f"job {sighting.job_id} was cancelled"
    assert (end.fault, end.bad_node) == (Fault.NOBODY, None)


def test_a_requeued_job_gets_a_new_place(lab, boot):
    spec = service(lab)
    backend = boot(spec)
    job_id = str(backend.launcher.launch(spec, "r1").job_id)
    first = backend.ears.until_phase("r1", Phase.STARTING)
    lab.run("scontrol", "requeue", job_id)
    waiting = backend.ears.until_phase("r1", Phase.PENDING, 60)
    assert (waiting.endpoint, waiting.job_id) == (None, job_id)
    again = backend.ears.until_phase("r1", Phase.STARTING, 60)
    assert (again.gen, again.job_id) == (2, job_id)
    assert again.endpoint != first.endpoint
    until(lambda: answers(again))


def test_a_port_taken_on_the_node_is_not_the_services_fault_unless_it_is_fixed(lab, boot):
    script = lab.script("taken.sh", 'echo "OSError: [Errno 98] Address already in use"\nexit 1')
    spec = service(lab, bash_file=script)
    fixed = replace(spec, name="Fixed", route_name="fixed", remote_port=20001)
    backend = boot(spec, fixed)
    backend.launcher.launch(spec, "r1")
    backend.launcher.launch(fixed, "r2")
    assert backend.ears.until_end("r1").fault is Fault.PORT
    end = backend.ears.until_end("r2")
    assert end.fault is Fault.SERVICE
    assert end.reason.startswith("port 20001 is taken on node n")


# -- waiting -----------------------------------------------------------------------------------


def test_a_full_cluster_is_waited_for_with_reason_shown(lab, boot):
    lab.fill()
    spec = service(lab)
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    until(lambda: "Resources" in str(getattr(backend.ears.last("r1"), "reason", "")))
    assert not backend.ears.hopeless_ones
    lab.free()
    backend.ears.until_phase("r1", Phase.STARTING)


def test_a_reason_that_never_passes_is_told_in_slurms_words(lab, boot):
    spec = service(lab, sbatch_args=("--hold",))
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    until(lambda: "JobHeldUser" in backend.ears.hopeless_ones.get("r1", ""))
    assert backend.ears.ends == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sbatch_args": ("--partition=nowhere",)}, "nvalid partition"),
        ({"bash_file": "missing.sh"}, "does not exist on the login host"),
    ],
)
def test_a_refusal_comes_at_once_in_words(lab, boot, state, changes, words):
    spec = service(lab, **changes)
    backend = boot(spec)
    with pytest.raises(CannotStart, match=words):
        backend.launcher.launch(spec, "r1")
    assert Records(state.replicas).read_all() == []
    assert lab.queue() == []
    assert backend.ears.ends == []


def test_a_host_that_cannot_be_reached_is_named(lab, boot, state, monkeypatch):
    monkeypatch.setattr("slurmgate.launchers.contact.PATIENCE", 6.0)
    took: list[float] = []
    with dead_port() as port:
        spec = service(lab, ssh=replace(login(lab), host="127.0.0.1", port=port))
        backend = boot(spec)
        for replica in ("r1", "r2", "r3", "r4"):
            began = time.monotonic()
            with pytest.raises(CannotStart, match=r"127\.0\.0\.1"):
                backend.launcher.launch(spec, replica)
            took.append(time.monotonic() - began)
    # Of the later ones the quickest counts: a busy machine holds up one, but not each.
    assert min(took[1:]) < 5.0, "it was known to be away"
    assert Records(state.replicas).read_all() == []


# -- exactly one job ---------------------------------------------------------------------------


def halting_sbatch(lab: Lab, folder: Path, submits_first: bool) -> tuple[str, ...]:
    """Setup lines that make each sbatch halt before or after it submits.

    When it halts there is the file ``halts`` in the folder; it goes on when there is ``on``.
    """
    real = lab.run("sh", "-c", "command -v sbatch").stdout.strip()
    halt = (
        f'touch "{folder}/halts"\nfor _ in $(seq 600); do [ -e "{folder}/on" ] || sleep 0.1; done'
    )
    submit = f'{real} "$@"'
    steps = [submit, halt] if submits_first else [halt, submit]
    wrapper = lab.script(f"halting-sbatch-{submits_first}", "\n".join(steps))
    return (f'sbatch() {{ "{wrapper}" "$@"; }}',)


@pytest.mark.parametrize("submits_first", [False, True])
def test_a_backend_that_dies_while_it_submits_finds_the_one_job(lab, boot, tmp_path, submits_first):
    spec = service(lab, remote_setup=halting_sbatch(lab, tmp_path, submits_first))
    first = boot(spec)
    launching = threading.Thread(target=try_launch, args=(first, spec, "r1"), daemon=True)
    launching.start()
    until((tmp_path / "halts").exists)
    first.die()

    second = boot(spec)
    (sighting,) = second.adoption.sightings
    if not submits_first:  # else the first may have found it in Slurm's list
        assert sighting.phase is Phase.SUBMITTED
    (tmp_path / "on").touch()
    reached = second.ears.until_phase("r1", Phase.STARTING, 60)
    until(lambda: answers(reached))
    assert ours(lab) == [reached.job_id]
    launching.join(40)
    assert ours(lab) == [reached.job_id]


def try_launch(backend: Backend, spec: ServiceSpec, replica: str) -> None:
    with contextlib.suppress(StartRefused, CannotStart):
        backend.launcher.launch(spec, replica)


def test_a_submission_that_slurmctld_slept_through_becomes_one_job(own_lab, boot):
    lab = own_lab()
    spec = service(lab)
    backend = boot(spec)
    until(lambda: "LLM" in backend.ears.listed_ones)
    lab.slurmctld.pause()
    sighting = backend.launcher.launch(spec, "r1")
    assert sighting.phase is Phase.SUBMITTED
    assert "not confirmed" in str(sighting.reason)
    lab.slurmctld.resume()
    reached = backend.ears.until_phase("r1", Phase.STARTING, 60)
    assert ours(lab) == [reached.job_id]


def until_saved(lab: Lab, job_id: str) -> None:
    """Wait until a killed slurmctld would know that the job runs: it saves every few seconds."""
    since, saved = time.time(), lab.folder / "slurmctld" / "job_state"
    lab.run("scontrol", "update", f"JobId={job_id}", "Comment=running")
    until(lambda: saved.exists() and saved.stat().st_mtime > since)


def test_while_slurmctld_is_down_nothing_is_declared_gone(own_lab, boot):
    lab = own_lab()
    spec = service(lab)
    other = replace(spec, name="Other", route_name="other")
    backend = boot(spec, other)
    backend.launcher.launch(spec, "r1")
    reached = backend.ears.until_phase("r1", Phase.STARTING)
    until_saved(lab, str(reached.job_id))
    lab.slurmctld.kill()
    sighting = backend.launcher.launch(other, "r2")
    assert sighting.phase is Phase.SUBMITTED
    assert answers(reached)
    lab.slurmctld.start()
    backend.ears.until_phase("r2", Phase.STARTING, 90)
    assert backend.ears.ends == []
    assert len(ours(lab)) == 2


def test_of_two_jobs_of_one_name_the_older_stays(lab, boot):
    spec = service(lab)
    backend = boot(spec)
    job_id = str(backend.launcher.launch(spec, "r1").job_id)
    (job,) = lab.queue()
    second = lab.sbatch(f"--job-name={job.name}", "--wrap=exec sleep 600")
    until(lambda: ours(lab) == [job_id], 40)
    assert second != job_id
    assert backend.ears.ends == []


def test_jobs_of_others_are_left_alone_whatever_they_are_called(lab, boot, state):
    spec = service(lab)
    hash_ = spec.start_hash()
    names = [
        f"sg.{INSTANCE}.somebody.r1.20001.{hash_}.llm",
        f"sg.other.{state.owner}.r1.20001.{hash_}.llm",
        f"sg.{INSTANCE}.{state.owner}.r1.20001.llm",
        f"xsg.{INSTANCE}.{state.owner}.r1.20001.{hash_}.llm",
    ]
    others = [lab.sbatch(f"--job-name={name}", "--wrap=exec sleep 600") for name in names]
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    backend.ears.until_phase("r1", Phase.STARTING)
    (stranger,) = backend.launcher.strangers()
    assert (stranger.owner, stranger.job_id) == ("somebody", others[0])
    backend.launcher.stop("r1")
    backend.ears.until_end("r1")
    assert set(others) <= {job.id for job in lab.queue()}


def test_a_job_without_a_record_is_adopted_or_cancelled(lab, boot, state):
    spec = service(lab)
    (state.path / "x").write_text("")
    wanted = f"sg.{INSTANCE}.{state.owner}.lost.20001.{spec.start_hash()}.llm"
    unwanted = f"sg.{INSTANCE}.{state.owner}.lost2.20001.{spec.start_hash()}.unknown"
    ids = [
        lab.sbatch(f"--job-name={name}", lab.probe_script("node"), "20001")
        for name in (wanted, unwanted)
    ]
    backend = boot(spec)
    reached = backend.ears.until_phase("lost", Phase.STARTING)
    assert (reached.job_id, reached.port) == (ids[0], 20001)
    until(lambda: ours(lab) == [ids[0]])


def test_jobs_of_another_owner_can_be_taken_over(lab, boot):
    spec = service(lab)
    name = f"sg.{INSTANCE}.former.r7.20001.{spec.start_hash()}.llm"
    job_id = lab.sbatch(f"--job-name={name}", lab.probe_script("node"), "20001")
    backend = boot(spec)
    until(lambda: backend.launcher.strangers())
    assert backend.launcher.take_over("nobody") == 0
    assert backend.launcher.take_over("former") == 1
    reached = backend.ears.until_phase("r7", Phase.STARTING)
    assert reached.job_id == job_id
    until(lambda: answers(reached))


def test_a_stop_that_the_backend_did_not_live_to_finish_is_finished_by_the_next(lab, boot, state):
    spec = service(lab)
    first = boot(spec)
    first.launcher.launch(spec, "r1")
    first.ears.until_phase("r1", Phase.STARTING)
    first.die()
    (record,) = Records(state.replicas).read_all()
    Records(state.replicas).write(replace(record, stopping=True))

    second = boot(spec)
    assert second.adoption.sightings == ()
    until(lambda: not ours(lab))
    until(lambda: not Records(state.replicas).read_all())
    until(lambda: not any(state.tunnel_sockets.iterdir()))


# -- several -----------------------------------------------------------------------------------


def launch_together(backend: Backend, spec: ServiceSpec, *replicas: str) -> None:
    threads = [
        threading.Thread(target=try_launch, args=(backend, spec, r), daemon=True) for r in replicas
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)


def logins(lab: Lab) -> int:
    log = lab.folder / "log" / "sshd-login.log"
    return log.read_text(errors="replace").count("Accepted publickey")


@pytest.mark.parametrize("port", [None, 23000])
def test_three_replicas_on_one_node_are_started_adopted_and_stopped_one_by_one(lab, boot, port):
    changes = {"remote_port": port, "replicas": ReplicaBounds(max=3)}
    spec = service(lab, sbatch_args=(f"--nodelist={lab.nodes[1]}",), **changes)
    names = ("r1", "r2", "r3")
    first = boot(spec)
    launch_together(first, spec, *names)
    reached = [first.ears.until_phase(name, Phase.STARTING) for name in names]
    for sighting in reached:
        until(partial(answers, sighting))
        assert sighting.node == lab.nodes[1]
    ports = {sighting.port for sighting in reached}
    assert len(ports) == 3
    assert port is None or ports == {port, port + 1, port + 2}
    assert len(ours(lab)) == 3
    first.die()

    second = boot(spec)
    assert {s.replica: s.job_id for s in second.adoption.sightings} == {
        s.replica: s.job_id for s in reached
    }
    second.launcher.stop("r2")
    assert second.ears.until_end("r2").fault is Fault.NOBODY
    assert set(ours(lab)) == {reached[0].job_id, reached[2].job_id}
    assert answers(reached[0])
    assert answers(reached[2])
    again = second.launcher.launch(spec, "r4").port
    assert again not in {reached[0].port, reached[2].port}
    assert port is None or again == reached[1].port
    until(partial(answers, second.ears.until_phase("r4", Phase.STARTING)))  # its tunnel is open
    before = logins(lab)
    for name in ("r1", "r3", "r4"):
        second.launcher.stop(name)
    for name in ("r1", "r3", "r4"):
        second.ears.until_end(name)
    assert logins(lab) == before
    assert not ours(lab)


def test_replicas_without_records_are_adopted_up_to_one_more_than_the_service_may_have(
    lab, boot, state
):
    spec = service(lab, replicas=ReplicaBounds(max=2))
    jobs = {
        f"lost{n}": lab.sbatch(
            f"--job-name=sg.{INSTANCE}.{state.owner}.lost{n}.{20001 + n}.{spec.start_hash()}.llm",
            *(lab.probe_script("node"), str(20001 + n)),
        )
        for n in range(4)
    }
    backend = boot(spec)
    until(lambda: len(ours(lab)) == 3)
    kept = [name for name, job_id in jobs.items() if job_id in ours(lab)]
    for name in kept:
        until(partial(answers, backend.ears.until_phase(name, Phase.STARTING)))
    assert len({s.replica for s in backend.ears.sightings}) == 3


# -- nodes -------------------------------------------------------------------------------------


def test_nodes_to_avoid_and_those_that_the_script_excludes_are_both_left_alone(lab, boot):
    body = Path(lab.probe_script("node")).read_text().split("\n", 1)[1]
    script = lab.script("choosy.sh", f"#SBATCH --exclude={lab.nodes[0]}\n{body}")
    spec = service(lab, bash_file=script)
    backend = boot(spec)
    sighting = backend.launcher.launch(spec, "r1", avoid=(lab.nodes[1], "n[1-3]"))
    shown = lab.run("scontrol", "show", "job", str(sighting.job_id)).stdout
    assert "ExcNodeList=n[1-2]" in shown
    reached = backend.ears.until_phase("r1", Phase.STARTING)
    assert reached.node == lab.nodes[2]
    until(lambda: answers(reached))


@pytest.mark.parametrize("avoid", ["all", "unknown", "pinned"])
def test_what_cannot_be_avoided_is_not(lab, boot, avoid):
    nodes = {"all": lab.nodes, "unknown": ["n77"], "pinned": [lab.nodes[0]]}[avoid]
    pinned = (f"--nodelist={lab.nodes[0]}",) if avoid == "pinned" else ()
    spec = service(lab, sbatch_args=pinned)
    backend = boot(spec)
    backend.launcher.launch(spec, "r1", avoid=nodes)
    backend.ears.until_phase("r1", Phase.STARTING)
    assert len(ours(lab)) == 1


def test_a_node_that_fails_is_named(own_lab, boot):
    lab = own_lab()
    spec = service(lab, sbatch_args=("--no-requeue",))
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    node = backend.ears.until_phase("r1", Phase.STARTING).node
    lab.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    end = backend.ears.until_end("r1", 40)
    assert (end.fault, end.bad_node) == (Fault.NOBODY, node)
    assert end.reason == f"node {node} failed"


def test_a_node_whose_prolog_fails_is_named_and_its_job_given_up(own_lab, boot, tmp_path):
    prolog = tmp_path / "prolog"
    prolog.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" = n1 ]\n')
    prolog.chmod(0o755)
    lab = own_lab(Prolog=prolog)
    spec = service(lab)
    broken = replace(spec, sbatch_args=("--nodelist=n2",))
    backend = boot(broken)
    backend.launcher.launch(broken, "r1")
    end = backend.ears.until_end("r1", 40)
    assert (end.fault, end.bad_node) == (Fault.NOBODY, "n2")
    assert "launch failed requeued held" in end.reason
    # The same when no listing saw it there: Slurm is asked. Its times are whole seconds, so the
    # node before must not have failed in the same one.
    lab.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    name = JobName(INSTANCE, "nobody", "r9", 20001, "0", "llm")
    job_id = lab.sbatch(f"--job-name={name}", "--nodelist=n3", "--wrap=exec sleep 600")
    until(lambda: "launch failed" in lab.run("squeue", "-h", "-j", job_id, "-o", "%r").stdout)
    assert Host(login(lab), (), backend.remotes).unfit_node(name, job_id) == "n3"

    backend.launcher.launch(spec, "r2", avoid=("n2", "n3"))
    assert backend.ears.until_phase("r2", Phase.STARTING).node == "n1"


def test_when_a_job_will_end_follows_changes_of_its_limit(lab, boot, monkeypatch):
    monkeypatch.setattr("slurmgate.launchers.pace.REST", 1.0)
    spec = service(lab, sbatch_args=("--time=10",))
    backend = boot(spec)
    job_id = str(backend.launcher.launch(spec, "r1").job_id)
    backend.ears.until_phase("r1", Phase.STARTING)

    def ends_in() -> float | None:
        found = backend.ears.last("r1")
        assert found is not None
        return None if found.ends_at is None else found.ends_at - time.monotonic()

    def between(low: float, high: float) -> bool:
        left = ends_in()
        return left is not None and low < left <= high

    until(lambda: between(570, 600))
    lab.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=1-00:00:00")
    until(lambda: between(86300, 86400))
    lab.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=UNLIMITED")
    until(lambda: ends_in() is None)
    lab.run("scontrol", "update", f"JobId={job_id}", "EndTime=now+5minutes")
    until(lambda: between(280, 302))
    lab.run("scontrol", "requeue", job_id)
    waiting = backend.ears.until_phase("r1", Phase.PENDING)
    assert waiting.ends_at is None


# -- ways --------------------------------------------------------------------------------------


def test_without_a_tunnel_the_node_is_dialled_directly(lab, boot):
    spec = service(lab, tunnel=TunnelMode.NONE)
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    reached = backend.ears.until_phase("r1", Phase.STARTING)
    assert reached.endpoint == f"{lab.addresses[str(reached.node)]}:{reached.port}"
    until(lambda: answers(reached))


def test_a_service_that_listens_nowhere_is_explained(lab, boot):
    spec = service(lab, bash_file=lab.script("sleeps.sh", "exec sleep 600"))
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    reached = backend.ears.until_phase("r1", Phase.STARTING)
    assert not answers(reached)
    until(lambda: "nothing listened on" in str(backend.launcher.explain("r1")))
    assert '"node-loopback"' in str(backend.launcher.explain("r1"))


def test_jobs_are_cancelled_when_the_backend_closes_for_good(lab, boot, state):
    spec = service(lab)
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    backend.ears.until_phase("r1", Phase.STARTING)
    backend.launcher.close(stop_replicas=True)
    until(lambda: not ours(lab))


def test_a_service_that_dies_while_it_loads_is_noticed_before_the_next_listing(
    lab, boot, monkeypatch
):
    monkeypatch.setattr("slurmgate.launchers.pace.REST", 1000.0)
    spec = service(lab, bash_file=lab.script("dies.sh", "sleep 8\necho no memory\nexit 4"))
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    reached = backend.ears.until_phase("r1", Phase.STARTING)
    until(lambda: answers(reached) or backend.ears.ends, 60)
    assert backend.ears.until_end("r1").reason == "the service exited with code 4"


def test_a_service_on_the_nodes_loopback_is_reached_by_way_of_the_node(lab, boot):
    lab.need_port_22()
    spec = service(lab, bash_file=lab.probe_script("loopback"), tunnel=TunnelMode.NODE_LOOPBACK)
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    reached = backend.ears.until_phase("r1", Phase.STARTING)
    until(lambda: answers(reached))


def test_the_local_port_leads_to_the_oldest_replica_and_then_to_the_next(lab, boot):
    port = free_port()
    spec = service(lab, local_host="127.0.0.1", local_port=port)
    backend = boot(spec)
    for replica in ("r1", "r2"):
        backend.launcher.launch(spec, replica)
        reached = backend.ears.until_phase(replica, Phase.STARTING)
        until(partial(answers, reached))
    local = replace(reached, endpoint=f"127.0.0.1:{port}")
    until(lambda: answers(local))
    backend.launcher.stop("r1")
    backend.ears.until_end("r1")
    until(lambda: answers(local))
    backend.launcher.stop("r2")
    backend.ears.until_end("r2")
    until(lambda: not answers(local))


def test_a_local_port_that_is_taken_is_told_and_nothing_else_suffers(lab, boot):
    with socket.create_server(("127.0.0.1", 0)) as server:
        spec = service(lab, local_host="127.0.0.1", local_port=server.getsockname()[1])
        backend = boot(spec)
        backend.launcher.launch(spec, "r1")
        reached = backend.ears.until_phase("r1", Phase.STARTING)
        until(lambda: answers(reached))
        until(lambda: "local_port" in str(getattr(backend.ears.last("r1"), "notice", "")))


def test_on_the_login_host_itself_no_ssh_is_needed(lab, boot, monkeypatch):
    for name, value in lab.env.items():
        monkeypatch.setenv(name, value)
    spec = service(lab, ssh=None)
    backend = boot(spec)
    backend.launcher.launch(spec, "r1")
    reached = backend.ears.until_phase("r1", Phase.STARTING)
    assert reached.endpoint == f"{lab.addresses[str(reached.node)]}:{reached.port}"
    until(lambda: answers(reached))
    backend.launcher.stop("r1")
    backend.ears.until_end("r1")
