"""The sides of a comparison, running at the same time and loaded in turns.

Each proxy has one worker, and the workers have a core of their own; wrk and the service (an nginx
that answers at once) have another. So the proxy is the narrow place as far as two cores allow.

What else the machine does is measured with every round, because it distorts all of this. A round
during which that was more than a little is repeated, whatever its result was.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.bench import wrk
from tests.bench.client import ask
from tests.bench.machine import Cores, cpu_seconds, machine_busy_seconds, pin
from tests.bench.nginxes import fast_service, plain_proxy, say_healthy
from tests.up.product import Product, children, free_port, running

MANY = 500
ROUND_S = 1
# Cores that the rest of the machine may use in a round that counts.
CALM = 0.15
# How many times as long as the rounds need, to get that many calm ones.
PATIENCE = 2.0
LOOK_S = 0.2
WAIT_S = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What one round of one side measured; ``busy`` and ``others`` in cores."""

    rate: float
    cpu_us: float
    median_us: float
    busy: float
    others: float


@dataclass
class Side:
    """One proxy, and what each of its rounds measured."""

    url: str
    workers: list[int]
    service: list[int]
    post: wrk.Post | None = None
    samples: list[Sample] = field(default_factory=list)

    def load(self, connections: int, cores: Cores) -> None:
        """One round."""
        everything, client = machine_busy_seconds(), _ended_children_seconds()
        workers, service = cpu_seconds(self.workers), cpu_seconds(self.service)
        run = self.ask(connections, cores)
        workers = cpu_seconds(self.workers) - workers
        ours = workers + cpu_seconds(self.service) - service + _ended_children_seconds() - client
        others = machine_busy_seconds() - everything - ours
        self.samples.append(
            Sample(
                rate=run.rate,
                cpu_us=workers / run.requests * 1e6,
                median_us=run.median_us,
                busy=workers / run.seconds,
                others=others / run.seconds,
            )
        )

    def ask(self, connections: int, cores: Cores) -> wrk.Run:
        """Ask for as much as there is in one round."""
        return wrk.run(self.url, connections, ROUND_S, cores.client, self.post)


@dataclass(frozen=True, slots=True)
class Rounds:
    """The rounds of all sides that count, and all that were made."""

    counted: dict[str, list[Sample]]
    made: dict[str, list[Sample]]

    def of(self, side: str, value: Callable[[Sample], float]) -> list[float]:
        return [value(sample) for sample in self.counted[side]]

    def note(self) -> str:
        counted, made = (len(next(iter(x.values()))) for x in (self.counted, self.made))
        if any(sample.others > CALM for samples in self.counted.values() for sample in samples):
            return f"the machine did other work all the time: all {made} rounds count"
        return f"{counted} of {made} rounds count: the machine did other work during the rest"

    def as_json(self) -> dict[str, object]:
        return {name: [asdict(s) for s in samples] for name, samples in self.made.items()}


def rounds(
    sides: dict[str, Side],
    wanted: int,
    connections: int,
    cores: Cores,
    patience: float = PATIENCE,
) -> Rounds:
    """Load all sides in turns, until enough rounds were calm or patience is at its end."""
    order = list(sides.values())
    deadline = time.monotonic() + patience * wanted * len(order) * ROUND_S
    calm: list[int] = []
    for index in itertools.count():
        until_calm()
        for side in order:
            side.load(connections, cores)
        if all(side.samples[index].others <= CALM for side in order):
            calm.append(index)
        if len(calm) == wanted or time.monotonic() > deadline:
            break
        # Nobody always follows the same one.
        order.reverse()
    made = {name: side.samples for name, side in sides.items()}
    if len(calm) * 4 < wanted:
        return Rounds(made, made)
    return Rounds({name: [s[i] for i in calm] for name, s in made.items()}, made)


def until_calm() -> None:
    """Wait a little for a moment in which the machine does nothing else."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        before = machine_busy_seconds()
        time.sleep(LOOK_S)
        if machine_busy_seconds() - before <= CALM * LOOK_S:
            return


@contextlib.contextmanager
def running_sides(names: Iterable[str], cores: Cores) -> Iterator[dict[str, Side]]:
    """Run ``gate`` (2 services), ``gate_500`` and ``plain`` (before the service of ``gate``)."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sg")))
        sides: dict[str, Side] = {}
        few = stack.enter_context(running(_gate(folder / "few", 2))).up()
        sides["gate"] = _side(few, cores)
        if "gate_500" in names:
            many = stack.enter_context(running(_gate(folder / "many", MANY))).up()
            sides["gate_500"] = _side(many, cores)
        service = f"127.0.0.1:{few.services[0]['remote_port']}"
        plain = stack.enter_context(plain_proxy(folder, free_port(), service))
        pin(plain.workers, cores.proxy)
        url = f"http://127.0.0.1:{plain.port}/fast/hello"
        sides["plain"] = Side(url, plain.workers, sides["gate"].service)
        for side in sides.values():
            side.ask(32, cores)
        yield sides


def fill_up(product: Product, count: int) -> None:
    """Configure services nobody asks for, until there are ``count``."""
    script = product.script("idle.sh", "exec sleep 1000")
    for index in range(count - len(product.services)):
        product.service(f"other-{index}", script)


def _gate(folder: Path, services: int) -> Product:
    folder.mkdir()
    product = Product(folder, gate={"workers": 1})
    fast_service(product, "fast", remote_port=free_port(), timeout=3600)
    fill_up(product, services)
    say_healthy(product)
    return product


def _side(product: Product, cores: Cores) -> Side:
    assert ask(product.port, "/fast/hello").status == 200
    return Side(f"{product.url}/fast/hello", *pinned(product, cores))


def pinned(product: Product, cores: Cores) -> tuple[list[int], list[int]]:
    """The gate's workers, and the services with their children, each on its core."""
    workers = product.nginx_workers()
    pin(workers, cores.proxy)
    service = [pid for master in product.replicas() for pid in (master, *children(master))]
    pin(service, cores.service)
    return workers, service


def _ended_children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
