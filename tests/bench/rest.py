"""What it costs to run when nobody asks: 500 services configured."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.bench.client import ask
from tests.bench.cold import light_service
from tests.bench.figures import Figure, Outcome
from tests.bench.machine import cpu_seconds
from tests.bench.sides import MANY, fill_up
from tests.up.product import Product, running

READY = 5
SETTLE_S = 8.0


def _shares(product: Product, seconds: float) -> dict[str, float]:
    """Percent of one core that backend and gate use, some time after anything happened."""
    time.sleep(SETTLE_S)
    backend = product.backend()
    assert backend is not None
    processes = {"backend": [backend], "gate": product.nginx_workers()}
    began = time.monotonic()
    before = {name: cpu_seconds(pids) for name, pids in processes.items()}
    time.sleep(seconds)
    took = time.monotonic() - began
    return {
        name: 100 * (cpu_seconds(pids) - before[name]) / took for name, pids in processes.items()
    }


def rest(quick: bool) -> Outcome:
    """CPU time of the backend at rest, with every service cold and with a handful ready."""
    seconds = 5.0 if quick else 25.0
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Product(Path(folder))
        for index in range(READY):
            light_service(product, f"light-{index}", 0)
        fill_up(product, MANY)
        with running(product):
            product.up()
            cold = _shares(product, seconds)
            for index in range(READY):
                assert ask(product.port, f"/light-{index}/").status == 200
            ready = _shares(product, seconds)
    figures = [
        Figure("backend at rest, 500 services, all cold", cold["backend"], 2, "%"),
        Figure(f"backend at rest, {READY} of 500 ready", ready["backend"], 2, "%"),
        Figure("gate at rest, 500 services, all cold", cold["gate"], None, "%"),
        Figure(f"gate at rest, {READY} of 500 ready", ready["gate"], None, "%"),
    ]
    raw: dict[str, object] = {"seconds": seconds, "percent_cold": cold, "percent_ready": ready}
    return Outcome(figures, [], raw)
