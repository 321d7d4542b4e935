"""Services that take their time, and what they noted of it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.client import ask, service_info
from tests.bench.cold import STARTS_AN_HOUR
from tests.up.product import Product
from tests.waiting import until

SERVICE = Path(__file__).with_name("slow_service.py")
TAKE_S = 0.05
READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Work:
    """One request at one replica, from its arrival to the answer's last byte."""

    begun: float
    ended: float


def slow_command() -> str:
    """What a script does to run the service; its port is the script's first argument."""
    return f'exec "{sys.executable}" -S -E "{SERVICE}" "$1"'


def slow_fields(product: Product, name: str, **fields: Any) -> dict[str, Any]:
    """The fields of a service that runs it; ``notes`` reads what it notes then."""
    _notes(product, name).mkdir()
    env = {"BENCH_TAKE_S": str(TAKE_S), "BENCH_NOTES": str(_notes(product, name))}
    return {"env": env, "timeout": 3600, "max_starts_per_hour": STARTS_AN_HOUR, **fields}


def slow_service(product: Product, name: str, **fields: Any) -> None:
    """Configure the service as processes of this machine."""
    script = product.script("slow.sh", slow_command())
    product.service(name, script, **slow_fields(product, name, **fields))


def notes(product: Product, name: str) -> dict[str, list[Work]]:
    """What each replica has done so far, in the order of the ends."""
    found = {}
    for path in _notes(product, name).iterdir():
        lines = [line.split() for line in path.read_text().splitlines()]
        found[path.name] = [Work(float(begun), float(ended)) for begun, ended in lines]
    return found


def ready(product: Product, name: str) -> list[dict[str, Any]]:
    """The replicas of a service that are ready, as the backend shows them."""
    shown = service_info(product, name)["replicas"]
    return [replica for replica in shown if replica["state"] == "ready"]


def until_ready(product: Product, name: str, count: int) -> list[dict[str, Any]]:
    """Ask once, and wait until so many replicas are ready."""
    assert ask(product.port, f"/{name}/").status == 200

    def all_ready() -> list[dict[str, Any]] | None:
        found = ready(product, name)
        return found if len(found) == count else None

    all_ready.__doc__ = f"{count} replicas of {name} ready"
    return until(all_ready, READY_S)


def _notes(product: Product, name: str) -> Path:
    return product.folder / f"notes-{name}"


# -- sums over what was noted; pure --------------------------------------------------------------


def mean_in_flight(done: Iterable[Work], begin: float, end: float) -> float:
    """Requests in flight at one replica, in the mean over a time."""
    shares = (min(work.ended, end) - max(work.begun, begin) for work in done)
    return sum(share for share in shares if share > 0) / (end - begin)


def rate(done: Iterable[Work], begin: float, end: float) -> float:
    """Requests a second within a time; of one that lies only partly in it, its part counts.

    Answers come in volleys, so that counting whole ones would depend on the moment of the last.
    """
    parts = (
        (min(work.ended, end) - max(work.begun, begin)) / (work.ended - work.begun) for work in done
    )
    return sum(part for part in parts if part > 0) / (end - begin)


def most_in_flight(done: Iterable[Work]) -> int:
    """Requests in flight at one replica at the same moment."""
    # At the same moment an end comes before a begin.
    changes = sorted(
        itertools.chain.from_iterable(((work.begun, 1), (work.ended, -1)) for work in done)
    )
    return max(itertools.accumulate(change for _moment, change in changes), default=0)


def share_in_use(done: Iterable[Work]) -> float:
    """How much of the time from the first begin to the last end any request was in flight."""
    ordered = sorted(done, key=lambda work: work.begun)
    begin = busy_until = ordered[0].begun
    unused = 0.0
    for work in ordered:
        unused += max(0.0, work.begun - busy_until)
        busy_until = max(busy_until, work.ended)
    return 1 - unused / (busy_until - begin)
