"""Which replica a request goes to: spread, affinity, replicas that fail, and when one is up."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.gate.harness import Answer, FakeBackend, Gate, service, wait_until, waiting
from tests.gate.small_service import Services, SmallService

QUICK = {"path": "/health", "interval": 0.3, "start_interval": [0.05, 0.3], "timeout": 0.2}
QUICK["failures"] = 10  # so many intervals may pass without an answer, on a busy machine too
MANY_POLLS = 13
PATIENT = {**QUICK, "interval": 5, "timeout": 60}  # a poll gets its answer however slow the machine
REFUSED = ("connect() ", "prematurely closed", "reset by peer", "Broken pipe")


@pytest.fixture
def services() -> Iterator[Services]:
    running = Services()
    yield running
    running.stop()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Tests ask for it first, so that its requests end when the gate and the services have."""
    with ThreadPoolExecutor(64) as threads:
        yield threads


def serve(backend: FakeBackend, gate: Gate, replicas: list[SmallService], **changes: Any) -> None:
    entries = [one.entry() for one in replicas]
    backend.publish(service(**{"state": "ready", "replicas": entries, **changes}))
    known = {one.name for one in replicas}
    wait_until(lambda: backend.notes and set(backend.notes[-1]["replicas"]) == known, "known")


def expect_refusals(gate: Gate) -> None:
    gate.expected_errors.extend(REFUSED)


def replica_of(answer: Answer) -> str:
    assert answer.status == 200
    return str(answer.headers["X-Slurmgate-Replica"])


def wait_for(replicas: list[SmallService], count: int) -> None:
    """Wait until so many requests are in flight."""
    wait_until(lambda: sum(one.in_flight for one in replicas) == count, f"{count} arrived")


def at_rest(backend: FakeBackend) -> None:
    """Wait until the gate counts nobody: the count of a request ends behind its last byte."""
    told = len(backend.notes)

    def nobody() -> bool:
        replicas = backend.notes[-1]["replicas"].values()
        return len(backend.notes) > told + 1 and not any(one["in_flight"] for one in replicas)

    wait_until(nobody, "nothing in flight")


def release(replicas: list[SmallService], held: list[Future[Answer]]) -> list[str]:
    for one in replicas:
        one.released = True
    return [replica_of(one.result()) for one in held]


def worker_of(gate: Gate, port: int) -> int:
    """The worker that has the connection a client made from a port."""
    peer = f"0100007F:{port:04X}"
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[2] == peer:
            inodes.add(f"socket:[{fields[9]}]")
    for pid in gate.workers():
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # one that was closed since
                if str(link.readlink()) in inodes:
                    return pid
    return 0


@contextmanager
def connection_per_worker(gate: Gate) -> Iterator[list[HTTPConnection]]:
    """Connections that were accepted by different workers, each used already."""
    found: dict[int, HTTPConnection] = {}
    with ExitStack() as stack:

        def complete() -> bool:
            connection = HTTPConnection("127.0.0.1", gate.port, timeout=20)
            stack.callback(connection.close)
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            worker = worker_of(gate, connection.sock.getsockname()[1])
            if worker:  # else the table of connections was read while it changed
                found[worker] = connection
            return len(found) == gate.spec.workers

        wait_until(complete, "a connection to each worker")
        yield list(found.values())


def ask(connection: HTTPConnection, path: str) -> str:
    connection.request("GET", path)
    return replica_of(Answer(connection.getresponse()))


class Load:
    """Clients that ask as fast as they are answered, until stopped."""

    def __init__(self, gate: Gate, clients: int, path: str = "/llm/busy") -> None:
        self.answers: list[Answer] = []
        self.began: list[tuple[float, Answer]] = []  # when each was asked for
        self._gate, self._path = gate, path
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def goes_on(self, count: int) -> None:
        """Wait until so many more requests were answered."""
        until = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= until, f"{count} more answers")

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            answer = self._gate.get(self._path)
            self.began.append((began, answer))
            self.answers.append(answer)


# Spread -------------------------------------------------------------------------------------


