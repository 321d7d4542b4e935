"""Three thousand requests held at once, then released through one tunnel.

The release is the moment the service becomes healthy, as in ``crowd``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tests.bench.client import stop
from tests.bench.crowd import Released, hold_and_release
from tests.bench.figures import Figure, Outcome, span
from tests.bench.nginxes import fast_script
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


@dataclass(frozen=True, slots=True)
class Round:
    """One crowd, and what it took."""

    released: Released
    jobs: int
    tunnels: int


def _one_round(product: ClusterProduct, lab: WatchedLab) -> Round:
    before = _submissions(lab)
    released, _open = hold_and_release(product, NAME, SIZE, lambda: until(product.tunnels))
    seen = Round(released, _submissions(lab) - before, len(product.tunnels()))
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
        rounds = [_one_round(product, lab) for _ in range(1 if quick else 3)]
    count = len(rounds)
    answered, jobs, last = (
        [r.released.answered for r in rounds],
        [max(r.jobs, r.tunnels) for r in rounds],
        [r.released.last_s for r in rounds],
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
