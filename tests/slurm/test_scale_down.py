"""Requests timed around every scale-down and every idle stop: none is lost, none fails."""

from __future__ import annotations

import asyncio
import random
import re

import pytest

from tests.slurm.product import ClusterProduct
from tests.up.clients import Answer, fetch, session

NAMES = ("left", "right")
CYCLES = 2
REPLICAS = 3
TARGET = 8
TIMEOUT = 1.0
AROUND_SCALE_DOWN = 70
AROUND_IDLE_STOP = 6


class Shrinking:
    """One service that grows to all its replicas and goes back to none, under aimed requests."""

    def __init__(self, product: ClusterProduct, name: str, seed: int) -> None:
        self.product = product
        self.name = name
        self.chance = random.Random(f"{seed}-{name}")
        self.answers: list[Answer] = []

    async def run(self) -> None:
        async with session() as client:
            self.client = client
            for _ in range(CYCLES):
                await self.grow()
                dropped = asyncio.get_running_loop().time()
                await self.aim_at_scale_down(dropped + TIMEOUT)
                await self.ask_until_one_is_left()
                for _ in range(AROUND_IDLE_STOP):
                    await self.aim_at_idle_stop()

    async def ask(self, seconds: float) -> None:
        url = f"{self.product.url}/{self.name}/slow?s={seconds}"
        self.answers.append(await fetch(self.client, url))

    async def look(self) -> dict:
        return await asyncio.to_thread(self.product.info, self.name)

    async def grow(self) -> None:
        """Keep more in flight than two can take, until the third is ready; then nothing."""
        grown = False

        async def one() -> None:
            while not grown:
                await self.ask(0.3)

        load = [asyncio.ensure_future(one()) for _ in range(TARGET * REPLICAS)]
        async with asyncio.timeout(40):
            while sum(r["state"] == "ready" for r in (await self.look())["replicas"]) < REPLICAS:
                await asyncio.sleep(0.1)
        grown = True
        await asyncio.gather(*load)

    async def aim_at_scale_down(self, moment: float) -> None:
        """Requests that one replica could serve, from a little before the first is let go."""

        async def one(at: float) -> None:
            await asyncio.sleep(at - asyncio.get_running_loop().time())
            await self.ask(self.chance.choice([0.001, 0.02]))

        aims = [moment + self.chance.gauss(0.05, 0.05) for _ in range(AROUND_SCALE_DOWN // 2)]
        aims += [moment + self.chance.uniform(0.1, 0.8) for _ in range(AROUND_SCALE_DOWN // 2)]
        await asyncio.gather(*map(one, aims))

    async def ask_until_one_is_left(self) -> None:
        """The same while the next one is let go, which is only once the one before is gone."""
        left = False

        async def one() -> None:
            while not left:
                await self.ask(self.chance.choice([0.001, 0.02]))
                await asyncio.sleep(self.chance.uniform(0, 0.05))

        load = [asyncio.ensure_future(one()) for _ in range(TARGET // 2)]
        async with asyncio.timeout(40):
            while len((await self.look())["replicas"]) > 1:
                await asyncio.sleep(0.05)
        left = True
        await asyncio.gather(*load)

    async def aim_at_idle_stop(self) -> None:
        """One request at the moment that /info names, more or less."""
        left = (await self.look())["stops_in_s"]
        await asyncio.sleep((left or 0.0) + self.chance.gauss(0.05, 0.05))
        await self.ask(0.01)


@pytest.mark.timeout(180)
def test_requests_timed_around_scale_downs_and_idle_stops_are_all_answered(
    product: ClusterProduct,
):
    for name in NAMES:
        bounds = {"min": 0, "max": REPLICAS, "target_in_flight": TARGET}
        entry = product.job(name, timeout=TIMEOUT, scale_up_after=0.2, replicas=bounds)
        entry["env"]["PROBE_LINGER_S"] = "0.4"
    product.up()
    seed = random.randrange(1 << 30)
    both = [Shrinking(product, name, seed) for name in NAMES]

    async def run_both() -> None:
        await asyncio.gather(*(service.run() for service in both))

    asyncio.run(run_both())
    answers = [answer for service in both for answer in service.answers]
    refused = [answer for answer in answers if answer.status != 200]
    assert refused == [], f"seed {seed}"
    assert len(answers) > 300
    late = [r for name in NAMES for r in product.noted("request", name) if r["terminated"]]
    assert late == [], f"seed {seed}: requests reached a service after its cancel"
    for name in NAMES:
        product.until_state("cold", name)
    closed = [line for line in product.log if re.search(r"draining: idle", line)]
    assert len(closed) >= len(NAMES) * (CYCLES * (REPLICAS - 1) + 1), f"seed {seed}"
