"""The thread that follows process replicas outlives whatever goes wrong with one of them."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from contextlib import suppress

import pytest

from slurmgate.launchers.watcher import Watcher
from slurmgate.model import Exit


class Scene:
    """A watcher and the processes of one test; the first ``held`` report blocks the thread."""

    def __init__(self):
        self.ends: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.watcher = Watcher(self._ended)
        self._processes: list[subprocess.Popen[bytes]] = []

    def _ended(self, replica: str, end: Exit) -> None:
        self.ends.put(replica)
        if replica == "held":
            self.reached.set()
            assert self.go_on.wait(20)
        if replica == "broken":
            raise OSError("a fault of this test")

    def process(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        self._processes.append(process)
        return process

    def follow(self, replica: str) -> subprocess.Popen[bytes]:
        process = self.process()
        pidfd = os.pidfd_open(process.pid)
        self.watcher.follow(replica, process.pid, pidfd, {"SLURMGATE_TEST_MARK": replica})
        return process

    def close(self) -> None:
        self.go_on.set()
        self.watcher.close()
        for process in self._processes:
            process.kill()
            with suppress(ChildProcessError):
                process.wait()


@pytest.fixture
def scene():
    scene = Scene()
    yield scene
    scene.close()


def end_held(scene: Scene) -> None:
    """Keep the thread busy, so that calls made now are seen together and before any end."""
    scene.follow("held").kill()
    assert scene.reached.wait(20)
    assert scene.ends.get(timeout=20) == "held"


def test_a_leader_that_its_parent_has_reaped_is_stopped_without_a_word(scene, caplog):
    end_held(scene)
    gone = scene.follow("gone")
    scene.watcher.stop("gone", 60)
    gone.kill()
    gone.wait()
    scene.go_on.set()
    assert scene.ends.get(timeout=20) == "gone"
    scene.follow("next").kill()
    assert scene.ends.get(timeout=20) == "next"
    assert caplog.records == []


def test_an_error_about_one_replica_is_logged_and_the_others_are_followed_on(scene, caplog):
    scene.follow("broken").kill()
    assert scene.ends.get(timeout=20) == "broken"
    scene.follow("next").kill()
    assert scene.ends.get(timeout=20) == "next"
    assert "broken" in caplog.text
    assert "a fault of this test" in caplog.text


def test_a_replica_whose_end_could_not_be_looked_into_is_looked_into_again(scene, monkeypatch):
    failures = [OSError(24, "Too many open files")]
    members = "slurmgate.procfs.session_members"

    def session_members(pid):
        if failures:
            raise failures.pop()
        return []

    monkeypatch.setattr(members, session_members)
    scene.follow("busy").kill()
    assert scene.ends.get(timeout=20) == "busy"
    assert failures == []
