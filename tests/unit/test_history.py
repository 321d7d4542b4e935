"""The starts that have ended: kept in a file, over restarts, full disks and damage."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slurmgate import cli
from slurmgate.history import KEPT, History, entry, read, shown
from slurmgate.observed import Outcome, Start
from slurmgate.state import StateDir
from tests.waiting import until

PROGRAM = "tests.unit.full_disk"
ROOT = Path(__file__).parents[2]


def start(replica: str = "k3f9", **changes: Any) -> Start:
    base: dict[str, Any] = {"service": "LLM", "ended": time.monotonic(), "outcome": Outcome.READY}
    base |= {"queue_s": 12.0, "start_s": 3.5, "job_id": "4711", "node": "gpu07"}
    return Start(replica=replica, **(base | changes))


@contextmanager
def history(path: Path, **clocks: Any):
    kept = History(path, **clocks)
    try:
        yield kept
    finally:
        kept.close(20)


def keep(path: Path, *starts: Start, **clocks: Any) -> None:
    with history(path, **clocks) as kept:
        for one in starts:
            kept.add(one)


def replicas(path: Path) -> list[str]:
    return [found.replica for found in read(path).starts]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "history.jsonl"


# Keeping


def test_a_start_is_one_line_of_json(path):
    at = {"clock": lambda: 50.0, "wall": lambda: 10_000.0}
    keep(path, start(ended=45.0, queue_s=0.12345, reason="exit code 1"), **at)
    assert json.loads(path.read_text()) == {
        "at": "1970-01-01T02:46:35.000Z",
        "service": "LLM",
        "replica": "k3f9",
        "job_id": "4711",
        "node": "gpu07",
        "queue_s": 0.123,
        "start_s": 3.5,
        "outcome": "ready",
        "reason": "exit code 1",
    }
    assert path.read_text().endswith("}\n")


def test_starts_outlive_the_backend_on_the_clock_of_the_next_one(path):
    keep(path, start(ended=45.0), clock=lambda: 50.0, wall=lambda: 10_000.0)
    with history(path, clock=lambda: 7.0, wall=lambda: 10_100.0) as later:
        assert later.recent() == (start(ended=7.0 - 105.0),)


def test_a_start_of_a_clock_slightly_ahead_ended_just_now(path):
    keep(path, start(ended=45.0), clock=lambda: 50.0, wall=lambda: 10_000.0)
    with history(path, clock=lambda: 7.0, wall=lambda: 9_990.0) as later:
        assert later.recent() == (start(ended=7.0),)
    keep(path, start(ended=60.0), clock=lambda: 50.0, wall=lambda: 10_000.0)
    assert read(path).starts[-1].ended == 10_000.0


def test_a_start_of_which_nothing_is_known_is_kept_too(path):
    nothing: dict[str, Any] = {"queue_s": None, "start_s": None, "job_id": None, "node": None}
    lost = start(outcome=Outcome.LOST, **nothing)
    keep(path, lost)
    with history(path) as later:
        (found,) = later.recent()
    assert (found.queue_s, found.start_s, found.job_id, found.node) == (None,) * 4
    assert found.outcome is Outcome.LOST


def test_a_start_that_clocks_disagree_about_took_no_time(path):
    keep(path, start(queue_s=-0.5, start_s=-0.0001))
    (found,) = read(path).starts
    assert (found.queue_s, found.start_s) == (0.0, 0.0)


def test_starts_are_recent_before_they_are_on_the_disk(tmp_path):
    with history(tmp_path / "gone" / "history.jsonl") as kept:
        kept.add(start("a"))
        kept.add(start("b"))
        assert [found.replica for found in kept.recent()] == ["a", "b"]


def test_only_the_last_thousand_are_kept(path):
    keep(path, *(start(f"r{n}") for n in range(KEPT)))
    keep(path, *(start(f"s{n}") for n in range(KEPT)))
    keep(path, start("t"))
    expected = [*(f"s{n}" for n in range(1, KEPT)), "t"]
    assert replicas(path) == expected
    with history(path) as later:
        assert [found.replica for found in later.recent()] == expected
        later.add(start("u"))
        assert [found.replica for found in later.recent()] == [*expected[1:], "u"]


def test_a_file_that_has_grown_too_long_is_replaced_by_its_last_part(path):
    keep(path, *(start(f"r{n}") for n in range(KEPT)))
    path.write_bytes(path.read_bytes() * 2)
    before = path.stat().st_ino
    keep(path, start("last"))
    assert path.stat().st_ino != before
    assert replicas(path) == [*(f"r{n}" for n in range(1, KEPT)), "last"]
    assert len(path.read_bytes().splitlines()) == KEPT
    assert mode(path) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_of_long_lines_is_not_read_whole_and_made_short(path):
    path.write_bytes((b"x" * 1_000_000 + b"\n") * 9)
    keep(path, start("a"), start("b"))
    assert replicas(path) == ["a", "b"]
    assert path.stat().st_size < 1000


def test_the_file_is_for_its_owner_alone(path):
    before = os.umask(0)
    try:
        keep(path, start())
    finally:
        os.umask(before)
    assert mode(path) == 0o600


def test_starts_of_many_threads_are_all_kept_as_whole_lines(path):
    with history(path) as kept:
        threads = [
            threading.Thread(target=lambda t=t: [kept.add(start(f"{t}.{n}")) for n in range(100)])
            for t in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        in_memory = [found.replica for found in kept.recent()]
    assert replicas(path) == in_memory
    assert sorted(in_memory) == sorted(f"{t}.{n}" for t in range(8) for n in range(100))
    assert read(path).damaged == 0


def test_a_history_that_is_closed_takes_starts_and_writes_none(path):
    kept = History(path)
    kept.add(start("a"))
    kept.close(20)
    kept.add(start("b"))
    kept.close(20)
    assert [found.replica for found in kept.recent()] == ["a", "b"]
    assert replicas(path) == ["a"]


# Damage

GOOD = entry(start(ended=1_000_000.0))
NO_STARTS: list[dict[str, Any]] = [
    {"at": "2026-11-22T07:55:00"},
    {"at": "9999-12-31T23:59:59Z"},
    {"at": "1969-12-31T23:59:59Z"},
    {"at": 5},
    {"queue_s": float("nan")},
    {"queue_s": -1},
    {"start_s": 10**400},
    {"start_s": True},
    {"start_s": "3"},
    {"outcome": "odd"},
    {"outcome": []},
    {"service": ""},
    {"service": "a\x1b[31m"},
    {"service": "\ud800"},
    {"service": None},
    {"replica": None},
    {"node": 7},
]


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"at":"2026-11-22T07:',
        b"\xff\xfe\x00",
        *(json.dumps(GOOD | change).encode() for change in NO_STARTS),
    ],
)
def test_a_line_that_is_no_start_is_passed_over_and_said_once(path, caplog, line):
    good = json.dumps(GOOD | {"of a later version": 1}).encode()
    path.write_bytes(b"\n".join([good, line, b"", line, good, b""]))
    with history(path) as kept:
        assert [found.replica for found in kept.recent()] == ["k3f9", "k3f9"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 2 damaged lines passed over"
    ]


def test_a_line_that_broke_off_does_not_spoil_the_next_one(path):
    keep(path, start("a"), start("b"))
    path.write_bytes(path.read_bytes()[:-20])
    keep(path, start("c"), start("d"))
    assert replicas(path) == ["a", "c", "d"]
    assert read(path).damaged == 1


def test_something_else_in_the_place_of_the_file_is_said_and_left_alone(path, caplog):
    path.mkdir()
    with history(path) as kept:
        assert kept.recent() == ()
        kept.add(start())
    assert path.is_dir()
    read_failed, write_failed = (record.getMessage() for record in caplog.records)
    assert read_failed == f"cannot read the recent starts in {path}: Is a directory"
    assert write_failed.startswith(f"cannot keep recent starts in {path}: Is a directory")


# Disks that take nothing


def namespace() -> list[str]:
    """How to run a program that may mount; empty when this kernel lets nobody do so here."""
    for way in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        mount = ["mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        tried = subprocess.run([*way, *mount], capture_output=True, timeout=20)
        if tried.returncode == 0:
            return way
    return []


def run_full_disk(folder: Path, kind: str) -> dict[str, Any]:
    program = [sys.executable, "-B", "-m", PROGRAM, str(folder), kind]
    if kind != "limit":
        way = namespace()
        if not way:
            pytest.skip("no file system can be mounted here; the same is tested by a limit")
        mount = 'mount -t tmpfs -o size=32k tmpfs "$1" && shift && exec "$@"'
        program = [*way, "sh", "-c", mount, "sh", str(folder), *program]
    result = subprocess.run(program, cwd=ROOT, stdout=subprocess.PIPE, timeout=60, check=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("limit", "File too large"),
        ("full", "No space left on device"),
        ("read-only", "Read-only file system"),
    ],
)
def test_a_disk_that_takes_nothing_costs_the_starts_meanwhile_and_nothing_else(tmp_path, kind, why):
    found = run_full_disk(tmp_path, kind)
    assert found["kept"][: len(found["before"])] == found["before"]
    assert found["kept"][-1] == "last"
    assert found["missing"] not in found["kept"]
    assert found["whole"], "half a line was left"
    assert found["recent"], "what is in memory suffered"
    path = tmp_path / "history.jsonl"
    assert found["said"] == [
        f"cannot keep recent starts in {path}: {why}; until that works those that end are missing"
        " there",
        f"recent starts are kept in {path} again",
    ]


def test_a_device_that_is_always_full_is_said_once(path, caplog):
    path.symlink_to("/dev/full")
    with history(path) as kept:
        caplog.clear()
        for n in range(3):
            kept.add(start(f"r{n}"))
            until(lambda: caplog.records)
        assert len(kept.recent()) == 3
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()


def test_a_state_directory_that_vanished_and_came_back(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "state"
    folder.mkdir()
    path = folder / "history.jsonl"
    with history(path) as kept:
        kept.add(start("a"))
        until(lambda: replicas(path) == ["a"])
        shutil.rmtree(folder)
        kept.add(start("b"))
        until(lambda: caplog.records)
        assert not folder.exists()
        folder.mkdir()
        kept.add(start("c"))
        until(lambda: len(caplog.records) == 2)
    assert replicas(path) == ["c"]
    lost, found = (record.getMessage() for record in caplog.records)
    assert lost.startswith(f"cannot keep recent starts in {path}: No such file or directory")
    assert found == f"recent starts are kept in {path} again"


# What others wrote


@pytest.mark.parametrize("field", ["reason", "node", "job_id", "replica"])
def test_texts_of_others_are_short_and_print_on_any_terminal(path, field):
    keep(path, start(**{field: "a\x1b[31m\r\n\tb\x7f\x9b\u202e\ud800" + "c" * 5000}))
    value = json.loads(path.read_text())[field]
    assert value.startswith("a\ufffd[31m b\ufffd\ufffd\ufffd\ufffdc")
    assert value.endswith("c…")
    assert len(value) == (500 if field == "reason" else 255)
    assert value.isprintable()
    (found,) = read(path).starts
    assert getattr(found, field) == value


def test_text_that_is_safe_is_shown_as_it_is():
    assert shown("Über-Modell 東京 (70B)") == "Über-Modell 東京 (70B)"


# The command


@pytest.fixture
def state(tmp_path) -> StateDir:
    return StateDir.open(tmp_path / "state")


@pytest.fixture
def command(state, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["history", *arguments, "--state-dir", str(state.path)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def east(monkeypatch):
    """Two hours ahead of Greenwich."""
    monkeypatch.setenv("TZ", "EAST-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def some(state) -> None:
    at = {"clock": lambda: 0.0, "wall": lambda: 1_800_000_000.0}
    keep(
        state.history,
        start(ended=-300.0),
        start("t1", ended=-200.0, service="TTS", queue_s=0.0, start_s=0.25, job_id=None, node=None),
        start("k3fa", ended=-100.0, queue_s=120.0, start_s=None, outcome=Outcome.CANCELLED),
        start("k3fb", ended=0.0, outcome=Outcome.FAILED, reason="exit code 1", node=None),
        **at,
    )


def test_the_table_shows_when_what_and_how_long_newest_last(command, some, east):
    code, out, err = command()
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "WHEN                 SERVICE  OUTCOME    QUEUED  STARTED  WHERE              REASON",
        "2027-01-15 09:55:00  LLM      ready      12.0 s  3.50 s   job 4711 on gpu07",
        "2027-01-15 09:56:40  TTS      ready      0.00 s  0.25 s   replica t1",
        "2027-01-15 09:58:20  LLM      cancelled  120 s   -        job 4711 on gpu07",
        "2027-01-15 10:00:00  LLM      failed     12.0 s  3.50 s   job 4711           exit code 1",
        "4 starts, queue + start of 2 that succeeded: p50 0.25 s, p95 15.5 s",
    ]


def test_one_service_is_picked_by_name(command, some):
    _, out, _ = command("TTS")
    lines = out.splitlines()
    assert len(lines) == 3
    assert "TTS" in lines[1]
    assert lines[2] == "1 start, queue + start of 1 that succeeded: p50 0.25 s, p95 0.25 s"


def test_as_many_are_shown_as_asked_for(command, some):
    _, out, _ = command("-n", "1")
    assert len(out.splitlines()) == 3
    assert out.endswith("1 start, none that succeeded\n")
    assert len(json.loads(command("--json", "-n", "2")[1])) == 2


def test_json_gives_every_start_and_the_table_the_last_fifty(command, state):
    keep(state.history, *(start(f"r{n}") for n in range(60)))
    _, out, _ = command("LLM", "--json")
    assert [found["replica"] for found in json.loads(out)] == [f"r{n}" for n in range(60)]
    assert len(command("LLM")[1].splitlines()) == 52


def test_json_is_what_the_file_holds(command, some, state):
    _, out, _ = command("--json")
    lines = [json.loads(line) for line in state.history.read_text().splitlines()]
    assert json.loads(out) == lines


def test_of_a_name_without_starts_it_says_which_names_have_some(command, some):
    said = "no start of XYZ\ufffd[31m is on record; there are starts of LLM, TTS\n"
    assert command("XYZ\x1b[31m") == (0, said, "")
    assert command("XYZ", "--json") == (0, "[]\n", "")


def test_before_the_first_start_there_is_nothing_to_show(command):
    assert command() == (0, "no starts to show\n", "")
    assert command("--json") == (0, "[]\n", "")
    said = "no start of LLM is on record, nor of any other service\n"
    assert command("LLM") == (0, said, "")


@pytest.mark.parametrize("number", ["0", "-1", "x", "\u0663"])
def test_less_than_one_line_is_refused(command, number, capsys):
    with pytest.raises(SystemExit):
        command("-n", number)
    assert "should be a number, 1 or more" in capsys.readouterr().err


def test_no_control_character_of_a_file_reaches_the_terminal(command, state):
    bad = "a\x1b[31m\u202e\x9b\x7f\nb"
    line = GOOD | {"reason": bad, "node": bad, "job_id": bad, "replica": bad}
    line |= {"service": "L\u202eM"}
    state.history.write_text(json.dumps(line) + "\n\x1b[31m\n")
    for arguments in ([], ["--json"]):
        code, out, err = command(*arguments)
        assert code == 0
        assert err == f"slurmgate: {state.history}: 1 damaged lines passed over\n"
        assert all(row.isprintable() for row in out.splitlines()), out


def test_a_long_reason_is_cut_in_the_table_and_whole_in_json(command, state):
    keep(state.history, start(reason="y" * 400))
    row = command()[1].splitlines()[1]
    assert row.endswith("  " + "y" * 159 + "…")
    assert json.loads(command("--json")[1])[0]["reason"] == "y" * 400


def test_a_file_that_cannot_be_read_is_an_error_in_words(command, state):
    state.history.mkdir()
    code, _, err = command()
    assert code == 1
    assert err == f"slurmgate: cannot read {state.history}: Is a directory\n"


def test_the_command_needs_a_state_directory(tmp_path, capsys):
    assert cli.main(["history", "--state-dir", str(tmp_path / "none")]) == 1
    assert "is no state directory of Slurmgate" in capsys.readouterr().err


def test_a_start_from_the_future_was_written_by_a_wrong_clock_and_is_long_ago(path):
    keep(path, start(ended=45.0), clock=lambda: 50.0, wall=lambda: 10_000.0)
    with history(path, clock=lambda: 7.0, wall=lambda: 9_000.0) as later:
        (found,) = later.recent()
    assert found.ended < 7.0 - 3600
