"""Cold starts: how soon a request that waited reaches a service that became healthy."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from slurmgate.starts import quantile
from tests.bench.client import ask, stop
from tests.bench.figures import Figure, Outcome, middle, quartiles, span
from tests.up.product import Product, free_port, running

SERVICE = Path(__file__).with_name("service.py")
LOAD_S = 2.0
# Benchmarks start a service more often than anybody who works with it.
STARTS_AN_HOUR = 10000


def light_service(product: Product, name: str, load_s: float, **fields: object) -> None:
    """Configure the service that starts fast."""
    script = product.script("light.sh", f'exec "{sys.executable}" -S -E "{SERVICE}" "$1"')
    env = {"BENCH_LOAD_S": str(load_s)}
    often = {"max_starts_per_hour": STARTS_AN_HOUR}
    product.service(name, script, env=env, timeout=3600, **often, **fields)


# -- from healthy to the first request ---------------------------------------------------------


class Starts(threading.Thread):
    """Starts one service cold, again and again; keeps the delays in seconds."""

    def __init__(self, product: Product, name: str, count: int) -> None:
        super().__init__()
        self._product, self._name, self._count = product, name, count
        self._chance = random.Random(name)
        self.delays: list[float] = []

    def run(self) -> None:
        for _ in range(self._count):
            # Spread over the time, so that one start hardly disturbs another.
            time.sleep(self._chance.uniform(0, 1.5))
            answer = ask(self._product.port, f"/{self._name}/")
            assert answer.status == 200, answer
            seen = json.loads(answer.body)
            self.delays.append(seen["came"] - seen["healthy"])
            stop(self._product, self._name)


def release(quick: bool) -> Outcome:
    """From the moment a service is healthy, 2 s after its start, to the held request's arrival."""
    services, count = (4, 3) if quick else (8, 15)
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Product(Path(folder))
        for index in range(services):
            light_service(product, f"cold-{index}", LOAD_S)
        with running(product):
            product.up()
            threads = [Starts(product, s["name"], count) for s in product.services]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    delays = [1000 * delay for thread in threads for delay in thread.delays]
    assert len(delays) == services * count, "a cold start failed"
    bounds = [("median", middle(delays), 50.0), ("p99", quantile(delays, 0.99), 120.0)]
    figures = [
        Figure(
            f"healthy → first held request there, {name}",
            measured,
            bound,
            "ms",
            digits=0,
            spread=span(delays, 0, "ms"),
            rounds=len(delays),
        )
        for name, measured, bound in bounds
    ]
    return Outcome(figures, [], {"delays_ms": delays})


# -- a service that is healthy at once ---------------------------------------------------------


def _by_hand() -> float:
    """Seconds from starting the process to its first good health answer."""
    port = free_port()
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-S", "-E", str(SERVICE), str(port)])
    try:
        while time.monotonic() - began < 30:
            with suppress(ConnectionRefusedError):
                if ask(port, "/health").status == 200:
                    return time.monotonic() - began
            time.sleep(0.001)
    finally:
        process.terminate()
        process.wait(10)
    raise AssertionError("the service does not become healthy")


def _through_the_gate(product: Product) -> float:
    began = time.monotonic()
    answer = ask(product.port, "/cold/")
    ended = time.monotonic()
    assert answer.status == 200, answer
    stop(product, "cold")
    return ended - began


def cold(quick: bool) -> Outcome:
    """A cold request to a service that is healthy at once, against its process started by hand."""
    by_hand, gate = [], []
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Product(Path(folder))
        light_service(product, "cold", 0)
        with running(product):
            product.up()
            for _ in range(5 if quick else 30):
                by_hand.append(1000 * _by_hand())
                gate.append(1000 * _through_the_gate(product))
    needs = middle(by_hand)
    added = [took - needs for took in gate]
    figures = [
        Figure(
            f"cold request beyond what the process needs, {name}",
            measured,
            400,
            "ms",
            digits=0,
            spread=quartiles(added, 0, "ms"),
            rounds=len(added),
        )
        for name, measured in (("median", middle(added)), ("max", max(added)))
    ]
    notes = [f"by hand {needs:.0f} ms, through the gate {middle(gate):.0f} ms (medians)"]
    return Outcome(figures, notes, {"by_hand_ms": by_hand, "gate_ms": gate})