def test_requests_one_after_the_other_fill_all_replicas_alike(
    pool: ThreadPoolExecutor, gate: Gate, backend: FakeBackend, services: Services
) -> None:
    four = services.start(4)
    serve(backend, gate, four)
    held = []
    for count in range(1, 21):
        held.append(pool.submit(gate.get, "/llm/hold"))
        wait_for(four, count)
    assert [one.in_flight for one in four] == [5, 5, 5, 5]
    release(four, held)


def test_requests_at_once_through_all_workers_spread_over_all_replicas(
    pool: ThreadPoolExecutor, gate: Gate, backend: FakeBackend, services: Services
) -> None:
    four = services.start(4)
    serve(backend, gate, four)
    held = [pool.submit(gate.get, "/llm/hold") for _ in range(40)]
    wait_for(four, 40)
    loads = [one.in_flight for one in four]
    # Two workers may look at the same moment.
    assert max(loads) - min(loads) <= 2, loads
    release(four, held)


def test_no_idle_replica_is_left_out(gate: Gate, backend: FakeBackend, services: Services) -> None:
    serve(backend, gate, services.start(4))
    taken = Counter(replica_of(gate.get("/llm/x")) for _ in range(80))
    assert set(taken) == {"r1", "r2", "r3", "r4"}
    assert min(taken.values()) >= 4, taken


# Affinity -----------------------------------------------------------------------------------


def home_of(gate: Gate, key: str) -> str:
    return replica_of(gate.get("/llm/x", headers={"X-Session-Id": key}))


