"""Held streams: comment lines while they wait, then the service's own events or one error."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any

import h2.connection
import h2.events
import httpx
import pytest

from slurmgate.model import GateSpec
from tests.gate.harness import FakeBackend, Gate, free_port, key, replica, service, wait_until
from tests.gate.stream_service import EVENTS, LARGE, StreamService
from tests.gate.test_balancing import worker_of
from tests.gate.test_transport import make_certificate

HEARTBEAT_S = 0.2
SOON_S = 4.0  # less than the five seconds for which nginx lingers on a connection that was closed
ASKING = {"Accept": "text/event-stream"}
ASKING_OVER_HTTP2 = [("accept", "text/event-stream")]
PENDING = {"state": "pending", "reason": "Resources"}


@pytest.fixture
def echo() -> Iterator[StreamService]:
    upstream = StreamService()
    upstream.start()
    yield upstream
    upstream.go.set()
    upstream.stop()


@pytest.fixture
def gate_spec() -> GateSpec:
    return GateSpec(listen=f"127.0.0.1:{free_port()}", workers=2, max_held_bytes=8_000_000)


def cold(**changes: Any) -> dict[str, Any]:
    defaults = {"state": "waking", "heartbeat": HEARTBEAT_S, "progress": PENDING, "models": ["m"]}
    return service(**{**defaults, **changes})


def ready(*replicas: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return cold(**{"state": "ready", "progress": None, "replicas": list(replicas), **changes})


def failed(code: str = "start-failed") -> dict[str, Any]:
    refusal = {"code": code, "reason": "exit code 3", "log": ["boom"], "retry_after_s": 7.0}
    return cold(state="failed", progress=None, refusal=refusal)


def note(backend: FakeBackend) -> dict[str, Any]:
    return backend.service_note("LLM")


def nothing_held(backend: FakeBackend) -> bool:
    told = note(backend)
    return (
        told.get("waiting") == 0
        and told.get("in_flight") == 0
        and all(entry["in_flight"] == 0 for entry in backend.notes[-1]["replicas"].values())
    )


class Stream:
    """A request whose answer is read line by line."""

    def __init__(
        self,
        gate: Gate,
        path: str = "/llm/sse",
        body: bytes | None = b'{"stream": true}',
        headers: dict[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self._connection = HTTPConnection("127.0.0.1", port or gate.port, timeout=20)
        method = "GET" if body is None else "POST"
        self._connection.request(method, path, body, headers or {})
        self._response: HTTPResponse | None = None

    @property
    def local_port(self) -> int:
        return int(self._connection.sock.getsockname()[1])

    @property
    def response(self) -> HTTPResponse:
        if self._response is None:
            self._response = self._connection.getresponse()
        return self._response

    def comment(self) -> str:
        line = self.response.readline().decode()
        assert line.startswith(": waiting"), line
        assert self.response.readline() == b"\n"
        return line.rstrip("\n")

    def rest(self) -> bytes:
        """All that comes behind the comment lines, to the answer's end."""
        with self.response as response:
            lines = [line for line in response if not line.startswith(b": ")]
        self._connection.close()
        while lines and lines[0] == b"\n":
            lines.pop(0)
        return b"".join(lines)

    def close(self) -> None:
        # The answer keeps the socket open too.
        if self._response is not None:
            self._response.close()
        self._connection.close()


def waits(backend: FakeBackend, count: int = 1) -> None:
    wait_until(lambda: note(backend).get("waiting") == count, f"{count} wait")


def error_of(text: bytes) -> Any:
    """The object of the one error event that a stream ends with."""
    assert text.endswith(b"\n\n")
    assert text.count(b"\ndata: ") + text.startswith(b"data: ") == 1
    # Of bytes the parser would take more than UTF-8.
    return json.loads(text.decode().partition("data: ")[2])


