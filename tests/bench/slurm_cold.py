"""Cold starts on a cluster, through the gate and by hand, in turns.

By hand: ``sbatch`` in a shell that is open on the login host, ``squeue`` there once a second until
the job runs, ``ssh -N -L`` to its node, ten health requests a second until one is good, then the
request. Through the gate: the request, from a client that knows nothing.

The service is healthy as soon as its process runs. Slurm starts jobs up to a second after they were
submitted, so every start waits for a random part of a second first.
"""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import asdict, dataclass

from tests.bench.client import ask, stop
from tests.bench.cold import STARTS_AN_HOUR
from tests.bench.figures import Figure, Outcome, middle, paired, quartiles
from tests.bench.slurm_lab import (
    Shell,
    WatchedLab,
    cluster_service,
    forwarded,
    gate_before,
    light_script,
    no_jobs,
    replica,
    until_healthy,
    watched_lab,
)
from tests.slurm.product import ClusterProduct
from tests.up.product import free_port

NAME = "cold"


@dataclass(frozen=True, slots=True)
class Start:
    """The parts of one cold start through the gate, in seconds, in this order."""

    until_sbatch: float
    sbatch: float
    queued: float
    until_tunnel: float
    until_answer: float

    @property
    def until_accepted(self) -> float:
        return self.until_sbatch + self.sbatch

    @property
    def whole(self) -> float:
        return self.until_accepted + self.queued + self.until_tunnel + self.until_answer


def _through_the_gate(product: ClusterProduct, lab: WatchedLab) -> Start:
    sent = time.time()
    answer = ask(product.port, f"/{NAME}/")
    answered = time.time()
    assert answer.status == 200, answer
    (submission,) = (c for c in lab.commands() if c.program == "sbatch" and c.began >= sent)
    shown = replica(product, NAME)
    running = lab.running_at(shown["job_id"])
    # ssh makes its socket when it has logged in, and listens in the same moment.
    (socket,) = product.run_dir.rglob(f"{shown['id']}*.sock")
    opened = socket.stat().st_ctime
    stop(product, NAME)
    return Start(
        until_sbatch=submission.began - sent,
        sbatch=submission.ended - submission.began,
        queued=running - submission.ended,
        until_tunnel=opened - running,
        until_answer=answered - opened,
    )


def _by_hand(lab: WatchedLab, shell: Shell, script: str) -> float:
    port = free_port()
    began = time.monotonic()
    job = shell.run(f"sbatch --parsable --output=/dev/null {script} {port}")
    while (seen := shell.run(f"squeue -h -j {job} -o '%T %N'").split())[0] != "RUNNING":
        time.sleep(1)
    here = free_port()
    with forwarded(lab, f"127.0.0.1:{here}", lab.addresses[seen[1]], port):
        until_healthy(here)
        answer = ask(here, "/")
        ended = time.monotonic()
    assert answer.status == 200, answer
    shell.run(f"scancel {job}")
    return ended - began


def slurm_cold(quick: bool) -> Outcome:
    """The way of a cold request, and how long it takes beside the same done by hand."""
    by_hand: list[float] = []
    gate: list[Start] = []
    with watched_lab() as lab, gate_before(lab) as product:
        script = light_script(lab)
        cluster_service(product, NAME, script, max_starts_per_hour=STARTS_AN_HOUR)
        product.up()
        with contextlib.closing(Shell(lab)) as shell:
            _through_the_gate(product, lab)  # the SSH connection is up for the others

            def one_by_hand() -> None:
                by_hand.append(_by_hand(lab, shell, script))

            def one_through_the_gate() -> None:
                gate.append(_through_the_gate(product, lab))

            turns = [one_by_hand, one_through_the_gate]
            for _ in range(5 if quick else 20):
                for turn in turns:
                    no_jobs(lab)
                    time.sleep(random.random())
                    turn()
                turns.reverse()
    return _outcome(by_hand, gate)


def _outcome(by_hand: list[float], gate: list[Start]) -> Outcome:
    accepted = [1000 * start.until_accepted for start in gate]
    tunnel = [start.until_tunnel for start in gate]
    whole = paired([start.whole for start in gate], by_hand)
    count = len(gate)
    figures = [
        Figure(
            "Slurm: request → sbatch accepted, median",
            middle(accepted),
            150,
            "ms",
            digits=0,
            spread=quartiles(accepted, 0, "ms"),
            rounds=count,
        ),
        Figure(
            "Slurm: job RUNNING → tunnel open, median",
            middle(tunnel),
            1.5,
            "s",
            spread=quartiles(tunnel, 2, "s"),
            rounds=count,
        ),
        Figure(
            "Slurm: cold start ÷ by hand, median",
            middle(whole),
            1.1,
            spread=quartiles(whole),
            rounds=count,
        ),
    ]
    parts = {
        "request → sbatch": [start.until_sbatch for start in gate],
        "sbatch": [start.sbatch for start in gate],
        "accepted → RUNNING": [start.queued for start in gate],
        "RUNNING → tunnel open": tunnel,
        "tunnel open → answer": [start.until_answer for start in gate],
    }
    notes = [
        f"by hand {middle(by_hand):.2f} s, through the gate"
        f" {middle([start.whole for start in gate]):.2f} s (medians); of that "
        + ", ".join(f"{name} {middle(part):.3f} s" for name, part in parts.items())
    ]
    raw: dict[str, object] = {"by_hand_s": by_hand, "gate_s": [asdict(start) for start in gate]}
    return Outcome(figures, notes, raw)
