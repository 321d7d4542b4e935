"""Several replicas of a service: what they answer together, and how evenly the load lies.

A service that takes 50 ms for an answer and eight requests at a time, once with one replica and
once with four, loaded in turns by the same client. Everything is counted by the services.

Four replicas need processors for four times the requests. Turns in which the machine had no time to
spare, whoever used it, are repeated, whatever their result was.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench import wrk
from tests.bench.figures import Figure, Outcome, middle, paired, span
from tests.bench.machine import machine_busy_seconds
from tests.bench.slow import (
    TAKE_S,
    Work,
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
# Share of the processors' time that may be used in a round that counts.
SPARE = 0.85
# How many times as many turns as wanted, to get that many with time to spare.
PATIENCE = 1.5


@dataclass(frozen=True, slots=True)
class Round:
    """One load on one service; ``in_flight`` for each replica, in the mean.

    ``busy`` is how much of the time of all processors was used.
    """

    rate: float
    in_flight: list[float]
    most: int
    busy: float

    @property
    def spread(self) -> float:
        return max(self.in_flight) / max(NOTHING, min(self.in_flight))


@dataclass(frozen=True, slots=True)
class Turn:
    """One replica and four under the same load, and four half loaded."""

    one: Round
    four: Round
    half: Round


def _within(done: Iterable[Work], began: float, end: float) -> list[Work]:
    """Leave out what wrk's clients of this round and the one before left when they hung up."""
    return [work for work in done if began <= work.begun < end]


def _load(product: Product, name: str, connections: int, seconds: int) -> Round:
    cores = os.sched_getaffinity(0)
    began, busy = time.monotonic(), machine_busy_seconds()
    run = wrk.run(f"{product.url}/{name}/", connections, seconds, cores)
    busy = (machine_busy_seconds() - busy) / (time.monotonic() - began) / len(cores)
    time.sleep(2 * TAKE_S)  # wrk leaves requests behind
    done = notes(product, name).values()
    begin, end = began + EDGE_S, began + run.seconds - EDGE_S
    return Round(
        rate=sum(rate(one, begin, end) for one in done),
        in_flight=[mean_in_flight(one, begin, end) for one in done],
        most=max(most_in_flight(_within(one, began, end)) for one in done),
        busy=busy,
    )


@contextlib.contextmanager
def _running() -> Iterator[Product]:
    """``one`` and ``four`` are the same service with as many replicas, all ready."""
    counts = {"one": 1, "four": REPLICAS}
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Product(Path(folder))
        for name, count in counts.items():
            bounds = {"min": count, "max": count, "max_in_flight": SLOTS}
            slow_service(product, name, replicas=bounds)
        with running(product):
            product.up()
            for name, count in counts.items():
                until_ready(product, name, count)
            yield product


def _turn(product: Product, seconds: int, *, reverse: bool) -> Turn:
    loads = [("one", SATURATING), ("four", SATURATING), ("four", HALF)]
    order = reversed(loads) if reverse else loads
    rounds = {load: _load(product, *load, seconds) for load in order}
    return Turn(*(rounds[load] for load in loads))


def replicas(quick: bool) -> Outcome:
    """Throughput of four against one, and the spread between them, saturated and half loaded."""
    seconds, wanted = (1, 1) if quick else (2, 4)
    made: list[Turn] = []
    with _running() as product:
        while len(made) < PATIENCE * wanted and sum(map(_calm, made)) < wanted:
            # Nobody always follows the same one.
            made.append(_turn(product, seconds, reverse=len(made) % 2 == 1))
    return _outcome(list(filter(_calm, made)) or made, made)


def _calm(turn: Turn) -> bool:
    return all(one.busy <= SPARE for one in (turn.one, turn.four, turn.half))


def _outcome(turns: list[Turn], made: list[Turn]) -> Outcome:
    one, four, half = [t.one for t in turns], [t.four for t in turns], [t.half for t in turns]
    count = len(turns)
    times = paired([r.rate for r in four], [r.rate for r in one])
    spreads = [
        (f"{SATURATING} clients", [r.spread for r in four]),
        (f"{HALF} clients", [r.spread for r in half]),
    ]
    most = [max(r.most for r in (t.one, t.four, t.half)) for t in turns]
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
        f" requests {SLOTS / TAKE_S:.0f} and {REPLICAS * SLOTS / TAKE_S:.0f}",
        f"{sum(map(_calm, made))} of {len(made)} turns left the machine time to spare; with"
        f" {REPLICAS} replicas it was busy {middle([r.busy for r in four]):.0%}",
    ]
    return Outcome(figures, notes_, {"turns": [asdict(turn) for turn in made]})
