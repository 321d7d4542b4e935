"""A request to a cold service waits and is answered."""

from __future__ import annotations

import asyncio
import hashlib
import os

import aiohttp

from tests.waiting import until


def test_a_request_to_a_cold_service_waits_and_is_answered(product):
    product.probe(load=0.5)
    product.up()
    answer = product.get("/probe/hello?x=1")
    assert answer.status_code == 200
    assert answer.headers["X-Slurmgate-Service"] == "probe"
    assert float(answer.headers["X-Slurmgate-Waited"]) >= 0.5
    assert answer.headers["X-Slurmgate-Replica"] == product.info()["replicas"][0]["id"]
    assert product.noted("request")[0]["path"] == "/hello?x=1"
    again = product.get("/probe/hello")
    assert again.headers["X-Slurmgate-Waited"] == "0.000"


def test_300_parallel_cold_requests_start_one_process_and_are_all_answered(product):
    product.probe(load=0.5)
    product.up()

    async def ask_all() -> list[tuple[int, int]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def ask(index: int) -> tuple[int, int]:
                async with session.get(f"{product.url}/probe/n/{index}") as answer:
                    return answer.status, (await answer.json())["pid"]

            return await asyncio.gather(*map(ask, range(300)))

    answers = asyncio.run(ask_all())
    (start,) = product.noted("start")
    assert answers == [(200, start["pid"])] * 300
    assert sorted(r["path"] for r in product.noted("request")) == sorted(
        f"/n/{i}" for i in range(300)
    )
    until(lambda: product.info()["requests"] == 300)


def test_an_idle_service_is_stopped_and_a_later_request_starts_it_again(product):
    product.probe(timeout=0.5)
    product.up()
    first = product.get("/probe/").json()["pid"]
    product.until_state("cold")
    assert product.replicas() == []
    assert product.get("/probe/").json()["pid"] != first


def test_a_large_upload_through_a_cold_start_arrives_whole(product):
    product.probe(load=0.5)
    product.up()
    chunk = os.urandom(1 << 20)
    digest = hashlib.sha256(chunk * 200).hexdigest()

    def body():
        for _ in range(200):
            yield chunk

    answer = __import__("httpx").post(f"{product.url}/probe/digest", content=body(), timeout=100)
    assert answer.json() == {"sha256": digest, "length": 200 << 20}
