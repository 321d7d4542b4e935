"""What the gate costs a request to a service on a node: gate and tunnel against a bare tunnel.

Compared: the gate, and an ``ssh -N -L`` with a TCP port as people open it by hand, both to the same
nginx that runs as a job. What both need, ssh and its sshd, has a core of its own, because on a real
cluster it has several machines for itself; wrk, the gate and the service share another. So the
tunnel is the narrow place as far as two cores allow: where the other core is busy all the time, it
was not, and ``busy`` of ssh and sshd is below one core. Beside, without a bound: the same rounds
with every process wherever the kernel puts it, and an nginx with nothing but ``proxy_pass`` before
an ``ssh -N -L`` with a unix socket. That one says how much of the cost any proxy has.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from tests.bench import sockets, wrk
from tests.bench.client import ask
from tests.bench.figures import Figure, Outcome, middle, paired, quartiles
from tests.bench.machine import Cores, pin
from tests.bench.nginxes import fast_script, plain_proxy, say_healthy
from tests.bench.sides import Rounds, Side, rounds
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
from tests.waiting import until

NAME = "fast"
CONNECTIONS = 16
LARGE_MB = 200
OTHERS = {"bare": "bare ssh -L", "plain": "plain nginx and ssh -L"}


@contextlib.contextmanager
def _running() -> Iterator[dict[str, Side]]:
    """All ways to one service. The workers of a side are its ssh and sshd."""
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
        service = _nginxes(lab)
        (tunnel,) = product.tunnels()
        gate = [*product.nginx_workers(), *service]
        here = free_port()
        bare = stack.enter_context(forwarded(lab, f"127.0.0.1:{here}", node, port))
        path = product.folder / "plain.sock"
        behind = stack.enter_context(forwarded(lab, str(path), node, port))
        until_healthy(here)
        until(path.exists)
        plain = stack.enter_context(plain_proxy(product.folder, free_port(), f"unix:{path}"))
        until_healthy(plain.port)
        yield {
            "gate": Side(f"{product.url}/{NAME}", _both_ends(lab, tunnel), gate),
            "plain": Side(
                f"http://127.0.0.1:{plain.port}",
                _both_ends(lab, behind),
                [*plain.workers, *service],
            ),
            "bare": Side(f"http://127.0.0.1:{here}", _both_ends(lab, bare), service),
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


@dataclass
class Download(Side):
    """A way that is asked for one large answer; every megabyte of it counts as a request."""

    def ask(self, connections: int, cores: Cores) -> wrk.Run:
        what = "%{http_code} %{size_download} %{time_total}"
        done = subprocess.run(
            ["curl", "-sS", "-o", "/dev/null", "-w", what, self.url],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            preexec_fn=partial(os.sched_setaffinity, 0, cores.client),
        )
        status, size, seconds = done.stdout.split()
        assert (status, int(size)) == ("200", LARGE_MB << 20), done.stdout
        return wrk.Run(LARGE_MB, float(seconds), 0.0)


def _measure(ways: dict[str, Side], wanted: int, connections: int, cores: Cores) -> Rounds:
    """Rounds with every process where ``cores`` says, after one that does not count."""
    for way in ways.values():
        pin(way.workers, cores.proxy)
        pin(way.service, cores.service)
        way.ask(connections, cores)
    return rounds(ways, wanted, connections, cores)


def _small(ways: dict[str, Side]) -> dict[str, Side]:
    return {name: Side(f"{way.url}/hello", way.workers, way.service) for name, way in ways.items()}


def _large(ways: dict[str, Side]) -> dict[str, Side]:
    return {
        name: Download(f"{way.url}/large", way.workers, way.service) for name, way in ways.items()
    }


def _notes(what: str, unit: str, seen: Rounds) -> list[str]:
    notes = []
    for name in seen.counted:
        rate = middle(seen.of(name, lambda sample: sample.rate))
        cost = middle(seen.of(name, lambda sample: sample.cpu_us))
        busy = middle(seen.of(name, lambda sample: sample.busy))
        notes.append(
            f"{what}, {name}: {rate:,.0f} {unit}/s, ssh and sshd busy {busy:.0%} of a core,"
            f" {cost:,.0f} µs for each"
        )
    return [*notes, f"{what}: {seen.note()}"]


def slurm_tunnel(quick: bool) -> Outcome:
    """Small requests on 16 connections, and one answer of 200 MB at a time."""
    cores = Cores.of_this_machine()
    anywhere = Cores(*[cores.proxy | cores.client | cores.service] * 3)
    wanted = 4 if quick else 15
    with _running() as ways:
        free = _measure(_small(ways), wanted // 3, CONNECTIONS, anywhere)
        small = _measure(_small(ways), wanted, CONNECTIONS, cores)
        large = _measure(_large(ways), wanted // 2, 1, cores)
    figures = [
        _quotient("small requests", small, "bare", 0.9),
        _quotient(f"one {LARGE_MB} MB answer", large, "bare", 0.9),
        _quotient("small requests", small, "plain", None),
        _quotient("small requests, no process pinned", free, "bare", None),
    ]
    notes = [*_notes("small", "requests", small), *_notes("large", "MB", large)]
    raw: dict[str, object] = {
        "small": small.as_json(),
        "small_not_pinned": free.as_json(),
        "large": large.as_json(),
    }
    return Outcome(figures, notes, raw)


def _quotient(what: str, seen: Rounds, other: str, bound: float | None) -> Figure:
    rate = {name: seen.of(name, lambda sample: sample.rate) for name in ("gate", other)}
    values = paired(rate["gate"], rate[other])
    name = f"Slurm: {what}, gate and tunnel ÷ {OTHERS[other]}"
    return Figure(name, middle(values), bound, "", True, 3, quartiles(values, 3), len(values))
