"""Random schedules of faults, by seed: afterwards exactly the wanted jobs exist, and every request
was answered or got the problem that the model (``outcomes``) allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slurmgate import client
from slurmgate.errors import BackendAway, SlurmgateError
from slurmgate.state import StateDir
from tests.lab.lab import Lab
from tests.slow.outcomes import Fault, Kind, Outcome, Request, allowed
from tests.slurm.product import ClusterProduct, serving
from tests.up.clients import Background, session
from tests.up.product import alive
from tests.waiting import until

SEEDS = range(20)
AT_A_TIME = 3
CLIENTS = 5
TARGET = 2
SETTLED_WITHIN = 60.0
UNHARMED = 40.0  # the longest that a request may take, all starts and backoffs included


class Schedule:
    """One product, its clients and what was done to it, all out of one seed."""

    def __init__(self, product: ClusterProduct, seed: int) -> None:
        self.product = product
        self.chance = random.Random(seed)
        self.seed = seed
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.rounds = itertools.count(1)
        self.ended = threading.Event()
        self.min = self.chance.choice([0, 1, 1, 2])
        self.max = self.chance.randint(max(1, self.min), 3)
        self.max_in_flight = self.chance.choice([0, 0, 1, 3])
        self.entry = product.job(
            load=self.chance.choice([0, 0, 0.8]),
            timeout=2,
            scale_up_after=0.5,
            max_starts_per_hour=100,
            replicas=self.bounds(),
            health={"interval": 1, "timeout": 2, "failures": 2},
        )

    def bounds(self) -> dict[str, int]:
        return {
            "min": self.min,
            "max": self.max,
            "target_in_flight": TARGET,
            "max_in_flight": self.max_in_flight,
        }

    # -- clients ---------------------------------------------------------------------------

    async def clients(self) -> None:
        async with session(UNHARMED) as http:
            await asyncio.gather(*(self.client(http, n) for n in range(CLIENTS)))

    async def client(self, http: aiohttp.ClientSession, number: int) -> None:
        chance = random.Random(f"{self.seed}-{number}")
        while not self.ended.is_set():
            path, expected = chance.choice([short, short, slow, stream])(chance)
            began = time.monotonic()
            outcome, detail = await ask(http, self.product.url + path, expected)
            ended = time.monotonic()
            self.requests.append(Request(path, began, ended, outcome, detail))
            await asyncio.sleep(chance.uniform(0, 0.2))

    # -- faults ----------------------------------------------------------------------------

    def strike(self) -> None:
        """Do one thing, if there is something to do it to."""
        kind = self.chance.choice(list(Kind))
        began = time.monotonic()
        target = STRIKES[kind](self)
        if target is not None:
            self.faults.append(Fault(kind, began, time.monotonic(), str(target)))

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
        self.max = self.chance.randint(max(1, self.min), 3)
        self.entry["replicas"] = self.bounds()
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

    # -- what must come of it --------------------------------------------------------------

    def judge(self) -> None:
        """Every request has an outcome that the model allows."""
        assert self.requests
        bad = [r for r in self.requests if r.outcome not in allowed(r, self.faults)]
        assert bad == [], self.story(bad)

    def story(self, bad: list[Request]) -> str:
        began = self.requests[0].began
        told = [(f.began, f"{f.kind} {f.target} until {f.ended - began:.2f}") for f in self.faults]
        told += [
            (r.began, f"  {r.path} until {r.ended - began:.2f}: {r.outcome} {r.detail}")
            for r in bad
        ]
        lines = [f"{at - began:7.2f} {what}" for at, what in sorted(told)]
        return "\n".join([f"seed {self.seed}, {self.bounds()}", *lines])

    def serve_again(self) -> None:
        """One request is answered, once the backoff of the last failed start is over."""

        def answered() -> bool:
            return self.product.get("/probe/", timeout=UNHARMED).status_code == 200

        until(answered, SETTLED_WITHIN)

    def settles_at(self, wanted: int) -> None:
        """Slurm's list, records, tunnels and /info agree on so many replicas."""
        seen: dict[str, Any] = {}

        def agreed() -> bool:
            with contextlib.suppress(BackendAway):  # one that was killed last is on its way
                seen["replicas"] = self.product.info()["replicas"]
                if [r["state"] for r in seen["replicas"]] == ["ready"] * wanted:
                    seen.update(self.look())
                    return is_at_rest(seen, wanted)
            return False

        try:
            until(agreed, SETTLED_WITHIN)
        except AssertionError as error:
            raise AssertionError(f"wanted {wanted}, {self.story([])}\n{seen}") from error

    def look(self) -> dict[str, Any]:
        product = self.product
        return {
            "jobs": sorted(job.id for job in product.live()),
            "records": sorted(p.stem for p in (product.state_dir / "replicas").glob("*.json")),
            "tunnels": len(product.tunnels()),
        }

    def wanted_by(self, load: int) -> int:
        per_replica = min(TARGET, self.max_in_flight or TARGET)
        return max(self.min, min(self.max, math.ceil(load / per_replica)))


