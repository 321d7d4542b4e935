"""A service for large bodies: body_service.py PORT, with Python's own library only.

A request with a body is answered, when all of it is there, with the moment its header came (of the
machine's monotonic clock), the body's length and its CRC 32; any other one at once. One thread
for each connection.
"""

import json
import re
import socketserver
import sys
import time
import zlib

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
END = b"\r\n\r\n"
PIECE = 1 << 18


class Connection(socketserver.BaseRequestHandler):
    """One connection; between two requests ``rest`` is empty."""

    def handle(self) -> None:
        self.piece = memoryview(bytearray(PIECE))
        received = b""
        while chunk := self.request.recv(65536):
            came = time.monotonic()
            received += chunk
            if END in received:
                head, _, rest = received.partition(END)
                self.answer(came, head + END, rest)
                received = b""

    def answer(self, came: float, head: bytes, rest: bytes) -> None:
        found = LENGTH.search(head)
        length = int(found[1]) if found else 0
        crc = self.take(length - len(rest), zlib.crc32(rest))
        body = json.dumps({"came": came, "length": length, "crc": crc}).encode()
        self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    def take(self, left: int, crc: int) -> int:
        while left > 0:
            got = self.request.recv_into(self.piece, min(left, PIECE))
            if not got:
                raise ConnectionError("the body is too short")
            crc = zlib.crc32(self.piece[:got], crc)
            left -= got
        return crc


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024


with Server(("127.0.0.1", int(sys.argv[1])), Connection) as server:
    server.serve_forever()
