"""Clients for tests: many requests at once, streams, connections that hang up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def fetch(session: aiohttp.ClientSession, url: str, **options: Any) -> Answer:
    method = options.pop("method", "GET")
    async with session.request(method, url, **options) as answer:
        return Answer(answer.status, dict(answer.headers), await answer.read())


def session(seconds: float = 90) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=seconds)
    )


class Background:
    """Runs a coroutine on a thread of its own while the test does something else."""

    def __init__(self, work: Callable[[], Awaitable[Any]]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Awaitable[Any]]) -> None:
        async def main() -> Any:
            return await work()

        try:
            self._result = asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - handed on to the test by result()
            self._error = error

    def result(self, seconds: float = 90) -> Any:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "requests still run"
        if self._error is not None:
            raise self._error
        return self._result


def ask_in_background(urls: list[str], **options: Any) -> Background:
    """GET all of them at once."""

    async def ask_all() -> list[Answer]:
        async with session() as client:
            return list(await asyncio.gather(*(fetch(client, url, **options) for url in urls)))

    return Background(ask_all)


@dataclass
class Load:
    """Steady requests until ``stop``; every answer other than 200 is kept."""

    url: str
    clients: int = 4
    pause: float = 0.0
    sent: int = 0
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._ended = threading.Event()
        self._background = Background(self._all)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._background.result()

    async def _all(self) -> None:
        async with session() as client:
            await asyncio.gather(*(self._one(client) for _ in range(self.clients)))

    async def _one(self, client: aiohttp.ClientSession) -> None:
        while not self._ended.is_set():
            self.sent += 1
            try:
                answer = await fetch(client, self.url)
            except aiohttp.ClientError as error:
                self.failures.append(repr(error))
            else:
                if answer.status != 200:
                    self.failures.append(f"{answer.status} {answer.body[:300]!r}")
            await asyncio.sleep(self.pause)


def connect(port: int, request: bytes) -> socket.socket:
    """Open a connection and send bytes on it; the caller hangs up."""
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(request)
    return client


def read_answer(client: socket.socket, seconds: float = 30) -> bytes:
    client.settimeout(seconds)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(65536):
            received += chunk
    return received


def http2(url: str, *args: str) -> subprocess.Popen[bytes]:
    """A curl that asks over HTTP/2 and does not look at the certificate's name."""
    return subprocess.Popen(
        ["curl", "-sk", "--http2", url, *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