def test_a_session_stays_with_its_replica_whichever_worker_it_comes_to(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    serve(backend, gate, services.start(4), affinity="X-Session-Id")
    homes = {key: home_of(gate, key) for key in map(str, range(40))}
    assert set(homes.values()) == {"r1", "r2", "r3", "r4"}
    with connection_per_worker(gate) as connections:
        for connection in connections:
            for key, home in homes.items():
                connection.request("GET", "/llm/x", headers={"x-session-id": key})
                assert replica_of(Answer(connection.getresponse())) == home


def test_only_the_sessions_of_a_replica_that_leaves_move_and_they_come_back(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    four = services.start(4)
    serve(backend, gate, four, affinity="X-Session-Id")
    homes = {key: home_of(gate, key) for key in map(str, range(40))}
    serve(backend, gate, four[:2] + four[3:], affinity="X-Session-Id")
    for key, home in homes.items():
        now = home_of(gate, key)
        assert now == home if home != "r3" else now != "r3"
    serve(backend, gate, four, affinity="X-Session-Id")
    assert {key: home_of(gate, key) for key in homes} == homes


def test_a_loaded_replica_shares_its_sessions(
    pool: ThreadPoolExecutor, gate: Gate, backend: FakeBackend, services: Services
) -> None:
    four = services.start(4)
    serve(backend, gate, four, affinity="X-Session-Id")
    home = home_of(gate, "a")
    held = []
    for count in range(1, 17):
        held.append(pool.submit(gate.get, "/llm/hold", headers={"X-Session-Id": "a"}))
        wait_for(four, count)
    loads = {one.name: one.in_flight for one in four}
    # A quarter above the mean of four, and not more.
    assert loads[home] == 5
    assert max(loads.values()) == 5
    release(four, held)
    assert home_of(gate, "a") == home


def test_requests_without_the_header_are_balanced(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    serve(backend, gate, services.start(3), affinity="X-Session-Id")
    everywhere = {"r1", "r2", "r3"}
    assert {replica_of(gate.get("/llm/x")) for _ in range(50)} == everywhere
    assert {home_of(gate, "") for _ in range(50)} == everywhere


def test_a_session_passes_over_a_full_replica(
    pool: ThreadPoolExecutor, gate: Gate, backend: FakeBackend, services: Services
) -> None:
    two = services.start(2)
    serve(backend, gate, two, affinity="X-Session-Id", max_in_flight=1)
    home = home_of(gate, "a")
    at_rest(backend)
    held = [pool.submit(gate.get, "/llm/hold", headers={"X-Session-Id": "a"})]
    wait_for(two, 1)
    assert home_of(gate, "a") != home
    assert release(two, held) == [home]


BY_MODEL = "/v1/chat/completions"


def prompt(beginning: str, end: str = "") -> bytes:
    """A request whose beginning is as long as is looked at, whatever it ends with."""
    messages = [{"role": "system", "content": beginning.ljust(300, ".") + end}]
    return json.dumps({"model": "m", "temperature": len(end), "messages": messages}).encode()


def home_of_prompt(gate: Gate, path: str, beginning: str, end: str = "") -> str:
    return replica_of(gate.get(path, "POST", prompt(beginning, end)))


def test_prompts_that_begin_alike_go_to_the_same_replica_by_route_and_by_model(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    serve(backend, gate, services.start(3), prefix_affinity=True, models=["m"])
    homes = {text: home_of_prompt(gate, BY_MODEL, text) for text in map(str, range(40))}
    taken = Counter(homes.values())
    assert set(taken) == {"r1", "r2", "r3"}
    assert min(taken.values()) >= 4, taken
    for text, home in homes.items():
        for path in (BY_MODEL, "/llm" + BY_MODEL):
            assert home_of_prompt(gate, path, text, "another end") == home


def test_a_prompt_that_many_send_overflows_to_other_replicas(
    pool: ThreadPoolExecutor, gate: Gate, backend: FakeBackend, services: Services
) -> None:
    three = services.start(3)
    serve(backend, gate, three, prefix_affinity=True, models=["m"])
    home = home_of_prompt(gate, BY_MODEL, "hot")
    held = []
    for count in range(1, 13):
        held.append(pool.submit(gate.get, "/llm/hold", "POST", prompt("hot", str(count))))
        wait_for(three, count)
    loads = {one.name: one.in_flight for one in three}
    # A quarter above the mean of four, and not more.
    assert loads[home] == max(loads.values()) == 5
    assert min(loads.values()) > 0
    release(three, held)
    assert home_of_prompt(gate, BY_MODEL, "hot") == home


def test_requests_without_a_prompt_are_balanced(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    serve(backend, gate, services.start(3), prefix_affinity=True, models=["m"])
    everywhere = {"r1", "r2", "r3"}
    assert {replica_of(gate.get("/llm/x")) for _ in range(50)} == everywhere
    empty = b'{"model": "m"}'
    assert {replica_of(gate.get(BY_MODEL, "POST", empty)) for _ in range(50)} == everywhere


def test_a_request_whose_body_takes_long_goes_to_no_replica_that_left_meanwhile(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    two = services.start(2)
    serve(backend, gate, two, prefix_affinity=True)
    bodies = [prompt(str(number)) for number in range(16)]
    with ExitStack() as stack:
        socks = []
        for body in bodies:
            sock = socket.create_connection(("127.0.0.1", gate.port), timeout=20)
            socks.append(stack.enter_context(sock))
            sock.sendall(
                b"POST /llm/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
            )
        for sock in socks:  # the body is about to be read, so its service is known
            assert sock.recv(65536).startswith(b"HTTP/1.1 100 ")
        leaving = two[1].entry(phase="draining", routable=False)
        backend.publish(
            service(state="ready", prefix_affinity=True, replicas=[two[0].entry(), leaving])
        )
        wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "stored")
        wait_until(lambda: backend.replica_note("r2")["in_flight"] == 0, "proven unreachable")
        for sock, body in zip(socks, bodies, strict=True):
            sock.sendall(body)
        for sock in socks:
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert two[1].seen == []
    assert len(two[0].seen) == len(bodies)


# Replicas that fail -------------------------------------------------------------------------


def test_a_replica_that_refused_a_connection_gets_nothing_until_its_health_is_good(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    expect_refusals(gate)
    three = services.start(3)
    dead = three[1]
    serve(backend, gate, three, replay=0)
    services.kill(dead)
    assert "r2" not in {replica_of(gate.get("/llm/x")) for _ in range(50)}
    assert refusals(gate) == 1
    dead.health = "bad"
    services.revive(dead)
    wait_until(lambda: dead.polls > 2, "polled")
    assert "r2" not in {replica_of(gate.get("/llm/x")) for _ in range(12)}
    assert dead.seen == []
    dead.health = "good"
    wait_until(lambda: replica_of(gate.get("/llm/x")) == "r2", "back in the choice")


def test_what_one_worker_suspects_no_other_worker_chooses(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    expect_refusals(gate)
    three = services.start(3)
    serve(backend, gate, three)
    with connection_per_worker(gate) as (first, second):
        services.kill(three[0])
        wait_until(lambda: ask(first, "/llm/x") and refusals(gate), "the first worker met it")
        assert "r1" not in {ask(second, "/llm/x") for _ in range(9)}
    assert refusals(gate) == 1


def refusals(gate: Gate) -> int:
    """Failed connections of requests; polls are made without nginx's upstream."""
    return gate.errors.read_text().count("while connecting to upstream")


def test_nothing_fails_when_one_of_three_replicas_dies_under_load(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    expect_refusals(gate)
    three = services.start(3)
    serve(backend, gate, three, replay=1)
    with Load(gate, 24) as load:
        load.goes_on(100)
        services.kill(three[2])
        killed = time.monotonic()
        load.goes_on(150)
        later = [answer for began, answer in load.began if began > killed]
        services.revive(three[2])
        wait_until(lambda: replica_of(load.answers[-1]) == "r3", "back in the choice")
    assert {answer.status for answer in load.answers} == {200}
    assert {replica_of(answer) for answer in later} == {"r1", "r2"}


def in_flight(
    pool: ThreadPoolExecutor, gate: Gate, backend: FakeBackend, services: Services, **changes: Any
) -> tuple[Future[Answer], SmallService, list[SmallService]]:
    """A request that one of three will never answer and the others will; that one, and those."""
    expect_refusals(gate)
    three = services.start(3)
    serve(backend, gate, three, health=PATIENT, **changes)
    held = pool.submit(gate.get, "/llm/hold")
    wait_for(three, 1)
    [first] = [one for one in three if one.in_flight]
    others = [one for one in three if one is not first]
    for one in others:
        one.released = True
    return held, first, others


def test_a_request_is_not_sent_again_into_tunnels_that_are_cut_together_with_its_first(
    pool: ThreadPoolExecutor, gate: Gate, backend: FakeBackend, services: Services
) -> None:
    held, first, others = in_flight(pool, gate, backend, services)
    for one in others:
        one.cut_off = True
    services.kill(first)
    wait_until(lambda: all(one.broken_off for one in others), "the others were tried")
    wait_until(lambda: waiting(backend) == 1, "held")
    for one in others:
        one.cut_off = False
    assert replica_of(held.result()) in {one.name for one in others}


def test_a_request_is_sent_again_although_one_of_the_others_is_mute(
    pool: ThreadPoolExecutor, gate: Gate, backend: FakeBackend, services: Services
) -> None:
    held, first, others = in_flight(pool, gate, backend, services)
    others[0].health = "mute"
    services.kill(first)
    assert replica_of(held.result()) in {one.name for one in others}


def test_newcomers_pass_a_request_that_waits_to_be_sent_again_and_their_answers_end_its_wait(
    pool: ThreadPoolExecutor, gate: Gate, backend: FakeBackend, services: Services
) -> None:
    held, first, others = in_flight(pool, gate, backend, services, max_in_flight=1)
    for one in others:
        one.health = "mute"
    services.kill(first)
    wait_until(lambda: waiting(backend) == 1, "held")
    names = {one.name for one in others}

    def done() -> bool:
        assert replica_of(gate.get("/llm/x")) in names
        return held.done()

    wait_until(done, "sent again")
    assert replica_of(held.result()) in names


@pytest.mark.parametrize("count", [1, 2])
def test_a_burst_over_a_small_backlog_loses_nothing(
    pool: ThreadPoolExecutor,
    gate: Gate,
    backend: FakeBackend,
    services: Services,
    folder: Path,
    count: int,
) -> None:
    expect_refusals(gate)
    small = [
        services.add(SmallService(f"r{i}", f"unix:{folder}/run/r{i}.sock", backlog=1))
        for i in range(count)
    ]
    serve(backend, gate, small)
    burst = [pool.submit(gate.get, "/llm/busy") for _ in range(300)]
    assert {one.result().status for one in burst} == {200}


# Up and down --------------------------------------------------------------------------------


def health_of(backend: FakeBackend, name: str) -> str:
    return str(backend.replica_note(name)["health"])


def healths(backend: FakeBackend, name: str, while_: Callable[[], Any]) -> set[str]:
    """All that was told of a replica's health while something lasted."""
    begin = len(backend.notes)
    while_()
    return {note["replicas"][name]["health"] for note in backend.notes[begin:]}


@pytest.mark.parametrize("count", [1, 3])
def test_a_health_path_that_times_out_under_full_load_changes_nothing(
    gate: Gate, backend: FakeBackend, services: Services, count: int
) -> None:
    some = services.start(count)
    serve(backend, gate, some, health=QUICK, max_in_flight=4)
    wait_until(lambda: {health_of(backend, one.name) for one in some} == {"up"}, "all up")
    with Load(gate, 4 * count) as load:
        load.goes_on(count)
        polls = {one: one.polls for one in some}
        for one in some:
            one.health = "mute"

        def many_polls_failed() -> bool:
            return all(one.polls >= polls[one] + MANY_POLLS for one in some)

        for one in some:
            seen = healths(backend, one.name, lambda: wait_until(many_polls_failed, "polls"))
            assert seen <= {"up"}
    assert {answer.status for answer in load.answers} == {200}
    wait_until(lambda: {health_of(backend, one.name) for one in some} == {"down"}, "all down")


def test_clients_that_break_off_their_bodies_do_not_keep_a_mute_replica_up(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    [one] = services.start(1)
    serve(backend, gate, [one], health=QUICK)
    wait_until(lambda: backend.replica_note("r1")["health"] == "up", "up")
    one.health = "mute"

    def down() -> bool:
        with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as sock:
            sock.sendall(b"POST /llm/x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx")
            wait_until(lambda: backend.replica_note("r1")["in_flight"] == 1, "sent")
        wait_until(lambda: backend.replica_note("r1")["in_flight"] == 0, "broken off")
        return bool(backend.replica_note("r1")["health"] == "down")

    wait_until(down, "down")
    assert one.seen == []


def test_a_long_answer_keeps_its_replica_up_although_its_health_path_is_mute(
    pool: ThreadPoolExecutor, gate: Gate, backend: FakeBackend, services: Services
) -> None:
    two = services.start(2)
    serve(backend, gate, two, health=QUICK)
    wait_until(lambda: {health_of(backend, one.name) for one in two} == {"up"}, "both up")
    held = pool.submit(gate.get, "/llm/stream")
    streaming = wait_until(lambda: next((one for one in two if one.in_flight), None), "streams")
    idle = two[1 - two.index(streaming)]
    polls = streaming.polls
    for one in two:
        one.health = "mute"
    wait_until(lambda: health_of(backend, idle.name) == "down", "the idle one is down")
    seen = healths(
        backend,
        streaming.name,
        lambda: wait_until(lambda: streaming.polls >= polls + MANY_POLLS, "many polls"),
    )
    assert seen <= {"up"}
    streaming.released = True
    assert replica_of(held.result()) == streaming.name
    wait_until(lambda: health_of(backend, streaming.name) == "down", "down when silent")


def test_a_changed_protocol_keeps_its_replica_up_while_bytes_come(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    (one,) = services.start(1)
    serve(backend, gate, [one], health=QUICK)
    wait_until(lambda: health_of(backend, "r1") == "up", "up")
    with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as sock:
        sock.sendall(b"GET /llm/upgrade HTTP/1.1\r\nHost: a\r\n")
        sock.sendall(b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 101")
        polls = one.polls
        one.health = "mute"
        seen = healths(
            backend,
            "r1",
            lambda: wait_until(lambda: one.polls >= polls + MANY_POLLS, "many polls"),
        )
        assert seen <= {"up"}
    wait_until(lambda: health_of(backend, "r1") == "down", "down when silent")
