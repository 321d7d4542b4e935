"""The lab itself: a cluster that does what tests ask of it, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest

from slurmgate import procfs
from tests.lab.lab import ROOT, Lab
from tests.lab.place import free_ports
from tests.waiting import until


@pytest.fixture
def short_path():
    """A folder with a path that leaves room for the names of sockets below it."""
    with tempfile.TemporaryDirectory(prefix="sg-lab-") as folder:
        yield Path(folder)


def login(lab: Lab, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(login_argv(lab, *options, command), capture_output=True, text=True)


def login_argv(lab: Lab, *args: str) -> list[str]:
    return [
        *("ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"),
        *("-i", str(lab.key_file), "-o", f"UserKnownHostsFile={lab.known_hosts}"),
        *("-p", str(lab.ssh_fields()["ssh_port"]), f"{lab.user}@{lab.address}", *args),
    ]


def processes_of(lab: Lab) -> list[int]:
    """Found by the folder and the cluster's name, not by who started them."""
    marks = (f"SLURM_CLUSTER_NAME={lab.place.cluster}\0".encode(), f"{lab.folder}/".encode())
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            seen = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if any(mark in seen for mark in marks):
            found.append(int(entry.name))
    return found


def test_a_job_runs_on_each_node(lab):
    jobs = {
        node: lab.sbatch(f"--nodelist={node}", f"--output={node}", "--wrap=echo $SLURMD_NODENAME")
        for node in lab.nodes
    }
    for node, job in jobs.items():
        assert lab.until_job(job, "COMPLETED").node == node
        assert (lab.home / node).read_text() == f"{node}\n"


def test_services_on_different_nodes_use_the_same_port(lab):
    script = lab.probe_script()
    port = 8123
    for node in lab.nodes:
        lab.sbatch(f"--nodelist={node}", "--output=/dev/null", script, str(port))
    pids = {pid_at(address, port) for address in lab.addresses.values()}
    assert len(pids) == len(lab.nodes)


def pid_at(address: str, port: int) -> int:
    def answered() -> int | None:
        try:
            return httpx.get(f"http://{address}:{port}/").json()["pid"]
        except httpx.TransportError:
            return None

    return until(answered)


def test_nothing_is_left_of_a_stopped_lab(own_lab):
    lab = own_lab()
    job = lab.sbatch("--wrap=setsid sleep 600 </dev/null >/dev/null 2>&1 & exec sleep 600")
    lab.until_job(job, "RUNNING")
    with subprocess.Popen(login_argv(lab, "sleep 600"), stderr=subprocess.DEVNULL) as session:
        until(lambda: lab.sshd.sessions())
        until(lambda: commands(lab).count("sleep") >= 3)
        seen = {pid: procfs.start_time(pid) for pid in [*lab.processes(), *processes_of(lab)]}
        lab.stop()
        assert session.wait(20) == 255
    left = [pid for pid, start in seen.items() if start and procfs.start_time(pid) == start]
    assert left == []
    assert processes_of(lab) == []
    assert not lab.folder.exists()


def commands(lab: Lab) -> list[str]:
    found = []
    for pid in lab.processes():
        with contextlib.suppress(OSError):  # it has ended since
            found.append(Path(f"/proc/{pid}/comm").read_text().strip())
    return found


def test_a_lab_ends_with_the_process_that_made_it(short_path):
    made = (
        "import sys, time, pathlib; from tests.lab.lab import Lab;"
        "lab = Lab(pathlib.Path(sys.argv[1])).start(); lab.sbatch('--wrap=sleep 600');"
        "print(lab.processes(), flush=True); time.sleep(600)"
    )
    argv = [sys.executable, "-c", made, str(short_path / "lab")]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        pids = [int(pid) for pid in maker.stdout.readline().strip("[]\n").split(",")]
        # Slurm's daemons start helpers that end by themselves.
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert len(pids) >= 6
        maker.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_two_labs_know_nothing_of_each_other(lab, own_lab):
    other = own_lab()
    job = other.sbatch("--job-name=elsewhere", "--wrap=sleep 600")
    other.until_job(job, "RUNNING")
    assert [seen.name for seen in other.queue()] == ["elsewhere"]
    assert lab.queue() == []


def test_a_login_finds_slurm_and_a_home_of_its_own(lab):
    done = login(lab, "pwd && echo $HOME && sbatch --parsable --wrap=true --output=/dev/null")
    *places, job = done.stdout.split()
    assert places == [str(lab.home)] * 2, done.stderr
    lab.until_job(job, "COMPLETED")


