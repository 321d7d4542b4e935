"""A thousand event streams at once, twenty tokens a second each: the time between tokens.

Through the gate and on direct connections to the same service, in turns. Once the tokens of the
streams come at moments of their own, once all at the same moments, as from a model server that
computes one token for everybody at each step; and once for streams that were held before, which
the gate relays to itself behind the comment lines it has sent.

Gate, service and client together need more than one core. Turns during which the machine did more
than a little else are repeated, whatever their result was.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from slurmgate.starts import quantile
from tests.bench.client import ask, stop
from tests.bench.cold import STARTS_AN_HOUR
from tests.bench.figures import Figure, Outcome, middle, paired, span
from tests.bench.machine import cpu_seconds, machine_busy_seconds
from tests.bench.openai import PATH
from tests.bench.sides import until_calm
from tests.bench.stream_client import Streams
from tests.up.product import Product, free_port, running

SERVICE = Path(__file__).with_name("stream_service.py")
SIZE = 1000
EVERY_S = 0.05
TOKENS, QUICK_TOKENS = 120, 80
# Cores that the rest of the machine may use in a turn that counts.
CALM = 0.2
# How many times as many turns as wanted, to get that many calm ones.
PATIENCE = 2
HEARTBEAT_S = 1
SETTLE_S = 0.5  # the streams begin in a hurry
OWN, TOGETHER, HELD = "own", "together", "held"
WHAT = {
    OWN: "tokens at moments of their own",
    TOGETHER: "tokens of all at the same moments",
    HELD: "held before, relayed",
}


@dataclass(frozen=True, slots=True)
class Round:
    """The tokens of one side; milliseconds, and shares of a core."""

    tokens: int
    gap_p50: float
    gap_p99: float
    gap_most: float
    delay_p50: float
    delay_p99: float
    service_late_p99: float
    gate: float
    service: float
    client: float
    others: float


@dataclass(frozen=True, slots=True)
class Turn:
    """The same streams through the gate and directly."""

    gate: Round
    direct: Round

    @property
    def calm(self) -> bool:
        return max(self.gate.others, self.direct.others) <= CALM


class Usage:
    """CPU time of the gate, the service and this process since the last ``look``, by name."""

    def __init__(self, product: Product) -> None:
        self._pids = {
            "gate": product.nginx_workers(),
            "service": product.replicas(),
            "client": [os.getpid()],
        }
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        used = {name: cpu_seconds(pids) for name, pids in self._pids.items()}
        others = machine_busy_seconds() - sum(used.values())
        return {**used, "others": others, "seconds": time.monotonic()}

    def look(self) -> dict[str, float]:
        before, self._before = self._before, self._now()
        took = {name: now - before[name] for name, now in self._before.items()}
        seconds = took.pop("seconds")
        return {name: used / seconds for name, used in took.items()}


def _body(name: str) -> str:
    messages = [{"role": "user", "content": "Tell me a story."}]
    return json.dumps({"messages": messages, "model": name, "stream": True})


def _round(product: Product, streams: Streams) -> Round:
    """What the tokens of streams that have begun are like, until the first of them ends."""
    streams.until(lambda s: s.begun > 0, "every stream has begun")
    begin = time.monotonic() + SETTLE_S
    streams.until(lambda _: time.monotonic() >= begin, "a moment later")
    usage = Usage(product)
    streams.until(lambda s: s.over > 0, "the first stream ends")
    used = usage.look()
    streams.finish()
    seen = streams.tokens.within(begin, streams.over)

    def ms(values: list[float], q: float) -> float:
        return 1000 * quantile(values, q)

    gaps, delays = list(seen.gaps), list(seen.delays)
    return Round(
        tokens=len(gaps),
        gap_p50=ms(gaps, 0.5),
        gap_p99=ms(gaps, 0.99),
        gap_most=1000 * max(gaps),
        delay_p50=ms(delays, 0.5),
        delay_p99=ms(delays, 0.99),
        service_late_p99=ms(list(seen.late), 0.99),
        **used,
    )


def _healthy(product: Product) -> Path:
    return product.folder / "healthy"


def _ask(product: Product, port: int, name: str) -> Round:
    until_calm()
    with contextlib.closing(Streams(port, PATH, _body(name), SIZE)) as streams:
        return _round(product, streams)


def _ask_held(product: Product, name: str) -> Round:
    stop(product, name)
    _healthy(product).unlink()
    until_calm()
    with contextlib.closing(Streams(product.port, PATH, _body(name), SIZE)) as streams:
        streams.until(lambda s: s.commented == s.size, "a comment line in every stream")
        _healthy(product).touch()
        return _round(product, streams)


@contextlib.contextmanager
def _running(tokens: int) -> Iterator[tuple[Product, dict[str, int]]]:
    """The product, and the services' own ports."""
    with tempfile.TemporaryDirectory(prefix="sg") as folder:
        product = Product(Path(folder))
        script = product.script("streams.sh", f'exec "{sys.executable}" -S -E "{SERVICE}" "$1"')
        ports = {name: free_port() for name in WHAT}
        for name, port in ports.items():
            env = {
                "BENCH_TOKENS": str(tokens),
                "BENCH_EVERY_S": str(EVERY_S),
                "BENCH_HEALTHY": str(_healthy(product)),
                "BENCH_TOGETHER": "1" if name == TOGETHER else "",
            }
            fields = {"heartbeat": HEARTBEAT_S, "max_starts_per_hour": STARTS_AN_HOUR}
            bounds = {"max_waiting": 2 * SIZE, "timeout": 3600}
            product.service(
                name, script, remote_port=port, env=env, models=[name], **fields, **bounds
            )
        _healthy(product).touch()
        with running(product):
            product.up()
            for name in WHAT:
                assert ask(product.port, f"/{name}/hello").status == 200
            yield product, ports


