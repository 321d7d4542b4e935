"""Backend, workers and master are killed; nginx is reloaded. Nobody notices who need not."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from slurmgate import history
from slurmgate.observed import Outcome
from tests.up.clients import Background, ask_in_background, fetch, session
from tests.up.product import alive
from tests.waiting import until

UPSTREAM_GONE = r"upstream prematurely closed|Connection refused|reset by peer"


def hold(product, count: int):
    """Send requests that have to be held; returns once all of them wait."""
    asked = ask_in_background([f"{product.url}/probe/{i}" for i in range(count)])
    until(lambda: product.info()["waiting"] == count)
    return asked


def test_requests_held_while_the_backend_is_killed_are_answered_by_one_start(product):
    product.probe(held=True)
    product.probe("warm")
    product.up()
    product.get("/warm/")
    asked = hold(product, 100)
    product.kill_backend(wait=False)
    for _ in range(20):
        assert product.get("/warm/").headers["X-Slurmgate-Waited"] == "0.000"
    product.let_load()
    assert {a.status for a in asked.result()} == {200}
    assert len(product.noted("start")) == 1
    assert len(product.noted("start", "warm")) == 1


def test_a_start_the_killed_backend_had_not_noticed_is_adopted(product):
    product.probe(held=True)
    product.up()
    asked = hold(product, 3)
    until(lambda: product.noted("start"))
    product.kill_backend()
    product.let_load()
    assert {a.status for a in asked.result()} == {200}
    assert len(product.noted("start")) == 1


def test_a_start_during_which_the_backend_is_killed_is_in_the_history_once(product):
    product.probe(load=3)
    product.up()
    asked = hold(product, 3)
    until(lambda: product.noted("start"))
    product.kill_backend()
    assert {a.status for a in asked.result()} == {200}
    kept = product.state_dir / "history.jsonl"
    until(lambda: history.read(kept).starts)
    product.kill_backend()
    product.until_state("ready")
    (start,) = history.read(kept).starts
    assert (start.service, start.outcome) == ("probe", Outcome.READY)
    assert start.start_s is None or start.start_s >= 3, "nobody may have seen when it was ready"


def test_adopted_services_still_go_idle(product):
    product.probe(timeout=1.5)
    product.up()
    product.get("/probe/")
    product.kill_backend()
    product.until_state("cold")
    assert product.replicas() == []


def test_a_service_older_than_its_start_timeout_is_adopted_all_the_same(product):
    product.probe()
    product.up()
    product.get("/probe/")
    product.probe(start_timeout=1)
    product.write_config()
    product.run("reload")
    until(lambda: product.info()["replicas"][0]["since_s"] > 1.5)
    product.kill_backend()
    for _ in range(20):
        assert product.get("/probe/").headers["X-Slurmgate-Waited"] == "0.000"
    product.until_state("ready")
    assert len(product.noted("start")) == 1


def test_an_adopted_replica_that_dies_unseen_is_replaced_and_nobody_is_refused(product):
    product.expected.append(UPSTREAM_GONE)
    product.probe()
    product.up()
    first = product.get("/probe/").json()["pid"]
    product.kill_backend(wait=False)
    os.kill(first, signal.SIGKILL)
    assert product.get("/probe/").status_code == 200
    assert len(product.noted("start")) == 2


def test_a_lease_that_was_used_up_does_not_come_back_with_a_restarted_backend(product):
    product.probe(timeout=0.3)
    product.up()
    assert product.get("/probe/", headers={"Prefer": "wait=0"}).status_code == 503
    # It may have ended again before anybody looks: then this request starts it once more.
    until(lambda: product.noted("start") and product.info()["state"] != "waking")
    assert product.get("/probe/").status_code == 200
    product.until_state("cold")
    started = len(product.noted("start"))
    product.kill_backend()
    # An admin call is answered once the gate has reported to the new backend.
    until(lambda: product.post("/admin/reload").json()["gate_informed"] is True)
    assert product.info()["state"] == "cold"
    assert len(product.noted("start")) == started


def test_counts_of_a_killed_worker_vanish_and_the_service_still_goes_idle(product):
    product.top["gate"] = {"workers": 2}
    product.probe(timeout=1)
    product.up()
    product.get("/probe/")
    product.expected.append("exited on signal 9")

    async def streams() -> list[object]:
        async with session() as client:
            asks = [fetch(client, f"{product.url}/probe/stream?n=600&s=0.1") for _ in range(10)]
            return await asyncio.gather(*asks, return_exceptions=True)

    streaming = Background(streams)
    until(lambda: product.info()["in_flight"] == 10)
    for worker in product.nginx_workers():
        os.kill(worker, signal.SIGKILL)
    assert all(isinstance(outcome, Exception) for outcome in streaming.result())
    product.until_state("cold")
    assert product.get("/probe/").status_code == 200


def test_after_the_master_is_killed_it_serves_again_within_two_seconds(product):
    product.probe()
    product.up()
    product.get("/probe/")

    def seconds_away() -> float:
        master, workers = product.nginx_master(), product.nginx_workers()
        os.kill(master, signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: product.serves_again(master))
        took = time.monotonic() - killed
        assert product.get("/probe/").status_code == 200
        assert not any(map(alive, workers))
        return took

    # A machine that is busy, or stands still for a second, is not so each time.
    assert any(seconds_away() < 2 for _ in range(4))
    assert len(product.noted("start")) == 1


def test_an_nginx_reload_keeps_held_requests_and_streams(product):
    product.probe(held=True, timeout=1)
    product.probe("warm", timeout=60)
    product.up()
    product.get("/warm/")

    async def streams() -> list[bytes]:
        async with session() as client:
            asks = [fetch(client, f"{product.url}/warm/stream?n=30&s=0.1") for _ in range(10)]
            return [answer.body for answer in await asyncio.gather(*asks)]

    streaming = Background(streams)
    asked = hold(product, 100)
    before = set(product.nginx_workers())
    os.kill(product.nginx_master(), signal.SIGHUP)
    until(lambda: set(product.nginx_workers()) - before)
    product.let_load()
    assert {a.status for a in asked.result()} == {200}
    whole = "".join(f"{n}\n" for n in range(30)).encode()
    assert streaming.result() == [whole] * 10
    product.until_state("cold")
    until(lambda: not before & set(product.nginx_workers()))
    assert len(product.noted("start")) == 1
