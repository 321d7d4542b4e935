"""Idle services end; nothing that is in use, or about to be, is ever cut."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.up.clients import ask_in_background, fetch, session
from tests.waiting import until


def test_an_idle_service_is_stopped_and_a_later_request_starts_it_again(product):
    product.probe(timeout=0.5)
    product.up()
    first = product.get("/probe/").json()["pid"]
    product.until_state("cold")
    assert product.replicas() == []
    assert product.get("/probe/").json()["pid"] != first


def test_a_stop_right_after_an_answer_starts_nothing_anew(product):
    product.probe()
    product.up()
    product.get("/probe/")
    product.post("/admin/services/probe/stop")
    product.until_state("cold")
    assert len(product.noted("start")) == 1


def test_a_stream_longer_than_the_idle_timeout_is_not_cut(product):
    product.probe(timeout=0.5)
    product.up()
    lines = product.get("/probe/stream?n=30&s=0.1").text.split()
    assert lines == [str(n) for n in range(30)]
    assert len(product.noted("start")) == 1
    product.until_state("cold")


def test_options_and_no_wake_paths_neither_start_it_nor_keep_it(product):
    product.probe(timeout=1, no_wake=["/status"])
    product.up()
    for method, path in (("GET", "/probe/status/x"), ("OPTIONS", "/probe/anything")):
        answer = ask_in_background([product.url + path], method=method).result()[0]
        assert answer.status == 503
        assert answer.json["type"].endswith("not-running")
        assert int(answer.headers["Retry-After"]) <= 60
    assert product.info()["state"] == "cold"
    product.get("/probe/")

    def poll_until_stopped() -> bool:
        return product.get("/probe/status").status_code == 503

    until(poll_until_stopped)
    assert product.noted("start")[1:] == []
    assert product.info()["requests"] == 1


@pytest.mark.timeout(240)
def test_requests_timed_around_the_idle_timeout_never_fail(product):
    """Hundreds of requests, each about one idle timeout after the one before, on ten services."""
    names = [f"s{i}" for i in range(10)]
    for name in names:
        product.probe(name, timeout=0.9, linger=0.3)
    product.up()
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    pauses = {name: [chance.gauss(0.95, 0.12) for _ in range(30)] for name in names}

    async def use(client, name) -> list[int]:
        statuses = []
        for pause in pauses[name]:
            statuses.append((await fetch(client, f"{product.url}/{name}/slow?s=0.01")).status)
            await asyncio.sleep(pause)
        return statuses

    async def use_all() -> list[list[int]]:
        async with session(200) as client:
            return await asyncio.gather(*(use(client, name) for name in names))

    answers = asyncio.run(use_all())
    assert answers == [[200] * 30] * 10, f"seed {seed}"
    late = [r for name in names for r in product.noted("request", name) if r["terminated"]]
    assert late == [], f"seed {seed}: requests reached a service after its cancel"
    stops = sum(len(product.noted("term", name)) for name in names)
    assert stops > 10, "the idle timeout was hardly ever met"


@pytest.mark.timeout(240)
def test_no_request_reaches_a_replica_after_its_cancel(product):
    """Requests at full speed while the service is stopped again and again."""
    product.probe(linger=0.4)
    product.up()
    product.get("/probe/")

    async def hammer(client, ended: asyncio.Event) -> list[int]:
        statuses = []
        while not ended.is_set():
            statuses.append((await fetch(client, f"{product.url}/probe/")).status)
        return statuses

    def newly_ready(info, before) -> bool:
        known = {replica["id"] for replica in before}
        return any(r["state"] == "ready" and r["id"] not in known for r in info["replicas"])

    async def race() -> list[int]:
        ended = asyncio.Event()
        async with session(200) as client:
            clients = [asyncio.ensure_future(hammer(client, ended)) for _ in range(16)]
            for _ in range(15):
                asked = len(product.noted("request"))
                while len(product.noted("request")) < asked + 40:  # it is in full use
                    await asyncio.sleep(0.02)
                ready = product.info()["replicas"]
                await asyncio.to_thread(product.post, "/admin/services/probe/stop")
                while not newly_ready(await asyncio.to_thread(product.info), ready):
                    await asyncio.sleep(0.05)
            ended.set()
            return [status for statuses in await asyncio.gather(*clients) for status in statuses]

    statuses = asyncio.run(race())
    assert set(statuses) == {200}
    assert len(statuses) > 500
    assert [r for r in product.noted("request") if r["terminated"]] == []