def _turn(product: Product, port: int, name: str, *, reverse: bool) -> Turn:
    direct = _ask(product, port, name) if reverse else None
    gate = _ask_held(product, name) if name == HELD else _ask(product, product.port, name)
    return Turn(gate, direct or _ask(product, port, name))


def streams(quick: bool) -> Outcome:
    """The p99 of the time between two tokens, through the gate and directly."""
    wanted = 1 if quick else 3
    seen: dict[str, list[Turn]] = {}
    with _running(QUICK_TOKENS if quick else TOKENS) as (product, ports):
        for name, port in ports.items():
            turns = seen[name] = []
            while len(turns) < PATIENCE * wanted and sum(turn.calm for turn in turns) < wanted:
                # Nobody always follows the same one.
                turns.append(_turn(product, port, name, reverse=len(turns) % 2 == 1))
    return _outcome(seen)


def _outcome(seen: dict[str, list[Turn]]) -> Outcome:
    figures, notes = [], []
    for name, made in seen.items():
        turns = [turn for turn in made if turn.calm] or made
        figures += _figures(f"{SIZE:,} streams, {WHAT[name]}", turns)
        for side, rounds in (
            ("gate", [turn.gate for turn in turns]),
            ("direct", [turn.direct for turn in turns]),
        ):
            notes.append(f"{name}, {side}: {_described(rounds)}")
        calm = sum(turn.calm for turn in made)
        notes.append(f"{name}: during {calm} of {len(made)} turns the machine did nothing else")
    raw: dict[str, object] = {name: [asdict(t) for t in made] for name, made in seen.items()}
    return Outcome(figures, notes, raw)


def _figures(what: str, turns: list[Turn]) -> list[Figure]:
    times = paired([t.gate.gap_p99 for t in turns], [t.direct.gap_p99 for t in turns])
    later = [t.gate.delay_p50 - t.direct.delay_p50 for t in turns]
    count = len(turns)
    return [
        Figure(
            f"{what}: p99 between ÷ direct", middle(times), 1.5, spread=span(times), rounds=count
        ),
        Figure(
            f"{what}: later by, median",
            middle(later),
            None,
            "ms",
            spread=span(later, 2, "ms"),
            rounds=count,
        ),
    ]


def _described(rounds: list[Round]) -> str:
    def mid(field: str) -> float:
        return middle([getattr(r, field) for r in rounds])

    return (
        f"between tokens median {mid('gap_p50'):.1f}, p99 {mid('gap_p99'):.1f},"
        f" most {mid('gap_most'):.1f} ms; after it was due median {mid('delay_p50'):.2f},"
        f" p99 {mid('delay_p99'):.1f} ms, the service itself late p99"
        f" {mid('service_late_p99'):.1f} ms; cores used: gate {mid('gate'):.2f},"
        f" service {mid('service'):.2f}, client {mid('client'):.2f}, others {mid('others'):.2f}"
    )
