"""Requests to cold, breaking and vanishing services, with a fake backend."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slurmgate.model import GateSpec
from tests.gate.harness import (
    EchoService,
    FakeBackend,
    Gate,
    free_port,
    replica,
    service,
    wait_until,
    waiting,
)
from tests.ports import dead_port


def nothing_held(backend: FakeBackend) -> bool:
    note = backend.service_note("LLM")
    return (
        note.get("waiting") == 0
        and note.get("in_flight") == 0
        and all(entry["in_flight"] == 0 for entry in backend.notes[-1]["replicas"].values())
    )


def test_a_request_to_a_cold_service_is_held_and_answered(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    backend.publish(service())
    with ThreadPoolExecutor() as pool:
        held = pool.submit(gate.get, "/llm/v1/x?a=b%20c", "POST", b"hello")
        wait_until(lambda: waiting(backend) == 1, "one waits")
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        answer = held.result()
    assert answer.status == 200
    assert answer.json["path"] == "/v1/x?a=b%20c"
    assert answer.json["length"] == 5
    assert answer.headers["X-Slurmgate-Service"] == "LLM"
    assert answer.headers["X-Slurmgate-Replica"] == "r1"
    assert float(answer.headers["X-Slurmgate-Waited"]) > 0
    wait_until(lambda: nothing_held(backend), "counts given back")
    wait_until(lambda: backend.service_note("LLM")["requests"] == 1, "counted once")


def test_requests_before_the_first_snapshot_are_held_then_routed(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    with ThreadPoolExecutor() as pool:
        held = pool.submit(gate.get, "/llm/x")
        lost = pool.submit(gate.get, "/nothing/x")
        assert gate.get("/readyz").code == "not-ready"
        wait_until(lambda: len(backend.notes) > 3, "calls")
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        assert held.result().status == 200
        assert lost.result().code == "no-such-route"
    assert gate.get("/readyz").status == 200
    wait_until(lambda: nothing_held(backend), "counts given back")
    wait_until(lambda: backend.service_note("LLM")["requests"] == 1, "counted once")


def test_many_held_requests_are_all_released(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    backend.publish(service())
    with ThreadPoolExecutor(200) as pool:
        held = [pool.submit(gate.get, f"/llm/{i}", "POST", b"x" * i * 100) for i in range(200)]
        wait_until(lambda: waiting(backend) == 200, "all wait")
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        answers = [one.result() for one in held]
    assert {answer.status for answer in answers} == {200}
    assert [answer.json["length"] for answer in answers] == [i * 100 for i in range(200)]
    wait_until(lambda: nothing_held(backend), "counts given back")
    wait_until(lambda: backend.service_note("LLM")["requests"] == 200, "all counted once")


def test_health_is_polled_and_told_at_once(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    starting = replica(echo.port, phase="starting", routable=False)
    echo.healthy = False
    backend.publish(service(state="waking", replicas=[starting]))
    wait_until(lambda: backend.replica_note("r1").get("detail") == "last poll: status 503", "503")
    assert backend.replica_note("r1")["health"] != "up"
    echo.healthy = True
    wait_until(lambda: backend.replica_note("r1")["health"] == "up", "up")


def test_wait_zero_answers_at_once_and_leaves_a_lease(gate: Gate, backend: FakeBackend) -> None:
    backend.publish(service(retry_after_s=200.0))
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    answer = gate.get("/llm/x", headers={"Prefer": "respond-async, Wait=0"})
    assert (answer.status, answer.code) == (503, "hold-timeout")
    assert answer.headers["Retry-After"] == "60"
    assert answer.json["retry_after_s"] == 200
    note = wait_until(lambda: backend.service_note("LLM").get("lease_s"), "lease told")
    assert 170 < note <= 180


@pytest.mark.parametrize("wish", ["wait=1", 'wait="1"'])
def test_prefer_wait_shortens_the_hold(gate: Gate, backend: FakeBackend, wish: str) -> None:
    backend.publish(service())
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    answer = gate.raw(
        b"GET /llm/x HTTP/1.1\r\nHost: a\r\nPrefer: respond-async\r\nPrefer: "
        + wish.encode()
        + b"\r\nConnection: close\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"hold-timeout" in answer


def test_a_wait_that_is_no_whole_number_is_ignored(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    backend.publish(service())
    with ThreadPoolExecutor() as pool:
        held = pool.submit(gate.get, "/llm/x", headers={"Prefer": "wait=0.2"})
        wait_until(lambda: waiting(backend) == 1, "one waits")
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        assert held.result().status == 200


def test_hold_timeout_ends_the_wait(gate: Gate, backend: FakeBackend) -> None:
    backend.publish(service(hold_timeout=0.3))
    assert gate.get("/llm/x").code == "hold-timeout"
    wait_until(lambda: nothing_held(backend), "counts given back")


def test_a_refusal_ends_the_wait_of_all_with_reason_and_log(
    gate: Gate, backend: FakeBackend
) -> None:
    backend.publish(service())
    refusal = {
        "code": "start-failed",
        "reason": "exited with code 3",
        "log": ["boom"],
        "retry_after_s": 2.0,
    }
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(gate.get, "/llm/x") for _ in range(5)]
        wait_until(lambda: waiting(backend) == 5, "all wait")
        backend.publish(service(state="failed", refusal=refusal))
        answers = [one.result() for one in held]
    for answer in answers:
        assert (answer.status, answer.code) == (503, "start-failed")
        assert answer.json["reason"] == "exited with code 3"
        assert answer.json["log"] == ["boom"]
        assert answer.headers["Retry-After"] in ("1", "2")  # what is left of it


def test_a_removed_service_is_404_for_its_waiters(gate: Gate, backend: FakeBackend) -> None:
    backend.publish(service())
    with ThreadPoolExecutor() as pool:
        held = pool.submit(gate.get, "/llm/x")
        wait_until(lambda: waiting(backend) == 1, "one waits")
        backend.publish()
        assert held.result().code == "no-such-route"


@pytest.mark.parametrize("when", ["while it had it", "while it waits again"])
def test_a_request_whose_service_was_removed_after_it_was_sent_is_502(
    gate: Gate, backend: FakeBackend, echo: EchoService, when: str
) -> None:
    gate.expected_errors.append("prematurely closed")
    backend.publish(service(state="ready", replicas=[replica(echo.port)]))
    wait_until(lambda: gate.get("/llm/x").status == 200, "ready")
    original = echo.answer

    def remove_and_break(handler) -> None:
        if handler.path == "/break" and when == "while it had it":
            backend.publish()
            wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "snapshot taken")
        elif handler.path == "/break":
            backend.publish(service(state="waking"))
            wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "snapshot taken")
        original(handler)

    echo.answer = remove_and_break  # type: ignore[method-assign]
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(gate.get, "/llm/break")
        if when == "while it waits again":
            wait_until(lambda: waiting(backend) == 1, "held again")
            backend.publish()
        assert (sent.result().status, sent.result().code) == (502, "upstream-failed")


def test_the_waiting_room_is_bounded(gate: Gate, backend: FakeBackend) -> None:
    backend.publish(service(max_waiting=2))
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(gate.get, "/llm/x") for _ in range(2)]
        wait_until(lambda: waiting(backend) == 2, "two wait")
        assert gate.get("/llm/x").code == "too-many-waiting"
        backend.publish()
        assert {one.result().code for one in held} == {"no-such-route"}


def test_requests_that_do_not_wake(gate: Gate, backend: FakeBackend) -> None:
    backend.publish(service(no_wake=["/status"]))
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    assert gate.get("/llm/status/x").code == "not-running"
    assert gate.get("/llm/x", "OPTIONS").code == "not-running"
    assert backend.service_note("LLM") == {}


@pytest.mark.parametrize("body", [b"", b"x" * 100_000])
def test_a_client_that_hangs_up_while_held_leaves_no_count(
    gate: Gate, backend: FakeBackend, body: bytes
) -> None:
    backend.publish(service())
    with socket.create_connection(("127.0.0.1", gate.port)) as sock:
        sock.sendall(b"POST /llm/x HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body))
        sock.sendall(body)
        wait_until(lambda: waiting(backend) == 1, "one waits")
    wait_until(lambda: nothing_held(backend), "counts given back")


def test_a_client_that_hangs_up_behind_its_next_request_leaves_no_count(
    gate: Gate, backend: FakeBackend
) -> None:
    backend.publish(service())
    with socket.create_connection(("127.0.0.1", gate.port)) as sock:
        sock.sendall(b"GET /llm/1 HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: waiting(backend) == 1, "one waits")
        sock.sendall(b"GET /llm/2 HTTP/1.1\r\nHost: a\r\n\r\n")
    wait_until(lambda: nothing_held(backend), "counts given back")


def test_a_client_that_hangs_up_during_its_body_leaves_no_count(
    gate: Gate, backend: FakeBackend
) -> None:
    backend.publish(service())
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    with socket.create_connection(("127.0.0.1", gate.port)) as sock:
        sock.sendall(b"POST /llm/x HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nabc")
        wait_until(lambda: waiting(backend) == 1, "one waits")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: nothing_held(backend), "counts given back")


def test_a_request_that_was_not_sent_is_sent_to_the_next_replica(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    gate.expected_errors.append("Connection refused")
    with ThreadPoolExecutor() as pool, dead_port() as port:
        backend.publish(service(state="ready", replay=0, replicas=[replica(port, "dead")]))
        held = pool.submit(gate.get, "/llm/x", "POST", b"abc")
        wait_until(lambda: waiting(backend) == 1, "held again")
        backend.publish(service(state="ready", replay=0, replicas=[replica(echo.port, "good")]))
        answer = held.result()
    assert (answer.status, answer.json["length"]) == (200, 3)
    assert answer.headers["X-Slurmgate-Replica"] == "good"
    wait_until(lambda: nothing_held(backend), "counts given back")


@pytest.mark.parametrize(("replay", "sent"), [(0, 1), (1, 2), (3, 4)])
def test_a_request_that_was_sent_is_replayed_so_often(
    gate: Gate, backend: FakeBackend, echo: EchoService, replay: int, sent: int
) -> None:
    gate.expected_errors.append("prematurely closed")
    backend.publish(service(state="ready", replay=replay, replicas=[replica(echo.port)]))
    answer = gate.get("/llm/break")
    assert (answer.status, answer.code) == (502, "upstream-failed")
    assert answer.headers["X-Slurmgate-Replica"] is None
    assert len(echo.seen) == sent
    wait_until(lambda: nothing_held(backend), "counts given back")


def test_a_request_during_which_two_replicas_ended_gets_502(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    gate.expected_errors.append("prematurely closed")
    first = [replica(echo.port, "a")]
    backend.publish(service(state="ready", replay=8, replicas=first))

    def end_replicas(note: dict) -> None:
        # Each replica ends as soon as the request was sent to it.
        if len(echo.seen) == 1:
            backend.publish(service(state="ready", replay=8, replicas=[replica(echo.port, "b")]))
        elif len(echo.seen) == 2:
            backend.publish(service(state="cold", replay=8))

    backend.publish(service(state="ready", replay=8, replicas=first))
    wait_until(lambda: gate.get("/llm/x").status == 200, "ready")
    echo.seen.clear()
    original = echo.answer

    def break_and_end(handler) -> None:
        original(handler)
        if handler.path == "/break":
            end_replicas({})
            wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "snapshot taken")

    echo.answer = break_and_end  # type: ignore[method-assign]
    answer = gate.get("/llm/break")
    assert (answer.status, answer.code) == (502, "upstream-failed")
    assert len(echo.seen) == 2


def test_a_stream_cut_by_the_death_of_a_replica_does_not_make_it_trusted_again(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    gate.expected_errors += ["prematurely closed", "context: ngx.timer"]
    broken, cut = threading.Event(), threading.Event()
    original = echo.answer

    def answer(handler) -> None:
        if handler.path not in ("/stream", "/x"):
            original(handler)
            return
        echo.seen.append(handler.path)
        handler.close_connection = True
        if handler.path == "/stream":
            handler.send_response_only(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"1\r\na\r\n")
            handler.wfile.flush()
            cut.wait(20)
        else:
            broken.wait(20)

    echo.answer = answer  # type: ignore[method-assign]
    other = EchoService()
    other.start()
    backend.publish(service(state="ready", replicas=[replica(echo.port, "dead")]))
    wait_until(lambda: gate.get("/llm/y").status == 200, "ready")
    with ThreadPoolExecutor() as pool, socket.create_connection(("127.0.0.1", gate.port)) as stream:
        stream.sendall(b"GET /llm/stream HTTP/1.1\r\nHost: a\r\n\r\n")
        held = pool.submit(gate.get, "/llm/x")
        wait_until(lambda: {"/stream", "/x"} <= set(echo.seen), "both under way")
        echo.healthy = False
        broken.set()
        wait_until(lambda: waiting(backend) == 1, "held again")
        cut.set()
        while stream.recv(65536):
            pass
        told = len(backend.notes)
        wait_until(lambda: len(backend.notes) > told + 10, "time passes")
        backend.publish(service(state="ready", replicas=[replica(other.port, "good")]))
        answered = held.result()
    other.stop()
    assert (answered.status, answered.headers["X-Slurmgate-Replica"]) == (200, "good")
    assert echo.seen.count("/x") == 1


def test_a_silent_service_is_a_timeout(gate: Gate, backend: FakeBackend, echo: EchoService) -> None:
    gate.expected_errors.append("upstream timed out")
    backend.publish(service(state="ready", read_timeout=0.2, replicas=[replica(echo.port)]))
    answer = gate.get("/llm/slow/5")
    assert (answer.status, answer.code) == (504, "upstream-timeout")


def test_a_reload_keeps_held_requests(gate: Gate, backend: FakeBackend, echo: EchoService) -> None:
    backend.publish(service())
    with ThreadPoolExecutor(40) as pool:
        held = [pool.submit(gate.get, "/llm/x") for _ in range(40)]
        wait_until(lambda: waiting(backend) == 40, "all wait")
        before = set(gate.workers())
        gate.reload()
        wait_until(lambda: len(set(gate.workers()) - before) == 2, "new workers")
        wait_until(lambda: waiting(backend) == 40, "all wait")
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        assert {one.result().status for one in held} == {200}
    wait_until(lambda: not before & set(gate.workers()), "old workers gone")
    assert gate.get("/llm/x").status == 200
    wait_until(lambda: nothing_held(backend), "counts given back")
    wait_until(lambda: backend.service_note("LLM")["requests"] == 41, "all counted once")


def test_counts_of_a_killed_worker_vanish(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    gate.expected_errors.append("exited on signal 9")
    backend.publish(service(state="ready", replicas=[replica(echo.port)]))
    with ThreadPoolExecutor(8) as pool:
        cut = [pool.submit(gate.get, "/llm/until-told") for _ in range(8)]
        wait_until(lambda: backend.service_note("LLM").get("in_flight") == 8, "all in flight")
        for pid in gate.workers():
            os.kill(pid, signal.SIGKILL)
        for one in cut:
            assert one.exception() is not None
    wait_until(lambda: nothing_held(backend), "counts removed")
    assert gate.get("/llm/x").status == 200


def test_pacing_and_the_backend_away(
    gate: Gate, backend: FakeBackend, echo: EchoService, folder: Path
) -> None:
    # The second is the reset of a call that was under way.
    gate.expected_errors += ["control.sock failed", "context: ngx.timer"]
    backend.publish(service(state="ready", replicas=[replica(echo.port)]))
    wait_until(lambda: gate.get("/llm/x").status == 200, "ready")
    backend.stop()
    with ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(gate.get, "/llm/slow/0.2") for _ in range(100)]
        assert {one.result().status for one in answers} == {200}
    backend.start()
    wait_until(lambda: nothing_held(backend), "told again")
    assert backend.service_note("LLM")["requests"] >= 101


@pytest.fixture
def gate_spec() -> GateSpec:
    return GateSpec(
        listen=f"127.0.0.1:{free_port()}", workers=2, max_body=1_000_000, max_held_bytes=3_000_000
    )


CHUNKED = (
    b"POST /llm/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def test_held_bodies_are_bounded(gate: Gate, backend: FakeBackend, echo: EchoService) -> None:
    gate.expected_errors.append("too large body")
    backend.publish(service())
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(gate.get, "/llm/x", "POST", b"x" * 900_000) for _ in range(3)]
        wait_until(lambda: waiting(backend) == 3, "three wait")
        refused = gate.get("/llm/x", "POST", b"x" * 900_000)
        assert refused.code == "too-many-waiting"
        assert "bytes" in refused.json["detail"]
        assert b"too-many-waiting" in gate.raw(CHUNKED + chunk(b"x" * 400_000))
        small = pool.submit(gate.raw, CHUNKED + chunk(b"ab"))
        wait_until(lambda: waiting(backend) == 4, "the small one waits")
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        assert {one.result().json["length"] for one in held} == {900_000}
        assert b'"length": 2' in small.result()
    assert gate.get("/llm/x", "POST", b"x" * 1_000_001).code == "body-too-large"


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_held_bodies_are_bounded_whatever_the_method(
    gate: Gate, backend: FakeBackend, echo: EchoService, method: bytes
) -> None:
    backend.publish(service())
    chunked = CHUNKED.replace(b"POST", method)
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(gate.raw, chunked + chunk(b"x" * 900_000)) for _ in range(3)]
        wait_until(lambda: waiting(backend) == 3, "three wait")
        assert b" 429 " in gate.raw(chunked + chunk(b"x" * 900_000)).splitlines()[0]
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        for one in held:
            one.result()


@pytest.mark.parametrize("bound", [0, 1])
def test_who_cannot_be_held_is_told_before_the_body_has_come(
    gate: Gate, backend: FakeBackend, bound: int
) -> None:
    asking = CHUNKED.replace(
        b"Transfer-Encoding: chunked", b"Expect: 100-continue\r\nContent-Length: 900000"
    )
    backend.publish(service(max_in_flight=bound, hold_timeout=15))
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(gate.get, "/llm/x", "POST", b"x" * 900_000) for _ in range(3)]
        wait_until(lambda: waiting(backend) == 3, "three wait")
        assert gate.ask(asking).status == 429
        refusal = {"code": "start-failed", "reason": "", "log": [], "retry_after_s": 2.0}
        backend.publish(service(max_in_flight=bound, refusal=refusal))
        assert {one.result().status for one in held} == {503}
    # Whichever worker is asked: one of them has stored the news, the others are about to look.
    assert {gate.ask(asking).status for _ in range(10)} == {503}


def test_bodies_of_unknown_length_take_turns_with_what_is_left(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    backend.publish(service())

    def send(index: int) -> bytes:
        with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as sock:
            sock.sendall(CHUNKED)
            sock.sendall(chunk(b"x" * index))
            parts = []
            while part := sock.recv(65536):
                parts.append(part)
            return b"".join(parts)

    with ThreadPoolExecutor(100) as pool:
        held = [pool.submit(send, index) for index in range(100)]
        wait_until(lambda: waiting(backend) == 100, "all wait")
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        for index, one in enumerate(held):
            assert b'"length": %d,' % index in one.result()
    wait_until(lambda: nothing_held(backend), "counts given back")
