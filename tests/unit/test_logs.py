"""The logs of process replicas: what is kept of long ones, and how their ends are read."""

from __future__ import annotations

import shutil
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

    def full(_: Path, target: Path) -> None:
        target.write_text("li")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    logs.bound(log, 10)
    assert log.read_text() == ""
    assert not earlier.exists()
    assert "No space left on device" in caplog.text


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
