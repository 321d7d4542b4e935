"""Three thousand requests held at once, then released through one tunnel.

The release is the moment the service becomes healthy, as in ``crowd``.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass

from tests.bench.client import Crowd, service_info, stop
from tests.bench.figures import Figure, Outcome, span
from tests.bench.nginxes import fast_script, say_healthy
from tests.bench.slurm_lab import (
    WatchedLab,
    cluster_service,
    gate_before,
    no_jobs,
    watched_lab,
)
from tests.slurm.product import ClusterProduct
from tests.waiting import until

NAME = "crowd"
SIZE = 3000
ANSWERS_S = 60.0


@dataclass(frozen=True, slots=True)
class Round:
    """One crowd; seconds after the release."""

    answered: int
    jobs: int
    tunnels: int
    first_s: float
    last_s: float


def _hold_and_release(product: ClusterProduct, lab: WatchedLab) -> Round:
    before = _submissions(lab)
    with contextlib.closing(Crowd(product.port, f"/{NAME}/hello", SIZE)) as crowd:
        until(lambda: service_info(product, NAME)["waiting"] == SIZE, ANSWERS_S)
        until(product.tunnels)
        released = time.monotonic()
        say_healthy(product)
        ended = crowd.collect(ANSWERS_S)
    times = [one.at - released for one in ended]
    seen = Round(
        answered=sum(one.status == 200 for one in ended),
        jobs=_submissions(lab) - before,
        tunnels=len(product.tunnels()),
        first_s=min(times),
        last_s=max(times),
    )
    assert len(product.live(NAME)) == 1
    stop(product, NAME)
    (product.folder / "healthy").unlink()
    no_jobs(lab)
    return seen


def _submissions(lab: WatchedLab) -> int:
    return sum(command.program == "sbatch" for command in lab.commands())


def slurm_crowd(quick: bool) -> Outcome:
    """All must be answered, by one job, soon."""
    with watched_lab() as lab, gate_before(lab) as product:
        script = lab.script("fast.sh", fast_script(product.folder, f"$({lab.address_script})"))
        cluster_service(product, NAME, script, max_waiting=2 * SIZE)
        product.up()
        rounds = [_hold_and_release(product, lab) for _ in range(1 if quick else 3)]
    count = len(rounds)
    answered, jobs, last = (
        [r.answered for r in rounds],
        [max(r.jobs, r.tunnels) for r in rounds],
        [r.last_s for r in rounds],
    )
    figures = [
        Figure(
            f"Slurm: {SIZE:,} held, answered 200 (fewest)",
            min(answered),
            SIZE,
            at_least=True,
            digits=0,
            spread=span(answered, 0),
            rounds=count,
        ),
        Figure(
            "Slurm: jobs and tunnels for them (most)",
            max(jobs),
            1,
            "",
            False,
            0,
            span(jobs, 0),
            count,
        ),
        Figure(
            "Slurm: release → last answer (slowest)",
            max(last),
            2.5,
            "s",
            False,
            2,
            span(last),
            count,
        ),
    ]
    return Outcome(figures, [], {"rounds": [asdict(r) for r in rounds]})
