"""A request to a cold service waits and is answered."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal

import aiohttp

from tests.up.clients import ask_in_background, session
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


def test_a_service_runs_as_soon_as_it_is_healthy_and_says_why_it_does_not(product):
    product.probe(load=1)
    product.up()
    product.run("start", "probe")
    told = []

    def is_ready() -> bool:
        told.append(product.info())
        return told[-1]["state"] == "ready"

    until(is_ready)
    starting = [found for found in told if found["started"] and found["state"] == "waking"]
    assert starting
    assert not any(found["running"] for found in starting)
    assert all(found["reason"] for found in starting)
    assert (told[-1]["running"], told[-1]["reason"]) == (True, None)


def test_a_service_named_like_a_word_of_ours_is_held_and_counted_as_any_other(product):
    product.probe("-", load=0.5)
    product.up()
    assert product.get("/-/").status_code == 200

    def counts() -> tuple[int, int, int]:
        found = product.info("-")
        return found["requests"], found["waiting"], found["in_flight"]

    until(lambda: counts() == (1, 0, 0))


def test_a_health_check_may_take_longer_than_a_socket_can_wait(product):
    product.probe(health={"timeout": 10_000_000})
    product.up()
    assert product.get("/probe/").status_code == 200


def test_300_parallel_cold_requests_start_one_process_and_are_all_answered(product):
    product.probe(load=0.5)
    product.up()
    urls = [f"{product.url}/probe/n/{i}" for i in range(300)]
    answers = ask_in_background(urls).result()
    (start,) = product.noted("start")
    assert [(a.status, a.json["pid"]) for a in answers] == [(200, start["pid"])] * 300
    paths = sorted(r["path"] for r in product.noted("request"))
    assert paths == sorted(f"/n/{i}" for i in range(300))
    until(lambda: product.info()["requests"] == 300)


def test_the_number_of_requests_is_right_after_notify_calls_were_lost(product):
    product.probe()
    product.up()
    product.get("/probe/")
    backend = product.backend()
    os.kill(backend, signal.SIGSTOP)
    try:
        urls = [f"{product.url}/probe/{i}" for i in range(50)]
        assert {a.status for a in ask_in_background(urls).result()} == {200}
    finally:
        product.kill_backend(wait=False)
    urls = [f"{product.url}/probe/{i}" for i in range(50)]
    assert {a.status for a in ask_in_background(urls).result()} == {200}
    until(lambda: product.backend() not in (None, backend) and product.api_answers())
    until(lambda: product.info()["requests"] == 101)
    assert len(product.noted("start")) == 1


def test_a_large_upload_through_a_cold_start_arrives_whole(product):
    product.probe(load=0.5)
    product.up()
    chunk = os.urandom(1 << 20)
    digest = hashlib.sha256(chunk * 200).hexdigest()

    async def upload() -> object:
        async def body():
            for _ in range(200):
                yield chunk

        async with session() as client:
            async with client.post(f"{product.url}/probe/digest", data=body()) as answer:
                return await answer.json()

    assert asyncio.run(upload()) == {"sha256": digest, "length": 200 << 20}


def test_a_websocket_through_a_cold_start(product):
    product.probe(load=0.5)
    product.up()

    async def talk() -> list[str]:
        async with session() as client, client.ws_connect(f"{product.url}/probe/ws") as socket:
            heard = []
            for word in ("one", "two"):
                await socket.send_str(word)
                heard.append((await socket.receive(10)).data)
            return heard

    assert asyncio.run(talk()) == ["one", "two"]
    until(lambda: product.info()["in_flight"] == 0)


def test_a_streamed_answer_through_a_cold_start_flushes_as_it_comes(product):
    product.probe(load=0.5)
    product.up()

    async def listen() -> list[bytes]:
        """The first lines of an answer that is a minute long."""
        async with session() as client:
            async with client.get(f"{product.url}/probe/stream?n=600&s=0.1") as answer:
                return [await answer.content.readline() for _ in range(5)]

    lines = asyncio.run(asyncio.wait_for(listen(), 30))
    assert lines == [b"%d\n" % n for n in range(5)]


def test_answer_headers_of_60_kilobytes_pass(product):
    product.probe()
    product.up()

    async def ask() -> int:
        async with aiohttp.ClientSession(max_line_size=1 << 17, max_field_size=1 << 17) as client:
            async with client.get(f"{product.url}/probe/headers?bytes=60000") as answer:
                return len(answer.headers["X-Large"])

    assert asyncio.run(ask()) == 60000
