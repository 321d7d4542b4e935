"""The waiting room in order, across two workers, before replicas that take so many at once."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gate.harness import EchoService, FakeBackend, Gate, replica, service, wait_until, waiting

TAKE_S = 0.01
GO_ON_S = 3.0  # after a worker's death; far less on a machine that is not busy


class Slots(EchoService):
    """Keeps the order in which requests came and the most it had at once; /first waits."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.to_break = ""
        self.release = threading.Event()
        self.take_s = TAKE_S
        self._now = 0
        self._lock = threading.Lock()

    def answer(self, handler) -> None:
        path = handler.path
        if path == "/health":
            handler.reply(200, b"{}")
            return
        with self._lock:
            self.seen.append(path)
            self._now += 1
            self.most = max(self.most, self._now)
        if path == "/first":
            self.release.wait(30)
        else:
            time.sleep(self.take_s)
        # Once the answer is on its way the gate may send the next.
        with self._lock:
            self._now -= 1
        if path == self.to_break:
            self.to_break = ""
            handler.close_connection = True
            return
        handler.reply(200, b"{}")


@pytest.fixture
def echo() -> Iterator[Slots]:
    slots = Slots()
    slots.start()
    yield slots
    slots.release.set()
    slots.stop()


@pytest.fixture
def ready(gate: Gate, backend: FakeBackend, echo: Slots) -> None:
    publish(backend, echo)
    wait_until(lambda: backend.notes and backend.notes[-1]["snapshot"] == backend.version, "told")


def publish(backend: FakeBackend, slots: Slots, bound: int = 1, **changes) -> None:
    one = replica(slots.port)
    backend.publish(service(state="ready", max_in_flight=bound, replicas=[one], **changes))


def until_waiting(backend: FakeBackend, number: int) -> None:
    wait_until(lambda: waiting(backend) == number, f"{number} wait")


def until_confirmed(backend: FakeBackend) -> None:
    """Wait for as many calls as an unknown route may wait for, and then some: it has its place."""
    told = len(backend.notes)
    wait_until(lambda: len(backend.notes) > told + 4, "calls later")


class Client:
    """One kept connection, and the worker that accepted it."""

    def __init__(self, gate: Gate) -> None:
        self.socket = socket.create_connection(("127.0.0.1", gate.port), timeout=20)
        self._inode = ""
        self._gate = gate

    def owners(self) -> list[int]:
        """The worker that has the connection; none before it is accepted."""
        port, own = self._gate.port, self.socket.getsockname()[1]
        line = re.compile(rf":\s\w+:{port:04X} \w+:{own:04X} (?:\S+ +){{6}}(\d+)")
        found = line.search(Path("/proc/net/tcp").read_text())
        if not found or found[1] == "0":
            return []
        link = f"socket:[{found[1]}]"
        return [pid for pid in self._gate.workers() if link in links(pid)]

    def ask(self, path: str, header: str = "") -> None:
        self.socket.sendall(f"GET /llm{path} HTTP/1.1\r\nHost: a\r\n{header}\r\n".encode())

    def answer(self) -> bytes:
        """Status line, header and body of the next answer."""
        text = b""
        while True:
            head, end, body = text.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            if end and length and len(body) >= int(length[1]):
                return text
            part = self.socket.recv(65536)
            assert part, "the gate hung up"
            text += part

    def status(self) -> int:
        return int(self.answer().split()[1])


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def links(pid: int) -> set[str]:
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            found.add(os.readlink(entry.path))
        except FileNotFoundError:
            continue
    return found