@pytest.mark.parametrize("size", [10, 100_000, 5_000_000])
def test_a_held_stream_gets_comment_lines_and_then_the_services_own_bytes(
    gate: Gate, backend: FakeBackend, echo: StreamService, size: int
) -> None:
    backend.publish(cold())
    body = json.dumps({"text": "x" * size, "stream": True}).encode()
    stream = Stream(gate, body=body, headers={"X-One": "two"})
    beginning, _, eta = stream.comment().partition(" eta_s=")
    assert beginning == ": waiting state=pending reason=Resources"
    assert 20 <= int(eta) <= 30  # what is left of the estimate
    headers = stream.response.headers
    assert stream.response.status == 200
    assert headers["Content-Type"] == "text/event-stream"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Accel-Buffering"] == "no"
    assert headers["X-Slurmgate-Service"] == "LLM"
    for _ in range(3):
        stream.comment()
    waits(backend)
    assert note(backend)["requests"] == 1
    backend.publish(ready(replica(echo.port)))
    digest = hashlib.sha256(body).hexdigest().encode()
    assert stream.rest() == b"data: " + digest + b"\n\n" + EVENTS
    assert echo.headers[0]["X-One"] == "two"
    assert not [name for name in echo.headers[0] if name.startswith("X-Slurmgate")]
    wait_until(lambda: nothing_held(backend), "counts given back")
    assert note(backend)["requests"] == 1


def test_the_access_log_has_one_line_that_tells_how_it_went_on(
    gate: Gate, backend: FakeBackend, echo: StreamService, folder: Path
) -> None:
    backend.publish(cold())
    began = time.monotonic()
    stream = Stream(gate, headers={"X-Request-Id": "one"})
    for _ in range(4):
        stream.comment()
    backend.publish(ready(replica(echo.port)))
    stream.rest()
    took = time.monotonic() - began
    log = folder / "access.log"
    lines = wait_until(lambda: log.read_text().splitlines(), "logged")
    wait_until(lambda: gate.get("/llm/x").status == 200, "another")
    wait_until(lambda: len(log.read_text().splitlines()) == 2, "logged too")
    entry = json.loads(lines[0])
    assert (entry["request_id"], entry["path"], entry["status"]) == ("one", "/llm/sse", 200)
    assert (entry["service"], entry["replica"], entry["tries"]) == ("LLM", "r1", 1)
    assert HEARTBEAT_S <= entry["waited"] <= took
    assert echo.headers[0]["X-Request-Id"] == "one"


def test_a_client_that_speaks_http_1_0_gets_comment_lines_and_the_stream(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold())
    asked = b"GET /llm/sse HTTP/1.0\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", gate.port), timeout=20) as sock,
        sock.makefile("rb") as answer,
    ):
        sock.sendall(asked)
        head = b"".join(iter(answer.readline, b"\r\n"))
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"chunked" not in head
        for _ in range(2):
            assert answer.readline().startswith(b": waiting state=pending")
            assert answer.readline() == b"\n"
        backend.publish(ready(replica(echo.port)))
        assert answer.read().endswith(b"\n\n" + EVENTS)


def test_a_stream_of_known_length_comes_event_by_event(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold())
    stream = Stream(gate, "/llm/sse/length")
    stream.comment()
    backend.publish(ready(replica(echo.port)))
    wait_until(lambda: stream.response.readline() == b"data: [DONE]\n", "the first part")
    assert not echo.go.is_set()
    echo.go.set()
    assert stream.rest() == EVENTS


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream;q=0.9, */*;q=0.1", True),
        ("application/json, text/event-stream", False),
        ("*/*", False),
    ],
)
def test_a_stream_can_be_asked_for_by_accept_alone(
    gate: Gate, backend: FakeBackend, echo: StreamService, accept: str, wanted: bool
) -> None:
    backend.publish(cold())
    stream = Stream(gate, body=None, headers={"Accept": accept})
    other = Stream(gate, headers=ASKING)
    other.comment()
    other.comment()
    other.close()
    if wanted:
        stream.comment()
    waits(backend)
    backend.publish(ready(replica(echo.port)))
    assert stream.rest().endswith(EVENTS)
    # Of one that waited in silence the header is the service's own.
    own = "charset" in stream.response.headers["Content-Type"]
    assert own == (not wanted)


