"""Small HTTP clients whose own cost does not disturb what is measured."""

from __future__ import annotations

import http.client
import json
import select
import socket
import time
from dataclasses import dataclass
from typing import Any

from tests.up.product import Product

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("backend", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def _exchange(
    connection: http.client.HTTPConnection,
    path: str,
    method: str,
    headers: dict[str, str],
    body: str | None = None,
) -> Answer:
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return Answer(response.status, response.read())
    finally:
        connection.close()


def ask(port: int, path: str, method: str = "GET", token: str | None = None) -> Answer:
    """Ask on a connection of its own."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    return _exchange(connection, path, method, headers)


def service_info(product: Product, name: str) -> dict[str, Any]:
    """Ask the backend itself, past the gate's half-second copies."""
    socket_path = str(product.run_dir / "api.sock")
    answer = _exchange(_UnixConnection(socket_path), f"/info/{name}", "GET", {})
    assert answer.status == 200, answer
    found: dict[str, Any] = json.loads(answer.body)
    return found


def post(port: int, path: str, body: str, token: str | None = None) -> Answer:
    """Ask with a JSON body, on a connection of its own."""
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    return _exchange(connection, path, "POST", headers, body)


def _until(product: Product, name: str, field: str, wanted: object) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while (found := service_info(product, name)[field]) != wanted:
        assert time.monotonic() < deadline, f"{name}: {field} stays {found}, not {wanted}"
        time.sleep(0.05)


def stop(product: Product, name: str) -> None:
    """Have a service stopped; returns when it is cold."""
    # A request that waited must be known to have ended: else it is a reason to start again.
    _until(product, name, "waiting", 0)
    answer = ask(product.port, f"/admin/services/{name}/stop", "POST", product.token)
    assert answer.status < 300, answer
    _until(product, name, "state", "cold")


@dataclass(frozen=True, slots=True)
class Ended:
    """How one request of a crowd ended, and when (monotonic)."""

    status: int
    at: float


class Crowd:
    """Many requests at once, each on a connection of its own, from one thread."""

    def __init__(self, port: int, path: str, size: int) -> None:
        self.open: dict[int, socket.socket] = {}
        self.ended: list[Ended] = []
        self._poll = select.epoll()
        request = f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode()
        for _ in range(size):
            client = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
            client.sendall(request)
            client.setblocking(False)
            self.open[client.fileno()] = client
            self._poll.register(client, select.EPOLLIN)

    def collect(self, seconds: float) -> list[Ended]:
        """Wait until every request has ended or the time is over."""
        deadline = time.monotonic() + seconds
        while self.open and (left := deadline - time.monotonic()) > 0:
            for number, _event in self._poll.poll(left, 512):
                self._take(number)
        return self.ended

    def _take(self, number: int) -> None:
        client = self.open.pop(number)
        self._poll.unregister(client)
        head = client.recv(16)
        self.ended.append(Ended(int(head[9:12]) if len(head) >= 12 else 0, time.monotonic()))
        client.close()

    def close(self) -> None:
        for client in self.open.values():
            client.close()
        self._poll.close()
