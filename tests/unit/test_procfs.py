"""The process table: names with odd characters, environments of processes that change programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from slurmgate import procfs
from tests.waiting import until


def test_odd_names_of_programs_do_not_confuse(tmp_path):
    program = tmp_path / "a) S 1 (b"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([str(program), "1000"]) as process:
        found = procfs.read(process.pid)
        assert found is not None
        assert found.comm == "a) S 1 (b"
        assert found.parent == os.getpid()
        process.kill()


def test_a_zombie_is_not_alive():
    with subprocess.Popen(["sleep", "1000"]) as process:
        start = procfs.start_time(process.pid)
        assert start is not None
        assert procfs.alive(process.pid, start)
        assert not procfs.alive(process.pid, start - 1)
        process.kill()
        until(lambda: not procfs.alive(process.pid, start))
        assert procfs.start_time(process.pid) == start
    assert procfs.start_time(process.pid) is None
    assert procfs.open_process(process.pid, start) is None


def test_the_start_of_a_process_is_told_in_monotonic_time():
    before = time.monotonic()
    with subprocess.Popen(["sleep", "1000"]) as process:
        start = procfs.start_time(process.pid)
        assert start is not None
        assert before - 0.1 <= procfs.monotonic(start) <= time.monotonic()
        process.kill()


def test_marks_are_found_even_while_a_process_changes_programs():
    chain = "exec bash -c 'exec bash -c \"exec sleep 1000\"'"
    for i in range(30):
        marks = {"PROCFS_TEST": str(os.getpid()), "PROCFS_ROUND": str(i)}
        environ = {**os.environ, **marks}
        with subprocess.Popen(["/bin/bash", "-c", chain], env=environ) as process:
            while True:
                name = procfs.read(process.pid)
                assert [found.pid for found in procfs.find_marked(marks)] == [process.pid]
                if name is not None and name.comm == "sleep":
                    break
            process.kill()


def test_a_process_without_environment_has_no_marks():
    with subprocess.Popen(["sleep", "1000"], env={}) as process:
        assert procfs.environment(process.pid) == {}
        process.kill()


def test_ancestors_go_up_to_the_first_process():
    found = procfs.ancestors(os.getpid())
    assert {os.getpid(), os.getppid()} <= found
