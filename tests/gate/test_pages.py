"""Routing, the gate's own pages and what it refuses, with a fake backend."""

from __future__ import annotations

import json
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection

import pytest

from tests.gate.harness import EchoService, FakeBackend, Gate, replica, service, wait_until


@pytest.fixture
def ready(gate: Gate, backend: FakeBackend, echo: EchoService) -> Gate:
    """A gate with one ready service."""
    backend.publish(
        service(state="ready", replicas=[replica(echo.port)]),
        service("API", api_paths=["/v1"]),
    )
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    return gate


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/nothing/x", 404, "no-such-route"),
        ("/api/v2", 404, "path-not-allowed"),
        ("/llm/../info", 400, "bad-path"),
        ("/llm/%2e%2e/info", 400, "bad-path"),
        ("/llm/a%2fb", 400, "bad-path"),
        ("/llm/%00", 400, "bad-path"),
        ("/../x", 400, "bad-path"),
        ("/llm/%zz", 400, "bad-path"),
    ],
)
def test_refused_paths(ready: Gate, path: str, status: int, code: str) -> None:
    answer = ready.get(path)
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["X-Slurmgate-Service"] is None


def test_path_and_query_reach_the_service_byte_for_byte(ready: Gate) -> None:
    for path in ("/a%20b//c;d?x=%2e%2e/../y&z", "/", "/?q", "/%41%c3%a9"):
        assert ready.get("/llm" + path).json["path"] == path
    assert ready.get("/llm").json["path"] == "/"
    assert ready.get("/llm?a=1").json["path"] == "/?a=1"


def test_headers_to_the_service_and_back(ready: Gate) -> None:
    answer = ready.get("/llm/x", headers={"Host": "me:1", "X-Request-Id": "mine", "X-Own": "1"})
    sent = answer.json["headers"]
    assert sent["Host"] == "me:1"
    assert sent["X-Own"] == "1"
    assert sent["X-Forwarded-For"] == "127.0.0.1"
    assert sent["X-Forwarded-Host"] == "me:1"
    assert sent["X-Request-Id"] == "mine"
    assert answer.headers["X-Request-Id"] == "mine"
    assert answer.headers["X-Slurmgate-Waited"] == "0.000"
    made = ready.get("/llm/x", headers={"X-Request-Id": "x" * 129})
    assert made.headers["X-Request-Id"] == made.json["headers"]["X-Request-Id"]
    assert len(made.headers["X-Request-Id"]) < 100


def test_a_request_without_host_reaches_the_service_with_the_address_asked(ready: Gate) -> None:
    answer = ready.raw(b"GET /llm/x HTTP/1.0\r\n\r\n")
    sent = json.loads(answer.partition(b"\r\n\r\n")[2])["headers"]
    assert sent["Host"] == f"127.0.0.1:{ready.port}"
    assert sent["X-Forwarded-Host"] == f"127.0.0.1:{ready.port}"
    named = ready.raw(b"GET http://b/llm/x HTTP/1.0\r\n\r\n")
    assert json.loads(named.partition(b"\r\n\r\n")[2])["headers"]["Host"] == "b"


def test_answer_headers_of_64_kb_pass(ready: Gate) -> None:
    assert len(ready.get("/llm/header/65000").headers["X-Long"]) == 65000


def test_a_refused_body_is_not_taken_for_the_next_request(ready: Gate) -> None:
    connection = HTTPConnection("127.0.0.1", ready.port, timeout=10)
    inner = b"GET /llm/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    for _ in range(3):
        connection.request("POST", "/nothing", inner)
        answer = connection.getresponse()
        assert (answer.status, answer.read()[:1]) == (404, b"{")
    connection.request("GET", "/llm/x")
    assert json.loads(connection.getresponse().read())["path"] == "/x"
    connection.close()


def test_problems_under_v1_have_the_openai_shape(ready: Gate) -> None:
    for path in ("/v1", "/v1/chat/completions"):
        answer = ready.get(path, "POST", b"{}")
        assert answer.status == 400
        assert answer.json["error"]["code"] == "bad-body"


def test_a_head_request_has_no_body(ready: Gate) -> None:
    answer = ready.get("/nothing", "HEAD")
    assert (answer.status, answer.body) == (404, b"")


