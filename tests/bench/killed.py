"""A replica killed under load: what its clients notice, and how soon nothing goes there any more.

Every request that the gate sends to a dead process is an error line of nginx with the address it
was sent to. The moments here are those when such a line was read, so they are late rather than
early; that of the kill is the one right before it.
"""

from __future__ import annotations

import os
import random
import re
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slurmgate.starts import quantile
from tests.bench.figures import Figure, Outcome, middle, span
from tests.bench.slow import ready, slow_service, until_ready
from tests.bench.steady import Asked, Steady
from tests.up.product import Product, running
from tests.waiting import until

NAME = "killed"
REPLICAS = 3
RATE = 200
BEFORE_S = 1.0
# Long enough to see a request that goes astray late, and those that wait for the next replica.
AFTER_S = 2.0
TRIED = re.compile(r'while (?:connecting|sending|reading).* upstream: "http://([^/"]+)')


class Watched(Product):
    """Notes when it read each line of its log."""

    def __init__(self, folder: Path, **top: Any) -> None:
        super().__init__(folder, **top)
        self.read: list[tuple[float, str]] = []
        self.expected.append(TRIED.pattern)

    def _collect(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self.read.append((time.monotonic(), line))
                self.log.append(line.rstrip("\n"))

    def tries_in_vain(self, begin: float, end: float) -> list[tuple[float, str]]:
        """When, and to which address, something was sent for nothing."""
        found = ((at, TRIED.search(line)) for at, line in list(self.read) if begin <= at <= end)
        return [(at, match[1]) for at, match in found if match]


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill, by the machine's clock; ``in_vain`` are the moments after it."""

    at: float
    in_vain_ms: list[float]

    @property
    def last_ms(self) -> float:
        return max(self.in_vain_ms, default=0.0)


def _kill(product: Watched) -> Kill:
    """Kill one replica out of those that are ready, and wait until there are as many again."""
    victim = random.choice(ready(product, NAME))
    time.sleep(BEFORE_S + random.random() / 10)
    at = time.monotonic()
    os.kill(int(victim["job_id"]), signal.SIGKILL)
    time.sleep(AFTER_S)
    tries = product.tries_in_vain(at, at + AFTER_S)
    assert len({address for _moment, address in tries}) <= 1, "others are out of reach, too"

    def replaced() -> bool:
        """Another replica is ready in its place"""
        now = ready(product, NAME)
        return len(now) == REPLICAS and victim["id"] not in {replica["id"] for replica in now}

    until(replaced, 60)
    return Kill(at, [1000 * (moment - at) for moment, _address in tries])


def killed(quick: bool) -> Outcome:
    """Three replicas under 200 requests a second; one at a time is killed with -9."""
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Watched(Path(folder))
        bounds = {"min": REPLICAS, "max": REPLICAS}
        slow_service(product, NAME, replicas=bounds, replay=1)
        with running(product):
            product.up()
            until_ready(product, NAME, REPLICAS)
            with Steady(product.port, f"/{NAME}/", RATE) as load:
                kills = [_kill(product) for _ in range(1 if quick else 4)]
            answers = load.finish()
    return _outcome(kills, answers)


def _outcome(kills: list[Kill], answers: list[Asked]) -> Outcome:
    count = len(kills)
    failed = sum(one.status != 200 for one in answers)
    last = [kill.last_ms for kill in kills]
    slowest = [_slowest_ms(kill, answers) for kill in kills]
    figures = [
        Figure(
            f"failed of {len(answers):,} requests while replicas are killed",
            failed,
            0,
            digits=0,
            rounds=count,
        ),
        Figure(
            "kill → last request sent to the dead replica",
            max(last),
            100,
            "ms",
            digits=0,
            spread=span(last, 0, "ms"),
            rounds=count,
        ),
        Figure(
            "slowest answer around a kill, median",
            middle(slowest),
            None,
            "ms",
            digits=0,
            spread=span(slowest, 0, "ms"),
            rounds=count,
        ),
    ]
    sent = [len(kill.in_vain_ms) for kill in kills]
    usual = quantile([one.took_ms for one in answers], 0.5)
    notes = [
        f"requests that a dead replica had or got: {', '.join(map(str, sent))};"
        f" an answer usually takes {usual:.0f} ms"
    ]
    raw: dict[str, object] = {"kills": [asdict(kill) for kill in kills], "slowest_ms": slowest}
    return Outcome(figures, notes, raw)


def _slowest_ms(kill: Kill, answers: list[Asked]) -> float:
    return max(a.took_ms for a in answers if kill.at - 0.1 <= a.due <= kill.at + AFTER_S)
