"""Requests of 20 MB whose ``model`` stands at the end, and small ones on the same worker.

Both proxies keep the whole body before the service hears of the request. All but its last byte is
sent and read before; from the last byte to the moment the service has the header it is longer at
the gate by what it does to find the model. The small requests of that time tell how long the worker
was away.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import random
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.client import ask
from tests.bench.figures import Figure, Outcome, middle, span
from tests.bench.machine import Cores, pin, staying_on
from tests.bench.nginxes import fast_service, plain_proxy, say_healthy
from tests.bench.sides import pinned, until_calm
from tests.bench.steady_client import steady_elsewhere
from tests.up.product import Product, free_port, running

SERVICE = Path(__file__).with_name("body_service.py")
PATH = "/v1/chat/completions"
SIZE = 20_000_000
MODEL = "bench-large"
SMALL_RATE = 1000
QUIET_S = 0.2
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Sent:
    """One large request, from its last byte on; moments of the monotonic clock."""

    last: float
    came: float
    ended: float


@dataclass(frozen=True, slots=True)
class Round:
    """One large request, and what small ones took before and after its last byte, in ms.

    ``finding_ms`` is the longest while the service had not heard of it, ``longest_ms`` the longest
    until it was answered.
    """

    there_ms: float
    finding_ms: float
    longest_ms: float
    normal_ms: float


# -- bodies; pure --------------------------------------------------------------------------------


def image_body() -> bytes:
    """One image as a data URL, and the model behind it."""
    head = b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
    head += b'{"url": "data:image/png;base64,'
    tail = b'"}}]}], "model": %s}' % json.dumps(MODEL).encode()
    pixels = random.Random(1).randbytes((SIZE - len(head) - len(tail)) // 4 * 3)
    return head + base64.b64encode(pixels) + tail


def objects_body() -> bytes:
    """Many small objects, and the model behind them."""
    one = b'{"role": "user", "content": "a \\"small\\" one"}'
    head, tail = b'{"messages": [', b'], "model": %s}' % json.dumps(MODEL).encode()
    count = (SIZE - len(head) - len(tail)) // (len(one) + 1)
    return head + b",".join([one] * count) + tail


SHAPES: dict[str, Callable[[], bytes]] = {"one image": image_body, "small objects": objects_body}


@dataclass(frozen=True, slots=True)
class Case:
    """A body, and what of it the service has to see."""

    body: bytes
    length: int
    crc: int

    @staticmethod
    def of(body: bytes, seen_as: str = MODEL) -> Case:
        at = body.rindex(MODEL.encode())
        seen = body[:at] + seen_as.encode() + body[at + len(MODEL) :]
        return Case(body, len(seen), zlib.crc32(seen))


# -- one round -----------------------------------------------------------------------------------


def _send(port: int, case: Case) -> Sent:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        connection.putrequest("POST", PATH)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(case.body)))
        connection.endheaders(case.body[:-1])
        time.sleep(QUIET_S)
        last = time.monotonic()
        connection.send(case.body[-1:])
        response = connection.getresponse()
        shown = response.read()
        ended = time.monotonic()
    assert response.status == 200, shown[:500]
    seen = json.loads(shown)
    assert (seen["length"], seen["crc"]) == (case.length, case.crc), "another body came"
    return Sent(last, seen["came"], ended)


def _round(port: int, case: Case) -> Round:
    with steady_elsewhere(port, "/small/hello", SMALL_RATE) as load:
        time.sleep(QUIET_S)
        sent = _send(port, case)
        small = load.finish()

    def longest(end: float) -> float:
        """Of the time until then; what comes later is not the time's."""
        times = (min(one.ended, end) - max(one.due, sent.last) for one in small if one.due < end)
        return 1000 * max(0.0, *times)

    return Round(
        there_ms=1000 * (sent.came - sent.last),
        finding_ms=longest(sent.came),
        longest_ms=longest(sent.ended),
        normal_ms=middle([one.took_ms for one in small if one.ended < sent.last]),
    )


@contextlib.contextmanager
def _running(cores: Cores) -> Iterator[dict[str, int]]:
    """Ports of ``gate`` and ``plain``, one worker each, before the same services."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sg")))
        product = Product(folder, gate={"workers": 1})
        script = product.script("body.sh", f'exec "{sys.executable}" -S -E "{SERVICE}" "$1"')
        large, small = free_port(), free_port()
        product.service("large", script, remote_port=large, timeout=3600, models=[MODEL])
        fast_service(product, "small", remote_port=small, timeout=3600)
        say_healthy(product)
        stack.enter_context(running(product)).up()
        for name in ("large", "small"):
            assert ask(product.port, f"/{name}/hello").status == 200
        pinned(product, cores)
        others = {"/small/": f"127.0.0.1:{small}"}
        plain = stack.enter_context(plain_proxy(folder, free_port(), f"127.0.0.1:{large}", others))
        pin(plain.workers, cores.proxy)
        yield {"gate": product.port, "plain": plain.port}


def model_20mb(quick: bool) -> Outcome:
    """How long the gate looks for the model, and how long small requests wait for it."""
    count = 3 if quick else 15
    cores = Cores.of_this_machine()
    seen: dict[str, dict[str, list[Round]]] = {}
    with _running(cores) as ports, staying_on(cores.client):
        for shape, body in SHAPES.items():
            case = Case.of(body())
            rounds = seen[shape] = {name: [] for name in ports}
            for index in range(count + 1):
                for name, port in sorted(ports.items(), reverse=index % 2 == 1):
                    until_calm()
                    rounds[name].append(_round(port, case))
    # The first request of a shape finds nothing warm: no page cache, no compiled code.
    warm = {s: {n: rounds[1:] for n, rounds in sides.items()} for s, sides in seen.items()}
    return _outcome(warm, seen)


def _outcome(
    warm: dict[str, dict[str, list[Round]]], seen: dict[str, dict[str, list[Round]]]
) -> Outcome:
    figures, notes = [], []
    for shape, sides in warm.items():
        gate, plain = sides["gate"], sides["plain"]
        longer = [a.there_ms - b.there_ms for a, b in zip(gate, plain, strict=True)]
        delays = [r.finding_ms - r.normal_ms for r in gate]
        figures += [
            _milliseconds(f"model behind 20 MB of {shape}: found", middle(longer), longer, 60),
            _milliseconds("… the longest delay of a small request", max(delays), delays, 10),
        ]
        notes += [f"{shape}, {name}: {_described(rounds)}" for name, rounds in sides.items()]
    raw = {
        s: {name: [asdict(r) for r in rounds] for name, rounds in sides.items()}
        for s, sides in seen.items()
    }
    return Outcome(figures, notes, {"rounds": raw})


def _milliseconds(name: str, measured: float, values: list[float], bound: float) -> Figure:
    return Figure(name, measured, bound, "ms", False, 1, span(values, 1, "ms"), len(values))


def _described(rounds: list[Round]) -> str:
    there = middle([r.there_ms for r in rounds])
    parts = [
        ("before the last byte (median)", [r.normal_ms for r in rounds]),
        ("until the service has the request (longest)", [r.finding_ms for r in rounds]),
        ("until it is answered (longest)", [r.longest_ms for r in rounds]),
    ]
    small = ", ".join(f"{name} {middle(v):.1f} ms (most {max(v):.1f})" for name, v in parts)
    return f"last byte → service {there:.1f} ms; small requests: {small}"