def test_pages_come_from_the_backend_and_are_kept_for_a_moment(
    ready: Gate, backend: FakeBackend
) -> None:
    backend.pages["/info"] = (200, '{"a": 1}')
    with ThreadPoolExecutor(20) as pool:
        headers = {"X-Slurmgate-Private": "0"}
        answers = [pool.submit(ready.get, "/info", headers=headers) for _ in range(50)]
        assert {one.result().body for one in answers} == {b'{"a": 1}'}
    calls = [call for call in backend.calls if call[1] == "/info"]
    assert len(calls) <= 10
    assert {call[2]["X-Slurmgate-Private"] for call in calls} == {"1"}


def info_calls(backend: FakeBackend) -> int:
    return sum(call[1] == "/info" for call in backend.calls)


def test_a_page_is_fetched_by_its_path_alone(ready: Gate, backend: FakeBackend) -> None:
    backend.pages["/info"] = (200, "{}")
    assert {ready.get(f"/info?{i}").status for i in range(20)} == {200}
    assert {call[1] for call in backend.calls} == {"/info"}
    assert info_calls(backend) <= 5


def test_info_shows_what_was_answered_before(ready: Gate, backend: FakeBackend) -> None:
    def show_counts(method: str, path: str) -> None:
        backend.pages["/info"] = (200, json.dumps(backend.service_note("LLM")))

    backend.on_call = show_counts
    for number in range(1, 9):
        assert ready.get("/llm/x").status == 200
        shown = ready.get("/info").json
        assert (shown["requests"], shown["waiting"]) == (number, 0)
        # The count of a request ends behind its last byte.
        wait_until(lambda: ready.get("/info").json["in_flight"] == 0, "none in flight")
    assert info_calls(backend) <= 20


def is_known(gate: Gate, route: str) -> bool:
    return gate.get(route, "OPTIONS").code == "not-running"


def test_info_is_fresh_when_there_is_another_snapshot(ready: Gate, backend: FakeBackend) -> None:
    backend.pages["/info"] = (200, "1")
    for number in range(2, 5):
        ready.get("/info")
        backend.pages["/info"] = (200, str(number))
        backend.publish(service(f"R{number}"))
        route = f"/r{number}/x"
        wait_until(partial(is_known, ready, route), "snapshot taken")
        assert ready.get("/info").json == number


def test_info_is_fresh_after_an_admin_call(ready: Gate, backend: FakeBackend) -> None:
    backend.pages["/admin/reload"] = (200, "{}")
    backend.pages["/info"] = (200, "0")
    for number in range(1, 6):
        ready.get("/info")
        backend.pages["/info"] = (200, str(number))
        assert ready.get("/admin/reload", "POST").status == 200
        assert ready.get("/info").json == number


def test_a_client_that_leaves_takes_no_page_with_it(ready: Gate, backend: FakeBackend) -> None:
    backend.pages["/info"] = (200, "{}")
    goes_on = threading.Event()
    backend.on_call = lambda method, path: (goes_on.wait(20), None)[1]
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", ready.port)) as sock:
            sock.sendall(b"GET /info HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: backend.calls, "fetch begun")
    goes_on.set()
    assert ready.get("/info").status == 200


@pytest.mark.parametrize("reloaded", [False, True], ids=["", "and the gate is reloaded"])
def test_the_backend_is_told_often_while_an_admin_call_is_under_way(
    ready: Gate, backend: FakeBackend, reloaded: bool
) -> None:
    backend.pages["/admin/reload"] = (200, "{}")

    took: list[float] = []

    def wait_for_gate(method: str, path: str) -> None:
        # As the real one: its answer waits until the gate has the new snapshot.
        before = set(ready.workers())
        if reloaded:
            ready.reload()
            wait_until(lambda: not before <= set(ready.workers()), "new workers")
            wait_until(lambda: len(before & set(ready.workers())) == 1, "one old worker stays")
        for number in range(10):
            began = time.monotonic()
            backend.publish(service(max_waiting=number + 1))
            wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "snapshot taken")
            took.append(time.monotonic() - began)

    backend.on_call = wait_for_gate
    assert ready.get("/admin/reload", "POST").status == 200
    # At rest it is told every second. A machine that stands still delays some of them, not most.
    assert len(took) == 10
    assert statistics.median(took) < 0.2, took


def test_admin_calls_are_passed_on_and_get_changes_nothing(
    ready: Gate, backend: FakeBackend
) -> None:
    backend.pages["/admin/reload"] = (200, "{}")
    refused = ready.get("/admin/reload")
    assert (refused.status, refused.code) == (405, "method-not-allowed")
    assert refused.headers["Allow"] == "POST"
    assert backend.calls == []
    token = {"Authorization": "Bearer x", "X-Slurmgate-Private": "0"}
    assert ready.get("/admin/reload", "POST", b"", token).status == 200
    method, path, headers = backend.calls[-1]
    assert (method, path) == ("POST", "/admin/reload")
    assert headers["Authorization"] == "Bearer x"
    assert headers["X-Slurmgate-Private"] == "1"
    assert ready.get("/admin/reload", "POST", b"x" * 70_000).code == "body-too-large"


