"""What finding the service by its model, with a key, costs a request to a service that runs.

Compared: ``/v1/chat/completions`` through the gate and through an nginx with ``proxy_pass``, the
same request with the same key to the same service.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench import wrk
from tests.bench.client import post
from tests.bench.figures import Figure, Outcome, middle, paired
from tests.bench.machine import Cores, pin
from tests.bench.nginxes import fast_service, plain_proxy, say_healthy
from tests.bench.sides import Side, fill_up, pinned, rounds
from tests.bench.warm import CONNECTIONS, cpu_of, quotient, rate_of, throughput_notes
from tests.up.product import Product, free_port, running

PATH = "/v1/chat/completions"
MODEL = "bench/a-model-7b"
BODY_BYTES = 400
SERVICES = 50


def chat(content: str, model: str = MODEL, **more: object) -> str:
    """The body of a chat request, its fields in the order of OpenAI's own client."""
    messages = [{"role": "user", "content": content}]
    return json.dumps({"messages": messages, "model": model, **more})


def new_key(product: Product, name: str) -> str:
    """Make a key for every service; the product's file names a ``keys_file``."""
    argv = product.command("keys", "add", name, "--config", str(product.config))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


@contextlib.contextmanager
def _sides(cores: Cores) -> Iterator[dict[str, Side]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sg")))
        product = Product(folder, gate={"workers": 1}, keys_file="keys.json")
        fast_service(product, "fast", remote_port=free_port(), timeout=3600, models=[MODEL])
        fill_up(product, SERVICES)
        say_healthy(product)
        product.write_config()
        token = new_key(product, "bench")
        stack.enter_context(running(product)).up()
        body = chat("x" * (BODY_BYTES - len(chat(""))))
        assert post(product.port, PATH, body, token).status == 200
        assert post(product.port, PATH, body).status == 401
        request = wrk.Post(body, token)
        gate = Side(product.url + PATH, *pinned(product, cores), request)
        service = f"127.0.0.1:{product.services[0]['remote_port']}"
        plain = stack.enter_context(plain_proxy(folder, free_port(), service))
        pin(plain.workers, cores.proxy)
        url = f"http://127.0.0.1:{plain.port}{PATH}"
        sides = {"gate": gate, "plain": Side(url, plain.workers, gate.service, request)}
        for side in sides.values():
            side.ask(CONNECTIONS, cores)
        yield sides


def openai(quick: bool) -> Outcome:
    """Requests per second on 32 connections, and the worker's CPU time for each."""
    cores = Cores.of_this_machine()
    with _sides(cores) as sides:
        seen = rounds(sides, 4 if quick else 25, CONNECTIONS, cores)
    rates, cpu = ({name: seen.of(name, of) for name in sides} for of in (rate_of, cpu_of))
    added = [a - b for a, b in zip(cpu["gate"], cpu["plain"], strict=True)]
    ratio = "by model with a key, 400 bytes: throughput ÷ plain nginx"
    figures = [
        quotient(ratio, paired(rates["gate"], rates["plain"]), 0.65, True),
        Figure("by model with a key: CPU added per request", middle(added), None, "µs", digits=1),
    ]
    return Outcome(figures, throughput_notes(seen), seen.as_json())
