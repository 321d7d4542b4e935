"""What a cluster and its login host see of a gate when nobody asks: 200 services, 20 running."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from tests.bench import sockets
from tests.bench.client import ask
from tests.bench.figures import Figure, Outcome
from tests.bench.machine import cpu_seconds
from tests.bench.slurm_lab import (
    WatchedLab,
    cluster_service,
    gate_before,
    light_script,
    watched_lab,
)
from tests.slurm.product import ClusterProduct
from tests.waiting import until

SERVICES = 200
RUNNING = 20
# The scheduler is asked more often while a job was submitted less than half a minute ago.
SETTLE_S = 35.0
LOOK_S = 5.0


def _command_connections(product: ClusterProduct, lab: WatchedLab) -> int:
    """Connections of the backend itself with the login host; those of tunnels are ssh's."""
    backend = until(product.backend)
    login = (lab.address, lab.place.ssh_port)
    return sum(there == login for _here, there in sockets.connections(backend))


def _logins(lab: WatchedLab) -> int:
    log = (lab.folder / "log" / "sshd-login.log").read_text(errors="replace")
    return log.count("Accepted publickey")


def slurm_rest(quick: bool) -> Outcome:
    """Scheduler commands, SSH connections and CPU time of the backend at rest."""
    seconds = 30.0 if quick else 130.0
    with watched_lab() as lab, gate_before(lab) as product:
        script = light_script(lab)
        for index in range(SERVICES):
            cluster_service(product, f"light-{index}", script)
        product.up()
        paths = [f"/light-{index}/" for index in range(RUNNING)]
        with ThreadPoolExecutor(RUNNING) as pool:
            answers = list(pool.map(lambda path: ask(product.port, path).status, paths))
        assert answers == [200] * RUNNING, answers
        time.sleep(SETTLE_S)
        seen = _look(product, lab, seconds)
        assert len(lab.queue()) == len(product.tunnels()) == RUNNING
    figures = [
        Figure(
            "Slurm: scheduler commands a minute at rest",
            seen["commands_a_minute"],
            5,
            digits=1,
        ),
        Figure("Slurm: SSH connections for commands (most)", seen["connections"], 1, digits=0),
        Figure("Slurm: new SSH logins at rest", seen["logins"], 0, digits=0),
        Figure(
            f"Slurm: backend at rest, {RUNNING} of {SERVICES} running",
            seen["backend_percent"],
            3,
            "%",
        ),
    ]
    return Outcome(figures, [f"looked at for {seconds:.0f} s"], dict(seen))


def _look(product: ClusterProduct, lab: WatchedLab, seconds: float) -> dict[str, float]:
    backend = until(product.backend)
    began, asked, logins = time.monotonic(), len(lab.commands()), _logins(lab)
    used = cpu_seconds([backend])
    connections = []
    while time.monotonic() - began < seconds:
        time.sleep(LOOK_S)
        connections.append(_command_connections(product, lab))
    took = time.monotonic() - began
    return {
        "seconds": took,
        "commands_a_minute": 60 * (len(lab.commands()) - asked) / took,
        "connections": max(connections),
        "logins": _logins(lab) - logins,
        "backend_percent": 100 * (cpu_seconds([backend]) - used) / took,
    }
