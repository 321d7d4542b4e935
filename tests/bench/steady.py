"""A load that does not wait for answers: so many requests a second, each at its own moment.

The time of an answer counts from the moment its request was due, so that a client that is late
itself hides nothing.
"""

from __future__ import annotations

import re
import select
import socket
import threading
import time
from dataclasses import dataclass, field

PATIENCE_S = 30.0
HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
REPLICA = re.compile(rb"\r\nx-slurmgate-replica: (\S*)\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request; moments of the monotonic clock. Status 0: no whole answer came."""

    due: float
    sent: float
    ended: float
    status: int
    replica: str

    @property
    def took_ms(self) -> float:
        return 1000 * (self.ended - self.due)


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    due: float = 0.0
    sent: float = 0.0
    asked: bool = False
    received: bytes = field(default=b"")


class Steady(threading.Thread):
    """GET requests at a constant rate from one thread, on connections that are kept.

    ``answers`` may be read at any time, and is complete once ``finish`` returned.
    """

    def __init__(self, port: int, path: str, rate: float) -> None:
        super().__init__(daemon=True)
        self.answers: list[Asked] = []
        self._address = ("127.0.0.1", port)
        self._request = f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
        self._every = 1 / rate
        self._over = threading.Event()
        self._poll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []

    def __enter__(self) -> Steady:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.finish()

    def finish(self) -> list[Asked]:
        """Send no more, wait for the answers still to come, and give all."""
        self._over.set()
        self.join()
        return self.answers

    def run(self) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            while due <= (now := time.monotonic()):
                self._send(due)
                due += self._every
            self._take(due - now)
        deadline = time.monotonic() + PATIENCE_S
        while self._under_way() and time.monotonic() < deadline:
            self._take(0.1)
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._poll.close()

    def _under_way(self) -> bool:
        return any(connection.asked for connection in self._connections.values())

    def _send(self, due: float) -> None:
        connection = self._idle.pop() if self._idle else self._connect()
        connection.due, connection.sent, connection.asked = due, time.monotonic(), True
        connection.received = b""
        try:
            connection.socket.sendall(self._request)
        except OSError:
            self._drop(connection)

    def _connect(self) -> _Connection:
        connection = _Connection(socket.create_connection(self._address, PATIENCE_S))
        self._connections[connection.socket.fileno()] = connection
        self._poll.register(connection.socket, select.EPOLLIN)
        return connection

    def _take(self, seconds: float) -> None:
        for number, _event in self._poll.poll(max(0.0, seconds)):
            self._receive(self._connections[number])

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(65536)
        except OSError:
            data = b""
        connection.received += data
        if not data:
            self._drop(connection)
        elif self._is_whole(connection.received):
            self._end(connection, int(connection.received[9:12]))
            self._idle.append(connection)

    @staticmethod
    def _is_whole(received: bytes) -> bool:
        head = received.find(HEAD_END)
        length = LENGTH.search(received, 0, head + len(HEAD_END)) if head >= 0 else None
        return length is not None and len(received) >= head + len(HEAD_END) + int(length[1])

    def _end(self, connection: _Connection, status: int) -> None:
        replica = REPLICA.search(connection.received)
        self.answers.append(
            Asked(
                connection.due,
                connection.sent,
                time.monotonic(),
                status,
                replica[1].decode() if replica else "",
            )
        )
        connection.asked = False

    def _drop(self, connection: _Connection) -> None:
        """Close a connection; a request on it has failed."""
        if connection.asked:
            self._end(connection, 0)
        elif connection in self._idle:
            self._idle.remove(connection)
        self._poll.unregister(connection.socket)
        del self._connections[connection.socket.fileno()]
        connection.socket.close()