def test_the_ssh_server_takes_options_and_gives_them_back(own_lab):
    lab = own_lab()
    lab.sshd_options(env={"PATH": lab.bare_path()})
    assert login(lab, "command -v sbatch || echo no").stdout == "no\n"
    assert login(lab, "bash -lc 'command -v sbatch'").stdout.endswith("/sbatch\n")
    lab.sshd_options("ForceCommand echo refused")
    assert login(lab, "true").stdout == "refused\n"
    lab.sshd_options()
    assert login(lab, "command -v sbatch").stdout.endswith("/sbatch\n")
    lab.change_host_key()
    assert "IDENTIFICATION HAS CHANGED" in login(lab, "true").stderr


def test_cutting_sessions_leaves_the_server(own_lab):
    lab = own_lab()
    argv = login_argv(lab, "echo in; exec sleep 600")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == b"in\n"
        lab.sshd.cut()
        assert session.wait(20) == 255
    assert login(lab, "echo here").stdout == "here\n"


def test_a_full_cluster_says_when_a_job_starts(lab):
    lab.fill(minutes=30)
    job = lab.sbatch("--output=/dev/null", "--wrap=true")
    until(lambda: lab.job(job).reason in ("Resources", "Priority"))
    until(lambda: lab.run("squeue", "-h", "-j", job, "-o", "%S").stdout.strip("N/A\n"))
    lab.free()
    lab.until_job(job, "COMPLETED")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--partition=quick", "--time=10"], "PartitionTimeLimit"),
        (["--partition=staff"], "account"),
        (["--hold"], "JobHeldUser"),
    ],
)
def test_some_jobs_wait_for_ever(lab, args, reason):
    job = lab.sbatch(*args, "--wrap=true")
    until(lambda: reason in lab.job(job).reason)


def test_a_controller_that_is_frozen_or_killed_keeps_its_jobs(own_lab):
    lab = own_lab()
    job = lab.sbatch("--wrap=sleep 600")
    lab.until_job(job, "RUNNING")
    lab.slurmctld.pause()
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(["squeue"], env=lab.env, timeout=1, check=False, capture_output=True)
    lab.slurmctld.resume()
    assert [seen.id for seen in lab.queue()] == [job]
    lab.slurmctld.kill()
    assert not lab.slurmctld.alive
    lab.slurmctld.start()
    lab.until_job(job, "RUNNING")


def test_a_node_that_dies_takes_its_jobs_with_it_and_comes_back(own_lab):
    lab = own_lab(SlurmdTimeout=2)
    job = lab.sbatch("--nodelist=n2", "--no-requeue", "--wrap=sleep 600")
    lab.until_job(job, "RUNNING")
    lab.slurmd["n2"].kill()
    lab.until_job(job, "NODE_FAIL", 90)
    lab.slurmd["n2"].start()
    until(lambda: lab.node_states()["n2"] == "idle", 60)


def test_a_node_has_an_ssh_server_of_its_own_or_the_lab_says_why_not(lab):
    if lab.port_22_problem:
        with pytest.raises(AssertionError, match="run as root"):
            lab.need_port_22()
        return
    lab.need_port_22()
    address = lab.addresses["n1"]
    keys = subprocess.run(["ssh-keyscan", address], capture_output=True, text=True, check=False)
    host_key = (lab.folder / "ssh" / "host_n1.pub").read_text().split()[1]
    assert host_key in keys.stdout


def test_settings_of_slurm_can_be_changed(own_lab):
    lab = own_lab(nodes=1, EnforcePartLimits="ANY")
    refused = lab.run("sbatch", "--partition=quick", "--time=10", "--wrap=true", check=False)
    assert refused.returncode == 1
    assert "time limit" in refused.stderr


def test_serving_for_a_container_runs_jobs_of_people_who_log_in(short_path, lab):
    port, control_port = free_ports(2)
    argv = [
        *(sys.executable, "-m", "tests.lab", "serve", str(short_path / "lab")),
        *("--listen", "127.0.0.1", "--ssh-port", str(port), "--control-port", str(control_port)),
        *("--authorized-key", str(lab.key_file.with_suffix(".pub"))),
    ]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        word, key = served.stdout.readline().split(" ", 1)
        assert word == "host-key"
        known_hosts = short_path / "known_hosts"
        known_hosts.write_text(f"[127.0.0.1]:{port} {key}")
        assert served.stdout.readline() == "ready\n"
        done = subprocess.run(
            [
                *("ssh", "-F", "none", "-o", "BatchMode=yes", "-i", str(lab.key_file)),
                *("-o", f"UserKnownHostsFile={known_hosts}", "-p", str(port)),
                *(f"{lab.user}@127.0.0.1", "sbatch --wait --output=out --wrap=hostname; cat out"),
            ],
            capture_output=True,
            text=True,
        )
        served.send_signal(signal.SIGTERM)
        assert served.wait(30) == 0
    assert os.uname().nodename in done.stdout, done.stderr
    assert not (short_path / "lab").exists()
