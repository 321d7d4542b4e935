"""A cluster whose login host notes every scheduler command, and services that are its jobs.

The commands are wrapped by scripts that come first in the PATH of ssh sessions and note when the
real one began and ended; that costs each command about 2 ms. When a job became RUNNING is what
slurmctld says in its log, to the millisecond. All moments are seconds of the wall clock, which is
the same for everybody on the one machine that plays all of the cluster.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.bench.client import ask, service_info
from tests.bench.cold import SERVICE
from tests.lab.lab import Lab
from tests.slurm.product import ClusterProduct, serving
from tests.waiting import until

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacct")
WRAPPER = """\
#!/bin/bash
began=$EPOCHREALTIME
{command} "$@"
code=$?
echo "{name} $began $EPOCHREALTIME" >>"{notes}"
exit $code
"""
STARTED = r"^\[(\S+)\] .*(?:Started JobId={0} |Allocate JobId={0} )"


@dataclass(frozen=True, slots=True)
class Command:
    """One scheduler command that came over ssh."""

    program: str
    began: float
    ended: float


class WatchedLab(Lab):
    """A lab that notes what is asked of its login host."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, LogTimeFormat="rfc5424_ms")
        self._notes = folder / "commands"

    def watch(self) -> None:
        """From now on the commands of ssh sessions are noted."""
        wrappers = self.folder / "wrappers"
        wrappers.mkdir()
        path = self.env["PATH"]
        self._notes.touch()
        for name in COMMANDS:
            wrapper = wrappers / name
            command = self.run("which", name).stdout.strip()
            wrapper.write_text(WRAPPER.format(name=name, command=command, notes=self._notes))
            wrapper.chmod(0o755)
        self.sshd_options(env={"PATH": f"{wrappers}:{path}"})

    def commands(self) -> list[Command]:
        """All that have ended, in the order of their ends."""
        lines = self._notes.read_text().splitlines()
        return [Command(name, float(b), float(e)) for name, b, e in map(str.split, lines)]

    def running_at(self, job_id: str) -> float:
        """When a job became RUNNING the last time."""
        log = (self.folder / "log" / "slurmctld.log").read_text()
        found = re.findall(STARTED.format(job_id), log, re.MULTILINE)
        assert found, f"slurmctld does not say when job {job_id} started"
        return datetime.fromisoformat(found[-1]).timestamp()


@contextlib.contextmanager
def watched_lab() -> Iterator[WatchedLab]:
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        lab = WatchedLab(Path(folder) / "lab")
        with lab:
            lab.watch()
            yield lab


@contextlib.contextmanager
def gate_before(lab: Lab, **top: Any) -> Iterator[ClusterProduct]:
    """The product, in a folder of its own; configure its services, then start it."""
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        with serving(ClusterProduct(Path(folder), lab, **top)) as product:
            yield product


def light_script(lab: Lab) -> str:
    """A job script: the service that starts fast, on the node's own address."""
    return lab.script(
        "light.sh",
        f'BENCH_HOST="$({lab.address_script})"\nexport BENCH_HOST\n'
        f'exec "{sys.executable}" -S -E "{SERVICE}" "$1"',
    )


def cluster_service(product: ClusterProduct, name: str, script: str, **fields: Any) -> None:
    """Configure a service that is a job."""
    ssh = product.lab.ssh_fields()
    product.service(name, script, **{"launcher": "slurm", "timeout": 3600, **ssh, **fields})


def replica(product: ClusterProduct, name: str) -> dict[str, Any]:
    """The one replica of a service, as the backend shows it."""
    (found,) = service_info(product, name)["replicas"]
    return dict(found)


def no_jobs(lab: Lab) -> None:
    """Wait until every job has ended."""
    until(lambda: not lab.queue(), 60)


# -- by hand -----------------------------------------------------------------------------------


def ssh_by_hand(lab: Lab, *words: str) -> list[str]:
    """The ssh command of somebody who works on this cluster."""
    options = ("-F", "none", "-o", "BatchMode=yes", "-o", f"UserKnownHostsFile={lab.known_hosts}")
    where = ("-i", str(lab.key_file), "-p", str(lab.place.ssh_port))
    return ["ssh", *options, *where, *words, f"{lab.user}@{lab.address}"]


class Shell:
    """A shell on the login host, as somebody has it open who works there."""

    def __init__(self, lab: Lab) -> None:
        argv = [*ssh_by_hand(lab), "/bin/sh"]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, line: str) -> str:
        """Give what a command says."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\necho .\n")
        self._process.stdin.flush()
        said: list[str] = []
        for answer in self._process.stdout:
            if answer == ".\n":
                return "".join(said).strip()
            said.append(answer)
        raise AssertionError(f"the shell on the login host ended at: {line}")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


@contextlib.contextmanager
def forwarded(lab: Lab, here: str, address: str, port: int) -> Iterator[int]:
    """Run ``ssh -N -L`` from ``here``, ``host:port`` or a path, to a port of a node; its pid.

    It may not yet listen.
    """
    argv = ssh_by_hand(lab, "-N", "-L", f"{here}:{address}:{port}")
    # Refused connections are what it says while the service loads.
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()  # asked to end, it may wait for connections that go on
        process.wait(20)


def until_healthy(port: int, seconds: float = 30) -> None:
    """Ask ten times a second."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if ask(port, "/health").status == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"not healthy within {seconds} s")
