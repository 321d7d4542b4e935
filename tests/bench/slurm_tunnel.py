"""What the gate costs a request to a service on a node: gate and tunnel against a bare tunnel.

Compared: the gate, and an ``ssh -N -L`` with a TCP port as people open it by hand, both to the same
nginx that runs as a job. What both need, ssh and its sshd, has a core of its own, because on a real
cluster it has several machines for itself; wrk, the gate and the service share another. So the
tunnel is the narrow place. The same rounds with every process wherever the kernel puts it are shown
beside, without a bound: on two cores the gate then takes its time from the tunnel's.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from functools import partial

from tests.bench import sockets, wrk
from tests.bench.client import ask
from tests.bench.figures import Figure, Outcome, middle, paired, quartiles
from tests.bench.machine import Cores, pin
from tests.bench.nginxes import fast_script, say_healthy
from tests.bench.sides import ROUND_S, Rounds, Sample, Side, rounds, until_calm
from tests.bench.slurm_lab import (
    WatchedLab,
    cluster_service,
    forwarded,
    gate_before,
    replica,
    until_healthy,
    watched_lab,
)
from tests.up.product import children, command_line, free_port

NAME = "fast"
CONNECTIONS = 16
LARGE_MB = 200


@contextlib.contextmanager
def _running() -> Iterator[dict[str, Side]]:
    """Both ways to one service. The workers of a side are its ssh and sshd."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(watched_lab())
        product = stack.enter_context(gate_before(lab, gate={"workers": 1}))
        (product.folder / "large").write_bytes(os.urandom(1 << 20) * LARGE_MB)
        say_healthy(product)
        script = lab.script("fast.sh", fast_script(product.folder, f"$({lab.address_script})"))
        port = free_port()
        cluster_service(product, NAME, script, remote_port=port)
        product.up()
        assert ask(product.port, f"/{NAME}/hello").status == 200
        node = lab.addresses[replica(product, NAME)["node"]]
        forward = stack.enter_context(forwarded(lab, node, port))
        until_healthy(forward.port)
        (tunnel,) = product.tunnels()
        service = _nginxes(lab)
        gate = [*product.nginx_workers(), *service]
        yield {
            "gate": Side(f"{product.url}/{NAME}", _both_ends(lab, tunnel), gate),
            "bare": Side(f"http://127.0.0.1:{forward.port}", _both_ends(lab, forward.pid), service),
        }


def _both_ends(lab: WatchedLab, pid: int) -> list[int]:
    """An ssh and the sshd that serves it."""
    sshd = sockets.partners(pid, lab.processes())
    assert sshd, "nobody is at the other end of ssh"
    return [pid, *sshd]


def _nginxes(lab: WatchedLab) -> list[int]:
    """Master and worker of the service."""
    (master,) = (pid for pid in lab.processes() if _title(pid).startswith("nginx: master"))
    return [master, *children(master)]


def _title(pid: int) -> str:
    return " ".join(command_line(pid))


# -- small requests ------------------------------------------------------------------------------


def _small(sides: dict[str, Side], wanted: int, cores: Cores) -> Rounds:
    """Rounds with every process where ``cores`` says."""
    fresh = {
        name: Side(f"{side.url}/hello", side.workers, side.service) for name, side in sides.items()
    }
    for side in fresh.values():
        pin(side.workers, cores.proxy)
        pin(side.service, cores.service)
        wrk.run(side.url, CONNECTIONS, ROUND_S, cores.client)
    return rounds(fresh, wanted, CONNECTIONS, cores)


def _quotients(seen: Rounds) -> list[float]:
    return paired(seen.of("gate", _rate), seen.of("bare", _rate))


def _rate(sample: Sample) -> float:
    return sample.rate


def _notes(seen: Rounds) -> list[str]:
    notes = [
        f"{name}: {middle(seen.of(name, _rate)):,.0f} requests/s,"
        f" {middle(seen.of(name, lambda sample: sample.cpu_us)):.1f} µs of ssh and sshd each,"
        f" the two busy {middle(seen.of(name, lambda sample: sample.busy)):.0%}"
        for name in seen.counted
    ]
    return [*notes, seen.note()]


# -- one large answer ----------------------------------------------------------------------------


def _megabytes_a_second(url: str, cores: Cores) -> float:
    done = subprocess.run(
        [
            "curl",
            "-sS",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code} %{size_download} %{time_total}",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=partial(os.sched_setaffinity, 0, cores.client),
    )
    status, size, seconds = done.stdout.split()
    assert (status, int(size)) == ("200", LARGE_MB << 20), done.stdout
    return LARGE_MB / float(seconds)


def _large(sides: dict[str, Side], count: int, cores: Cores) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(count):
        until_calm(1.0)
        for name in order:
            rates[name].append(_megabytes_a_second(f"{sides[name].url}/large", cores))
        order.reverse()
    return rates


def slurm_tunnel(quick: bool) -> Outcome:
    """Small requests on 16 connections, and answers of 200 MB."""
    cores = Cores.of_this_machine()
    everywhere = Cores(*[cores.proxy | cores.client | cores.service] * 3)
    wanted = 4 if quick else 15
    with _running() as sides:
        free = _small(sides, wanted // 2, everywhere)
        small = _small(sides, wanted, cores)
        large = _large(sides, wanted, cores)
    figures = [
        _quotient("small requests", _quotients(small), 0.9),
        _quotient("one 200 MB answer", paired(large["gate"], large["bare"]), 0.9),
        _quotient("small requests, no process pinned", _quotients(free), None),
    ]
    rates = {name: middle(values) for name, values in large.items()}
    said = ", ".join(f"{name} {rate:.0f} MB/s" for name, rate in rates.items())
    raw: dict[str, object] = {
        "small": small.as_json(),
        "small_not_pinned": free.as_json(),
        "large_mb_s": large,
    }
    return Outcome(figures, [*_notes(small), f"200 MB: {said}"], raw)


def _quotient(name: str, values: list[float], bound: float | None) -> Figure:
    name = f"Slurm: {name}, gate and tunnel ÷ bare ssh -L"
    return Figure(name, middle(values), bound, "", True, 3, quartiles(values, 3), len(values))
