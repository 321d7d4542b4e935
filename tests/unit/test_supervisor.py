"""The supervisor with small programs in the place of backend and nginx; signals are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from slurmgate import procfs
from slurmgate.sessions import Session
from tests.waiting import until

DRIVER = """
import ctypes, json, logging, sys
from pathlib import Path
from signal import Signals
from slurmgate.errors import SlurmgateError
from slurmgate.supervisor import ChildSpec, Supervisor

folder, bodies, grace = Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
ctypes.CDLL(None).prctl(36, 1)  # orphans come to us, as they do to process 1 of a container
logging.basicConfig(level=logging.INFO, format="%(message)s")

def changed(running):
    if (folder / "full").exists():
        return False
    fresh = folder / "running.new"
    fresh.write_text(json.dumps({k: [v.pid, v.start] for k, v in running.items()}))
    fresh.replace(folder / "running")
    return True

def spec(name, body):
    return ChildSpec(
        name=name,
        argv=("/bin/bash", "-c", body),
        ready=lambda: (folder / f"{name}.ready").exists(),
        stop=((Signals.SIGTERM, grace),),
        prepare=lambda: (folder / f"{name}.prepared").open("a").write("x"),
        reload=Signals.SIGHUP,
        held=(Signals.SIGTERM,) if name.startswith("held") else (),
    )

with Supervisor(changed) as supervisor:
    try:
        for name, body in bodies.items():
            if not supervisor.wait_ready(supervisor.start(spec(name, body))):
                break
        else:
            print("ready", flush=True)
            supervisor.watch()
    except SlurmgateError as error:
        print("error:", error, flush=True)
    finally:
        supervisor.stop()
        print("stopped", flush=True)
"""

STAY = "while :; do sleep 0.01; done"

# It hears the signal only after a while, and says so.
LATE = """exec python3 -c '
import signal, sys
def heard(*_):
    open("held.heard", "a").write("x\\n")
    sys.exit()
signal.signal(signal.SIGTERM, heard)
open("held.ready", "w").close()
open("held.began", "a").write("x\\n")
signal.sigtimedwait([signal.SIGUSR1], 0.5)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
signal.pause()
'"""