@pytest.mark.parametrize(
    ("method", "body", "headers"),
    [
        ("POST", b'{"stream": false}', {}),
        ("POST", b'{"text": "\\"stream\\": true"}', {}),
        ("POST", b"stream=true", {}),
        ("HEAD", None, ASKING),
    ],
)
def test_who_asks_for_no_stream_waits_in_silence(
    gate: Gate,
    backend: FakeBackend,
    echo: StreamService,
    method: str,
    body: bytes | None,
    headers: dict[str, str],
) -> None:
    backend.publish(cold())
    with ThreadPoolExecutor() as pool:
        held = pool.submit(gate.get, "/llm/x", method, body, headers)
        other = Stream(gate)
        other.comment()
        other.comment()
        backend.publish(ready(replica(echo.port)))
        answer = held.result()
        other.rest()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"


def test_without_a_heartbeat_a_stream_waits_in_silence(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold(heartbeat=0))
    stream = Stream(gate)
    waits(backend)
    told = len(backend.notes)
    wait_until(lambda: len(backend.notes) > told + 10, "time passes")
    backend.publish(ready(replica(echo.port), heartbeat=0))
    stream.rest()
    assert "charset" in stream.response.headers["Content-Type"]


def test_comment_lines_go_on_until_the_service_begins_to_answer(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold())
    stream = Stream(gate, "/llm/sse/late")
    stream.comment()
    backend.publish(ready(replica(echo.port)))
    wait_until(lambda: echo.seen == ["/sse/late"], "sent")
    wait_until(lambda: stream.comment() == ": waiting state=ready", "said so")
    echo.go.set()
    assert stream.rest().endswith(EVENTS)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/llm/x"])
def test_a_start_that_fails_becomes_an_error_event(
    gate: Gate, backend: FakeBackend, path: str
) -> None:
    backend.publish(cold())
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    stream = Stream(gate, path, b'{"model": "m", "stream": true}')
    stream.comment()
    backend.publish(failed())
    text = stream.rest()
    event = error_of(text)
    error = event["error"]
    if path == "/v1/messages":
        assert text.startswith(b"event: error\n")
        assert (event["type"], event["status"]) == ("error", 503)
        assert event["body"]["error"] == error
        assert error["type"] == "overloaded_error"
    else:
        assert (error["status"], error["code"]) == (503, "start-failed")
        assert error["type"] == "server_error"
        assert "body" in error
    assert "ended before it was ready" in error["message"]
    wait_until(lambda: nothing_held(backend), "counts given back")


@pytest.mark.parametrize("status", [200, 404, 503])
def test_an_answer_that_is_no_stream_becomes_an_error_event(
    gate: Gate, backend: FakeBackend, echo: StreamService, status: int
) -> None:
    backend.publish(cold())
    stream = Stream(gate, f"/llm/status/{status}")
    stream.comment()
    backend.publish(ready(replica(echo.port)))
    text = stream.rest()
    error = error_of(text)["error"]
    assert error["status"] == status
    assert error["body"] == {"detail": "as asked", "n": [1.5, []]}
    assert error["message"] == "as asked"
    assert error["type"] == ("invalid_request_error" if status == 404 else "server_error")
    wait_until(lambda: nothing_held(backend), "counts given back")


@pytest.mark.parametrize(
    ("trouble", "body"),
    [
        (b'["line\tone\nline two\x01"]', ["line one line two "]),
        ('["\u00e9\u4e2d\U0001f600"]'.encode(), ["\u00e9\u4e2d\U0001f600"]),
        (b'["\xff \xc3"]', ["? ?"]),
        (b'["\xc0\xaf"]', ["??"]),
        (b'["\xed\xa0\x80"]', ["???"]),
        (b'["\xe0\x9f\xbf"]', ["???"]),
        (b'["\xf0\x8f\xbf\xbf"]', ["????"]),
        (b'["\xf4\x90\x80\x80"]', ["????"]),
        (b'["\xf0\x9f\xc3\xa9\x98\x80"]', ["??????"]),
        (b"no JSON:\x00\n\xe9\xed\xb0\x80", "no JSON:\0\n????"),
    ],
)
def test_whatever_a_failed_answer_has_in_it_the_event_is_json(
    gate: Gate, backend: FakeBackend, echo: StreamService, trouble: bytes, body: list[str] | str
) -> None:
    echo.trouble = trouble
    backend.publish(cold())
    stream = Stream(gate, "/llm/status/500")
    stream.comment()
    backend.publish(ready(replica(echo.port)))
    assert error_of(stream.rest())["error"]["body"] == body


