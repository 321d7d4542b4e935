"""One replica that takes one request at a time, and two hundred that want it at once."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.client import Crowd
from tests.bench.figures import Figure, Outcome, middle, span
from tests.bench.slow import TAKE_S, most_in_flight, notes, share_in_use, slow_service, until_ready
from tests.up.product import Product, running

NAME = "slot"
SIZE, QUICK_SIZE = 200, 100


@dataclass(frozen=True, slots=True)
class Round:
    """One crowd: its longest wait in seconds, answer included, and what the service saw of it."""

    answered: int
    in_use: float
    most: int
    longest_s: float
    ideal_s: float


def _one_round(product: Product, size: int) -> Round:
    ideal_s = size * TAKE_S
    began = time.monotonic()
    with contextlib.closing(Crowd(product.port, f"/{NAME}/", size)) as crowd:
        ended = crowd.collect(4 * ideal_s)
    (done,) = notes(product, NAME).values()
    done = [work for work in done if work.begun > began]
    return Round(
        answered=sum(one.status == 200 for one in ended),
        in_use=share_in_use(done),
        most=most_in_flight(done),
        longest_s=max(one.at for one in ended) - began,
        ideal_s=ideal_s,
    )


def slot(quick: bool) -> Outcome:
    """How much of the time the slot is in use, and how long the last one waits."""
    size, count = (QUICK_SIZE, 1) if quick else (SIZE, 3)
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Product(Path(folder), gate={"workers": 2})
        slow_service(product, NAME, replicas={"min": 1, "max": 1, "max_in_flight": 1})
        with running(product):
            product.up()
            until_ready(product, NAME, 1)
            rounds = [_one_round(product, size) for _ in range(count)]
    return _outcome(size, rounds)


def _outcome(size: int, rounds: list[Round]) -> Outcome:
    count = len(rounds)
    in_use = [100 * r.in_use for r in rounds]
    longest = [r.longest_s / r.ideal_s for r in rounds]
    answered, most = [r.answered for r in rounds], [r.most for r in rounds]
    figures = [
        Figure(
            f"{size} wait for one slot, in use",
            middle(in_use),
            95,
            "%",
            at_least=True,
            digits=1,
            spread=span(in_use, 1, "%"),
            rounds=count,
        ),
        Figure(
            "longest wait ÷ ideal",
            middle(longest),
            1.2,
            digits=3,
            spread=span(longest, 3),
            rounds=count,
        ),
        Figure("answered 200 (fewest)", min(answered), size, "", True, 0, span(answered, 0), count),
        Figure("in the slot at once (most)", max(most), 1, "", False, 0, span(most, 0), count),
    ]
    return Outcome(figures, [], {"rounds": [asdict(r) for r in rounds]})
