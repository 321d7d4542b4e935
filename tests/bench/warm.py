"""What the gate costs a request to a service that runs.

Compared: the gate with 2 services, the gate with 500, and an nginx with ``proxy_pass``, kept
connections and an access log of the same kind, all before the same service.
"""

from __future__ import annotations

from tests.bench.figures import Figure, Outcome, middle, paired, quartiles
from tests.bench.machine import Cores
from tests.bench.sides import Rounds, Sample, rounds, running_sides

CONNECTIONS = 32
# Below that share of a core something else than the plain proxy was the narrow place.
NARROW = 0.8


def rate_of(sample: Sample) -> float:
    return sample.rate


def cpu_of(sample: Sample) -> float:
    return sample.cpu_us


def _busy(sample: Sample) -> float:
    return sample.busy


def _median(sample: Sample) -> float:
    return sample.median_us


def quotient(name: str, values: list[float], bound: float, at_least: bool) -> Figure:
    spread = quartiles(values, 3)
    return Figure(name, middle(values), bound, "", at_least, 3, spread, len(values))


def throughput_notes(seen: Rounds) -> list[str]:
    notes = [
        f"{name}: {middle(seen.of(name, rate_of)):,.0f} requests/s,"
        f" {middle(seen.of(name, cpu_of)):.1f} µs of the worker each,"
        f" the worker busy {middle(seen.of(name, _busy)):.0%}"
        for name in seen.counted
    ]
    if middle(seen.of("plain", _busy)) < NARROW:
        notes.append(
            "plain nginx had time to spare, so the throughput says more about the client and the"
            " service than about the proxies; the CPU time per request does not have this weakness"
        )
    return [*notes, seen.note()]


def throughput(quick: bool) -> Outcome:
    """Requests per second on 32 connections, and the workers' CPU time for each."""
    cores = Cores.of_this_machine()
    with running_sides(("gate", "gate_500", "plain"), cores) as sides:
        seen = rounds(sides, 4 if quick else 25, CONNECTIONS, cores)
    rate = {name: seen.of(name, rate_of) for name in sides}
    cpu = {name: seen.of(name, cpu_of) for name in sides}
    rate_500, cpu_500 = (paired(x["gate_500"], x["gate"]) for x in (rate, cpu))
    figures = [
        quotient("warm throughput ÷ plain nginx", paired(rate["gate"], rate["plain"]), 0.80, True),
        quotient("CPU per request ÷ plain nginx", paired(cpu["gate"], cpu["plain"]), 1.35, False),
        quotient("throughput with 500 services ÷ with 2", rate_500, 0.97, True),
        quotient("CPU per request with 500 services ÷ with 2", cpu_500, 1.03, False),
    ]
    return Outcome(figures, throughput_notes(seen), seen.as_json())


def latency(quick: bool) -> Outcome:
    """Median time of a request on one connection, with nothing else to do."""
    cores = Cores.of_this_machine()
    with running_sides(("gate", "plain"), cores) as sides:
        seen = rounds(sides, 4 if quick else 15, 1, cores)
    gate, plain = seen.of("gate", _median), seen.of("plain", _median)
    added = [a - b for a, b in zip(gate, plain, strict=True)]
    spread = quartiles(added, 0, "µs")
    name = "latency added on one connection, median"
    figure = Figure(name, middle(added), 60, "µs", digits=0, spread=spread, rounds=len(added))
    notes = [f"gate {middle(gate):.0f} µs, plain {middle(plain):.0f} µs (medians)", seen.note()]
    return Outcome([figure], notes, seen.as_json())
