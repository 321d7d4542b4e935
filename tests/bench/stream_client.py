"""Many event streams at once, from one thread that notes when each token came.

The streams are those of ``stream_service``: each event tells when it was due and when it was sent,
so that a service that was late itself does not look like a slow proxy.
"""

from __future__ import annotations

import select
import socket
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

PATIENCE_S = 60.0
SENT = b'"sent":"'
MOMENT = 17  # characters of one moment
EVENT_END = len(SENT) + 2 * MOMENT + 1
REST = 16  # what may stand behind the last whole event of a piece
DONE = b"data: [DONE]"
COMMENT = b": waiting "
PIECE = 1 << 16


@dataclass(slots=True)
class _Stream:
    """``last`` is when its newest token came, 0 before the first."""

    socket: socket.socket
    last: float = 0.0
    rest: bytes = b""
    head: bytes = b""
    commented: bool = False


@dataclass(slots=True)
class Tokens:
    """All tokens of a time, one place in each array: seconds since the token before of the same
    stream, since it was due, and how late the service itself sent it.
    """

    came: array[float] = field(default_factory=lambda: array("d"))
    gaps: array[float] = field(default_factory=lambda: array("d"))
    delays: array[float] = field(default_factory=lambda: array("d"))
    late: array[float] = field(default_factory=lambda: array("d"))

    def within(self, begin: float, end: float) -> Tokens:
        chosen = [i for i, came in enumerate(self.came) if begin <= came < end]
        arrays = (self.came, self.gaps, self.delays, self.late)
        return Tokens(*(array("d", (one[i] for i in chosen)) for one in arrays))


class Streams:
    """Streams under way. ``begun`` is when the last of them had its first token, ``over`` when the
    first of them ended; ``broken`` counts those that ended without their last event.
    """

    def __init__(self, port: int, path: str, body: str, size: int) -> None:
        self.size = size
        self.tokens = Tokens()
        self.started = self.commented = self.done = self.broken = 0
        self.begun = self.over = 0.0
        self._poll = select.epoll()
        self._open: dict[int, _Stream] = {}
        self._piece = bytearray(PIECE)
        request = (
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
        for _ in range(size):
            self._connect(port, request)
            self._take(0)

    def _connect(self, port: int, request: bytes) -> None:
        sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        sock.sendall(request)
        sock.setblocking(False)
        self._open[sock.fileno()] = _Stream(sock)
        self._poll.register(sock, select.EPOLLIN)

    def until(self, reached: Callable[[Streams], bool], what: str) -> None:
        """Take what comes until it is so; fail with its name when that takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while not reached(self):
            assert time.monotonic() < deadline, f"{what}: {self.started} of {self.size} had tokens"
            assert self.broken == 0, f"{what}: a stream broke off"
            self._take(0.1)

    def finish(self) -> None:
        """Take everything to the end."""
        self.until(lambda streams: streams.done == streams.size, "all streams at their end")

    def close(self) -> None:
        for stream in self._open.values():
            stream.socket.close()
        self._open.clear()
        self._poll.close()

    def _take(self, seconds: float) -> None:
        for number, _event in self._poll.poll(seconds, 512):
            stream = self._open[number]
            try:
                got = stream.socket.recv_into(self._piece)
            except OSError:
                got = 0
            now = time.monotonic()
            if got:
                self._look(stream, bytes(memoryview(self._piece)[:got]), now)
            else:
                self.broken += 1
                self._end(stream)

    def _look(self, stream: _Stream, data: bytes, now: float) -> None:
        if stream.rest:
            data = stream.rest + data
        tokens, begin = self.tokens, 0
        while (at := data.find(SENT, begin)) >= 0 and at + EVENT_END <= len(data):
            at += len(SENT)
            due = float(data[at : at + MOMENT])
            if stream.last == 0.0:
                self._first(stream, data, now)
            else:
                tokens.came.append(now)
                tokens.gaps.append(now - stream.last)
                tokens.delays.append(now - due)
                tokens.late.append(float(data[at + MOMENT + 1 : at + 2 * MOMENT + 1]) - due)
            stream.last = now
            begin = at + EVENT_END - len(SENT)
        stream.rest = data[begin:] if len(data) - begin > REST else b""
        if stream.rest:
            self._look_at_rest(stream, now)

    def _first(self, stream: _Stream, data: bytes, now: float) -> None:
        stream.head = stream.head or data[:16]
        assert stream.head.startswith(b"HTTP/1.1 200"), stream.head
        self.started += 1
        if self.started == self.size:
            self.begun = now

    def _look_at_rest(self, stream: _Stream, now: float) -> None:
        stream.head = stream.head or stream.rest[:16]
        if DONE in stream.rest:
            self.done += 1
            self.over = self.over or now
            self._end(stream)
        elif not stream.commented and COMMENT in stream.rest:
            stream.commented = True
            self.commented += 1

    def _end(self, stream: _Stream) -> None:
        self._poll.unregister(stream.socket)
        del self._open[stream.socket.fileno()]
        stream.socket.close()
