"""Services that shrink and grow all the time: no request meets a replica that is about to end."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.slurm.traffic import Flow
from tests.up.clients import Answer, fetch, session
from tests.waiting import until

SERVICES = 4
BURSTS = 30
TIMEOUT_S = 0.8


@pytest.mark.timeout(240)
def test_requests_timed_around_scale_down_are_never_lost(product):
    """Hundreds of requests in bursts, each burst about when the one before it lets replicas go."""
    names = [f"s{number}" for number in range(SERVICES)]
    for name in names:
        product.probe(
            name,
            timeout=TIMEOUT_S,
            linger=0.3,  # a request that comes too late is noted, not refused
            scale_up_after=0.1,
            max_starts_per_hour=1000,
            replicas={"max": 3, "target_in_flight": 2},
        )
    product.up()
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    plans = {
        name: [(chance.randint(1, 9), chance.gauss(TIMEOUT_S, 0.15)) for _ in range(BURSTS)]
        for name in names
    }

    async def use(client, name) -> list[Answer]:
        answers = []
        for size, pause in plans[name]:
            url = f"{product.url}/{name}/slow?s=0.2"
            answers += await asyncio.gather(*(fetch(client, url) for _ in range(size)))
            await asyncio.sleep(pause)
        return answers

    async def use_all() -> list[list[Answer]]:
        async with session(200) as client:
            return await asyncio.gather(*(use(client, name) for name in names))

    for name, answers in zip(names, asyncio.run(use_all()), strict=True):
        assert {answer.status for answer in answers} == {200}, (seed, name)
        late = [note for note in product.noted("request", name) if note["terminated"]]
        assert late == [], (seed, name)
        ended = product.noted("term", name)
        assert len(ended) >= 3, "replicas were let go meanwhile"


def test_streams_go_on_to_their_end_on_a_replica_that_is_let_go(product):
    grows = {"scale_up_after": 0.3, "replicas": {"max": 4, "target_in_flight": 4}}
    product.probe(**grows)
    product.up()
    body = "".join(f"{number}\n" for number in range(25))
    streams = Flow(f"{product.url}/probe/stream?n=25&s=0.2", size=4, body=body.encode())

    def states() -> list[str]:
        return [replica["state"] for replica in product.info()["replicas"]]

    def streaming() -> set[int]:
        asked = product.noted("request")
        return {note["pid"] for note in asked if note["path"].startswith("/stream")}

    def let_go_with_a_stream() -> bool:
        replicas = product.info()["replicas"]
        return any(r["state"] == "draining" and r["in_flight"] > 0 for r in replicas)

    with Flow(f"{product.url}/probe/slow?s=0.3", size=16) as load:
        until(lambda: states() == ["ready"] * 4, 30)
        load.size = 0
        until(lambda: sum(r["in_flight"] for r in product.info()["replicas"]) == 0)
        # Among replicas that have nothing else they spread; beside a load they may keep together.
        with streams:
            until(lambda: len(streaming()) >= 3)
            product.probe(timeout=1, **grows)  # not before, or some might be gone by now
            product.write_config()
            product.run("reload")
            until(let_go_with_a_stream)
            until(lambda: len(states()) == 1, 60)
    assert load.failures == []
    assert streams.failures == []
