"""A service that answers with event streams, and with everything a stream should not be."""

from __future__ import annotations

import hashlib
import threading

from tests.gate.harness import EchoService, _Handler

EVENTS = b"data: one\n\ndata: two\n\ndata: [DONE]\n\n"
LARGE = b"".join(b"data: %06d %s\n\n" % (i, b"x" * 5000) for i in range(4000))
DEADLINE_S = 20.0


class StreamService(EchoService):
    """Answers ``/sse…`` with events, the first of which has the digest of the request's body.

    ``/sse/late`` begins to answer, and ``/sse/long`` goes on behind its first event, when ``go`` is
    set, as does ``/sse/length``, which tells its length; ``/sse/cut`` breaks off; ``/sse/large``
    sends ``LARGE`` besides. ``/status/N`` answers N with ``trouble``, and ``/packed`` an encoded
    stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.trouble = b'{"detail":"as asked", "n": [1.50, []]}'
        self.headers: list[dict[str, str]] = []

    def answer(self, handler: _Handler) -> None:
        path = handler.path
        if not path.startswith(("/sse", "/status", "/packed")):
            super().answer(handler)
            return
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        self.seen.append(path)
        self.headers.append(dict(handler.headers))
        if path.startswith("/status"):
            handler.reply(int(path.rpartition("/")[2]), self.trouble)
        elif path == "/sse/length":
            self._stream_of_known_length(handler)
        else:
            self._stream(handler, path, hashlib.sha256(body).hexdigest())

    def _stream(self, handler: _Handler, path: str, digest: str) -> None:
        if path == "/sse/late":
            self.go.wait(DEADLINE_S)
        handler.send_response_only(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Transfer-Encoding", "chunked")
        if path == "/packed":
            handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        self._chunk(handler, f"data: {digest}\n\n".encode())
        if path == "/sse/long":
            self.go.wait(DEADLINE_S)
        if path == "/sse/cut":
            handler.close_connection = True
            return
        if path == "/sse/large":
            self._chunk(handler, LARGE)
        self._chunk(handler, EVENTS)
        handler.wfile.write(b"0\r\n\r\n")

    def _stream_of_known_length(self, handler: _Handler) -> None:
        handler.send_response_only(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Content-Length", str(2 * len(EVENTS)))
        handler.end_headers()
        handler.wfile.write(EVENTS)
        self.go.wait(DEADLINE_S)
        handler.wfile.write(EVENTS)

    def _chunk(self, handler: _Handler, data: bytes) -> None:
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        handler.wfile.flush()
