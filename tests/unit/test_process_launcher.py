"""The process launcher with real processes: started once, ended whole, found again."""

from __future__ import annotations

import functools
import os
import queue
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from slurmgate import procfs
from slurmgate.errors import StartRefused
from slurmgate.launchers import spawn
from slurmgate.launchers.log_keeper import LogKeeper
from slurmgate.launchers.process import ProcessLauncher, end_process_replicas
from slurmgate.model import End, Exit, LauncherKind, ReplicaBounds, ServiceSpec
from slurmgate.ports import Adoption
from slurmgate.records import Record, Records
from slurmgate.state import StateDir
from tests.ports import free_ports
from tests.unit import builders
from tests.waiting import until

SLEEPER = "exec sleep 1000"
STUBBORN = "trap '' TERM; echo ready; while :; do sleep 1000; done"


def end(**how):
    return End(f"the service {Exit(**how).describe()}")


class Ends:
    """Collects the ends that a launcher tells of; ``heard`` is called with each replica."""

    def __init__(self, heard=lambda replica: None):
        self._queue: queue.SimpleQueue[tuple[str, End]] = queue.SimpleQueue()
        self._heard = heard

    def ended(self, replica, end):
        self._heard(replica)
        self._queue.put((replica, end))

    def seen(self, sighting):
        raise AssertionError(sighting)

    def hopeless(self, replica, reason, code="cannot-start"):
        raise AssertionError(reason)

    def listed(self, services):
        raise AssertionError(services)

    def next(self):
        return self._queue.get(timeout=20)

    @property
    def empty(self):
        return self._queue.empty()


