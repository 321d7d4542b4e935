"""Clients that ask one chat request after the other, each with a beginning of its own, from one
thread on connections that are kept.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.openai import PATH
from tests.bench.steady import HEAD_END, LENGTH, PATIENCE_S, REPLICA

# Of the system prompt: the gate looks at the first 256 bytes of the messages.
PREFIX_LENGTH = 300


@dataclass(frozen=True, slots=True)
class Answered:
    """One good answer: whose beginning it was and which replica gave it."""

    prefix: str
    replica: str


@dataclass(slots=True)
class _Client:
    prefix: str
    socket: socket.socket
    asked: int = 0
    received: bytes = b""


def request(model: str, prefix: str, turn: int) -> bytes:
    """A request with this beginning, whatever its turn."""
    messages = [
        {"role": "system", "content": (prefix + " ").ljust(PREFIX_LENGTH, "x")},
        {"role": "user", "content": f"This is turn {turn}."},
    ]
    body = json.dumps({"messages": messages, "model": model})
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


def ask_for(port: int, model: str, prefixes: Sequence[str], seconds: float) -> list[Answered]:
    """Let one client for each beginning ask until the time is over, at least once each."""
    poll = select.epoll()
    clients: dict[int, _Client] = {}
    answers: list[Answered] = []
    deadline = time.monotonic() + seconds
    try:
        for prefix in prefixes:
            client = _Client(prefix, socket.create_connection(("127.0.0.1", port), PATIENCE_S))
            clients[client.socket.fileno()] = client
            poll.register(client.socket, select.EPOLLIN)
            _ask(client, model)
        waiting = len(clients)
        while waiting:
            ready = poll.poll(PATIENCE_S)
            assert ready, "no answer came"
            for number, _event in ready:
                answer = _take(clients[number])
                if answer is None:
                    continue
                answers.append(answer)
                if time.monotonic() < deadline:
                    _ask(clients[number], model)
                else:
                    waiting -= 1
    finally:
        for client in clients.values():
            client.socket.close()
        poll.close()
    return answers


def _ask(client: _Client, model: str) -> None:
    client.asked += 1
    client.received = b""
    client.socket.sendall(request(model, client.prefix, client.asked))


def _take(client: _Client) -> Answered | None:
    data = client.socket.recv(65536)
    client.received += data
    head, end, rest = client.received.partition(HEAD_END)
    assert data, "the connection was closed"
    if not end:
        return None
    length = LENGTH.search(head + end)
    assert length is not None, head
    if len(rest) < int(length[1]):
        return None
    replica = REPLICA.search(head + end)
    assert head.startswith(b"HTTP/1.1 200 "), head
    assert replica is not None, head
    return Answered(client.prefix, replica[1].decode())