class Clients:
    """All connections of a test."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._all: list[Client] = []

    def one(self) -> Client:
        self._all.append(Client(self._gate))
        return self._all[-1]

    def of(self, worker: int, count: int) -> list[Client]:
        """Connections that one worker has: the others are stopped while it accepts them."""
        others = [pid for pid in self._gate.workers() if pid != worker]
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        try:
            # One that does not sleep yet may still accept, or be woken in the place of the other.
            wait_until(lambda: all(map(is_stopped, others)), "stopped")
            found = [self.one() for _ in range(count)]
            wait_until(lambda: all(one.owners() == [worker] for one in found), "accepted")
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)
        return found

    def two_sides(self, count: int) -> tuple[list[Client], list[Client]]:
        """So many connections of each of the two workers."""
        wait_until(lambda: len(self._gate.workers()) == 2, "two workers")
        a, b = self._gate.workers()
        return self.of(a, count), self.of(b, count)

    def close(self) -> None:
        for client in self._all:
            client.socket.close()


@pytest.fixture
def clients(gate: Gate) -> Iterator[Clients]:
    made = Clients(gate)
    yield made
    made.close()


def take_slot(echo: Slots, client: Client) -> None:
    client.ask("/first")
    wait_until(lambda: echo.seen == ["/first"], "the slot is taken")


def queue_up(backend: FakeBackend, clients: list[Client], first: int = 1) -> list[str]:
    """Each asks once the one before it waits; returns the paths in order."""
    paths = [f"/{number}" for number in range(first, first + len(clients))]
    for number, (client, path) in enumerate(zip(clients, paths, strict=True), first):
        client.ask(path)
        until_waiting(backend, number)
    return paths


def mixed(a: list[Client], b: list[Client]) -> list[Client]:
    """Neither in turns nor in blocks."""
    both: list[Client] = []
    left, right = list(a), list(b)
    while left or right:
        side = left if len(both) % 5 in (0, 1, 3) else right
        both.append((side or left or right).pop(0))
    return both


def test_a_slot_goes_to_whoever_waits_longest_in_any_worker(
    gate: Gate, backend: FakeBackend, echo: Slots, ready: None, clients: Clients
) -> None:
    a, b = clients.two_sides(13)
    take_slot(echo, a.pop())
    waiters = mixed(a, b)
    paths = queue_up(backend, waiters)
    echo.release.set()
    assert [client.status() for client in waiters] == [200] * len(waiters)
    assert echo.seen == ["/first", *paths]
    assert echo.most == 1
    until_waiting(backend, 0)


@pytest.mark.parametrize("known", [False, True], ids=["no snapshot", "cold"])
def test_the_order_is_kept_through_a_cold_start(
    gate: Gate, backend: FakeBackend, echo: Slots, clients: Clients, known: bool
) -> None:
    a, b = clients.two_sides(6)
    waiters = mixed(a, b)
    if known:
        backend.publish(service(max_in_flight=1))
        paths = queue_up(backend, waiters)
    else:
        paths = [f"/{number}" for number in range(len(waiters))]
        for client, path in zip(waiters, paths, strict=True):
            client.ask(path)
            until_confirmed(backend)
    echo.take_s = 0.25  # many ticks, of a busy machine too
    publish(backend, echo)
    assert [client.status() for client in waiters] == [200] * len(waiters)
    # The workers learn of the start a tick apart: the one that does first has its own first go on.
    first, *rest = [paths.index(path) for path in echo.seen]
    assert first in (waiters.index(a[0]), waiters.index(b[0]))
    assert rest == sorted(rest)
    assert echo.most == 1


def test_a_request_that_is_tried_again_keeps_its_place(
    gate: Gate, backend: FakeBackend, echo: Slots, ready: None, clients: Clients
) -> None:
    gate.expected_errors.append("prematurely closed")
    a, b = clients.two_sides(4)
    take_slot(echo, a.pop())
    waiters = mixed(a, b)
    echo.to_break = "/2"
    paths = queue_up(backend, waiters)
    echo.release.set()
    assert [client.status() for client in waiters] == [200] * len(waiters)
    assert echo.seen == ["/first", "/1", "/2", *paths[1:]]


def keep_asking(waiters: list[Client], asked: int) -> None:
    """Every client asks again when it is answered, as often in all; then take what is left."""
    under_way = len(waiters)
    with selectors.DefaultSelector() as selector:
        for client in waiters:
            selector.register(client.socket, selectors.EVENT_READ, client)
        while under_way:
            ready = selector.select(20)
            assert ready, "nobody is answered"
            for key, _ in ready:
                assert key.data.status() == 200
                under_way -= 1
                if asked:
                    key.data.ask(f"/many/{asked}")
                    asked, under_way = asked - 1, under_way + 1


def test_one_clients_many_requests_do_not_starve_another(
    gate: Gate, backend: FakeBackend, echo: Slots, ready: None, clients: Clients
) -> None:
    a, b = clients.two_sides(16)
    other, first = a.pop(), b.pop()
    take_slot(echo, first)
    greedy = mixed(a, b)
    for client in greedy[:10]:
        client.ask("/many")
    until_waiting(backend, 10)
    other.ask("/other")
    until_waiting(backend, 11)
    for client in greedy[10:]:
        client.ask("/many")
    echo.release.set()
    keep_asking(greedy, 170)
    assert other.status() == 200
    assert len(echo.seen) == 202
    assert echo.seen.index("/other") == 11
    assert echo.most == 1


def test_no_replica_ever_has_more_than_its_bound(
    gate: Gate, backend: FakeBackend, echo: Slots, ready: None, clients: Clients
) -> None:
    other = Slots()
    other.start()
    both = [replica(echo.port), replica(other.port, "r2")]
    backend.publish(service(state="ready", max_in_flight=3, replicas=both))
    wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "told")
    a, b = clients.two_sides(20)
    for client in mixed(a, b):
        client.ask("/x")
    keep_asking(a + b, 600)
    other.stop()
    assert (echo.most, other.most) == (3, 3)
    assert min(len(echo.seen), len(other.seen)) > 200
    until_waiting(backend, 0)


@pytest.mark.parametrize("slot", ["its own", "another's"])
def test_a_killed_worker_whose_turn_it_was_holds_nobody_up(
    gate: Gate, backend: FakeBackend, echo: Slots, ready: None, clients: Clients, slot: str
) -> None:
    gate.expected_errors.append("exited on signal 9")
    dead, living = clients.two_sides(4)
    killed = gate.workers()[0]
    take_slot(echo, dead[0] if slot == "its own" else living[0])
    queue_up(backend, dead[1:])
    paths = queue_up(backend, living[1:], 4)
    os.kill(killed, signal.SIGKILL)
    if slot == "another's":
        echo.release.set()
    wait_until(lambda: echo.seen[-1] == paths[-1], "the others go on", GO_ON_S)
    assert [client.status() for client in living[1:]] == [200] * 3
    assert echo.seen == ["/first", *paths]
    until_waiting(backend, 0)


def test_waiters_of_exiting_workers_get_their_turn_before_later_ones(
    gate: Gate, backend: FakeBackend, echo: Slots, ready: None, clients: Clients
) -> None:
    old = gate.workers()
    a, b = clients.two_sides(5)
    take_slot(echo, a.pop())
    waiters = mixed(a, b)
    paths = queue_up(backend, waiters)
    gate.reload()
    wait_until(lambda: len(set(gate.workers()) - set(old)) == 2, "new workers")

    def of_a_new_worker() -> Client | None:
        client = clients.one()
        owners = wait_until(client.owners, "accepted")
        if set(owners) & set(old):
            client.socket.close()
            return None
        return client

    late = [wait_until(of_a_new_worker, "accepted by a new one") for _ in range(4)]
    paths += queue_up(backend, late, len(waiters) + 1)
    echo.release.set()
    assert [client.status() for client in waiters + late] == [200] * len(paths)
    assert echo.seen == ["/first", *paths]
    wait_until(lambda: not set(old) & set(gate.workers()), "old workers gone")


def test_a_client_that_hangs_up_gives_its_turn_away(
    gate: Gate, backend: FakeBackend, echo: Slots, ready: None, clients: Clients
) -> None:
    a, b = clients.two_sides(2)
    take_slot(echo, b.pop())
    waiters = [*a, *b]
    paths = queue_up(backend, waiters)
    waiters[0].socket.close()
    until_waiting(backend, 2)
    echo.release.set()
    assert [client.status() for client in waiters[1:]] == [200, 200]
    assert echo.seen == ["/first", *paths[1:]]


@pytest.mark.parametrize("wish", [0, 1])
def test_whoever_does_not_want_to_wait_for_a_slot_is_told_to_come_again(
    gate: Gate, backend: FakeBackend, echo: Slots, ready: None, clients: Clients, wish: int
) -> None:
    first, second = clients.one(), clients.one()
    take_slot(echo, first)
    second.ask("/x", f"Prefer: wait={wish}\r\n")
    answer = second.answer()
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"hold-timeout" in answer
    assert b"Retry-After: 10\r\n" in answer
    echo.release.set()
    assert first.status() == 200
    assert echo.seen == ["/first"]
    wait_until(lambda: backend.service_note("LLM").get("lease_s"), "it stays wanted")


def test_as_many_wait_for_a_slot_as_may(
    gate: Gate, backend: FakeBackend, echo: Slots, ready: None, clients: Clients
) -> None:
    publish(backend, echo, max_waiting=2)
    wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "told")
    first, *others = [clients.one() for _ in range(4)]
    take_slot(echo, first)
    queue_up(backend, others[:2])
    others[2].ask("/x")
    assert b"too-many-waiting" in others[2].answer()
    echo.release.set()
    assert [client.status() for client in others[:2]] == [200, 200]


def test_a_client_that_sends_its_body_slowly_takes_no_slot(
    gate: Gate, backend: FakeBackend, echo: Slots, ready: None, clients: Clients
) -> None:
    publish(backend, echo)
    wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "told")
    with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as slow:
        slow.sendall(
            b"POST /llm/slow HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n"
            b"Expect: 100-continue\r\nConnection: close\r\n\r\n"
        )
        assert slow.recv(100).startswith(b"HTTP/1.1 100 ")
        other = clients.one()
        other.ask("/x", "Prefer: wait=1\r\n")
        assert other.status() == 200
        slow.sendall(b"body")
        assert slow.recv(100).startswith(b"HTTP/1.1 200 ")
    assert echo.seen == ["/x", "/slow"]
