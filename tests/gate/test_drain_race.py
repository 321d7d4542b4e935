"""The drain handshake at full speed: what the gate proved is true, thousands of times."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from tests.gate.harness import FakeBackend, Gate, free_port, replica, service, wait_until

LOAD_S = 8
ENOUGH_WITHIN_S = 60
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Service(asyncio.Protocol):
    """Answers everything at once; ``late`` counts requests that came while it was cancelled."""

    cancelled = False
    served = 0
    late = 0
    closing = False
    open: ClassVar[list[asyncio.Transport]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.open.append(transport)
        if self.closing:  # accepted in the moment of the end
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if b" /health " not in data:
            Service.served += 1
            Service.late += Service.cancelled
        self.transport.write(ANSWER)


async def serve(port: int, started: threading.Event, ended: threading.Event) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Service, "127.0.0.1", port, backlog=4096)
    started.set()
    await asyncio.to_thread(ended.wait)
    server.close()
    Service.closing = True
    for transport in Service.open:
        transport.abort()


@pytest.fixture
def service_port() -> Iterator[int]:
    Service.cancelled, Service.closing = False, False
    Service.served, Service.late, Service.open = 0, 0, []
    port, started, ended = free_port(), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serve(port, started, ended)))
    thread.start()
    assert started.wait(10)
    yield port
    ended.set()
    thread.join()


class Drains:
    """Opens and closes the one replica whenever a note allows it; counts proven drains."""

    def __init__(self, backend: FakeBackend, port: int) -> None:
        self._backend = backend
        self._port = port
        self._state = "closed"
        self._ended = False
        self._lock = threading.Lock()
        self.done = 0

    def _publish(self, *, is_open: bool) -> None:
        phase = "ready" if is_open else "draining"
        entry = replica(self._port, phase=phase, routable=is_open)
        self._backend.publish(service(replicas=[entry], hold_timeout=60))
        self._state = "open" if is_open else "closed"

    def end(self) -> None:
        """Drain no more: a client that hangs up has its request counted no longer, though the
        service may still have it to read.
        """
        with self._lock:
            self._ended = True
            Service.cancelled = False

    def hear(self, note: dict[str, Any]) -> None:
        with self._lock:
            if not self._ended:
                self._hear(note)

    def _hear(self, note: dict[str, Any]) -> None:
        if note["snapshot"] != self._backend.version:
            if note["snapshot"] is None and self._state == "closed":
                self._publish(is_open=True)
            return
        if self._state == "open":
            self._publish(is_open=False)
        elif Service.cancelled:
            Service.cancelled = False
            self._publish(is_open=True)
        elif note["replicas"]["r1"]["in_flight"] == 0:
            Service.cancelled = True
            self.done += 1


def wrk(gate: Gate, connections: int, *headers: str) -> subprocess.Popen[bytes]:
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{2 * ENOUGH_WITHIN_S}s", *headers]
    return subprocess.Popen([*argv, f"http://{gate.spec.listen}/llm/x"], stdout=subprocess.DEVNULL)


def test_no_request_reaches_a_replica_that_was_proven_unreachable(
    gate: Gate, backend: FakeBackend, service_port: int
) -> None:
    drains = Drains(backend, service_port)
    backend.on_note = drains.hear
    wait_until(lambda: drains.done > 0, "the first drain")
    # Whoever asks with wait=0 has the gate tell at once, so that drains follow each other closely.
    load = [wrk(gate, 16), wrk(gate, 2, "-H", "Prefer: wait=0")]
    began = time.monotonic()

    def enough() -> bool:
        took = time.monotonic() - began
        return took > LOAD_S and Service.served > 1000 and drains.done > 100

    try:
        wait_until(enough, "drains under load", ENOUGH_WITHIN_S)
        drains.end()
        assert [process.poll() for process in load] == [None, None]
    finally:
        for process in load:
            process.terminate()
            process.wait(20)
    assert Service.late == 0
