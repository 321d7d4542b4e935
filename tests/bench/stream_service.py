"""A service of event streams: stream_service.py PORT, with Python's own library only.

Each POST is answered with BENCH_TOKENS events, one every BENCH_EVERY_S seconds from its arrival on.
With BENCH_TOGETHER all streams get theirs at the same moments, as from a model server that makes
one token for everybody at each step. An event holds when it was sent, on the machine's monotonic
clock. The health path is 200 once the file BENCH_HEALTHY exists. One thread for all of them; how
late it was itself can be told from the events.
"""

import os
import re
import select
import socket
import sys
import time
from collections import deque

TOKENS = int(os.environ["BENCH_TOKENS"])
EVERY_S = float(os.environ["BENCH_EVERY_S"])
TOGETHER = bool(os.environ.get("BENCH_TOGETHER"))
HEALTHY = os.environ["BENCH_HEALTHY"]
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
END = b"\r\n\r\n"
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
# Of the length of a usual one. "sent" is the due moment and the one it was really sent.
EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
    b'"created":1760000000,"model":"bench","choices":[{"index":0,"delta":{"content":" token"},'
    b'"logprobs":null,"finish_reason":null}],"sent":"%017.6f %017.6f"}\n\n'
)
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT % (0, 0)), EVENT)
LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Client:
    """One connection: what it sent so far, and how many events are left of its stream."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.received = b""
        self.left = 0
        self.due = 0.0


class Server:
    """``streams`` are in the order of the moments their next events are due."""

    def __init__(self, port: int) -> None:
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", port))
        self.listener.listen(4096)
        self.listener.setblocking(False)
        self.poll = select.epoll()
        self.poll.register(self.listener, select.EPOLLIN)
        self.clients: dict[int, Client] = {}
        self.streams: deque[Client] = deque()

    def run(self) -> None:
        while True:
            now = time.monotonic()
            wait = self.streams[0].due - now if self.streams else 1.0
            for number, _event in self.poll.poll(max(0.0, wait), 256):
                if number == self.listener.fileno():
                    self.accept()
                else:
                    self.receive(self.clients[number])
            now = time.monotonic()
            while self.streams and self.streams[0].due <= now:
                self.send(self.streams.popleft(), now)
                now = time.monotonic()

    def accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except BlockingIOError:
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.clients[sock.fileno()] = Client(sock)
        self.poll.register(sock, select.EPOLLIN)

    def receive(self, client: Client) -> None:
        try:
            data = client.socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.drop(client)
            return
        client.received += data
        head, end, rest = client.received.partition(END)
        if not end:
            return
        found = LENGTH.search(head + END)
        length = int(found[1]) if found else 0
        if len(rest) < length:
            return
        client.received = rest[length:]
        if head.startswith(b"POST "):
            self.begin(client)
        else:
            self.answer(client, head.startswith(b"GET /health "))

    def answer(self, client: Client, health: bool) -> None:
        status = b"503 Loading" if health and not os.path.exists(HEALTHY) else b"200 OK"
        client.socket.send(b"HTTP/1.1 %s\r\nContent-Length: 3\r\n\r\nok\n" % status)

    def begin(self, client: Client) -> None:
        client.socket.send(HEAD)
        client.left = TOKENS
        client.due = time.monotonic() + EVERY_S
        if TOGETHER:
            client.due = EVERY_S * (client.due // EVERY_S)
        # All have the same time between two, so whoever is next goes to the end.
        self.streams.append(client)

    def send(self, client: Client, now: float) -> None:
        if client.left == 0:  # hung up
            return
        try:
            client.socket.send(CHUNK % (client.due, now))
            client.left -= 1
            if client.left == 0:
                client.socket.send(LAST)
                return
        except OSError:
            self.drop(client)
            return
        client.due += EVERY_S
        self.streams.append(client)

    def drop(self, client: Client) -> None:
        client.left = 0
        self.poll.unregister(client.socket)
        del self.clients[client.socket.fileno()]
        client.socket.close()


Server(int(sys.argv[1])).run()
