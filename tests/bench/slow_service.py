"""A service that takes its time: slow_service.py PORT, with Python's own library only.

Every request but ``GET /health`` is answered ``BENCH_TAKE_S`` seconds after it came, however many
there are at once: waiting costs no CPU time. When each began and ended, on the machine's monotonic
clock, is a line in the file ``BENCH_NOTES/REPLICA``; a line is whole even if the process is killed.
It listens on ``BENCH_HOST`` (127.0.0.1).
"""

import asyncio
import os
import sys
import time

TAKE_S = float(os.environ.get("BENCH_TAKE_S", "0.05"))
NOTES = os.open(
    os.path.join(os.environ["BENCH_NOTES"], os.environ["SLURMGATE_REPLICA"]),
    os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    0o644,
)
END = b"\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ndone\n"


class Connection(asyncio.Protocol):
    """One connection, with one request at a time; ``begun`` is when that came."""

    def __init__(self) -> None:
        self.received = b""
        self.begun = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self.received += data
        if END not in self.received or self.timer is not None:
            return
        request, _, self.received = self.received.partition(END)
        if request.startswith(b"GET /health "):
            self.answer()
        else:
            self.begun = now
            self.timer = asyncio.get_running_loop().call_later(TAKE_S, self.done)

    def done(self) -> None:
        self.answer()
        self.note()

    def answer(self) -> None:
        assert self.transport is not None
        self.transport.write(ANSWER)

    def note(self) -> None:
        self.timer = None
        os.write(NOTES, f"{self.begun!r} {time.monotonic()!r}\n".encode())

    def connection_lost(self, _error: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.note()


async def serve() -> None:
    host = os.environ.get("BENCH_HOST", "127.0.0.1")
    server = await asyncio.get_running_loop().create_server(
        Connection, host, int(sys.argv[1]), backlog=1024
    )
    await server.serve_forever()


asyncio.run(serve())
