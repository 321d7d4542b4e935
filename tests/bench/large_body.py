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
from tests.bench.machine import Cores, Others, pin, staying_on
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
# Cores that the rest of the machine may use in a pair of rounds that counts.
CALM = 0.2
# How many times as many pairs as wanted, to get that many calm ones.
PATIENCE = 2
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
    others: float  # cores that the rest of the machine used


@dataclass(frozen=True, slots=True)
class Pair:
    """The same body through the gate and through plain nginx."""

    gate: Round
    plain: Round

    @property
    def calm(self) -> bool:
        return max(self.gate.others, self.plain.others) <= CALM


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


def _round(port: int, case: Case, pids: list[int]) -> Round:
    until_calm()
    others = Others(pids)
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
        others=others.cores(),
    )


@contextlib.contextmanager
def _running(cores: Cores) -> Iterator[tuple[int, int, list[int]]]:
    """Ports of the gate and of plain nginx, one worker each, before the same services; and the
    processes of all.
    """
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
        workers, service = pinned(product, cores)
        others = {"/small/": f"127.0.0.1:{small}"}
        plain = stack.enter_context(plain_proxy(folder, free_port(), f"127.0.0.1:{large}", others))
        pin(plain.workers, cores.proxy)
        yield product.port, plain.port, [*workers, *service, *plain.workers]


def _pairs(wanted: int, gate: int, plain: int, pids: list[int], case: Case) -> list[Pair]:
    """As many calm ones as wanted, if there are, among those made."""
    # The first request of a shape finds nothing warm: no page cache, no compiled code.
    for port in (gate, plain):
        _send(port, case)
    made: list[Pair] = []
    while len(made) < PATIENCE * wanted and sum(pair.calm for pair in made) < wanted:
        # Nobody always follows the same one.
        first = _round(plain, case, pids) if len(made) % 2 else None
        through = _round(gate, case, pids)
        made.append(Pair(through, first or _round(plain, case, pids)))
    return made


def model_20mb(quick: bool) -> Outcome:
    """How long the gate looks for the model, and how long small requests wait for it."""
    wanted = 3 if quick else 15
    cores = Cores.of_this_machine()
    with _running(cores) as (gate, plain, pids), staying_on(cores.client):
        seen = {
            shape: _pairs(wanted, gate, plain, pids, Case.of(body()))
            for shape, body in SHAPES.items()
        }
    return _outcome(seen)


def _outcome(seen: dict[str, list[Pair]]) -> Outcome:
    figures, notes = [], []
    for shape, made in seen.items():
        calm = [pair for pair in made if pair.calm]
        pairs = calm or made
        longer = [pair.gate.there_ms - pair.plain.there_ms for pair in pairs]
        delays = [pair.gate.finding_ms - pair.gate.normal_ms for pair in pairs]
        figures += [
            _milliseconds(f"model behind 20 MB of {shape}: found", middle(longer), longer, 60),
            _milliseconds("… the longest delay of a small request", max(delays), delays, 10),
        ]
        notes += [
            f"{shape}, gate: {_described([pair.gate for pair in pairs])}",
            f"{shape}, plain: {_described([pair.plain for pair in pairs])}",
            f"{shape}: during {len(calm)} of {len(made)} pairs the machine did nothing else",
        ]
    raw: dict[str, object] = {s: [asdict(pair) for pair in made] for s, made in seen.items()}
    return Outcome(figures, notes, raw)


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
