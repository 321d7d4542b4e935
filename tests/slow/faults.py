"""What is done to a product in a schedule: kills, cancels, reloads, stops, drawn at random."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

from slurmgate import client
from slurmgate.errors import SlurmgateError
from slurmgate.state import StateDir
from tests.slow.outcomes import Fault, Kind
from tests.slurm.product import ClusterProduct
from tests.up.product import alive
from tests.waiting import until


@dataclasses.dataclass(frozen=True)
class Bounds:
    """``replicas`` of the service."""

    min: int
    max: int
    max_in_flight: int
    target_in_flight: int = 2

    @classmethod
    def draw(cls, chance: random.Random) -> Bounds:
        least = chance.choice([0, 1, 1, 2])
        return cls(least, chance.randint(max(1, least), 3), chance.choice([0, 0, 1, 3]))

    def wanted_by(self, load: int) -> int:
        """How many replicas so many requests at a time need."""
        target = self.target_in_flight
        per_replica = min(target, self.max_in_flight or target)
        return max(self.min, min(self.max, math.ceil(load / per_replica)))


class Faults:
    """What may happen to the product, and what has; ``entry`` is its service's configuration."""

    def __init__(self, product: ClusterProduct, chance: random.Random) -> None:
        self.product = product
        self.chance = chance
        self.done: list[Fault] = []
        self.rounds = itertools.count(1)
        self.bounds = Bounds.draw(chance)
        self.entry = product.job(
            load=chance.choice([0, 0, 0.8]),
            timeout=2,
            scale_up_after=0.5,
            max_starts_per_hour=100,
            replicas=dataclasses.asdict(self.bounds),
            health={"interval": 1, "timeout": 2, "failures": 2},
        )

    def strike(self) -> None:
        """Do one thing, if there is something to do it to."""
        kind = self.chance.choice(list(Kind))
        began = time.monotonic()
        target = STRIKES[kind](self)
        if target is not None:
            self.done.append(Fault(kind, began, time.monotonic(), str(target)))

    def one_of(self, found: list[Any]) -> Any:
        return self.chance.choice(found) if found else None

    def kill(self, pid: int | None) -> int | None:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid

    def kill_backend(self) -> int | None:
        return self.kill(self.product.backend())

    def freeze_backend(self) -> int | None:
        pid = self.product.backend()
        if pid is not None:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self.chance.uniform(1, 2))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return pid

    def kill_master(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            master = self.kill(self.product.nginx_master())
            until(lambda: self.gate_serves(other_than=master), 15)
            return master
        return None

    def gate_serves(self, other_than: int | None) -> bool:
        with contextlib.suppress(OSError, ValueError):
            if self.product.nginx_master() != other_than:
                with contextlib.suppress(Exception):
                    return self.product.get("/healthz", timeout=2).status_code == 200
        return False

    def kill_worker(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return self.kill(self.one_of(self.product.nginx_workers()))
        return None

    def kill_tunnel(self) -> int | None:
        return self.kill(self.one_of(self.product.tunnels()))

    def cancel_job(self) -> str | None:
        job = self.one_of(self.product.live())
        if job is not None:
            self.product.lab.run("scancel", job.id, check=False)
        return None if job is None else job.id

    def kill_service(self) -> int | None:
        started = [note["pid"] for note in self.product.noted("start")]
        return self.kill(self.one_of([pid for pid in started if alive(pid)]))

    def change(self) -> str:
        self.entry["env"]["ROUND"] = str(next(self.rounds))
        return self.reload()

    def resize(self) -> str:
        most = self.chance.randint(max(1, self.bounds.min), 3)
        self.bounds = dataclasses.replace(self.bounds, max=most)
        self.entry["replicas"] = dataclasses.asdict(self.bounds)
        return self.reload()

    def reload(self) -> str:
        self.product.write_config()
        return self.tell("/admin/reload")

    def stop(self) -> str:
        return self.tell("/admin/services/probe/stop")

    def start(self) -> str:
        return self.tell("/admin/services/probe/start")

    def tell(self, path: str) -> str:
        """What ``slurmgate reload`` and its like do. The backend may be away, or be killed."""
        try:
            client.call(StateDir.find(self.product.state_dir), "POST", path, self.product.token)
        except SlurmgateError as error:
            return error.reason
        return "done"


STRIKES: dict[Kind, Callable[[Faults], object]] = {
    Kind.BACKEND_KILLED: Faults.kill_backend,
    Kind.BACKEND_FROZEN: Faults.freeze_backend,
    Kind.MASTER_KILLED: Faults.kill_master,
    Kind.WORKER_KILLED: Faults.kill_worker,
    Kind.TUNNEL_KILLED: Faults.kill_tunnel,
    Kind.JOB_CANCELLED: Faults.cancel_job,
    Kind.SERVICE_KILLED: Faults.kill_service,
    Kind.CHANGED: Faults.change,
    Kind.RESIZED: Faults.resize,
    Kind.STOPPED: Faults.stop,
    Kind.STARTED: Faults.start,
}
