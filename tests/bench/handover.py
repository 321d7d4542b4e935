"""A job near its time limit gives way to the next one, under a constant load.

Jobs of one minute, the shortest that Slurm knows, each replaced after half of its time. A change
lasts from two seconds before the new replica has its first request until two seconds after the old
one has gone; before it is all the time since the last change.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from slurmgate.starts import quantile
from tests.bench.client import service_info
from tests.bench.figures import Figure, Outcome, middle, paired, span
from tests.bench.slow import TAKE_S, slow_command, slow_fields, until_ready
from tests.bench.slurm_lab import cluster_service, gate_before, watched_lab
from tests.bench.steady import Asked, Steady
from tests.slurm.product import ClusterProduct
from tests.waiting import until

NAME = "handover"
RATE = 200
LIMIT_S = 60
MARGIN_S = 2.0
LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Change:
    """One replica's place taken by another; moments of the monotonic clock."""

    first_there: float
    old_gone: float

    def holds(self, moment: float) -> bool:
        return self.first_there - MARGIN_S <= moment <= self.old_gone + MARGIN_S


@dataclass(frozen=True, slots=True)
class Compared:
    """The times of the answers before and during one change, in milliseconds."""

    before_p99: float
    during_p99: float
    during_worst: float
    before: int
    during: int


class Ends:
    """When each replica of the service was shown for the last time."""

    def __init__(self, product: ClusterProduct) -> None:
        self._product = product
        self._here: set[str] = set()
        self.gone: dict[str, float] = {}

    def look(self) -> None:
        shown = {replica["id"] for replica in service_info(self._product, NAME)["replicas"]}
        now = time.monotonic()
        self.gone.update((replica, now) for replica in self._here - shown)
        self._here = shown


def _until_gone(ends: Ends, count: int, seconds: float) -> None:
    def gone() -> bool:
        """As many replicas have been replaced"""
        ends.look()
        time.sleep(LOOK_S)
        return len(ends.gone) >= count

    until(gone, seconds)


def _changes(answers: list[Asked], gone: dict[str, float]) -> list[Change]:
    """In order; pure. An answer that no replica gave belongs to none."""
    first: dict[str, float] = {}
    for one in sorted(answers, key=lambda answer: answer.sent):
        if one.replica:
            first.setdefault(one.replica, one.sent)
    order = list(first)
    return [Change(first[new], gone[old]) for old, new in itertools.pairwise(order) if old in gone]


def _compare(answers: list[Asked], changes: list[Change]) -> list[Compared]:
    """Pure. Requests during a change belong to no other's time before."""
    compared = []
    since = -math.inf
    for change in changes:
        before = [a for a in answers if since < a.due and a.due < change.first_there - MARGIN_S]
        during = [a for a in answers if change.holds(a.due)]
        times = [a.took_ms for a in during]
        compared.append(
            Compared(
                before_p99=quantile([a.took_ms for a in before], 0.99),
                during_p99=quantile(times, 0.99),
                during_worst=max(times),
                before=len(before),
                during=len(during),
            )
        )
        since = change.old_gone + MARGIN_S
    return compared


def handover(quick: bool) -> Outcome:
    """What the clients of a job notice when its time is over: nothing, it should be."""
    wanted = 1 if quick else 2
    with watched_lab() as lab, gate_before(lab) as product:
        script = lab.script(
            "slow.sh",
            f'BENCH_HOST="$({lab.address_script})"\nexport BENCH_HOST\n{slow_command()}',
        )
        fields = slow_fields(
            product,
            NAME,
            sbatch_args=["--time=1"],
            renew_before=LIMIT_S / 2,
        )
        cluster_service(product, NAME, script, **fields)
        product.up()
        until_ready(product, NAME, 1)
        ends = Ends(product)
        with Steady(product.port, f"/{NAME}/", RATE) as load:
            _until_gone(ends, wanted, wanted * LIMIT_S)
            time.sleep(MARGIN_S)
        answers = load.finish()
    changes = _changes(answers, ends.gone)
    assert len(changes) >= wanted, "a replica had no successor"
    return _outcome(answers, _compare(answers, changes))


def _outcome(answers: list[Asked], compared: list[Compared]) -> Outcome:
    count = len(compared)
    failed = sum(one.status != 200 for one in answers)

    def of(value: Callable[[Compared], float]) -> list[float]:
        return [value(one) for one in compared]

    ratio = paired(of(lambda one: one.during_p99), of(lambda one: one.before_p99))
    worst = of(lambda one: one.during_worst)
    figures = [
        Figure(
            f"Slurm: failed of {len(answers):,} requests over {count} hand-overs",
            failed,
            0,
            digits=0,
            rounds=count,
        ),
        Figure(
            "Slurm: p99 during a hand-over ÷ before",
            middle(ratio),
            2,
            spread=span(ratio),
            rounds=count,
        ),
        Figure(
            "Slurm: slowest answer during a hand-over",
            max(worst),
            None,
            "ms",
            digits=0,
            spread=span(worst, 0, "ms"),
            rounds=count,
        ),
    ]
    notes = [
        f"{RATE} requests a second of {1000 * TAKE_S:.0f} ms: p99 before"
        f" {middle(of(lambda one: one.before_p99)):.0f} ms, during"
        f" {middle(of(lambda one: one.during_p99)):.0f} ms (medians)"
    ]
    return Outcome(figures, notes, {"hand_overs": [asdict(one) for one in compared]})
