"""Random schedules of faults, by seed: afterwards exactly the wanted jobs exist, and every request
was answered or got the problem that the model (``outcomes``) allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slurmgate.errors import BackendAway
from tests.lab.lab import Lab
from tests.slow.asking import UNHARMED, ask, hold_load, short, slow, stream
from tests.slow.faults import Faults
from tests.slow.outcomes import Request, allowed
from tests.slurm.product import ClusterProduct, serving
from tests.up.clients import Background, session
from tests.waiting import until

SEEDS = range(20)
AT_A_TIME = 3
CLIENTS = 5
SETTLED_WITHIN = 60.0


class Schedule:
    """One product, its clients and what was done to it, all out of one seed."""

    def __init__(self, product: ClusterProduct, seed: int) -> None:
        self.product = product
        self.seed = seed
        self.faults = Faults(product, random.Random(seed))
        self.requests: list[Request] = []
        self.ended = threading.Event()

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

    # -- what must come of it --------------------------------------------------------------

    def judge(self) -> None:
        """Every request has an outcome that the model allows."""
        assert self.requests
        bad = [r for r in self.requests if r.outcome not in allowed(r, self.faults.done)]
        assert bad == [], self.story(bad)

    def story(self, bad: list[Request]) -> str:
        began = self.requests[0].began
        told = [
            (f.began, f"{f.kind} {f.target} until {f.ended - began:.2f}") for f in self.faults.done
        ]
        told += [
            (r.began, f"  {r.path} until {r.ended - began:.2f}: {r.outcome} {r.detail}")
            for r in bad
        ]
        lines = [f"{at - began:7.2f} {what}" for at, what in sorted(told)]
        return "\n".join([f"seed {self.seed}, {self.faults.bounds}", *lines])

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


def is_at_rest(seen: dict[str, Any], wanted: int) -> bool:
    replicas = seen["replicas"]
    return (
        {replica["job_id"] for replica in replicas} == set(seen["jobs"])
        and {replica["id"] for replica in replicas} == set(seen["records"])
        and len(seen["jobs"]) == len(seen["records"]) == seen["tunnels"] == wanted
    )


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
        chance = schedule.faults.chance
        product.up("--stop-jobs")
        clients = Background(schedule.clients)
        until(lambda: schedule.requests, UNHARMED)
        for _ in range(chance.randint(6, 10)):
            time.sleep(chance.uniform(0.1, 1.5))
            schedule.faults.strike()
        schedule.ended.set()
        clients.result(2 * UNHARMED)
        schedule.judge()
        schedule.serve_again()
        load, ended = chance.randint(1, 5), threading.Event()
        loaded = Background(lambda: hold_load(product.url, load, ended))
        schedule.settles_at(schedule.faults.bounds.wanted_by(load))
        ended.set()
        loaded.result()
        schedule.settles_at(schedule.faults.bounds.min)
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
