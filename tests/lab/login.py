"""What people do on the login host of a lab: commands, jobs, the queue.

State: the dummy jobs of ``fill``.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import until


@dataclass(frozen=True, slots=True)
class Job:
    """A line of squeue; ``node`` is empty while it is pending."""

    id: str
    state: str
    reason: str
    node: str
    partition: str
    name: str


class LoginHost:
    """Slurm as its users see it. ``env`` is the environment of a shell on the login host."""

    def __init__(self, user: str, nodes: Sequence[str], home: Path, env: dict[str, str]) -> None:
        self.user = user
        self.nodes = list(nodes)
        self.home = home
        self.env = env
        self._fillers: list[str] = []

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command; AssertionError with its output when it fails.

        munged hangs up on who says nothing for two seconds: on a machine that stands still for so
        long a command of Slurm dies of SIGPIPE before it has asked for anything. It asks again.
        """
        for _ in range(3):
            done = subprocess.run(
                argv,
                env=self.env,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            if done.returncode != -signal.SIGPIPE:
                break
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def sbatch(self, *args: str) -> str:
        """Submit a job; its id."""
        return self.run("sbatch", "--parsable", *args).stdout.strip()

    # -- jobs ------------------------------------------------------------------------------

    def queue(self) -> list[Job]:
        """Jobs that have not ended (those that are completing among them), oldest first."""
        return self._squeue()

    def jobs(self) -> list[Job]:
        """All jobs that slurmctld still knows, oldest first."""
        return self._squeue("--states=all")

    def _squeue(self, *args: str) -> list[Job]:
        lines = self.run("squeue", "--noheader", "-o", "%i|%T|%r|%N|%P|%j", *args).stdout
        jobs = [Job(*line.split("|", 5)) for line in lines.splitlines()]
        return sorted(jobs, key=lambda job: int(re.split(r"\D", job.id)[0]))

    def job(self, job_id: str) -> Job | None:
        """A job that slurmctld still knows."""
        return next((job for job in self.jobs() if job.id == job_id), None)

    def until_job(self, job_id: str, state: str, seconds: float = 30) -> Job:
        """Wait until a job is in a state."""

        def reached() -> Job | None:
            found = self.job(job_id)
            return found if found is not None and found.state == state else None

        reached.__doc__ = f"job {job_id} {state}"
        return until(reached, seconds)

    # -- nodes -----------------------------------------------------------------------------

    def node_states(self) -> dict[str, str]:
        """As sinfo shows them, for example ``idle`` or ``down*``; empty when slurmctld is away."""
        argv = ("sinfo", "--noheader", "-p", "main", "-N", "-o", "%N %T")
        lines = self.run(*argv, check=False).stdout.splitlines()
        return {name: state for name, state in map(str.split, lines)}

    def is_idle(self) -> bool:
        """Whether every node is idle and a job would be accepted."""
        states = self.node_states()
        return (
            set(states) == set(self.nodes)
            and set(states.values()) == {"idle"}
            and self.run("sbatch", "--test-only", "--wrap=true", check=False).returncode == 0
        )

    def fill(self, *, minutes: int = 60, nodes: Sequence[str] | None = None) -> None:
        """Take every free CPU with dummy jobs, until ``free()``. Slurm estimates that a job which
        waits for them starts in so many minutes.
        """
        for name in nodes or self.nodes:
            shown = self.run("scontrol", "show", "node", name, "-o").stdout
            used, total = (int(_value(shown, key)) for key in ("CPUAlloc", "CPUTot"))
            if used < total:
                what = [
                    f"--time={minutes}",
                    "--job-name=filler",
                    "--output=/dev/null",
                    "--no-requeue",
                ]
                size = ["-n1", f"-c{total - used}", f"--nodelist={name}"]
                self._fillers.append(self.sbatch(*what, *size, "--wrap=exec sleep 3600"))
        for job_id in self._fillers:
            self.until_job(job_id, "RUNNING")

    def free(self) -> None:
        """End the dummy jobs of ``fill``."""
        if self._fillers:
            self.run("scancel", *self._fillers)
            fillers = set(self._fillers)
            until(lambda: not fillers & {job.id for job in self.queue()})
            self._fillers.clear()

    def clear(self) -> None:
        """Cancel every job, wait until they have ended, and put nodes back that a test set down."""
        self._fillers.clear()
        self.run("scancel", f"--user={self.user}")
        for name, state in self.node_states().items():
            if re.search("down|drain", state):
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        until(lambda: not self.queue(), 60)
        until(self.is_idle, 60)


def _value(shown: str, key: str) -> str:
    found = re.search(rf"\b{key}=(\S+)", shown)
    assert found, f"no {key} in {shown}"
    return found[1]