def test_an_encoded_stream_becomes_an_error_event(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold())
    stream = Stream(gate, "/llm/packed", headers={"Accept-Encoding": "gzip"})
    stream.comment()
    backend.publish(ready(replica(echo.port)))
    assert error_of(stream.rest())["error"]["status"] == 200
    assert "Accept-Encoding" not in echo.headers[0]


def test_the_clients_own_bound_holds_for_a_stream_too(gate: Gate, backend: FakeBackend) -> None:
    backend.publish(cold())
    stream = Stream(gate, headers={"Prefer": "wait=3"})
    stream.comment()
    assert error_of(stream.rest())["error"]["code"] == "hold-timeout"
    wait_until(lambda: nothing_held(backend), "counts given back")


def test_a_stream_that_is_cut_off_does_not_end_like_a_whole_one(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    gate.expected_errors.append("prematurely closed")
    backend.publish(cold())
    stream = Stream(gate, "/llm/sse/cut")
    stream.comment()
    backend.publish(ready(replica(echo.port)))
    with pytest.raises(IncompleteRead):
        stream.response.read()
    stream.close()
    wait_until(lambda: nothing_held(backend), "counts given back")


@pytest.mark.parametrize("when", ["while it waits", "while the service has it", "in its stream"])
def test_a_client_that_hangs_up_leaves_no_count(
    gate: Gate, backend: FakeBackend, echo: StreamService, when: str
) -> None:
    backend.publish(cold())
    stream = Stream(gate, "/llm/sse/long" if when == "in its stream" else "/llm/sse/late")
    stream.comment()
    waits(backend)
    if when != "while it waits":
        backend.publish(ready(replica(echo.port)))
        wait_until(lambda: backend.replica_note("r1").get("in_flight") == 1, "sent")
    if when == "in its stream":
        wait_until(lambda: stream.response.readline().startswith(b"data: "), "begun")
    stream.close()
    wait_until(lambda: nothing_held(backend), "counts given back", SOON_S)


def test_a_client_that_hangs_up_behind_its_next_request_leaves_no_count(
    gate: Gate, backend: FakeBackend
) -> None:
    backend.publish(cold())
    with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as sock:
        sock.sendall(b"GET /llm/x HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n")
        assert b"200 OK" in sock.recv(100)
        sock.sendall(b"GET /llm/y HTTP/1.1\r\nHost: a\r\n\r\n")
    wait_until(lambda: nothing_held(backend), "counts given back", SOON_S)


@pytest.fixture
def secure_gate(
    folder: Path, backend: FakeBackend, echo: StreamService
) -> Iterator[tuple[Gate, httpx.Client]]:
    spec = GateSpec(listen=f"127.0.0.1:{free_port()}", tls=make_certificate(folder), workers=2)
    gate = Gate(folder, spec, backend)
    gate.start()
    trust = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    trust.check_hostname = False
    url = f"https://127.0.0.1:{gate.port}"
    with httpx.Client(http2=True, verify=trust, timeout=20, base_url=url) as client:
        yield gate, client
    gate.stop()
    assert gate.error_lines() == []


def reset_one_stream(gate: Gate, heard: Callable[[], object]) -> None:
    """Ask for a stream over HTTP/2, and reset it when a comment line came; the connection stays."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection(("127.0.0.1", gate.port), timeout=20)
    with context.wrap_socket(plain) as sock:
        talk = h2.connection.H2Connection()
        talk.initiate_connection()
        pseudo = [(":method", "GET"), (":scheme", "https"), (":path", "/llm/x")]
        talk.send_headers(1, [*pseudo, (":authority", "a"), *ASKING_OVER_HTTP2], end_stream=True)
        sock.sendall(talk.data_to_send())
        came: list[object] = []
        while not any(isinstance(event, h2.events.DataReceived) for event in came):
            came += talk.receive_data(sock.recv(65536))
        talk.reset_stream(1)
        sock.sendall(talk.data_to_send())
        heard()


def test_over_http2_a_stream_that_is_reset_leaves_no_count(
    secure_gate: tuple[Gate, httpx.Client], backend: FakeBackend
) -> None:
    gate, _ = secure_gate
    backend.publish(cold())
    reset_one_stream(
        gate, lambda: wait_until(lambda: nothing_held(backend), "counts given back", SOON_S)
    )


def test_over_http2_a_held_stream_works(
    secure_gate: tuple[Gate, httpx.Client], backend: FakeBackend, echo: StreamService
) -> None:
    _, client = secure_gate
    backend.publish(cold())
    with client.stream("POST", "/llm/sse", json={"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith(": waiting state=pending")
        backend.publish(ready(replica(echo.port)))
        assert "data: [DONE]" in list(lines)
    assert echo.headers[0]["X-Forwarded-Proto"] == "https"
    wait_until(lambda: nothing_held(backend), "counts given back")


def test_over_http2_a_stream_that_is_cut_off_does_not_end_like_a_whole_one(
    secure_gate: tuple[Gate, httpx.Client], backend: FakeBackend, echo: StreamService
) -> None:
    gate, client = secure_gate
    gate.expected_errors.append("prematurely closed")
    backend.publish(cold())
    with client.stream("POST", "/llm/sse/cut", json={"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith(": waiting state=pending")
        backend.publish(ready(replica(echo.port)))
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)


def test_streams_that_hear_comment_lines_keep_their_turn(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold())
    early = []
    for index in range(3):
        early.append(Stream(gate, f"/llm/sse/{index}"))
        waits(backend, index + 1)
    for stream in early:
        stream.comment()
    with ThreadPoolExecutor() as pool:
        late = pool.submit(gate.get, "/llm/x")
        waits(backend, 4)
        backend.publish(ready(replica(echo.port), max_in_flight=1))
        for stream in early:
            assert stream.rest().endswith(EVENTS)
        assert late.result().status == 200
    assert echo.seen == ["/sse/0", "/sse/1", "/sse/2", "/x"]


def test_a_reload_and_a_backend_that_restarts_leave_streams_alone(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    gate.expected_errors += ["control.sock failed", "context: ngx.timer"]
    backend.publish(cold())
    streams = [Stream(gate) for _ in range(20)]
    for stream in streams:
        stream.comment()
    streams += [Stream(gate) for _ in range(20)]  # those hear of it from a worker that exits
    before = set(gate.workers())
    gate.reload()
    wait_until(lambda: len(set(gate.workers()) - before) == 2, "new workers")
    backend.stop()
    for stream in streams:
        stream.comment()
    backend.start()
    waits(backend, 40)
    backend.publish(ready(replica(echo.port)))
    for stream in streams:
        assert stream.rest().endswith(EVENTS)
    wait_until(lambda: not before & set(gate.workers()), "old workers gone")
    wait_until(lambda: nothing_held(backend), "counts given back")
    assert note(backend)["requests"] == 40


def test_a_killed_worker_ends_no_stream_of_another(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    gate.expected_errors += ["signal 9", "recv() failed"]
    backend.publish(cold())
    streams = [Stream(gate) for _ in range(40)]
    for stream in streams:
        stream.comment()
    waits(backend, 40)
    kept = worker_of(gate, streams[0].local_port)
    [killed] = set(gate.workers()) - {kept}
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: killed not in gate.workers() and len(gate.workers()) == 2, "a new one")
    backend.publish(ready(replica(echo.port)))
    answers = [stream.rest() for stream in streams]
    assert answers[0].endswith(EVENTS)
    # Nothing more came from the killed one.
    assert all(text == b"" or text.endswith(EVENTS) for text in answers)
    wait_until(lambda: nothing_held(backend), "counts given back")


def test_many_streams_are_all_released(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold())
    streams = [Stream(gate, f"/llm/sse/{index}") for index in range(300)]
    for stream in streams:
        stream.comment()
    waits(backend, 300)
    backend.publish(ready(replica(echo.port)))
    for stream in streams:
        assert stream.rest().endswith(EVENTS)
    assert len(set(echo.seen)) == len(echo.seen) == 300
    wait_until(lambda: nothing_held(backend), "counts given back")
    assert note(backend)["requests"] == 300


def test_a_stream_whose_client_is_silent_for_long_counts_no_longer(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold())
    stream = Stream(gate, "/llm/sse/long")
    stream.comment()
    backend.publish(ready(replica(echo.port), max_idle_connection=3))
    wait_until(lambda: backend.replica_note("r1").get("in_flight") == 1, "sent")
    wait_until(lambda: nothing_held(backend), "counts no longer")
    echo.go.set()
    assert stream.rest().endswith(EVENTS)
    told = len(backend.notes)
    wait_until(lambda: len(backend.notes) > told + 3, "told on")
    assert nothing_held(backend)


def test_a_gate_that_was_killed_starts_again(gate: Gate, backend: FakeBackend) -> None:
    backend.publish(cold())
    gate.stop()
    assert (backend.run_dir / "inner.sock").exists()
    gate.start()
    stream = Stream(gate, headers={"Prefer": "wait=3"})
    stream.comment()
    stream.rest()


def test_a_stream_is_sent_again_when_its_replica_breaks_off_before_it_answers(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    gate.expected_errors.append("prematurely closed")
    broken = StreamService()

    def break_off(handler: Any) -> None:
        if handler.path != "/health":
            broken.seen.append(handler.path)
        handler.close_connection = True

    broken.answer = break_off  # type: ignore[method-assign]
    broken.start()
    backend.publish(cold())
    stream = Stream(gate)
    stream.comment()
    backend.publish(ready(replica(broken.port, "bad")))
    wait_until(lambda: broken.seen == ["/sse"], "sent")
    stream.comment()
    backend.publish(ready(replica(echo.port, "good")))
    assert stream.rest().endswith(EVENTS)
    broken.stop()
    wait_until(lambda: nothing_held(backend), "counts given back")


def test_a_warm_stream_whose_replica_broke_off_gets_comment_lines_too(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    gate.expected_errors.append("prematurely closed")
    backend.publish(ready(replica(echo.port, "bad")))
    wait_until(lambda: gate.get("/llm/x").status == 200, "ready")
    body = json.dumps({"text": "x" * 100_000, "stream": True}).encode()
    original = echo.answer

    def break_off(handler: Any) -> None:
        if handler.path == "/health":
            original(handler)
            return
        backend.publish(cold())
        wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "snapshot taken")
        handler.close_connection = True

    echo.answer = break_off  # type: ignore[method-assign]
    stream = Stream(gate, body=body)
    stream.comment()
    echo.answer = original  # type: ignore[method-assign]
    backend.publish(ready(replica(echo.port, "good")))
    digest = hashlib.sha256(body).hexdigest().encode()
    assert stream.rest() == b"data: " + digest + b"\n\n" + EVENTS


def test_bodies_of_streams_that_hear_comment_lines_count_once(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold())
    body = json.dumps({"text": "x" * 2_400_000, "stream": True}).encode()
    streams = [Stream(gate, body=body) for _ in range(3)]
    for stream in streams:
        stream.comment()
    refused = gate.get("/llm/sse", "POST", body)
    assert (refused.status, refused.code) == (429, "too-many-waiting")
    backend.publish(ready(replica(echo.port)))
    for stream in streams:
        assert stream.rest().endswith(EVENTS)
    backend.publish(cold())
    wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "snapshot taken")
    again = Stream(gate, body=body)
    again.comment()
    again.close()


def test_nobody_reaches_the_inner_listeners_ways_from_outside(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    forged = {"X-Slurmgate-Inner": '{"sg_service":"LLM","sg_uri":"/forged","sg_since":"1"}'}
    backend.publish(ready(replica(echo.port)))
    wait_until(lambda: gate.get("/llm/x").status == 200, "ready")
    for path in ("/@inner", "/@hold", "/@relay", "/", "//@hold"):
        assert gate.get(path, "POST", b"", forged).status in (404, 405)
    answer = gate.get("/llm/x", headers=forged)
    assert (answer.json["path"], answer.status) == ("/x", 200)
    assert "x-slurmgate-inner" not in {name.lower() for name in answer.json["headers"]}
    assert answer.headers["X-Slurmgate-Inner"] is None


def test_a_large_stream_reaches_a_client_that_reads_slowly(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold())
    stream = Stream(gate, "/llm/sse/large")
    stream.comment()
    backend.publish(ready(replica(echo.port)))
    wait_until(lambda: stream.response.readline().startswith(b"data: "), "begun")
    told = len(backend.notes)
    wait_until(lambda: len(backend.notes) > told + 3, "time passes")
    assert stream.rest() == LARGE + EVENTS


def test_without_an_inner_listener_a_stream_waits_in_silence(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    gate.expected_errors.append("inner.sock failed")
    backend.publish(cold())
    (backend.run_dir / "inner.sock").unlink()
    began = time.monotonic()
    stream = Stream(gate)
    waits(backend)
    told = len(backend.notes)
    wait_until(lambda: len(backend.notes) > told + 30, "it is given up")
    waits(backend)
    backend.publish(ready(replica(echo.port)))
    assert stream.rest().endswith(EVENTS)
    assert stream.response.headers["X-Slurmgate-Replica"] == "r1"
    waited = float(stream.response.headers["X-Slurmgate-Waited"])
    assert HEARTBEAT_S <= waited <= time.monotonic() - began
    wait_until(lambda: nothing_held(backend), "counts given back")


TOKEN = "sg-" + "a" * 43


def keyed(backend: FakeBackend) -> dict[str, Any]:
    use = backend.notes[-1].get("key_use") if backend.notes else None
    return dict((use or {}).get("anna", {}))


def test_a_key_is_counted_once_and_a_revoked_one_ends_the_wait(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish_keys(key(TOKEN, in_flight=1))
    backend.publish(cold())
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    auth = {"Authorization": f"Bearer {TOKEN}"}
    stream = Stream(gate, headers=auth)
    stream.comment()
    stream.comment()
    wait_until(lambda: keyed(backend).get("in_flight") == 1, "counted")
    assert keyed(backend)["requests"] == 1
    assert gate.get("/llm/x", headers=auth).code == "too-many-in-flight"
    backend.publish(ready(replica(echo.port)))
    assert stream.rest().endswith(EVENTS)
    assert echo.headers[0]["X-Slurmgate-User"] == "anna"
    assert "Authorization" not in echo.headers[0]
    wait_until(lambda: keyed(backend).get("in_flight") == 0, "given back")
    backend.publish(cold())
    wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "snapshot taken")
    stream = Stream(gate, headers=auth)
    stream.comment()
    backend.publish_keys()
    assert error_of(stream.rest())["error"]["code"] == "unauthorized"
    wait_until(lambda: nothing_held(backend), "counts given back")


def _request(client: socket.socket) -> bytes:
    """All of a request, which comes in pieces."""
    with client.makefile("rb") as file:
        head = b"".join(iter(file.readline, b"\r\n")) + b"\r\n"
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)\r\n", head)
        return head + file.read(int(length.group(1)) if length else 0)


class ImpatientProxy:
    """Passes bytes on between one client and the gate, and cuts both off after a silence."""

    def __init__(self, target: int, limit_s: float) -> None:
        self._target, self._limit_s = target, limit_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        gate = socket.create_connection(("127.0.0.1", self._target))
        gate.settimeout(self._limit_s)
        with client, gate:
            gate.sendall(_request(client))
            with contextlib.suppress(TimeoutError):
                while data := gate.recv(65536):
                    client.sendall(data)

    def close(self) -> None:
        self._thread.join()
        self._listener.close()


def test_a_proxy_that_cuts_silent_connections_is_kept_awake(
    gate: Gate, backend: FakeBackend, echo: StreamService
) -> None:
    backend.publish(cold())
    limit_s = 15 * HEARTBEAT_S
    proxy = ImpatientProxy(gate.port, limit_s)
    began = time.monotonic()
    stream = Stream(gate, port=proxy.port)
    while time.monotonic() < began + 2 * limit_s:
        stream.comment()
    backend.publish(ready(replica(echo.port)))
    assert stream.rest().endswith(EVENTS)
    proxy.close()
