"""Five thousand requests held at once, then released.

The release is the moment the service becomes healthy: a file appears that its health path looks
for. It is the earliest moment there could be; polling and the paced release come after it.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.bench.client import Crowd, service_info
from tests.bench.figures import Figure, Outcome, span
from tests.bench.machine import memory_bytes
from tests.bench.nginxes import fast_service, say_healthy, starts
from tests.up.product import Product, running
from tests.waiting import until

NAME = "crowd"
SIZE = 5000
ANSWERS_S = 60.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Released:
    """How a crowd ended; seconds after the release."""

    answered: int
    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class Round:
    """One crowd, and what it took: bytes of the gate for each held request."""

    released: Released
    starts: int
    bytes_each: float


def hold_and_release(
    product: Product, name: str, size: int, held: Callable[[], T]
) -> tuple[Released, T]:
    """Let that many wait, look at what ``held`` gives, and make the service healthy."""
    with contextlib.closing(Crowd(product.port, f"/{name}/hello", size)) as crowd:
        until(lambda: service_info(product, name)["waiting"] == size, ANSWERS_S)
        seen = held()
        released = time.monotonic()
        say_healthy(product)
        ended = crowd.collect(ANSWERS_S)
    times = [one.at - released for one in ended]
    answered = sum(one.status == 200 for one in ended)
    return Released(answered, min(times), max(times)), seen


def _hold_and_release(product: Product, size: int) -> Round:
    workers = product.nginx_workers()
    before = memory_bytes(workers)
    released, held = hold_and_release(product, NAME, size, lambda: memory_bytes(workers))
    return Round(released, starts(product), (held - before) / size)


def _one_round(size: int) -> Round:
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Product(Path(folder))
        fast_service(product, NAME, timeout=3600, max_waiting=2 * size)
        with running(product):
            product.up()
            return _hold_and_release(product, size)


def crowd(quick: bool) -> Outcome:
    """All must be answered, by one process, soon, and cost little while they wait."""
    rounds = [_one_round(SIZE) for _ in range(1 if quick else 3)]
    count = len(rounds)
    last = [r.released.last_s for r in rounds]
    memory = [r.bytes_each / 1000 for r in rounds]
    answered = [r.released.answered for r in rounds]
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
        "first_s": [r.released.first_s for r in rounds],
        "last_s": last,
        "kilobytes_each": memory,
    }
    return Outcome(figures, [], raw)
