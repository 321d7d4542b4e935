"""A replica's service that a test can hold up, cut off and bring back; any number on one thread."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from tests.gate.harness import free_port, replica

PIECE_S = 0.05
LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)\r\n")
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = STREAM.replace(b"Transfer", b"Content-Type: text/event-stream\r\nTransfer")
UPGRADED = b"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"


class SmallService:
    """Answers ``/hold…`` when released; streams ``/stream…``, ``/events…`` as an event
    stream, and ``/upgrade…`` with another protocol, until then; ``/flood…`` writes without an end;
    all else is answered at once.

    ``health`` is ``good``, ``bad`` (503) or ``mute`` (no answer). While it is ``cut_off``, it takes
    connections and breaks them off as soon as anything is asked, polls included, like a tunnel
    whose far half is gone. ``seen`` are the paths asked for in order, ``in_flight`` how many are
    not yet answered, ``broken_off`` how often it broke off. Attributes may be read by any thread.
    """

    def __init__(self, name: str, endpoint: str = "", backlog: int = 1024) -> None:
        self.name = name
        self.endpoint = endpoint or f"127.0.0.1:{free_port()}"
        self.health = "good"
        self.polls = 0
        self.seen: list[str] = []
        self.in_flight = 0
        self.released = False
        self.cut_off = False
        self.broken_off = 0
        self._backlog = backlog
        self.talks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    def entry(self, **changes: Any) -> dict[str, Any]:
        """What a snapshot says of it."""
        return replica(0, self.name, endpoint=self.endpoint, **changes)

    async def listen(self) -> None:
        self._listener = self._socket()
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        # A server of asyncio's that is closed forgets what it is about to accept, without closing
        # it; so does a task that is cancelled before it began.
        connection, _ = listener.accept()
        connection.setblocking(False)
        talk = asyncio.create_task(self._talk(connection))
        self.talks.add(talk)
        talk.add_done_callback(self.talks.discard)

    def _socket(self) -> socket.socket:
        if self.endpoint.startswith("unix:"):
            path = Path(self.endpoint.removeprefix("unix:"))
            path.unlink(missing_ok=True)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(path))
            # The gate's workers may be another user; in the product all are one user.
            path.chmod(0o777)
        else:
            host, _, port = self.endpoint.rpartition(":")
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, int(port)))
        sock.listen(self._backlog)
        sock.setblocking(False)
        return sock

    async def die(self) -> None:
        """End like a killed process: the listener and every connection at once."""
        if self._listener:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _talk(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        if self._listener is None:
            writer.transport.abort()
            return
        self._writers.add(writer)
        gone = (asyncio.IncompleteReadError, ConnectionError)
        try:
            with contextlib.suppress(*gone):
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    if self.cut_off:
                        self.broken_off += 1
                        writer.transport.abort()
                        return
                    length = LENGTH.search(head)
                    await reader.readexactly(int(length.group(1)) if length else 0)
                    await self._answer(head.split(b" ", 2)[1].decode(), writer)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/health":
            await self._answer_poll(writer)
            return
        self.seen.append(path)
        self.in_flight += 1
        try:
            if path.startswith("/stream"):
                await self._stream(writer, STREAM)
                return
            if path.startswith("/events"):
                await self._stream(writer, EVENTS)
                return
            if path.startswith("/upgrade"):
                await self._stream(writer, UPGRADED)
                return
            if path.startswith("/flood"):
                await self._flood(writer)
                return
            while path.startswith("/hold") and not self.released:
                await asyncio.sleep(PIECE_S)
            if path.startswith("/busy"):
                await asyncio.sleep(PIECE_S)
            await self._send(writer, 200, self.name)
        finally:
            self.in_flight -= 1

    async def _answer_poll(self, writer: asyncio.StreamWriter) -> None:
        self.polls += 1
        while self.health == "mute" and not writer.is_closing():
            await asyncio.sleep(PIECE_S)
        await self._send(writer, 200 if self.health == "good" else 503, "")

    async def _stream(self, writer: asyncio.StreamWriter, head: bytes) -> None:
        writer.write(head)
        while not self.released:
            writer.write(b"1\r\n.\r\n")
            await writer.drain()
            await asyncio.sleep(PIECE_S)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _flood(self, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        while True:
            writer.write(b"10000\r\n" + b"." * 65536 + b"\r\n")
            await writer.drain()

    async def _send(self, writer: asyncio.StreamWriter, status: int, text: str) -> None:
        writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()


class Services:
    """Small services on a thread of their own."""

    def __init__(self) -> None:
        self._all: list[SmallService] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, count: int) -> list[SmallService]:
        """Start services ``r1``, ``r2`` …"""
        return [self.add(SmallService(f"r{i + 1}")) for i in range(count)]

    def add(self, one: SmallService) -> SmallService:
        self._all.append(one)
        self.revive(one)
        return one

    def kill(self, one: SmallService) -> None:
        self._run(one.die())

    def revive(self, one: SmallService) -> None:
        self._run(one.listen())

    def stop(self) -> None:
        for one in self._all:
            one.released = True
            self._run(one.die())
        self._run(self._end_talks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_talks(self) -> None:
        while talks := [talk for one in self._all for talk in one.talks]:
            await asyncio.wait(talks)
        await asyncio.sleep(0)  # sockets are closed in the loop's next round

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)