class Machine:
    """A state directory, scripts and launchers of one test; ends whatever the test left."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.state = StateDir.open(folder / "state")
        self.records = Records(self.state.replicas)
        self.ends = Ends()
        self._open: list[ProcessLauncher] = []

    def launcher(self, **options) -> ProcessLauncher:
        launcher = ProcessLauncher(self.state, **{"kill_after": 15.0, **options})
        self._open.append(launcher)
        return launcher

    def fresh(self, **options) -> ProcessLauncher:
        launcher = self.launcher(**options)
        assert launcher.adopt((), self.ends) == Adoption()
        return launcher

    def script(self, body: str, *, name: str = "run.sh", executable: bool = True) -> ServiceSpec:
        path = self.folder / name
        path.write_text("#!/bin/bash\n" + body + "\n")
        path.chmod(0o755 if executable else 0o644)
        return self.spec(name)

    def spec(self, bash_file: str) -> ServiceSpec:
        return ServiceSpec(
            name="Echo service",
            route_name="echo",
            api_paths=("/",),
            bash_file=bash_file,
            check_health_path="/health",
            timeout=1.0,
            folder=self.folder,
            launcher=LauncherKind.PROCESS,
        )

    def log(self, replica: str) -> str:
        return self.state.log_file("Echo service", replica).read_text()

    def close(self, launcher: ProcessLauncher, *, stop_replicas: bool) -> None:
        self._open.remove(launcher)
        launcher.close(stop_replicas=stop_replicas)

    def marked(self) -> list[procfs.Process]:
        return procfs.find_marked({"SLURMGATE_OWNER": self.state.owner})

    def clean(self):
        for launcher in self._open:
            launcher.close(stop_replicas=False)
        for process in self.marked():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.clean()


# starting


def test_a_script_gets_its_port_its_environment_and_its_folder(machine):
    launcher = machine.fresh()
    body = 'echo "$@" $SLURMGATE_PORT "$SLURMGATE_SERVICE" $SLURMGATE_REPLICA $OWN; pwd; cat; ' + (
        SLEEPER
    )
    running = launcher.launch(replace(machine.script(body), env=(("OWN", "a b"),)), "k3f9")
    until(lambda: str(machine.folder) in machine.log("k3f9"))
    assert machine.log("k3f9").splitlines() == [
        f"{running.port} {running.port} Echo service k3f9 a b",
        str(machine.folder),
    ]
    assert running.endpoint == f"127.0.0.1:{running.port}"
    assert running.start_hash == replace(machine.script(body), env=(("OWN", "a b"),)).start_hash()
    assert (running.replica, running.service, running.node) == ("k3f9", "Echo service", "localhost")
    process = procfs.read(int(running.job_id))
    assert process is not None
    assert process.session == process.group == process.pid


def test_a_replica_has_a_key_of_its_own_that_only_its_environment_and_record_hold(
    machine, monkeypatch, caplog
):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("SLURMGATE_API_KEY", "of-somebody-else")
    body = 'echo "it is $SLURMGATE_API_KEY"; ' + SLEEPER
    keyed = replace(machine.script(body), upstream_key=True)
    launcher = machine.fresh()
    running = [launcher.launch(keyed, replica) for replica in ("a1", "a2")]
    keys = {one.api_key for one in running}
    assert len(keys) == 2
    for one in running:
        assert one.api_key is not None
        assert len(one.api_key) == 43
        assert one.api_key not in repr(one)
        process = procfs.environment(int(one.job_id))
        assert process["SLURMGATE_API_KEY"] == one.api_key
        assert one.api_key.encode() not in Path(f"/proc/{one.job_id}/cmdline").read_bytes()
        assert one.api_key not in caplog.text
    until(lambda: machine.log("a1"))
    assert launcher.log_tail("a1", 5) == ["it is [upstream key]"]
    machine.close(launcher, stop_replicas=False)
    told = machine.launcher().adopt((keyed,), machine.ends).sightings
    assert {one.api_key for one in told} == keys


def test_the_last_words_of_a_replica_do_not_tell_its_key(machine):
    launcher = machine.fresh()
    launcher.launch(
        replace(machine.script('echo "$SLURMGATE_API_KEY"; exit 3'), upstream_key=True), "a1"
    )
    assert machine.ends.next() == ("a1", end(code=3))
    assert launcher.log_tail("a1", 5) == ["[upstream key]"]


def test_without_a_key_a_replica_gets_nobodys(machine, monkeypatch):
    monkeypatch.setenv("SLURMGATE_API_KEY", "of-somebody-else")
    running = machine.fresh().launch(machine.script('echo "it is $SLURMGATE_API_KEY"'), "a1")
    assert running.api_key is None
    machine.ends.next()
    assert machine.log("a1") == "it is \n"


def test_a_script_that_is_not_executable_runs_with_bash(machine):
    launcher = machine.fresh()
    running = launcher.launch(machine.script("echo $1 $0", executable=False), "a1")
    assert machine.ends.next() == ("a1", end(code=0))
    assert machine.log("a1") == f"{running.port} {machine.folder}/run.sh\n"


def test_what_a_replica_prints_is_readable_by_its_owner_only(machine):
    machine.fresh().launch(machine.script("exit 0"), "a1")
    log = machine.state.log_file("Echo service", "a1")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    machine.ends.next()


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda path: None, r"run\.sh does not exist"),
        (lambda path: path.mkdir(), r"run\.sh is not a file"),
        (lambda path: path.write_bytes(b"\0\1\2"), r"Exec format error.*#!/bin/bash"),
        (lambda path: path.write_text("#!/no/such/shell\n"), r"'/no/such/shell'.*missing"),
        (lambda path: path.write_bytes(b"#!/bin/bash\r\nexit\r\n"), r"'/bin/bash\\r'.*missing"),
    ],
)
def test_a_script_that_cannot_run_is_refused_with_the_reason(machine, prepare, reason):
    path = machine.folder / "run.sh"
    prepare(path)
    if path.is_file():
        path.chmod(0o755)
    launcher = machine.fresh()
    with pytest.raises(StartRefused, match=reason):
        launcher.launch(machine.spec("run.sh"), "a1")
    assert machine.records.read_all() == []
    assert launcher.launch(machine.script("exit 0", name="good.sh"), "a1").replica == "a1"
    assert machine.ends.next() == ("a1", end(code=0))


def test_a_script_nobody_lets_us_read_is_refused(as_ordinary_user):
    folder = Path(tempfile.mkdtemp(prefix="sgt-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "run.sh").touch()
    (folder / "run.sh").chmod(0)

    def launch() -> None:
        with pytest.raises(StartRefused, match="Permission denied"):
            spawn.command(builders.spec(folder=folder, bash_file="run.sh"))

    try:
        as_ordinary_user(launch)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("env", [(("A=B", "c"),), (("A", "b\0c"),)])
def test_an_impossible_environment_is_refused(machine, env):
    launcher = machine.fresh()
    with pytest.raises(StartRefused, match="cannot start"):
        launcher.launch(replace(machine.script("exit 0"), env=env), "a1")
    assert machine.records.read_all() == []


def test_nothing_starts_unrecorded(machine):
    launcher = machine.fresh()
    machine.state.replicas.rename(machine.folder / "moved")
    with pytest.raises(StartRefused, match="cannot write the replica record"):
        launcher.launch(machine.script(f"touch {machine.folder}/started"), "a1")
    assert machine.marked() == []
    assert not (machine.folder / "started").exists()
    (machine.folder / "moved").rename(machine.state.replicas)


# ports


def test_a_fixed_port_that_is_taken_is_named(machine):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StartRefused, match=f"port {port} is not free: Address already in use"):
            machine.fresh().launch(replace(machine.script(SLEEPER), remote_port=port), "a1")


def test_a_port_taken_on_another_address_of_this_machine_is_not_free(machine):
    with socket.socket() as other:
        other.bind(("127.0.0.9", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StartRefused, match="is not free"):
            machine.fresh().launch(replace(machine.script(SLEEPER), remote_port=port), "a1")


def test_a_fixed_port_counts_upward_over_our_own_replicas(machine):
    spec = replace(
        machine.script(SLEEPER), remote_port=free_ports(2), replicas=ReplicaBounds(max=2)
    )
    launcher = machine.fresh()
    first, second = launcher.launch(spec, "a1"), launcher.launch(spec, "a2")
    assert second.port == first.port + 1


def test_with_several_replicas_a_port_that_somebody_else_has_is_passed_over(machine):
    first = free_ports(3)
    spec = replace(machine.script(SLEEPER), remote_port=first, replicas=ReplicaBounds(max=2))
    with socket.create_server(("127.0.0.1", first + 1)):
        launcher = machine.fresh()
        ports = [launcher.launch(spec, replica, avoid=("n1",)).port for replica in ("a1", "a2")]
    assert ports == [first, first + 2]


def test_there_is_no_port_above_the_highest(machine):
    with socket.socket() as other:
        with suppress(OSError):  # somebody has it
            other.bind(("127.0.0.1", 65535))
        spec = replace(machine.script(SLEEPER), remote_port=65535, replicas=ReplicaBounds(max=2))
        with pytest.raises(StartRefused, match="no port from 65535 upward is free"):
            machine.fresh().launch(spec, "a1")


def test_a_fixed_port_is_waited_for_while_the_replica_before_ends(machine):
    body = "trap 'read -r < go; exit 0' TERM; echo ready; while :; do sleep 0.01; done"
    os.mkfifo(machine.folder / "go")
    spec = replace(machine.script(body), remote_port=free_ports(1))
    launcher = machine.fresh()
    launcher.launch(spec, "a1")
    until(lambda: "ready" in machine.log("a1"))
    launcher.stop("a1")
    results: queue.SimpleQueue[int] = queue.SimpleQueue()
    starter = threading.Thread(target=lambda: results.put(launcher.launch(spec, "a2").port))
    starter.start()
    (machine.folder / "go").write_text("on\n")
    assert results.get(timeout=20) == spec.remote_port
    starter.join()


def test_parallel_starts_never_share_a_port(machine):
    low = free_ports(40)
    spec = replace(machine.script(SLEEPER), port_range=(low, low + 39))
    launcher = machine.fresh()
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=lambda i=i: ports.put(launcher.launch(spec, f"r{i}").port))
        for i in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [ports.get_nowait() for _ in threads]
    assert len(set(taken)) == 10
    assert all(low <= port <= low + 39 for port in taken)


def test_a_range_without_a_free_port_is_refused(machine):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        spec = replace(machine.script(SLEEPER), port_range=(port, port))
        with pytest.raises(StartRefused, match=f"no port of {port}-{port} is free"):
            machine.fresh().launch(spec, "a1")


# ends


@pytest.mark.parametrize(("body", "end"), [("exit 3", end(code=3)), ("kill -9 $$", end(signal=9))])
def test_the_way_a_replica_ended_is_reported_once_and_its_record_removed(machine, body, end):
    machine.fresh().launch(machine.script(body), "a1")
    assert machine.ends.next() == ("a1", end)
    assert machine.ends.empty
    assert machine.records.read_all() == []


def test_children_that_outlive_the_script_are_killed_before_the_end_is_reported(machine):
    body = (
        "(trap '' TERM; sleep 1000 & exec sleep 1000) &\n"
        "(setsid sleep 1000 &)\n"
        "set -m; sleep 1000 &\n"
        "until [ -e go ]; do sleep 0.01; done; exit 7"
    )
    machine.fresh().launch(machine.script(body), "a1")
    until(lambda: sum(p.comm == "sleep" for p in machine.marked()) >= 4)
    (machine.folder / "go").touch()
    assert machine.ends.next() == ("a1", end(code=7))
    assert machine.marked() == []


def test_children_without_an_environment_are_found_by_their_session(machine):
    body = "env -i sleep 1000 & echo $!; until [ -e go ]; do sleep 0.01; done"
    machine.fresh().launch(machine.script(body), "a1")
    child = int(until(lambda: machine.log("a1")))
    (machine.folder / "go").touch()
    machine.ends.next()
    process = procfs.read(child)
    assert process is None or process.ended


def test_stop_ends_the_whole_group_and_gives_it_time(machine):
    body = (
        "(trap 'sleep 0.1; echo child done; exit' TERM; echo child; while :; do sleep 0.01; done) &"
        "trap 'exit 5' TERM; echo parent; while :; do sleep 0.01; done"
    )
    launcher = machine.fresh()
    launcher.launch(machine.script(body), "a1")
    until(lambda: len(machine.log("a1").splitlines()) == 2)
    launcher.stop("a1")
    launcher.stop("a1")
    assert machine.ends.next() == ("a1", end(code=5))
    assert "child done" in machine.log("a1")
    assert machine.marked() == []
    launcher.stop("a1")
    launcher.stop("unknown")
    assert machine.ends.empty


def test_what_ignores_the_request_to_end_is_killed(machine):
    launcher = machine.fresh(kill_after=0.2)
    launcher.launch(machine.script(f"({STUBBORN}) & {STUBBORN}"), "a1")
    until(lambda: machine.log("a1").count("ready") == 2)
    launcher.stop("a1")
    assert machine.ends.next() == ("a1", end(signal=9))
    assert machine.marked() == []


def test_a_child_that_ignores_the_request_is_killed_though_its_parent_ended(machine):
    launcher = machine.fresh(kill_after=0.2)
    launcher.launch(machine.script(f"({STUBBORN}) & exec sleep 1000"), "a1")
    until(lambda: "ready" in machine.log("a1"))
    launcher.stop("a1")
    assert machine.ends.next() == ("a1", end(signal=15))
    assert machine.marked() == []


def test_closing_asks_all_replicas_before_it_kills_any(machine):
    asked_at_first_end: list[bool] = []

    def all_asked(_replica):
        asked_at_first_end.append(all("asked" in machine.log(f"r{i}") for i in range(8)))

    # Each ends by itself once all were asked, and is killed only where they never all are.
    ask = "echo asked; echo >> asked; until [ $(wc -l < asked) = 8 ]; do sleep 0.05; done; exit"
    launcher = machine.launcher(kill_after=60.0)
    launcher.adopt((), Ends(all_asked))
    spec = machine.script(f"trap '{ask}' TERM; sleep 1000 & echo ready; wait")
    for i in range(8):
        launcher.launch(spec, f"r{i}")
    until(lambda: all("ready" in machine.log(f"r{i}") for i in range(8)))
    machine.close(launcher, stop_replicas=True)
    assert asked_at_first_end == [True] * 8
    assert machine.marked() == []
    assert machine.records.read_all() == []


def test_nothing_starts_while_closing(machine):
    launcher = machine.fresh()
    machine.close(launcher, stop_replicas=True)
    with pytest.raises(StartRefused, match="stopping"):
        launcher.launch(machine.script(SLEEPER), "a1")


# adoption


def test_a_later_backend_adopts_watches_and_stops(machine):
    first = machine.fresh()
    spec = machine.script(SLEEPER)
    started = [first.launch(spec, "a1"), first.launch(spec, "a2")]
    machine.close(first, stop_replicas=False)
    second, ends = machine.launcher(), Ends()
    adopted = second.adopt((), ends).sightings
    for before, after in zip(started, adopted, strict=True):
        assert abs(before.running_at - after.running_at) < 60  # hours, where a clock is mixed up
        assert replace(after, running_at=before.running_at, created_at=before.created_at) == before
    os.kill(int(adopted[0].job_id), signal.SIGKILL)
    assert ends.next()[0] == "a1"
    second.stop("a2")
    assert ends.next()[0] == "a2"
    assert machine.records.read_all() == []
    assert machine.ends.empty


BACKEND = """
import os, sys
from pathlib import Path
from slurmgate.launchers.process import ProcessLauncher
from slurmgate.model import *
from slurmgate.state import StateDir
folder = Path(sys.argv[1])
spec = ServiceSpec(name="Echo service", route_name="echo", api_paths=("/",), bash_file="run.sh",
    check_health_path="/", timeout=1.0, folder=folder, launcher=LauncherKind.PROCESS)
