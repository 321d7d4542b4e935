"""Requests with the same beginning go to the same replica, as long as the load stays even.

Four replicas of a service that takes 50 ms for an answer, and clients that ask without a pause.
Where a beginning belongs is where it goes while nothing else is asked. Even load: as many clients
belong to each replica, each with a beginning of its own. Hot: half of the clients, or all of them,
have the same beginning. The load is counted by the services.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.asking import ask_for
from tests.bench.figures import Figure, Outcome, middle, span
from tests.bench.slow import TAKE_S, mean_in_flight, notes, slow_service, until_ready
from tests.up.product import Product, running

NAME = "prefixes"
REPLICAS = 4
EACH = 8
CLIENTS = REPLICAS * EACH
HOT = "hot beginning"
# At both ends of a round the load comes and goes.
EDGE_S = 0.2
MOST_BEGINNINGS = 1000


@dataclass(frozen=True, slots=True)
class Round:
    """One load: how many answers came from where their beginning belongs, and the mean number of
    requests in flight at each replica.
    """

    answers: int
    at_home: int
    in_flight: list[float]

    @property
    def percent(self) -> float:
        return 100 * self.at_home / self.answers

    @property
    def busiest(self) -> float:
        return max(self.in_flight) * len(self.in_flight) / sum(self.in_flight)


class Homes:
    """Where beginnings belong, found out by asking with each alone; each is asked once."""

    def __init__(self, product: Product) -> None:
        self._port = product.port
        self._known: dict[str, str] = {}

    def of(self, prefix: str) -> str:
        if prefix not in self._known:
            (answer,) = ask_for(self._port, NAME, [prefix], 0)
            self._known[prefix] = answer.replica
        return self._known[prefix]

    def even(self, each: int) -> list[str]:
        """Beginnings of which as many belong to each replica."""
        chosen: list[str] = []
        counts: Counter[str] = Counter()
        for index in itertools.count():
            assert index < MOST_BEGINNINGS, f"some replica has no beginnings: {counts}"
            prefix = f"beginning {index}"
            home = self.of(prefix)
            if counts[home] < each:
                counts[home] += 1
                chosen.append(prefix)
            if len(chosen) == each * REPLICAS:
                return chosen
        raise AssertionError


@contextlib.contextmanager
def _running() -> Iterator[Product]:
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Product(Path(folder))
        bounds = {"min": REPLICAS, "max": REPLICAS, "target_in_flight": CLIENTS}
        slow_service(product, NAME, models=[NAME], affinity="prefix", replicas=bounds)
        with running(product):
            product.up()
            until_ready(product, NAME, REPLICAS)
            yield product


def _round(product: Product, homes: Homes, prefixes: Sequence[str], seconds: float) -> Round:
    for prefix in prefixes:
        homes.of(prefix)
    time.sleep(2 * TAKE_S)
    began = time.monotonic()
    answers = ask_for(product.port, NAME, prefixes, seconds)
    begin, end = began + EDGE_S, began + seconds - EDGE_S
    return Round(
        answers=len(answers),
        at_home=sum(one.replica == homes.of(one.prefix) for one in answers),
        in_flight=[mean_in_flight(done, begin, end) for done in notes(product, NAME).values()],
    )


def affinity(quick: bool) -> Outcome:
    """How many repeated beginnings reach their replica, and how busy the busiest one is."""
    seconds, count = (1.5, 1) if quick else (3.0, 4)
    seen: dict[str, list[Round]] = {"even": [], "any": [], "half hot": [], "all hot": []}
    with _running() as product:
        homes = Homes(product)
        even, half = homes.even(EACH), homes.even(EACH // 2)
        loads = {
            "even": even,
            "any": [f"another {index}" for index in range(CLIENTS)],
            "half hot": [HOT] * len(half) + half,
            "all hot": [HOT] * CLIENTS,
        }
        for _ in range(count):
            for name, prefixes in loads.items():
                seen[name].append(_round(product, homes, prefixes, seconds))
    return _outcome(seen)


def _outcome(seen: dict[str, list[Round]]) -> Outcome:
    percent = {name: [r.percent for r in rounds] for name, rounds in seen.items()}
    busiest = {name: [r.busiest for r in rounds] for name, rounds in seen.items()}

    def stays(name: str, what: str, bound: float | None) -> Figure:
        values = percent[name]
        spread = span(values, 1, "%")
        return Figure(what, middle(values), bound, "%", True, 1, spread, len(values))

    def above(name: str, what: str, bound: float | None) -> Figure:
        values = busiest[name]
        spread = span(values, 3)
        return Figure(what, middle(values), bound, "", False, 3, spread, len(values))

    figures = [
        stays("even", "repeated beginnings on their replica, even load", 95),
        stays("any", f"repeated beginnings on their replica, any {CLIENTS}", None),
        above("half hot", "busiest replica ÷ mean, one beginning has half of the load", 1.3),
        above("all hot", "busiest replica ÷ mean, one beginning has all of the load", 1.3),
    ]
    notes_ = [
        f"{name}: {middle(percent[name]):.1f} % at home, busiest ÷ mean"
        f" {middle(busiest[name]):.3f}, {middle([r.answers for r in rounds]):,.0f} answers a round"
        for name, rounds in seen.items()
    ]
    return Outcome(figures, notes_, {n: [asdict(r) for r in rounds] for n, rounds in seen.items()})
