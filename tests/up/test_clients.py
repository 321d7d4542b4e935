"""Clients that hang up, wait for less, or send what the gate must not pass on."""

from __future__ import annotations

import time

import pytest

from tests.up.clients import ask_in_background, connect, http2, read_answer
from tests.waiting import until

POST = b"POST /probe/x HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


def all_counts_are_zero(product) -> bool:
    found = product.info()
    return found["waiting"] == found["in_flight"] == 0


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /probe/x HTTP/1.1\r\nHost: x\r\n\r\n",
        POST % 5 + b"hello",
        POST % (1 << 20) + b"y" * (1 << 20),
    ],
    ids=["no body", "small body", "large body"],
)
def test_a_client_that_hangs_up_while_held_leaves_no_count(product, request_bytes):
    product.probe(load=3600, timeout=1)
    product.up()
    clients = [connect(product.port, request_bytes) for _ in range(20)]
    until(lambda: product.info()["waiting"] == 20)
    for client in clients:
        client.close()
    until(lambda: all_counts_are_zero(product))


def test_a_client_that_hangs_up_before_its_body_was_read_leaves_no_count(product):
    product.probe(load=3600)
    product.up()
    clients = [connect(product.port, POST % 100000 + b"only a part") for _ in range(20)]
    until(lambda: product.info()["requests"] == 20)
    for client in clients:
        client.close()
    until(lambda: all_counts_are_zero(product))


@pytest.mark.parametrize("data", [(), ("--data-binary", "hello")], ids=["GET", "POST"])
def test_a_client_that_hangs_up_over_http2_leaves_no_count(product, certificate, data):
    product.top["gate"] = {"tls": certificate}
    product.probe(load=3600)
    product.up()
    asked = [http2(f"{product.url}/probe/x", *data) for _ in range(10)]
    until(lambda: product.info()["waiting"] == 10)
    for curl in asked:
        curl.kill()
        curl.communicate()
    until(lambda: all_counts_are_zero(product))


def test_a_request_over_http2_is_held_and_answered(product, certificate):
    product.top["gate"] = {"tls": certificate}
    product.probe(load=0.5)
    product.up()
    body, _ = http2(f"{product.url}/probe/x", "-w", "%{http_version} %{http_code}").communicate()
    assert body.endswith(b"2 200")


def test_whoever_waits_less_is_sent_away_but_the_start_goes_on(product):
    product.probe(load=2)
    product.up()
    answer = product.get("/probe/", headers={"Prefer": "wait=0"})
    assert answer.status_code == 503
    assert answer.json()["type"].endswith("hold-timeout")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert answer.json()["retry_after_s"] > 0
    product.until_state("ready")
    # The gate may learn of it a moment later.
    until(lambda: product.get("/probe/").headers["X-Slurmgate-Waited"] == "0.000")
    assert len(product.noted("start")) == 1


def test_prefer_shortens_the_hold_in_any_of_several_header_lines(product):
    product.probe(load=3600)
    product.up()
    began = time.monotonic()
    request = b"GET /probe/ HTTP/1.1\r\nHost: x\r\nPrefer: respond-async\r\n"
    client = connect(product.port, request + b'Prefer: wait="1"\r\nConnection: close\r\n\r\n')
    answer = read_answer(client)
    client.close()
    assert answer.startswith(b"HTTP/1.1 503")
    assert 0.9 < time.monotonic() - began < 20


def test_the_hold_timeout_ends_the_wait_with_state_and_reason(product):
    product.probe(load=3600, hold_timeout=1)
    product.up()
    product.run("start", "probe")
    until(lambda: "503" in (product.info()["reason"] or ""))  # it was polled, and still loads
    answer = product.get("/probe/")
    assert answer.status_code == 503
    problem = answer.json()
    assert problem["type"].endswith("hold-timeout")
    assert problem["service"] == "probe"
    assert problem["state"] == "waking"
    assert "503" in problem["reason"]


def test_a_full_waiting_room_refuses_the_next_at_once(product):
    product.probe(load=3600, max_waiting=5)
    product.up()
    asked = ask_in_background([f"{product.url}/probe/{i}" for i in range(5)])
    until(lambda: product.info()["waiting"] == 5)
    answer = product.get("/probe/")
    assert answer.status_code == 429
    assert answer.json()["type"].endswith("too-many-waiting")
    assert "Retry-After" in answer.headers
    product.run("stop", "probe")
    assert {a.status for a in asked.result()} == {503}


def test_bodies_of_waiting_requests_are_bounded(product):
    product.top["gate"] = {"max_held_bytes": 1000000}
    product.probe(load=3600)
    product.up()
    held = [connect(product.port, POST % 600000 + b"x" * 600000)]
    until(lambda: product.info()["waiting"] == 1)
    answer = ask_in_background([f"{product.url}/probe/"], method="POST", data=b"x" * 600000)
    assert answer.result()[0].status == 429
    held[0].close()
    until(lambda: all_counts_are_zero(product))
    held = [connect(product.port, POST % 600000 + b"x" * 600000)]
    until(lambda: product.info()["waiting"] == 1)
    held[0].close()


def test_a_body_over_the_limit_is_refused(product):
    product.expected.append("client intended to send too large body")
    product.top["gate"] = {"max_body": 1000}
    product.probe()
    product.up()
    answer = ask_in_background([f"{product.url}/probe/"], method="POST", data=b"x" * 1001)
    problem = answer.result()[0]
    assert problem.status == 413
    assert problem.json["type"].endswith("body-too-large")
    assert product.info()["state"] == "cold"