def is_at_rest(seen: dict[str, Any], wanted: int) -> bool:
    replicas = seen["replicas"]
    return (
        {replica["job_id"] for replica in replicas} == set(seen["jobs"])
        and {replica["id"] for replica in replicas} == set(seen["records"])
        and len(seen["jobs"]) == len(seen["records"]) == seen["tunnels"] == wanted
    )


def short(_chance: random.Random) -> tuple[str, str | None]:
    return "/probe/x", None


def slow(chance: random.Random) -> tuple[str, str | None]:
    return f"/probe/slow?s={chance.uniform(0.2, 1.2):.2f}", None


def stream(chance: random.Random) -> tuple[str, str | None]:
    count = chance.randint(5, 20)
    return f"/probe/stream?n={count}&s=0.1", "".join(f"{n}\n" for n in range(count))


async def ask(http: aiohttp.ClientSession, url: str, expected: str | None) -> tuple[Outcome, str]:
    """Send one request; ``expected`` is the whole body where it is known."""
    status = None
    try:
        async with http.get(url, headers={"Connection": "close"}) as answer:
            status = answer.status
            body = (await answer.read()).decode()
    except TimeoutError:
        return Outcome.UNANSWERED, f"status {status}"
    except aiohttp.ClientError as error:
        return (Outcome.RESET if status is None else Outcome.CUT), repr(error)
    if status == 200 and expected in (None, body):
        return Outcome.WHOLE, ""
    with contextlib.suppress(ValueError):
        problem = f"{status} {json.loads(body)['type'].rpartition('/')[2]}"
        if problem in set(Outcome):
            return Outcome(problem), body
    return Outcome.WRONG, f"{status} {body[:500]}"


STRIKES: dict[Kind, Callable[[Schedule], object]] = {
    Kind.BACKEND_KILLED: Schedule.kill_backend,
    Kind.BACKEND_FROZEN: Schedule.freeze_backend,
    Kind.MASTER_KILLED: Schedule.kill_master,
    Kind.WORKER_KILLED: Schedule.kill_worker,
    Kind.TUNNEL_KILLED: Schedule.kill_tunnel,
    Kind.JOB_CANCELLED: Schedule.cancel_job,
    Kind.SERVICE_KILLED: Schedule.kill_service,
    Kind.CHANGED: Schedule.change,
    Kind.RESIZED: Schedule.resize,
    Kind.STOPPED: Schedule.stop,
    Kind.STARTED: Schedule.start,
}


async def hold_load(url: str, load: int, ended: threading.Event) -> None:
    """Keep so many requests in flight until the end."""

    async def one(http: aiohttp.ClientSession) -> None:
        while not ended.is_set():
            outcome, detail = await ask(http, f"{url}/probe/slow?s=1.5", None)
            assert outcome is Outcome.WHOLE, detail

    async with session(UNHARMED) as http:
        await asyncio.gather(*(one(http) for _ in range(load)))


def play(folder: Path, lab: Lab, seed: int) -> None:
    """One schedule, from the first request to the last replica that is kept for none."""
    product = ClusterProduct(folder, lab, gate={"workers": 2})
    product.expected += [
        r"control\.sock|context: ngx\.timer|exited on signal 9",
        r"Connection refused|reset by peer|prematurely closed",
        r"^    ",  # last lines of a probe that was cancelled in the middle of an answer
    ]
    with serving(product):
        schedule = Schedule(product, seed)
        product.up("--stop-jobs")
        clients = Background(schedule.clients)
        until(lambda: schedule.requests, UNHARMED)
        for _ in range(schedule.chance.randint(6, 10)):
            time.sleep(schedule.chance.uniform(0.1, 1.5))
            schedule.strike()
        schedule.ended.set()
        clients.result(2 * UNHARMED)
        schedule.judge()
        schedule.serve_again()
        load, ended = schedule.chance.randint(1, 5), threading.Event()
        loaded = Background(lambda: hold_load(product.url, load, ended))
        schedule.settles_at(schedule.wanted_by(load))
        ended.set()
        loaded.result()
        schedule.settles_at(schedule.min)
    assert product.live() == [], schedule.story([])


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """What became of each schedule; a few are played at a time, all in one cluster."""
    with (
        Lab(tmp_path_factory.mktemp("lab")) as lab,
        ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="schedule") as pool,
    ):
        folders = [tmp_path_factory.mktemp(f"seed-{seed}") for seed in SEEDS]
        yield {seed: pool.submit(play, folders[seed], lab, seed) for seed in SEEDS}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_after_random_faults_the_wanted_jobs_exist_and_every_request_has_its_answer(played, seed):
    played[seed].result()