def test_without_a_backend_its_pages_are_away_and_services_go_on(
    ready: Gate, backend: FakeBackend
) -> None:
    ready.expected_errors += ["control.sock", "api.sock", "context: ngx.timer"]
    backend.stop()
    for method, path in (("GET", "/info"), ("POST", "/admin/reload")):
        answer = ready.get(path, method)
        assert (answer.status, answer.code) == (503, "backend-away")
        assert answer.headers["Retry-After"] == "1"
    assert ready.get("/llm/x").status == 200
    assert ready.get("/healthz").status == 200


def test_requests_nginx_itself_refuses_are_problems(ready: Gate) -> None:
    assert b"problem+json" in ready.raw(b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
    long = ready.raw(b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert long.startswith(b"HTTP/1.1 414")
    assert b"uri-too-long" in long
    headers = ready.raw(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n")
    assert b"headers-too-large" in headers


def logged(gate: Gate, count: int) -> list[dict]:
    """Lines of the access log about a test's own requests, once there are so many."""

    def read() -> list[dict]:
        text = (gate.folder / "access.log").read_bytes().decode()
        assert "secret" not in text
        whole = text[: text.rfind("\n") + 1].splitlines()
        lines = [json.loads(line) for line in whole]
        return [line for line in lines if line["path"] != "/readyz"]

    wait_until(lambda: len(read()) >= count, "log written")
    return read()


def test_the_access_log_has_json_lines_without_queries(ready: Gate) -> None:
    ready.get("/nothing?secret")
    ready.raw(b"GET /llm/../y?secret HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    ready.raw(b"nonsense\r\n\r\n")
    ready.get("/llm/x?secret")
    lines = logged(ready, 4)
    served = next(line for line in lines if line["path"] == "/llm/x")
    assert (served["status"], served["service"], served["replica"]) == (200, "LLM", "r1")
    assert (served["waited"], served["tries"], served["method"]) == (0, 1, "GET")
    refused = next(line for line in lines if line["path"] == "/nothing")
    assert (refused["waited"], refused["tries"]) == (0, 0)


REST = b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "method", "path", "status"),
    [
        (
            b"POST /llm/a/../b?secret" + REST + b"Content-Length: 0\r\n\r\n",
            "POST",
            "/llm/a/../b",
            400,
        ),
        (b"GET http://a/llm//a%20b?secret" + REST + b"\r\n", "GET", "/llm//a%20b", 200),
        (b"GET /llm/\xc3\xa9\xff?secret\xff" + REST + b"\r\n", "GET", "/llm/%C3%A9%FF", 200),
        (b"GET /llm/x?secret\xff" + REST + b"\r\n", "GET", "/llm/x", 200),
        (b"POST /llm/%zz?secret" + REST + b"\r\n", "POST", "/llm/%zz", 400),
        (b"PUT /llm/\xff%zz?secret" + REST + b"\r\n", "PUT", "/llm/%FF%zz", 400),
        (
            b"POST /admin/x?secret" + REST + b"Content-Length: 70000\r\n\r\n",
            "POST",
            "/admin/x",
            413,
        ),
        (
            b"POST /llm/x?secret" + REST + b"X: " + b"x" * 70_000 + b"\r\n\r\n",
            "POST",
            "/llm/x",
            431,
        ),
        (b"TRACE /llm/x?secret" + REST + b"\r\n", "TRACE", "/llm/x", 405),
        (b"POST /llm/x?secret" + REST + b"Content-Length: -1\r\n\r\n", "POST", "/llm/x", 400),
        (b"POST /llm/" + b"x" * 70_000 + REST + b"\r\n", "POST", None, 414),
        (b"\xff\xfe /\xff" + REST + b"\r\n", None, None, 400),
    ],
)
def test_the_access_log_has_method_and_path_as_they_came(
    ready: Gate, request_bytes: bytes, method: str | None, path: str | None, status: int
) -> None:
    ready.raw(request_bytes)
    line = logged(ready, 1)[0]
    assert line["status"] == status
    if method is not None:
        assert line["method"] == method
    if path is not None:
        assert line["path"] == path
