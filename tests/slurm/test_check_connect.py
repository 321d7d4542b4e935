"""``slurmgate check --connect`` against a real login host and a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.lab import Job, Lab

OWNER = "0a1b2c3d4e"


class Checked:
    """What the command said about a file with these services."""

    def __init__(self, folder: Path, *services: dict[str, Any], **top: Any) -> None:
        self.file = folder / "services.json"
        self.state = folder / "state"
        self.file.write_text(json.dumps({"Services": list(services), **top}))
        argv = [sys.executable, "-m", "slurmgate", "check", str(self.file), "--connect"]
        done = subprocess.run(
            [*argv, "--state-dir", str(self.state)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.stderr == ""
        self.code = done.returncode
        self.lines = done.stdout.splitlines()
        self.good = [line for line in self.lines if line.startswith("ok: ")]
        self.warnings = [line for line in self.lines if line.startswith("warning: ")]
        self.problems = [line for line in self.lines if line.startswith("Services[")]

    def only_problem(self) -> str:
        assert self.code == 1
        [line] = self.problems
        return line


@pytest.fixture
def script(lab: Lab) -> str:
    path = lab.home / "serve.sh"
    path.write_text("#!/bin/sh\n#SBATCH --partition=main\nexec sleep 60\n")
    return "serve.sh"


def service(lab: Lab, name: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "route_name": name,
        "api_paths": ["/"],
        "bash_file": "serve.sh",
        "check_health_path": "/health",
        "timeout": 60,
        **lab.ssh_fields(),
        **fields,
    }


@pytest.fixture
def submitted(lab: Lab) -> Callable[[], list[Job]]:
    """Give the jobs that came since the test began."""
    before = {job.id for job in lab.jobs()}
    return lambda: [job for job in lab.jobs() if job.id not in before]


def test_a_good_file_is_said_to_be_good_and_nothing_is_submitted(
    lab: Lab, script: str, tmp_path: Path, submitted: Callable[[], list[Job]]
):
    checked = Checked(
        tmp_path,
        service(lab, "one"),
        service(lab, "two", bash_file=f"~/{script}", sbatch_args=["--time=5"]),
        service(lab, "local", launcher="process", bash_file=str(lab.home / script)),
    )
    assert checked.code == 0, checked.lines
    assert checked.problems == []
    assert any("commands run on" in line and lab.user in line for line in checked.good)
    assert any("sbatch, squeue, scancel, scontrol: slurm" in line for line in checked.good)
    assert [line.split(": ")[1] for line in checked.good if "would take" in line] == [
        "Services[0]",
        "Services[1]",
    ]
    assert checked.lines[-1].endswith("3 services, no errors")
    assert submitted() == []
    assert not checked.state.exists()


@pytest.mark.parametrize(
    ("fields", "path", "words"),
    [
        ({"bash_file": "gone.sh"}, "bash_file", "gone.sh does not exist on the login host"),
        ({"bash_file": "/"}, "bash_file", "is not a file that can be read"),
        ({"bash_file": "plain.sh"}, "bash_file", "begin with #!"),
        ({"bash_file": "long.sh"}, "sbatch_args", "--time=2-0 is too long: partition quick"),
        ({"bash_file": "array.sh"}, "bash_file", "#SBATCH --array"),
        ({"sbatch_args": ["--partition=nope"]}, "sbatch_args", "sinfo -s lists them"),
        (
            {"sbatch_args": ["--partition=staff", "-A", "guests"]},
            "sbatch_args",
            "the account guests may not use partition staff",
        ),
        ({"sbatch_args": ["--gres=gpu:1"]}, "sbatch_args", "Invalid generic resource"),
        ({"sbatch_args": ["--constraint=zzz"]}, "sbatch_args", "Invalid feature"),
        ({"sbatch_args": ["--nodes=99"]}, "sbatch_args", "Slurm would refuse the job"),
        ({"sbatch_args": ["--frobnicate=1"]}, "sbatch_args", "unrecognized option"),
        (
            {"sbatch_args": ["--partition=quick", "--time=60"]},
            "sbatch_args",
            "--time=60 is too long: partition quick allows at most 1 min",
        ),
    ],
)
def test_what_slurm_would_refuse_is_told_with_its_place(
    lab: Lab,
    script: str,
    tmp_path: Path,
    submitted: Callable[[], list[Job]],
    fields: dict[str, Any],
    path: str,
    words: str,
):
    (lab.home / "plain.sh").write_text("sleep 1\n")
    (lab.home / "array.sh").write_text("#!/bin/sh\n#SBATCH --array=1-3\n")
    (lab.home / "long.sh").write_text("#!/bin/sh\n#SBATCH -p quick\n#SBATCH --time 2-0 # h\n")
    checked = Checked(tmp_path, service(lab, "good"), service(lab, "bad", **fields))
    problem = checked.only_problem()
    assert problem.startswith(f"Services[1].{path}: ")
    assert words in problem
    assert any(line.startswith("ok: Services[0]: Slurm would take") for line in checked.good)
    assert submitted() == []


def test_a_partition_for_others_is_a_warning_while_the_account_is_not_known(
    lab: Lab, script: str, tmp_path: Path
):
    checked = Checked(tmp_path, service(lab, "staff", sbatch_args=["--partition=staff"]))
    assert checked.code == 0
    [warning] = checked.warnings
    assert "partition staff is for the accounts staff" in warning


def test_a_missing_script_does_not_hide_wrong_arguments(lab: Lab, tmp_path: Path):
    fields = {"bash_file": "gone.sh", "sbatch_args": ["--partition=nope"]}
    checked = Checked(tmp_path, service(lab, "bad", **fields))
    assert [line.split(": ")[0] for line in checked.problems] == [
        "Services[0].bash_file",
        "Services[0].sbatch_args",
    ]


def test_an_unknown_host_key_is_told_once_for_all_services_of_the_host(
    lab: Lab, script: str, tmp_path: Path
):
    (tmp_path / "known_hosts").touch()
    (tmp_path / "key").write_text(lab.key_file.read_text())
    (tmp_path / "key").chmod(0o600)
    fields = {"ssh_known_hosts": str(tmp_path / "known_hosts")}
    checked = Checked(tmp_path, service(lab, "one", **fields), service(lab, "two", **fields))
    problem = checked.only_problem()
    assert problem.startswith("Services[0].remote_host (and Services[1]): ")
    assert "SHA256:" in problem
    assert "ssh-keyscan" in problem


def test_a_host_that_is_away_and_one_that_is_there(lab: Lab, script: str, tmp_path: Path):
    checked = Checked(
        tmp_path, service(lab, "away", ssh_port=1), service(lab, "there"), service(lab, "too")
    )
    assert checked.only_problem().startswith("Services[0].remote_host: ")
    assert any("Services[1].remote_host (and Services[2])" in line for line in checked.good)


def test_commands_that_are_not_found_are_told_with_the_place_to_set_the_path(
    lab: Lab, script: str, tmp_path: Path
):
    setup = [f"export PATH={lab.bare_path()}", "command() { return 1; }"]
    checked = Checked(tmp_path, service(lab, "bare", remote_setup=setup))
    problem = checked.only_problem()
    assert "sbatch, squeue, scancel, scontrol: not found" in problem
    assert "remote_setup" in problem


def test_jobs_of_another_state_directory_are_shown_with_what_to_do(
    lab: Lab, script: str, tmp_path: Path
):
    held = ["--hold", "--wrap=true"]
    theirs = lab.sbatch(f"--job-name=sg.campus.{OWNER}.k3f9.20000.deadbeef.llm", *held)
    lab.sbatch(f"--job-name=sg.other.{OWNER}.k3f9.20000.deadbeef.llm", *held)
    lab.sbatch("--job-name=sg.campus.not-ours", *held)
    checked = Checked(tmp_path, service(lab, "one"), instance="campus")
    assert checked.code == 0
    [warning] = checked.warnings
    assert f"job {theirs} (llm, pending)" in warning
    assert f"slurmgate adopt {OWNER}" in warning


def test_our_own_jobs_are_no_finding(lab: Lab, script: str, tmp_path: Path):
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    for name, text in (("owner", OWNER), ("instance", "campus")):
        (state / name).write_text(text)
        (state / name).chmod(0o600)
    lab.sbatch(f"--job-name=sg.campus.{OWNER}.k3f9.20000.ff.llm", "--hold", "--wrap=true")
    checked = Checked(tmp_path, service(lab, "one"))
    assert checked.code == 0
    assert checked.warnings == []


def test_a_scheduler_that_does_not_answer_is_a_problem_of_the_host(own_lab, tmp_path: Path):
    lab = own_lab()
    (lab.home / "serve.sh").write_text("#!/bin/sh\n")
    lab.slurmctld.stop()
    checked = Checked(tmp_path, service(lab, "one"), service(lab, "two"))
    problem = checked.only_problem()
    assert problem.startswith("Services[0].remote_host (and Services[1]): squeue failed: ")
    assert "Unable to contact slurm controller" in problem