class Driver:
    """A process that supervises children; its folder is where they leave word."""

    def __init__(self, folder: Path, *, grace: float, **bodies: str):
        self.folder = folder
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(folder), json.dumps(bodies), str(grace)],
                cwd=folder,
                env={**os.environ, "SUPERVISED_IN": str(folder)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def word(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().split() if path.exists() else []

    def wait_for(self, name: str, count: int = 1) -> list[str]:
        until(lambda: len(self.word(name)) >= count)
        return self.word(name)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def left(self) -> list[procfs.Process]:
        found = procfs.find_marked({"SUPERVISED_IN": str(self.folder)})
        return [process for process in found if process.pid != self.process.pid]

    def clean(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for process in self.left():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def drive(tmp_path):
    drivers = []

    def start(*, grace: float = 20.0, **bodies: str) -> Driver:
        drivers.append(Driver(tmp_path, grace=grace, **bodies))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.clean()


def announce(name: str) -> str:
    return f"echo $$ >> {name}.pids; touch {name}.ready; "


def test_a_child_that_dies_is_started_again_and_the_others_go_on(drive):
    driver = drive(a=announce("a") + STAY, b=announce("b") + STAY)
    assert driver.line() == "ready"
    (other,) = driver.word("b.pids")
    (first,) = driver.word("a.pids")
    os.kill(int(first), signal.SIGKILL)
    second = driver.wait_for("a.pids", 2)[1]
    os.kill(int(second), signal.SIGKILL)
    driver.wait_for("a.pids", 3)
    assert driver.word("b.pids") == [other]
    assert driver.word("a.prepared") == ["xxx"]
    assert "a was killed by signal 9; it is started again in 0.1 s" in driver.log
    assert "a was killed by signal 9; it is started again in 0.2 s" in driver.log


def test_nothing_of_the_session_before_lives_when_a_child_is_started_again(drive):
    body = (
        "[ -e member ] && kill -0 $(cat member) && touch overlap; "
        "bash -c \"trap '' TERM; " + STAY.replace("$", "\\$") + '" & echo $! > member; '
    )
    driver = drive(a=body + announce("a") + STAY)
    assert driver.line() == "ready"
    os.kill(int(driver.word("a.pids")[0]), signal.SIGKILL)
    driver.wait_for("a.pids", 2)
    assert not (driver.folder / "overlap").exists()


def test_a_child_that_ends_before_it_was_ready_is_an_error_and_nothing_stays(drive):
    driver = drive(a=announce("a") + STAY, b="exit 4")
    assert driver.line() == "error: b exited with code 4 while starting"
    assert driver.line() == "stopped"
    assert driver.process.wait(20) == 0
    assert driver.left() == []


def test_a_child_killed_before_it_was_ready_is_started_again(drive):
    driver = drive(a="[ -e once ] || { touch once; kill -9 $$; }; " + announce("a") + STAY)
    assert driver.line() == "ready"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_the_last_started_first_and_leaves_nothing(drive, number):
    bodies = {
        name: f"trap 'echo {name} >> order; exit 0' TERM; {announce(name)}sleep 1000 & {STAY}"
        for name in ("a", "b")
    }
    driver = drive(**bodies)
    assert driver.line() == "ready"
    driver.process.send_signal(number)
    assert driver.line() == "stopped"
    assert driver.process.wait(20) == 0
    assert driver.word("order") == ["b", "a"]
    assert driver.left() == []


def test_a_stop_during_the_start_is_heeded(drive):
    driver = drive(a="echo $$ >> a.pids; " + STAY)
    driver.wait_for("a.pids")
    driver.process.terminate()
    assert driver.line() == "stopped"
    assert driver.left() == []


def test_a_child_that_ignores_the_stop_is_killed(drive):
    driver = drive(grace=0.2, a=f"trap '' TERM; {announce('a')} {STAY}")
    assert driver.line() == "ready"
    driver.process.terminate()
    assert driver.line() == "stopped"
    assert driver.left() == []
    assert "a does not end by itself" in driver.log


def test_a_second_signal_hurries(drive):
    driver = drive(grace=1000.0, a=f"trap 'touch asked' TERM; {announce('a')} {STAY}")
    assert driver.line() == "ready"
    driver.process.terminate()
    until((driver.folder / "asked").exists)
    driver.process.terminate()
    assert driver.line() == "stopped"
    assert driver.left() == []


def test_children_do_not_outlive_a_killed_supervisor(drive):
    driver = drive(a=announce("a") + "exec sleep 1000", b=announce("b") + "exec sleep 1000")
    assert driver.line() == "ready"
    driver.process.kill()
    driver.process.wait()
    until(lambda: driver.left() == [])


def test_hangup_reaches_children_that_are_ready(drive):
    driver = drive(a=f"trap 'echo again >> reloads' HUP; {announce('a')} {STAY}")
    assert driver.line() == "ready"
    driver.process.send_signal(signal.SIGHUP)
    driver.wait_for("reloads")
    driver.process.send_signal(signal.SIGHUP)
    driver.wait_for("reloads", 2)
    assert len(driver.word("a.pids")) == 1


def test_hangup_does_not_kill_a_child_that_is_starting(drive):
    driver = drive(
        a="echo $$ >> a.pids; until [ -e go ]; do sleep 0.01; done; touch a.ready;" + STAY
    )
    driver.wait_for("a.pids")
    driver.process.send_signal(signal.SIGHUP)
    (driver.folder / "go").touch()
    assert driver.line() == "ready"
    assert len(driver.word("a.pids")) == 1


def test_orphans_that_come_to_us_are_reaped(drive):
    driver = drive(a=announce("a") + "(setsid bash -c 'echo $$ >> orphan; exit' &) ;" + STAY)
    assert driver.line() == "ready"
    (orphan,) = driver.wait_for("orphan")
    until(lambda: procfs.read(int(orphan)) is None)


def test_what_runs_is_told_by_pid_and_start_time(drive):
    driver = drive(a=announce("a") + STAY)
    assert driver.line() == "ready"
    pid = int(driver.word("a.pids")[0])
    assert (driver.folder / "running").read_text() == f'{{"a": [{pid}, {procfs.start_time(pid)}]}}'
    driver.process.terminate()
    driver.process.wait(20)
    assert (driver.folder / "running").read_text() == "{}"


def test_a_child_that_could_not_be_noted_is_noted_once_there_is_room(drive):
    driver = drive(a=f"echo $$ >> a.pids; touch a.ready; {STAY}")
    assert driver.line() == "ready"
    (driver.folder / "full").touch()
    os.kill(int(driver.word("a.pids")[0]), signal.SIGKILL)
    fresh = int(driver.wait_for("a.pids", 2)[1])
    until(lambda: f"process {fresh}" in driver.log)
    (driver.folder / "full").unlink()
    running = driver.folder / "running"
    until(lambda: json.loads(running.read_text()) == {"a": [fresh, procfs.start_time(fresh)]})


# sessions


def test_a_recycled_pid_is_no_session_of_ours():
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as stranger:
        start = procfs.start_time(stranger.pid)
        assert start is not None
        session = Session(stranger.pid, start - 1, "sleep")
        assert not session.leader_runs()
        assert session.members() == []
        session.signal_leader(signal.SIGKILL)
        assert session.kill()
        assert procfs.alive(stranger.pid, start)
        stranger.kill()


def test_members_of_a_session_without_its_leader_are_known_by_their_name(tmp_path):
    body = f"sleep 1000 & bash -c 'echo $$ > {tmp_path}/worker; {STAY}' & wait"
    with subprocess.Popen(["/bin/bash", "-c", body], start_new_session=True) as leader:
        session = Session.of(leader.pid)
        assert session is not None
        worker = int(
            until(lambda: (tmp_path / "worker").exists() and ((tmp_path / "worker").read_text()))
        )
        leader.kill()
    names = {process.pid: process.comm for process in session.members()}
    assert names[worker] == "bash"
    assert set(names.values()) == {"bash"}
    assert session.kill()
    assert session.members() == []
    for process in procfs.session_members(leader.pid):
        with suppress(ProcessLookupError):  # one of the short sleeps
            os.kill(process.pid, signal.SIGKILL)


def test_a_stop_waits_until_the_program_can_hear_it(drive):
    driver = drive(held=LATE)
    assert driver.line() == "ready"
    driver.process.terminate()
    assert driver.line() == "stopped"
    assert driver.word("held.heard") == ["x"]


def test_a_program_with_something_to_end_is_started_for_it_when_a_stop_finds_it_dead(drive):
    driver = drive(held=LATE)
    assert driver.line() == "ready"
    (pid, _) = json.loads((driver.folder / "running").read_text())["held"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: json.loads((driver.folder / "running").read_text()) == {})
    driver.process.terminate()
    assert driver.line() == "stopped"
    assert driver.word("held.began") == ["x", "x"]
    assert driver.word("held.heard") == ["x"]