launcher = ProcessLauncher(StateDir.open(folder / "state"))
launcher.adopt((), None)
print(launcher.launch(spec, "k3f9").job_id, flush=True)
sys.stdin.read(1)
"""


def killed_backend(machine) -> int:
    """Let a backend of its own process start a replica, then kill it; the replica's pid."""
    with subprocess.Popen(
        [sys.executable, "-c", BACKEND, str(machine.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as backend:
        assert backend.stdout is not None
        pid = int(backend.stdout.readline())
        backend.kill()
    return pid


def test_a_replica_of_a_killed_backend_is_adopted_and_its_end_seen(machine):
    machine.script(SLEEPER)
    pid = killed_backend(machine)
    (running,) = machine.launcher().adopt((), machine.ends).sightings
    assert running.job_id == str(pid)
    os.kill(pid, signal.SIGKILL)
    assert machine.ends.next() == ("k3f9", end())
    assert machine.records.read_all() == []


def test_an_adopted_replica_is_stopped_with_its_whole_group(machine):
    machine.script(f"({STUBBORN}) & {STUBBORN}")
    killed_backend(machine)
    until(lambda: machine.log("k3f9").count("ready") == 2)
    launcher = machine.launcher(kill_after=0.2)
    launcher.adopt((), machine.ends)
    launcher.stop("k3f9")
    assert machine.ends.next() == ("k3f9", end())
    assert machine.marked() == []


def test_a_process_started_right_before_the_backend_died_is_found_by_its_marks(machine):
    machine.script(f"sleep 1000 & {SLEEPER}")
    pid = killed_backend(machine)
    until(lambda: len(machine.marked()) == 2)
    (record,) = machine.records.read_all()
    machine.records.write(replace(record, pid=None, pid_start=None))
    launcher = machine.launcher()
    (running,) = launcher.adopt((), machine.ends).sightings
    assert running.job_id == str(pid)
    (record,) = machine.records.read_all()
    assert record.pid == pid
    launcher.stop("k3f9")
    assert machine.ends.next()[0] == "k3f9"


def test_a_start_that_never_happened_leaves_nothing(machine):
    machine.script(SLEEPER)
    spec = machine.spec("run.sh")
    machine.records.write(record_of(spec, pid=None, pid_start=None))
    assert machine.launcher().adopt((), machine.ends) == Adoption()
    assert machine.records.read_all() == []


def record_of(spec: ServiceSpec, **values) -> Record:
    return Record(
        **{
            "replica": "k3f9",
            "service": spec.name,
            "launcher": LauncherKind.PROCESS,
            "start_hash": spec.start_hash(),
            "port": 20001,
            "created": 1.0,
            "log": "",
            "boot": procfs.boot_id(),
            **values,
        }
    )


@pytest.mark.parametrize("change", ["start", "boot"])
def test_a_recycled_pid_is_neither_adopted_nor_touched(machine, change):
    spec = machine.script(SLEEPER)
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as stranger:
        start = procfs.start_time(stranger.pid)
        assert start is not None
        values: dict[str, object] = {"pid": stranger.pid, "pid_start": start}
        values |= {"pid_start": start - 1} if change == "start" else {"boot": "another"}
        machine.records.write(record_of(spec, **values))
        launcher = machine.launcher()
        assert launcher.adopt((), machine.ends) == Adoption()
        launcher.stop("k3f9")
        assert machine.records.read_all() == []
        machine.close(launcher, stop_replicas=True)
        assert procfs.alive(stranger.pid, start)
        stranger.kill()


def test_what_is_left_of_a_replica_whose_script_ended_unseen_is_killed(machine):
    machine.script(f"sleep 1000 & {SLEEPER}")
    pid = killed_backend(machine)
    until(lambda: len(machine.marked()) == 2)
    start = procfs.start_time(pid) or 0
    os.kill(pid, signal.SIGKILL)
    until(lambda: not procfs.alive(pid, start))
    assert machine.launcher().adopt((), machine.ends) == Adoption()
    until(lambda: machine.marked() == [])


def test_a_stop_under_way_goes_on_after_a_restart_and_nobody_is_told(machine):
    launcher = machine.fresh()
    launcher.launch(machine.script(STUBBORN), "a1")
    until(lambda: "ready" in machine.log("a1"))
    launcher.stop("a1")
    machine.close(launcher, stop_replicas=False)
    ends = Ends()
    second = machine.launcher(kill_after=0.2)
    assert second.adopt((), ends) == Adoption()
    until(lambda: machine.records.read_all() == [])
    assert machine.marked() == []
    assert ends.empty


def test_a_replica_whose_record_was_lost_is_ended(machine):
    launcher = machine.fresh()
    launcher.launch(machine.script(SLEEPER), "a1")
    machine.close(launcher, stop_replicas=False)
    machine.records.remove("a1")
    machine.launcher().adopt((), machine.ends)
    until(lambda: machine.marked() == [])


def test_replicas_of_another_state_directory_are_left_alone(machine, tmp_path):
    machine.script(SLEEPER)
    pid = killed_backend(machine)
    other = ProcessLauncher(StateDir.open(tmp_path / "other"))
    assert other.adopt((), machine.ends) == Adoption()
    other.close(stop_replicas=True)
    assert procfs.alive(pid, procfs.start_time(pid) or 0)


def test_all_process_replicas_can_be_ended_without_a_backend(machine):
    machine.script(f"sleep 1000 & {SLEEPER}")
    killed_backend(machine)
    end_process_replicas(machine.state)
    assert machine.marked() == []
    assert machine.records.read_all() == []


def test_a_backend_started_in_a_shell_of_its_replica_outlives_that_replica(machine):
    body = "exec sleep 1000"
    launcher = machine.fresh()
    launcher.launch(machine.script(body), "a1")
    machine.close(launcher, stop_replicas=False)
    environ = {**os.environ, "SLURMGATE_OWNER": machine.state.owner, "SLURMGATE_REPLICA": "a1"}
    script = (
        "import pathlib, queue, sys; from slurmgate.state import StateDir\n"
        "from slurmgate.launchers.process import ProcessLauncher\n"
        "ends = queue.SimpleQueue()\n"
        "class Ends:\n"
        "    def ended(self, replica, end): ends.put(replica)\n"
        "launcher = ProcessLauncher(StateDir.open(pathlib.Path(sys.argv[1])))\n"
        "launcher.adopt((), Ends()); launcher.stop('a1')\n"
        "print(ends.get(timeout=20))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(machine.state.path)],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout == "a1\n"
    assert machine.marked() == []


# logs


def test_the_tail_of_a_log_is_there_after_the_end_and_safe_to_show(machine):
    body = r"""printf 'one\ntwo\n\033[31mred\033[0m\n10%%\r20%%\r\nbell\a\xff\n'"""
    launcher = machine.fresh()
    launcher.launch(machine.script(body), "a1")
    machine.ends.next()
    assert launcher.log_tail("a1", 4) == ["two", "red", "20%", "bell\ufffd\ufffd"]
    assert launcher.log_tail("a1", 100)[0] == "one"
    assert launcher.log_tail("a1", 0) == []
    assert launcher.log_tail("none", 5) == []


def test_long_lines_are_cut_and_long_logs_read_from_the_end(machine):
    launcher = machine.fresh()
    log = machine.state.log_file("Echo service", "a1")
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {i}\n" for i in range(100_000)) + "x" * 9_000_000 + "\nlast")
    tail = launcher.log_tail("a1", 2)
    assert len(tail[0]) == 2000
    assert tail[1] == "last"
    log.write_text("".join(f"line {i}\n" for i in range(100_000)))
    assert launcher.log_tail("a1", 3) == ["line 99997", "line 99998", "line 99999"]


def test_only_the_newest_logs_of_a_service_are_kept(machine):
    launcher = machine.fresh()
    running = launcher.launch(machine.script(SLEEPER), "live")
    folder = machine.state.log_file("Echo service", "x").parent
    for i in range(30):
        (folder / f"old{i}.log").touch()
        os.utime(folder / f"old{i}.log", (i, i))
    os.utime(folder / "live.log", (0, 0))
    launcher.launch(machine.script("exit 0", name="quick.sh"), "new")
    names = {path.stem for path in folder.iterdir()}
    assert names == {"live", "new"} | {f"old{i}" for i in range(11, 30)}
    assert re.fullmatch(r"\d+", running.job_id)


def test_the_launcher_has_the_logs_of_what_runs_bounded(monkeypatch, machine):
    keeper = functools.partial(LogKeeper, limit=1000, every=0.01)
    monkeypatch.setattr("slurmgate.launchers.process.LogKeeper", keeper)
    launcher = machine.fresh()
    launcher.launch(machine.script("seq 1000; sleep 1000"), "a1")
    log = machine.state.log_file("Echo service", "a1")
    until(lambda: log.with_name("a1.log.1").exists() and log.stat().st_size <= 1000)
    assert launcher.log_tail("a1", 1) == ["1000"]


# errors of the machine


@pytest.mark.parametrize("call", ["os.pidfd_open", "slurmgate.procfs.start_time"])
def test_a_start_that_fails_after_the_process_exists_leaves_nothing(machine, monkeypatch, call):
    launcher = machine.fresh()
    spec = replace(machine.script(SLEEPER), remote_port=free_ports(1))
    with monkeypatch.context() as broken:
        broken.setattr(call, no_more_files)
        with pytest.raises(StartRefused, match="Too many open files"):
            launcher.launch(spec, "k3f9")
    assert machine.marked() == []
    assert machine.records.read_all() == []
    assert launcher.launch(spec, "k4f9").port == spec.remote_port


def test_old_logs_that_cannot_be_removed_do_not_fail_a_start(machine, monkeypatch, caplog):
    launcher = machine.fresh()
    monkeypatch.setattr("slurmgate.launchers.logs.prune", no_more_files)
    assert launcher.launch(machine.script(SLEEPER), "k3f9").replica == "k3f9"
    assert "Too many open files" in caplog.text


def no_more_files(*_):
    raise OSError(24, "Too many open files")
