"""Clients' keys and replicas' keys: who gets in, how often, and who sees which key."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from tests.gate.harness import (
    Answer,
    EchoService,
    FakeBackend,
    Gate,
    _Handler,
    key,
    replica,
    service,
    wait_until,
)
from tests.gate.test_balancing import connection_per_worker
from tests.ports import dead_port

ANNA = "sg-" + "A" * 43
BERT = "sg-" + "b" * 42 + "_"
OLD = "sg-" + "0" * 43
REPLICA_KEY = "replica-Key_1"
TICKS_S = 0.1  # in which a worker's timer is due several times


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def in_force(gate: Gate, backend: FakeBackend, version: str) -> None:
    """Wait until every worker goes by these keys: all have ticked since the gate told of them."""
    wait_until(
        lambda: backend.notes and backend.notes[-1]["keys"] == version, "the gate has the keys"
    )
    told = time.monotonic()
    with connection_per_worker(gate) as connections:
        wait_until(lambda: time.monotonic() > told + TICKS_S, "ticks are due")
        # A worker that answers has also seen to its timers that were due before the question.
        for connection in connections * 2:
            connection.request("GET", "/healthz")
            connection.getresponse().read()


@pytest.fixture
def keyed(gate: Gate, backend: FakeBackend, echo: EchoService) -> Gate:
    """A gate with a ready service, a public one and a cold one, and three keys."""
    version = backend.publish_keys(
        key(ANNA),
        key(BERT, "bert", services=["Open"]),
        key(OLD, "old", expires=int(time.time()) - 1),
    )
    backend.publish(
        service(state="ready", replicas=[replica(echo.port)]),
        service("Open", state="ready", public=True, replicas=[replica(echo.port, "r2")]),
        service("Cold"),
    )
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    in_force(gate, backend, version)
    return gate


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as threads:
        yield threads


def logged(gate: Gate, count: int) -> list[dict[str, Any]]:
    """The access log once it has so many lines, without those of who asked how the gate is."""
    path = gate.folder / "access.log"

    def lines() -> list[dict[str, Any]]:
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        own = ("/readyz", "/healthz")
        return [line for line in map(json.loads, whole) if line["path"] not in own]

    wait_until(lambda: len(lines()) >= count, "logged")
    return lines()


# Who gets in ------------------------------------------------------------------------------------


NOT_GOOD: tuple[tuple[dict[str, str], int, str], ...] = (
    ({}, 401, "unauthorized"),
    ({"Authorization": "Bearer"}, 401, "unauthorized"),
    ({"Authorization": f"Basic {ANNA}"}, 401, "unauthorized"),
    ({"Authorization": ANNA}, 401, "unauthorized"),
    ({"X-Api-Key": ""}, 401, "unauthorized"),
    (bearer(ANNA[:-1]), 401, "unauthorized"),
    (bearer(ANNA + "A"), 401, "unauthorized"),
    (bearer("x" * 60000), 401, "unauthorized"),
    (bearer(ANNA) | {"x-api-key": BERT}, 401, "unauthorized"),
    (bearer(OLD), 401, "unauthorized"),
    (bearer(BERT), 403, "forbidden"),
)


def test_without_a_good_key_nothing_is_asked_or_started(
    keyed: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    for headers, status, code in NOT_GOOD:
        for method, route in (("GET", "/llm/x"), ("POST", "/cold/x"), ("OPTIONS", "/cold/x")):
            answer = keyed.get(route, method, headers=headers)
            assert (answer.status, answer.code) == (status, code), headers
            assert answer.headers["X-Slurmgate-Service"] is None
            assert answer.headers["WWW-Authenticate"] == ("Bearer" if status == 401 else None)
    assert echo.seen == []
    count = len(backend.notes)
    wait_until(lambda: len(backend.notes) > count + 1, "told")
    assert backend.notes[-1]["services"] == {}
    assert backend.key_note("bert") == {"requests": 0, "refused": 3, "in_flight": 0}


@pytest.mark.parametrize(
    "headers",
    [
        bearer(ANNA),
        {"authorization": f"bEaReR   {ANNA}"},
        {"x-api-key": ANNA},
        bearer(ANNA) | {"X-API-Key": ANNA},
        {"Authorization": "Basic eDp5", "x-api-key": ANNA},
    ],
)
def test_the_service_gets_the_name_and_no_key(keyed: Gate, headers: dict[str, str]) -> None:
    answer = keyed.get("/llm/x", headers=headers | {"X-Slurmgate-User": "root"})
    assert answer.status == 200
    sent = {name.lower(): value for name, value in answer.json["headers"].items()}
    assert sent["x-slurmgate-user"] == "anna"
    assert "authorization" not in sent
    assert "x-api-key" not in sent
    assert ANNA not in answer.body.decode()


def test_of_two_lines_no_key_reaches_the_service(keyed: Gate) -> None:
    lines = f"Authorization: Bearer {ANNA}\r\nX-Api-Key: {ANNA}\r\n"
    answer = keyed.raw(
        f"GET /llm/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{lines}{lines}\r\n".encode()
    )
    assert ANNA.encode() not in answer


def test_without_keys_the_clients_own_headers_go_through(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    backend.publish_keys(required=False)
    backend.publish(service(state="ready", replicas=[replica(echo.port)]))
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    own = {"Authorization": "Basic eDp5", "X-Api-Key": "mine", "X-Slurmgate-User": "root"}
    sent = gate.get("/llm/x", headers=own).json["headers"]
    assert sent["Authorization"] == "Basic eDp5"
    assert sent["X-Api-Key"] == "mine"
    assert "X-Slurmgate-User" not in sent


@pytest.mark.parametrize(
    ("headers", "passed", "user"),
    [
        ({}, {}, None),
        (bearer("of-the-service"), bearer("of-the-service"), None),
        ({"X-Api-Key": "y"}, {"X-Api-Key": "y"}, None),
        (bearer(ANNA), {}, "anna"),
        (bearer(OLD), {}, None),
        ({"X-Api-Key": BERT} | bearer("z"), bearer("z"), "bert"),
        ({"Authorization": f"Basic sg-, {ANNA}x"}, {}, "anna"),
        (bearer("sg-" + "q" * 43), bearer("sg-" + "q" * 43), None),
    ],
)
def test_a_public_service_gets_what_was_sent_but_no_key_of_ours(
    keyed: Gate, headers: dict[str, str], passed: dict[str, str], user: str | None
) -> None:
    answer = keyed.get("/open/x", headers=headers)
    assert answer.status == 200
    sent = answer.json["headers"]
    kept = {name: sent[name] for name in ("Authorization", "X-Api-Key") if name in sent}
    assert kept == passed
    assert sent.get("X-Slurmgate-User") == user


def test_required_without_a_single_key_only_public_services_are_open(
    keyed: Gate, backend: FakeBackend
) -> None:
    in_force(keyed, backend, backend.publish_keys())
    assert keyed.get("/llm/x", headers=bearer(ANNA)).status == 401
    assert keyed.get("/llm/x").status == 401
    assert keyed.get("/open/x").status == 200


# Before and after -------------------------------------------------------------------------------


def test_before_the_first_snapshot_requests_are_held_and_then_judged(
    gate: Gate, backend: FakeBackend, echo: EchoService, pool: ThreadPoolExecutor
) -> None:
    good = [pool.submit(gate.get, "/llm/x", headers=bearer(ANNA)) for _ in range(8)]
    bad = [pool.submit(gate.get, "/llm/x", headers=bearer(BERT)) for _ in range(8)]
    wait_until(lambda: backend.notes and len(backend.notes) > 3, "told")
    backend.publish_keys(key(ANNA))
    backend.publish(service(state="ready", replicas=[replica(echo.port)]))
    assert [one.result().status for one in good] == [200] * 8
    assert [one.result().status for one in bad] == [401] * 8
    assert len(echo.seen) == 8
    wait_until(lambda: backend.key_note("anna").get("in_flight") == 0, "none in flight")
    assert backend.key_note("anna")["requests"] == 8


def test_a_revoked_key_is_refused_and_what_is_under_way_goes_on(
    keyed: Gate, backend: FakeBackend, echo: EchoService, pool: ThreadPoolExecutor
) -> None:
    under_way = pool.submit(keyed.get, "/llm/until-told", headers=bearer(ANNA))
    wait_until(lambda: echo.seen, "under way")
    backend.publish_keys(key(BERT, "bert"))
    wait_until(lambda: keyed.get("/llm/x", headers=bearer(ANNA)).status == 401, "revoked")
    in_force(keyed, backend, "k2")
    assert {keyed.get("/llm/x", headers=bearer(ANNA)).status for _ in range(20)} == {401}
    assert keyed.get("/llm/x", headers=bearer(BERT)).status == 200
    assert not under_way.done()
    echo.go_on.set()
    assert under_way.result().status == 200


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        (lambda: [], 401, "unauthorized"),
        (lambda: [key(BERT)], 401, "unauthorized"),
        (lambda: [key(ANNA, expires=int(time.time()))], 401, "unauthorized"),
        (lambda: [key(ANNA, services=["LLM"])], 403, "forbidden"),
    ],
)
def test_a_held_request_whose_key_is_no_longer_good_is_refused(
    keyed: Gate,
    backend: FakeBackend,
    echo: EchoService,
    pool: ThreadPoolExecutor,
    change: Callable[[], list[dict[str, Any]]],
    status: int,
    code: str,
) -> None:
    held = pool.submit(keyed.get, "/cold/x", headers=bearer(ANNA))
    wait_until(lambda: backend.service_note("Cold").get("waiting") == 1, "held")
    assert backend.key_note("anna")["in_flight"] == 1
    backend.publish_keys(*change())
    answer = held.result(20)
    assert (answer.status, answer.code) == (status, code)
    wait_until(lambda: backend.service_note("Cold").get("waiting") == 0, "left")
    backend.publish(service("Cold", state="ready", replicas=[replica(echo.port)]))
    wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "ready")
    assert echo.seen == []


def test_a_held_request_without_a_key_is_refused_when_keys_come_into_force(
    gate: Gate, backend: FakeBackend, pool: ThreadPoolExecutor
) -> None:
    backend.publish(service("Cold"))
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    held = pool.submit(gate.get, "/cold/x")
    wait_until(lambda: backend.service_note("Cold").get("waiting") == 1, "held")
    backend.publish_keys(key(ANNA))
    assert held.result(20).status == 401


def test_a_held_request_with_a_good_key_goes_on_when_keys_come_into_force(
    gate: Gate, backend: FakeBackend, echo: EchoService, pool: ThreadPoolExecutor
) -> None:
    backend.publish(service("Cold"))
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    held = pool.submit(gate.get, "/cold/x", headers=bearer(ANNA))
    wait_until(lambda: backend.service_note("Cold").get("waiting") == 1, "held")
    backend.publish_keys(key(ANNA))
    wait_until(lambda: backend.key_note("anna").get("in_flight") == 1, "counted on its key")
    backend.publish(service("Cold", state="ready", replicas=[replica(echo.port)]))
    answer = held.result(20)
    assert answer.status == 200
    assert answer.json["headers"]["X-Slurmgate-User"] == "anna"
    assert ANNA not in answer.body.decode()
    wait_until(lambda: backend.key_note("anna")["in_flight"] == 0, "none in flight")
    assert backend.key_note("anna")["requests"] == 1


def test_a_service_made_private_while_nobody_knows_how_it_is_asks_for_keys(
    keyed: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    backend.publish(service("Open", public=False, unknown=True, state="unknown"))
    wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "told")
    wait_until(lambda: keyed.get("/open/x").status == 401, "private")
    assert keyed.get("/open/x", headers=bearer(ANNA)).headers["X-Slurmgate-Replica"] == "r2"


# Which models there are -------------------------------------------------------------------------


def ask_model(gate: Gate, name: str, headers: dict[str, str]) -> Answer:
    return gate.get("/v1/chat/completions", "POST", json.dumps({"model": name}).encode(), headers)


def test_a_wrong_key_is_not_taken_for_none(
    keyed: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    backend.publish(
        service(models=["private"]),
        service(
            "Open", models=["open"], public=True, state="ready", replicas=[replica(echo.port, "r2")]
        ),
    )
    wait_until(lambda: ask_model(keyed, "open", {}).status == 200, "told")
    for wrong in (bearer(ANNA + "A"), bearer("x"), {"X-Api-Key": OLD[:-1]}):
        for path in ("/v1/models", "/v1/models/open"):
            assert keyed.get(path, headers=wrong).status == 401, (path, wrong)
        for model in ("none", "private"):
            assert ask_model(keyed, model, wrong).status == 401, (model, wrong)
    assert [model["id"] for model in keyed.get("/v1/models").json["data"]] == ["open"]
    listed = keyed.get("/v1/models", headers=bearer(ANNA)).json["data"]
    assert {model["id"] for model in listed} == {"open", "private"}
    # Nobody finds out by guessing which models there are.
    assert [ask_model(keyed, model, {}).status for model in ("none", "private")] == [401, 401]
    assert ask_model(keyed, "none", bearer(ANNA)).status == 404


def test_a_key_expires_by_itself(keyed: Gate, backend: FakeBackend) -> None:
    def is_good_for(seconds: int) -> bool:
        entry = key(ANNA, expires=int(time.time()) + seconds)
        in_force(keyed, backend, backend.publish_keys(entry))
        return keyed.get("/llm/x", headers=bearer(ANNA)).status == 200

    # It may have expired before a busy machine asks.
    assert is_good_for(4) or is_good_for(15)
    wait_until(lambda: keyed.get("/llm/x", headers=bearer(ANNA)).status == 401, "expired")
    assert "expired" in keyed.get("/llm/x", headers=bearer(ANNA)).json["detail"]


def test_a_reload_keeps_the_keys(keyed: Gate, backend: FakeBackend) -> None:
    old = keyed.workers()
    keyed.reload()
    wait_until(lambda: not set(old) & set(keyed.workers()) and keyed.workers(), "new workers")
    assert {keyed.get("/llm/x").status for _ in range(20)} == {401}
    assert {keyed.get("/llm/x", headers=bearer(ANNA)).status for _ in range(20)} == {200}


# How often --------------------------------------------------------------------------------------


def limit_headers(headers: Message) -> dict[str, str]:
    return {
        name.lower(): value
        for name, value in headers.items()
        if name.lower().startswith("ratelimit")
    }


def test_requests_per_minute_are_counted_over_all_workers(
    keyed: Gate, backend: FakeBackend, echo: EchoService, pool: ThreadPoolExecutor
) -> None:
    in_force(keyed, backend, backend.publish_keys(key(ANNA, rpm=20), key(BERT, "bert")))
    asked = [pool.submit(keyed.get, "/llm/x", headers=bearer(ANNA)) for _ in range(100)]
    answers = [one.result() for one in asked]
    refused = [answer for answer in answers if answer.status != 200]
    assert len(refused) == 80
    assert len(echo.seen) == 20
    for answer in refused:
        assert (answer.status, answer.code) == (429, "too-many-requests")
        retry = int(answer.headers["Retry-After"])
        assert 50 <= retry <= 60
        assert 50 < answer.json["retry_after_s"] <= 60
        assert limit_headers(answer.headers) == {
            "ratelimit-limit": "20",
            "ratelimit-remaining": "0",
            "ratelimit-reset": str(retry),
            "ratelimit-policy": '"requests";q=20;w=60',
            "ratelimit": f'"requests";r=0;t={retry}',
        }
    assert keyed.get("/cold/x", headers=bearer(ANNA)).status == 429
    assert keyed.get("/llm/x", headers=bearer(BERT)).status == 200
    wait_until(lambda: backend.key_note("anna").get("refused") == 81, "told")
    assert backend.key_note("anna") == {"requests": 20, "refused": 81, "in_flight": 0}
    assert "Cold" not in backend.notes[-1]["services"]
    assert backend.service_note("LLM")["requests"] == 21


def test_requests_in_flight_are_counted_over_all_workers(
    keyed: Gate, backend: FakeBackend, echo: EchoService, pool: ThreadPoolExecutor
) -> None:
    in_force(keyed, backend, backend.publish_keys(key(ANNA, in_flight=3, rpm=1000)))
    busy: list[Future[Answer]] = []
    while len(busy) < 3:
        busy.append(pool.submit(keyed.get, "/llm/until-told", headers=bearer(ANNA)))
        wait_until(lambda: len(echo.seen) == len(busy), "in flight")
    for _ in range(20):
        answer = keyed.get("/llm/x", headers=bearer(ANNA))
        assert (answer.status, answer.code) == (429, "too-many-in-flight")
        assert answer.headers["Retry-After"] == "1"
        assert limit_headers(answer.headers) == {
            "ratelimit-limit": "3",
            "ratelimit-remaining": "0",
            "ratelimit-reset": "1",
            "ratelimit-policy": '"requests";q=1000;w=60, "in-flight";q=3;qu="concurrent-requests"',
            "ratelimit": '"in-flight";r=0;t=1',
        }
    wait_until(lambda: backend.key_note("anna").get("refused") == 20, "told")
    assert backend.key_note("anna") == {"requests": 3, "refused": 20, "in_flight": 3}
    echo.go_on.set()
    assert [one.result().status for one in busy] == [200] * 3
    wait_until(lambda: keyed.get("/llm/x", headers=bearer(ANNA)).status == 200, "free")
    wait_until(lambda: backend.key_note("anna")["in_flight"] == 0, "none in flight")


def test_a_held_request_counts_in_flight_until_its_client_leaves(
    keyed: Gate, backend: FakeBackend
) -> None:
    in_force(keyed, backend, backend.publish_keys(key(ANNA, in_flight=1)))
    with pytest.raises(TimeoutError):
        keyed.get("/cold/x", headers=bearer(ANNA), timeout=0.5)
    wait_until(lambda: keyed.get("/llm/x", headers=bearer(ANNA)).status == 200, "free")


def test_counts_of_a_killed_worker_are_forgotten(
    keyed: Gate, backend: FakeBackend, echo: EchoService, pool: ThreadPoolExecutor
) -> None:
    keyed.expected_errors += ["exited on signal 9"]
    in_force(keyed, backend, backend.publish_keys(key(ANNA, in_flight=8)))
    asked = [pool.submit(keyed.get, "/llm/until-told", headers=bearer(ANNA)) for _ in range(8)]
    wait_until(lambda: len(echo.seen) == 8, "in flight")
    assert keyed.get("/llm/x", headers=bearer(ANNA)).status == 429
    for worker in keyed.workers():
        os.kill(worker, signal.SIGKILL)
    for one in asked:
        assert isinstance(one.exception(), OSError | EOFError)
    wait_until(lambda: keyed.get("/llm/x", headers=bearer(ANNA)).status == 200, "free")
    wait_until(lambda: backend.key_note("anna").get("in_flight") == 0, "none in flight")


# What a replica wants to be shown ---------------------------------------------------------------


class GuardedService(EchoService):
    """Answers nobody who does not show its key, polls neither."""

    def __init__(self, own_key: str) -> None:
        super().__init__()
        self.own_key = own_key
        self.shown: list[str | None] = []
        self._lock = threading.Lock()

    def answer(self, handler: _Handler) -> None:
        with self._lock:
            self.shown.append(handler.headers["Authorization"])
        if handler.headers.get_all("Authorization") != [f"Bearer {self.own_key}"]:
            handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
            handler.reply(401, b"{}")
            return
        super().answer(handler)


@pytest.fixture
def guarded() -> Iterator[GuardedService]:
    upstream = GuardedService(REPLICA_KEY)
    upstream.start()
    yield upstream
    upstream.stop()


def test_polls_and_requests_show_a_replica_its_key(
    guarded: GuardedService, gate: Gate, backend: FakeBackend
) -> None:
    starting = replica(guarded.port, phase="starting", routable=False, key=REPLICA_KEY, gen=3)
    backend.publish(service(state="waking", replicas=[starting]))
    wait_until(lambda: backend.replica_note("r1").get("health") == "up", "polled")
    assert set(guarded.shown) == {f"Bearer {REPLICA_KEY}"}
    backend.publish(service(state="ready", replicas=[replica(guarded.port, key=REPLICA_KEY)]))
    own = bearer("other") | {"X-Api-Key": "mine"}
    for headers in (own, {}):
        answer = gate.get("/llm/x", headers=headers)
        assert answer.status == 200
        assert "X-Api-Key" not in answer.json["headers"]


@pytest.fixture
def dead_replica() -> Iterator[int]:
    with dead_port() as port:
        yield port


@pytest.mark.parametrize("own_key", [REPLICA_KEY, None])
def test_a_replica_that_gets_the_next_try_is_shown_its_own_key(
    dead_replica: int,
    guarded: GuardedService,
    echo: EchoService,
    gate: Gate,
    backend: FakeBackend,
    pool: ThreadPoolExecutor,
    own_key: str | None,
) -> None:
    gate.expected_errors += ["Connection refused"]
    dead = replica(dead_replica, key="of-the-dead")
    live = replica(guarded.port if own_key else echo.port, "r2", key=own_key)
    backend.publish_keys(key(ANNA))
    backend.publish(service(state="ready", replicas=[dead]))
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    asked = pool.submit(gate.get, "/llm/x", headers=bearer(ANNA))
    wait_until(lambda: backend.replica_note("r1").get("health") == "down", "tried")
    wait_until(lambda: backend.service_note("LLM").get("waiting") == 1, "held")
    backend.publish(service(state="ready", replicas=[dead, live]))
    answer = asked.result()
    assert answer.status == 200
    assert answer.json["headers"].get("Authorization") == (own_key and f"Bearer {own_key}")
    assert answer.json["headers"]["X-Slurmgate-User"] == "anna"


# Nowhere else -----------------------------------------------------------------------------------


def test_keys_stand_in_no_log_and_no_answer(
    keyed: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    keyed.expected_errors += ["prematurely closed"]
    backend.publish(
        service(state="ready", replicas=[replica(echo.port, key=REPLICA_KEY)], replay=0)
    )
    wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "told")
    tokens = (ANNA, OLD, BERT, "sg-" + "w" * 43)
    answers = []
    for token in tokens:
        for headers in (bearer(token), {"X-Api-Key": token}):
            answers += [
                keyed.get(path, headers=headers) for path in ("/llm/x", "/llm/break", "/no")
            ]
    # What the echo gives back is what the replica was shown.
    texts = [
        str(answer.headers) + answer.body.decode() for answer in answers if answer.status > 200
    ]
    lines = logged(keyed, len(answers))
    users = Counter(line["user"] for line in lines if line["path"].startswith("/llm"))
    assert users == {"anna": 4, "old": 4, "bert": 4, "": 4}
    texts += [path.read_text() for path in Path(keyed.folder).glob("*.log")]
    texts += [json.dumps(note) for note in backend.notes]
    for text in texts:
        assert not [token for token in (*tokens, REPLICA_KEY) if token in text]
