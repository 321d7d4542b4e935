"""Load from wrk, with its report as numbers."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

REPORT = Path(__file__).with_name("report.lua")


@dataclass(frozen=True, slots=True)
class Run:
    """One run; the median latency in microseconds."""

    requests: int
    seconds: float
    median_us: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True, slots=True)
class Post:
    """A request with a JSON body and a key."""

    body: str
    token: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """What tells it to the script; no other user of the machine can read it there."""
        return {"BENCH_BODY": self.body, "BENCH_TOKEN": self.token}


def run(url: str, connections: int, seconds: int, cores: set[int], post: Post | None = None) -> Run:
    """Ask as fast as the answers come, on kept connections; every answer must be good."""
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(REPORT), url]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=seconds + 30,
        check=True,
        preexec_fn=partial(os.sched_setaffinity, 0, cores),
        env={**os.environ, **(post.environment() if post else {})},
    )
    report = json.loads(done.stdout.rsplit("REPORT ", 1)[1])
    assert report["failed"] == 0, f"{report['failed']} requests failed"
    return Run(report["requests"], report["us"] / 1e6, report["median_us"])
