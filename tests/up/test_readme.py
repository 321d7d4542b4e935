"""Every command and program of the README, run as it stands there, against ``make run``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.up.product import ROOT
from tests.waiting import until

BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUNS_US = {"make test", "make check", "make bench"}
SERVES = "make run"


def commands() -> list[tuple[str, str]]:
    """Commands in their order, each with the output the README shows."""
    found: list[tuple[str, str]] = []
    for block in BLOCK.findall((ROOT / "README.md").read_text()):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, "HOME": str(tmp_path)}


def shell(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def output_of(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


@pytest.mark.timeout(240)
def test_every_command_of_the_readme_works_as_shown(environment):
    known = commands()
    programs = PROGRAM.findall((ROOT / "README.md").read_text())
    assert len(programs) == 2
    assert SERVES in [command for command, _ in known]
    assert len(known) > 12
    served = subprocess.Popen(
        SERVES.split(),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert served.stdout is not None
    try:
        ready = "".join(iter(served.stdout.readline, "ready http://127.0.0.1:8080\n"))
        assert "error" not in ready.lower()
        for command, output in known:
            if command in RUNS_US:
                done = shell(f"{command} --dry-run", environment)
            elif command != SERVES:
                done = shell(command, environment)
            assert done.returncode == 0 if command != SERVES else True, (command, done)
            if output:
                assert done.stdout.strip() == output.strip(), command
        assert "hello" in "".join(output_of(program) for program in programs)
    finally:
        os.killpg(served.pid, signal.SIGINT)
        served.stdout.close()
        until(lambda: served.poll() is not None)
