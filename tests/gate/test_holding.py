"""Requests to cold services, with a fake backend."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.gate.harness import EchoService, FakeBackend, Gate, replica, service, wait_until


def test_a_request_to_a_cold_service_is_held_and_answered(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    backend.publish(service())
    with ThreadPoolExecutor() as pool:
        held = pool.submit(gate.get, "/llm/v1/x?a=b%20c", "POST", b"hello")
        wait_until(lambda: backend.service_note("LLM").get("waiting") == 1, "one waits")
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        answer = held.result()
    assert answer.status == 200
    assert answer.json["path"] == "/v1/x?a=b%20c"
    assert answer.json["length"] == 5
    assert answer.headers["X-Slurmgate-Service"] == "LLM"
    assert float(answer.headers["X-Slurmgate-Waited"]) > 0


def test_a_request_before_the_first_snapshot_is_held(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    with ThreadPoolExecutor() as pool:
        held = pool.submit(gate.get, "/llm/x")
        lost = pool.submit(gate.get, "/nothing/x")
        wait_until(lambda: len(backend.notes) > 3, "calls")
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        assert held.result().status == 200
        assert lost.result().code == "no-such-route"
