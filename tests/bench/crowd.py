"""Five thousand requests held at once, then released.

The release is the moment the service becomes healthy: a file appears that its health path looks
for. It is the earliest moment there could be; polling and the paced release come after it.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.client import Crowd, service_info
from tests.bench.figures import Figure, Outcome, span
from tests.bench.machine import memory_bytes
from tests.bench.nginxes import fast_service, say_healthy, starts
from tests.up.product import Product, running
from tests.waiting import until

SIZE = 5000
ANSWERS_S = 60.0


@dataclass(frozen=True, slots=True)
class Round:
    """One crowd: seconds after the release, bytes of the gate for each held request."""

    answered: int
    starts: int
    first_s: float
    last_s: float
    bytes_each: float


def _hold_and_release(product: Product, size: int) -> Round:
    workers = product.nginx_workers()
    before = memory_bytes(workers)
    with contextlib.closing(Crowd(product.port, "/crowd/hello", size)) as crowd:
        until(lambda: service_info(product, "crowd")["waiting"] == size, ANSWERS_S)
        held = memory_bytes(workers)
        released = time.monotonic()
        say_healthy(product)
        ended = crowd.collect(ANSWERS_S)
    times = [one.at - released for one in ended]
    return Round(
        answered=sum(one.status == 200 for one in ended),
        starts=starts(product),
        first_s=min(times),
        last_s=max(times),
        bytes_each=(held - before) / size,
    )


def _one_round(size: int) -> Round:
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Product(Path(folder))
        fast_service(product, "crowd", timeout=3600, max_waiting=2 * size)
        with running(product):
            product.up()
            return _hold_and_release(product, size)


def crowd(quick: bool) -> Outcome:
    """All must be answered, by one process, soon, and cost little while they wait."""
    rounds = [_one_round(SIZE) for _ in range(1 if quick else 3)]
    count = len(rounds)
    last = [r.last_s for r in rounds]
    memory = [r.bytes_each / 1000 for r in rounds]
    answered = [r.answered for r in rounds]
    begun = [r.starts for r in rounds]
    figures = [
        Figure(
            f"{SIZE:,} held, answered 200 (fewest)",
            min(answered),
            SIZE,
            at_least=True,
            digits=0,
            spread=span(answered, 0),
            rounds=count,
        ),
        Figure("starts for them (most)", max(begun), 1, "", False, 0, span(begun, 0), count),
        Figure("release → last answer (slowest)", max(last), 2, "s", False, 2, span(last), count),
        Figure(
            "gate memory per held request (most)",
            max(memory),
            20,
            "KB",
            False,
            1,
            span(memory, 1),
            count,
        ),
    ]
    raw: dict[str, object] = {
        "answered": answered,
        "starts": begun,
        "first_s": [r.first_s for r in rounds],
        "last_s": last,
        "kilobytes_each": memory,
    }
    return Outcome(figures, [], raw)
