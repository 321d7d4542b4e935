"""The logs of process replicas: what is kept of long ones, and how their ends are read."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from slurmgate.launchers import logs
from slurmgate.launchers.log_keeper import LogKeeper
from tests.waiting import until


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A shell that writes to a log as replicas do, one line for each line it gets."""
    (tmp_path / "k3f9.log").touch(0o600)
    with (
        (tmp_path / "k3f9.log").open("ab") as output,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output) as shell,
    ):
        yield shell


def write(writer: subprocess.Popen[bytes], path: Path, line: str) -> None:
    assert writer.stdin is not None
    writer.stdin.write(f"{line}\n".encode())
    writer.stdin.flush()
    until(lambda: path.read_text().endswith(f"{line}\n"))


def until_moved(log: Path, text: str) -> None:
    earlier = log.with_name(log.name + ".1")
    until(lambda: earlier.exists() and text in earlier.read_text() and not log.stat().st_size)


def test_a_log_that_is_too_long_goes_on_behind_its_earlier_part(writer, tmp_path):
    log, earlier = tmp_path / "k3f9.log", tmp_path / "k3f9.log.1"
    for line in ("one", "two", "three"):
        write(writer, log, line)
    logs.bound(log, 14)
    assert not earlier.exists()
    logs.bound(log, 13)
    assert log.read_text() == ""
    write(writer, log, "four")
    assert log.read_text() == "four\n"
    assert earlier.read_text() == "one\ntwo\nthree\n"
    assert stat.S_IMODE(earlier.stat().st_mode) == 0o600
    assert logs.tail(log, 2) == ["three", "four"]
    assert logs.tail(log, 1) == ["four"]
    assert logs.tail(log, 9) == ["one", "two", "three", "four"]
    assert logs.tail(log, 0) == []
    logs.bound(log, 0)
    assert earlier.read_text() == "four\n"
    assert logs.tail(log, 9) == ["four"]


def test_a_log_is_cut_even_if_there_is_no_room_for_what_it_had(monkeypatch, caplog, tmp_path):
    log, earlier = tmp_path / "k3f9.log", tmp_path / "k3f9.log.1"
    log.write_text("line\n" * 10)

    def full(_path: Path, _left: int, _end: int, target: Path) -> None:
        target.write_text("li")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logs, "_copy", full)
    logs.bound(log, 10)
    assert log.read_text() == ""
    assert not earlier.exists()
    assert "No space left on device" in caplog.text


def test_of_very_much_only_the_end_is_kept(monkeypatch, tmp_path):
    log, earlier = tmp_path / "k3f9.log", tmp_path / "k3f9.log.1"
    monkeypatch.setattr(logs, "_KEPT", 10)
    log.write_text("one\ntwo\nthree\nfour\n")
    logs.bound(log, 8)
    assert earlier.read_text() == "hree\nfour\n"
    assert log.read_text() == ""


def test_a_copy_does_not_run_after_a_writer_that_is_faster(monkeypatch, tmp_path):
    log, earlier = tmp_path / "k3f9.log", tmp_path / "k3f9.log.1"
    log.write_text("line\n" * 10)
    copy = logs._copy

    def written_meanwhile(path: Path, left: int, end: int, target: Path) -> None:
        with path.open("a") as writer:
            writer.write("more\n" * 10)
        copy(path, left, end, target)

    monkeypatch.setattr(logs, "_copy", written_meanwhile)
    logs.bound(log, 10)
    assert earlier.read_text() == "line\n" * 10


def test_lines_of_the_earlier_part_never_stand_before_a_gap(monkeypatch, tmp_path):
    log = tmp_path / "k3f9.log"
    monkeypatch.setattr(logs, "_BLOCK", 8)
    log.with_name("k3f9.log.1").write_text("old\n")
    log.write_text("one\ntwo\nsix\nten\n")
    with log.open("rb") as file:
        assert logs.last_lines(file, 9, most=8) == [b"six", b"ten"]
        assert logs.last_lines(file, 9) == [b"old", b"one", b"two", b"six", b"ten"]


def test_the_last_lines_of_an_open_log_leave_it_where_they_end(tmp_path):
    log = tmp_path / "k3f9.log"
    log.write_text("one\ntwo\n")

    def read_on(file: BinaryIO) -> bytes:
        with log.open("a") as more:
            more.write("three\n")
        return file.read()

    with log.open("rb") as file:
        assert logs.last_lines(file, 1) == [b"two"]
        assert read_on(file) == b"three\n"


def test_a_log_that_cannot_be_read_says_so(tmp_path):
    assert logs.tail(tmp_path, 3) == [f"{tmp_path} cannot be read: Is a directory"]
    assert logs.tail(tmp_path / "none.log", 3) == []


def test_an_old_log_is_removed_with_its_earlier_part(tmp_path):
    for name in ("a.log", "a.log.1", "b.log", "b.log.1"):
        (tmp_path / name).touch()
    logs.prune(tmp_path, 0, {"b"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.log", "b.log.1"]


def test_logs_are_bounded_while_they_grow_and_left_alone_after_that(writer, tmp_path):
    log, earlier = tmp_path / "k3f9.log", tmp_path / "k3f9.log.1"
    keeper = LogKeeper(lambda: [tmp_path / "gone.log", log], limit=20, every=0.01)
    for turn in range(3):
        assert writer.stdin is not None
        writer.stdin.write(b"more than twenty bytes, turn %d\n" % turn)
        writer.stdin.flush()
        until_moved(log, f"turn {turn}")
    keeper.close()
    write(writer, log, "and twenty bytes once more")
    assert "turn 2" in earlier.read_text()


def test_a_log_that_cannot_be_cut_is_no_end_of_looking_after_the_others(
    monkeypatch, caplog, tmp_path
):
    folder, log = tmp_path / "folder.log", tmp_path / "k3f9.log"
    folder.mkdir()
    (folder / "x").touch()
    log.write_text("line\n" * 10)
    keeper = LogKeeper(lambda: [folder, log], limit=10, every=0.01)
    until(lambda: log.stat().st_size == 0)
    keeper.close()
    assert "cannot be kept from growing: Is a directory" in caplog.text
