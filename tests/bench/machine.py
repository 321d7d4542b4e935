"""The machine: what it is, CPU time and memory of processes, which core does what."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slurmgate.nginx import find_nginx

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores a comparison uses: the proxy has one of its own, so that only it is the narrow
    place; the client and the service share another (a third, if there is one, is the service's).
    On a machine with one core all are the same.
    """

    proxy: set[int]
    client: set[int]
    service: set[int]

    @staticmethod
    def of_this_machine() -> Cores:
        usable = sorted(os.sched_getaffinity(0))
        return Cores({usable[0]}, {usable[min(1, len(usable) - 1)]}, {usable[-1]})


def pin(pids: Iterable[int], cores: set[int]) -> None:
    """Let processes run on these cores only."""
    for pid in pids:
        os.sched_setaffinity(pid, cores)


@contextlib.contextmanager
def staying_on(cores: set[int]) -> Iterator[None]:
    """Keep this thread on these cores, and the processes that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_seconds(pids: Iterable[int]) -> float:
    """Give the CPU time processes have used since their start, with all their threads."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def machine_busy_seconds() -> float:
    """Give the CPU time of all processes, with what other guests took from the machine.

    Without interrupts: on loopback they carry the packets of the processes that are measured, and
    are counted for nobody.
    """
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, _hard, _soft, stolen = map(int, fields[:8])
    return (user + nice + system + stolen) / TICKS


class Others:
    """What the machine does beside these processes, this one and those it started and awaited."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._began = time.monotonic()
        self._before = self._used()

    def _used(self) -> float:
        usages = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        ours = cpu_seconds(self._pids) + sum(usage.ru_utime + usage.ru_stime for usage in usages)
        return machine_busy_seconds() - ours

    def cores(self) -> float:
        """Cores it used for that since this was made."""
        return (self._used() - self._before) / (time.monotonic() - self._began)


def memory_bytes(pids: Iterable[int]) -> int:
    """Give the memory of processes; a page they share is divided among them."""
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        assert found is not None
        total += int(found[1]) * 1024
    return total


def allow_open_files(wanted: int) -> None:
    """Raise the soft limit of open files, for this process and those it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard >= wanted, f"open files: at most {hard}"
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def facts() -> dict[str, object]:
    """Describe the machine, without names of hosts or places."""
    version = subprocess.run([find_nginx(), "-v"], capture_output=True, text=True, check=True)
    models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "nginx": version.stderr.strip().removeprefix("nginx version: "),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }
