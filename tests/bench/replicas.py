"""Several replicas of a service: what they answer together, and how evenly the load lies.

A service that takes 50 ms for an answer and eight requests at a time, once with one replica and
once with four, loaded in turns by the same client. Everything is counted by the services.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench import wrk
from tests.bench.figures import Figure, Outcome, middle, paired, span
from tests.bench.slow import (
    TAKE_S,
    mean_in_flight,
    most_in_flight,
    notes,
    rate,
    slow_service,
    until_ready,
)
from tests.up.product import Product, running

REPLICAS = 4
SLOTS = 8
SATURATING = 2 * REPLICAS * SLOTS
HALF = REPLICAS * SLOTS // 2
# At both ends of a round the load comes and goes.
EDGE_S = 0.2
NOTHING = 0.01  # a replica that had nothing to do: what the others are divided by


@dataclass(frozen=True, slots=True)
class Round:
    """One load on one service; ``in_flight`` for each replica, in the mean."""

    rate: float
    in_flight: list[float]
    most: int

    @property
    def spread(self) -> float:
        return max(self.in_flight) / max(NOTHING, min(self.in_flight))


def _load(product: Product, name: str, connections: int, seconds: int) -> Round:
    began = time.monotonic()
    run = wrk.run(f"{product.url}/{name}/", connections, seconds, os.sched_getaffinity(0))
    time.sleep(2 * TAKE_S)  # wrk leaves requests behind
    done = notes(product, name).values()
    begin, end = began + EDGE_S, began + run.seconds - EDGE_S
    return Round(
        rate=sum(rate(one, begin, end) for one in done),
        in_flight=[mean_in_flight(one, begin, end) for one in done],
        most=max(most_in_flight(one) for one in done),
    )


def replicas(quick: bool) -> Outcome:
    """Throughput of four against one, and the spread between them, saturated and half loaded."""
    seconds, count_of_rounds = (1, 1) if quick else (2, 4)
    turns = [("one", SATURATING), ("four", SATURATING), ("four", HALF)]
    rounds: dict[tuple[str, int], list[Round]] = {turn: [] for turn in turns}
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Product(Path(folder))
        for name, count in (("one", 1), ("four", REPLICAS)):
            bounds = {"min": count, "max": count, "max_in_flight": SLOTS}
            slow_service(product, name, replicas=bounds)
        with running(product):
            product.up()
            for name, count in (("one", 1), ("four", REPLICAS)):
                until_ready(product, name, count)
            for _ in range(count_of_rounds):
                for name, connections in turns:
                    rounds[name, connections].append(_load(product, name, connections, seconds))
                turns.reverse()
    return _outcome(*rounds.values())


def _outcome(one: list[Round], four: list[Round], half: list[Round]) -> Outcome:
    count = len(one)
    times = paired([r.rate for r in four], [r.rate for r in one])
    spreads = [
        (f"{SATURATING} clients", [r.spread for r in four]),
        (f"{HALF} clients", [r.spread for r in half]),
    ]
    most = [max(r.most for r in three) for three in zip(one, four, half, strict=True)]
    figures = [
        Figure(
            f"throughput of {REPLICAS} replicas ÷ of one",
            middle(times),
            3.8,
            at_least=True,
            spread=span(times),
            rounds=count,
        ),
        *(
            Figure(
                f"in flight, fullest ÷ emptiest of {REPLICAS} replicas, {load}",
                middle(values),
                1.2,
                digits=3,
                spread=span(values, 3),
                rounds=count,
            )
            for load, values in spreads
        ),
        Figure(
            f"in flight at a replica that takes {SLOTS} (most)",
            max(most),
            SLOTS,
            digits=0,
            spread=span(most, 0),
            rounds=count,
        ),
    ]
    notes_ = [
        f"{SATURATING} clients: one replica {middle([r.rate for r in one]):.0f} requests/s,"
        f" {REPLICAS} replicas {middle([r.rate for r in four]):.0f}; with no time between two"
        f" requests {SLOTS / TAKE_S:.0f} and {REPLICAS * SLOTS / TAKE_S:.0f}"
    ]
    raw: dict[str, object] = {
        "one": [asdict(r) for r in one],
        "four": [asdict(r) for r in four],
        "four_half_loaded": [asdict(r) for r in half],
    }
    return Outcome(figures, notes_, raw)
