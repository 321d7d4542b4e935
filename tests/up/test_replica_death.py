"""A service that dies under its requests."""

from __future__ import annotations

import os
import signal
import time

from tests.up.clients import Load, ask_in_background
from tests.waiting import until

GONE = r"prematurely closed|Connection refused|reset by peer|Broken pipe"


def test_after_the_service_was_killed_requests_are_held_and_a_new_process_answers(product):
    product.expected.append(GONE)
    product.probe()
    product.up()
    first = product.get("/probe/").json()["pid"]
    with Load(f"{product.url}/probe/slow?s=0.02", clients=8) as load:
        until(lambda: load.sent > 100)
        os.kill(first, signal.SIGKILL)
        until(lambda: len(product.noted("start")) == 2)
        sent = load.sent
        until(lambda: load.sent > sent + 200)
    assert load.failures == []
    assert len(product.noted("start")) == 2
    assert product.get("/probe/").json()["pid"] != first


def test_without_replay_a_request_that_was_sent_is_not_repeated(product):
    product.expected.append(GONE)
    product.probe(replay=0)
    product.up()
    product.get("/probe/")
    answer = product.get("/probe/die")
    assert answer.status_code == 502
    assert answer.json()["type"].endswith("upstream-failed")
    assert [r["path"] for r in product.noted("request")].count("/die") == 1
    assert product.get("/probe/").status_code == 200


def test_a_request_that_kills_the_service_each_time_ends_after_two(product):
    product.expected.append(GONE)
    product.probe(replay=8)
    product.up()
    product.get("/probe/")
    answer = ask_in_background([f"{product.url}/probe/die"], method="POST", data=b"x").result()[0]
    assert answer.status == 502
    assert answer.json["type"].endswith("upstream-failed")
    assert [r["path"] for r in product.noted("request")].count("/die") == 2
    assert product.get("/probe/").status_code == 200


def test_a_service_that_answers_requests_but_no_health_checks_is_left_alone(product):
    # On a busy machine a second may pass without an answer.
    health = {"interval": 0.5, "timeout": 0.3, "failures": 4}
    product.probe(health=health, replace_after=1)
    product.up()
    product.get("/probe/sick")
    began = time.monotonic()
    with Load(f"{product.url}/probe/slow?s=0.02", clients=2) as load:
        until(lambda: time.monotonic() - began > 2 * (4 * 0.5 + 1))
    assert load.failures == []
    assert len(product.noted("start")) == 1


def test_a_service_that_answers_nothing_any_more_is_replaced(product):
    health = {"interval": 0.1, "timeout": 0.3, "failures": 2}
    product.probe(health=health, replace_after=1)
    product.up()
    product.get("/probe/sick")
    until(lambda: len(product.noted("start")) == 2)
    assert product.get("/probe/").status_code == 200
    until(lambda: len(product.replicas()) == 1)
