"""What stands between clients and services: proxies, hops, slow clients, TLS, other origins' pages,
silent connections, and what outsiders learn."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from slurmgate.errors import ConfigError
from slurmgate.model import GateSpec
from slurmgate.nginx import render
from tests.gate.harness import (
    Answer,
    EchoService,
    FakeBackend,
    Gate,
    key,
    replica,
    service,
    wait_until,
)
from tests.gate.small_service import Services, SmallService
from tests.gate.test_transport import make_certificate, paths

PAGE = "https://app.example"
OTHER = "https://evil.example"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}
SILENT_S = 2.0  # so long that the backend is told meanwhile, on a busy machine too
TOKEN = "sg-" + "a" * 43


@pytest.fixture
def services() -> Iterator[Services]:
    running = Services()
    yield running
    running.stop()


@contextlib.contextmanager
def running(folder: Path, spec: GateSpec, backend: FakeBackend) -> Iterator[Gate]:
    gate = Gate(folder, spec, backend)
    gate.start()
    try:
        yield gate
    finally:
        gate.stop()
    assert gate.error_lines() == []


@pytest.fixture
def behind_proxy(
    folder: Path, gate_spec: GateSpec, backend: FakeBackend, echo: EchoService
) -> Iterator[Gate]:
    """A gate that trusts this machine as a proxy, and tells nobody on it anything private."""
    spec = replace(gate_spec, trusted_proxies=("127.0.0.0/8",), private=("10.0.0.0/8",))
    with running(folder, spec, backend) as gate:
        serve(backend, gate, echo)
        yield gate


@pytest.fixture
def open_to_page(
    folder: Path, gate_spec: GateSpec, backend: FakeBackend, echo: EchoService
) -> Iterator[Gate]:
    with running(folder, replace(gate_spec, cors=(PAGE,), service_cors=True), backend) as gate:
        yield gate


def serve(backend: FakeBackend, gate: Gate, echo: EchoService, **changes: Any) -> None:
    backend.publish(service(**{"state": "ready", "replicas": [replica(echo.port)], **changes}))
    wait_until(lambda: gate.get("/llm/first").status == 200, "warm")


def received(answer: Answer) -> dict[str, str]:
    """The header as it reached the service."""
    assert answer.status == 200, answer.body
    return dict(answer.json["headers"])


def rewrite(gate: Gate, old: str, new: str) -> None:
    """Run the gate with another value than the product's, which a test would wait for too long."""
    text = gate.conf.read_text()
    assert old in text
    gate.conf.write_text(text.replace(old, new))
    before = set(gate.workers())
    gate.reload()
    wait_until(lambda: not before & set(gate.workers()), "new workers")


# Proxies --------------------------------------------------------------------------------------


def test_a_client_cannot_say_who_it_is(gate: Gate, backend: FakeBackend, echo: EchoService) -> None:
    serve(backend, gate, echo)
    forged = {
        "X-Forwarded-For": "8.8.8.8",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "elsewhere",
        "Forwarded": "for=8.8.8.8;proto=https",
        "X-Real-IP": "8.8.8.8",
        "Host": "gate.example",
    }
    got = received(gate.get("/llm/x", headers=forged))
    assert got["X-Forwarded-For"] == "127.0.0.1"
    assert got["X-Forwarded-Proto"] == "http"
    assert got["X-Forwarded-Host"] == "gate.example"
    assert "Forwarded" not in got


WAY_HERE = {"X-Forwarded-Port": "1", "x-forwarded-prefix": "/evil", "X-Forwarded-User": "root"}


def test_what_only_a_proxy_may_say_is_taken_from_others(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    serve(backend, gate, echo)
    others = {"X-Forwarded": "1", "X-Forward-Port": "2"}
    got = received(gate.get("/llm/x", headers={**WAY_HERE, **others}))
    assert not {name.lower() for name in WAY_HERE} & {name.lower() for name in got}
    assert {name: got[name] for name in others} == others


def test_what_a_trusted_proxy_says_besides_is_passed_on(behind_proxy: Gate) -> None:
    got = received(behind_proxy.get("/llm/x", headers=WAY_HERE))
    assert {name: got.get(name) for name in WAY_HERE} == WAY_HERE


def test_a_trusted_proxy_is_believed(behind_proxy: Gate) -> None:
    said = {
        "X-Forwarded-For": "10.9.9.9, 198.51.100.7, 127.0.0.9",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "llm.example:443",
    }
    got = received(behind_proxy.get("/llm/x", headers=said))
    # The last one that is no proxy: what stands before it was said by the client.
    assert got["X-Forwarded-For"] == "198.51.100.7"
    assert got["X-Forwarded-Proto"] == "https"
    assert got["X-Forwarded-Host"] == "llm.example:443"
    log = behind_proxy.folder / "access.log"
    wait_until(lambda: '"client":"198.51.100.7"' in log.read_text(), "logged")


@pytest.mark.parametrize("said", ["gopher", "https, http", "", "HTTPS\tx"])
def test_a_proxy_that_talks_nonsense_is_not_believed(behind_proxy: Gate, said: str) -> None:
    got = received(
        behind_proxy.get("/llm/x", headers={"X-Forwarded-Proto": said, "X-Forwarded-Host": "a b/"})
    )
    assert got["X-Forwarded-Proto"] == "http"
    assert got["X-Forwarded-Host"] == got["Host"]


def test_what_is_private_depends_on_the_client_behind_the_proxy(
    behind_proxy: Gate, backend: FakeBackend
) -> None:
    backend.pages["/metrics"] = (200, "up 1\n")
    assert behind_proxy.get("/metrics", headers={"X-Forwarded-For": "10.1.1.1"}).status == 200
    for client in ("198.51.100.7", "10.1.1.1, 198.51.100.7", "nonsense"):
        answer = behind_proxy.get("/metrics", headers={"X-Forwarded-For": client})
        assert (answer.status, answer.code) == (403, "forbidden")


def test_networks_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gate\.trusted_proxies"):
        render(GateSpec(trusted_proxies=("10.0.0.0/8; evil",)), paths(tmp_path))


# Hops -----------------------------------------------------------------------------------------


def test_headers_of_this_hop_go_no_further(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    serve(backend, gate, echo)
    text = gate.raw(
        b"GET /llm/x HTTP/1.1\r\nHost: a\r\nConnection: close, X-Hop\r\nConnection: x-second\r\n"
        b"X-Hop: 1\r\nX-Second: 2\r\nKeep-Alive: 9\r\nTE: trailers\r\nTrailer: X\r\n"
        b"Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic eA==\r\n"
        b"HTTP2-Settings: AAMAAABkAAQ\r\nX-Stays: 3\r\n\r\n"
    )
    got = {name.lower() for name in json.loads(text.partition(b"\r\n\r\n")[2])["headers"]}
    assert got == {
        "host",
        "x-forwarded-for",
        "x-forwarded-proto",
        "x-forwarded-host",
        "x-request-id",
        "x-stays",
    }


@pytest.mark.parametrize(
    ("connection", "upgrade"),
    [("Upgrade, HTTP2-Settings", "h2c"), ("Upgrade", "x"), ("close", "websocket")],
)
def test_only_a_websocket_changes_the_protocol(
    gate: Gate, backend: FakeBackend, echo: EchoService, connection: str, upgrade: str
) -> None:
    serve(backend, gate, echo)
    got = received(gate.get("/llm/x", headers={"Connection": connection, "Upgrade": upgrade}))
    assert "Upgrade" not in got
    assert "Connection" not in got


def test_no_header_of_the_gates_own_comes_from_a_client(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    serve(backend, gate, echo)
    forged = {
        f"{prefix}{name}": "root"
        for prefix in ("X-Slurmgate-", "x-slurmgate-", "X-SLURMGATE-")
        for name in ("User", "Private", "Inner", "Service", "Whatever")
    }
    got = received(gate.get("/llm/x", headers=forged))
    assert not [name for name in got if name.lower().startswith("x-slurmgate")]


def test_a_refused_request_ends_its_connection(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    serve(backend, gate, echo)
    echo.seen.clear()
    text = gate.raw(
        b"GET /llm/x HTTP/1.1\r\nHost: a\nX: b\r\n\r\nGET /llm/second HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    assert text.startswith(b"HTTP/1.1 400 ")
    assert text.count(b"HTTP/1.1 ") == 1
    assert echo.seen == []


def test_ordinary_clients_are_not_refused(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    serve(backend, gate, echo)
    for head in (
        b"User-Agent: x\r\nAccept: */*\r\nHost: a:8080\r\nConnection: keep-alive",
        b"Host: A.Example.\r\nAccept:\r\nX-Empty:   \r\nX-Blanks: a \t \r\nX_Under_Score: 1",
        b"Host: [::1]:8080\r\nCookie: a=b; c=d\r\nCookie: e=f\r\nX-Utf8: \xc3\xa9",
        b"Host: a\r\nX-Long: " + b"y" * 60_000 + b"\r\nX-Short: z",
    ):
        text = gate.raw(b"GET /llm/x?q=1 HTTP/1.1\r\n" + head + b"\r\nConnection: close\r\n\r\n")
        assert text.startswith(b"HTTP/1.1 200 "), (head[:60], text)


def test_connection_names_no_more_headers_than_any_client_has_use_for(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    serve(backend, gate, echo)
    for count, lines, status in ((45, 1, 200), (60, 1, 400), (60, 3, 400), (9_000, 1, 400)):
        words = [b"x-%d" % (i % 9) for i in range(count)]
        parts = [b"Connection: " + b",".join(words[i::lines]) + b"\r\n" for i in range(lines)]
        text = gate.raw(
            b"GET /llm/x HTTP/1.1\r\nHost: a\r\n" + b"".join(parts) + b"Connection: close\r\n\r\n"
        )
        assert text.startswith(b"HTTP/1.1 %d " % status), (count, lines, text[:100])


# Slow clients ---------------------------------------------------------------------------------


def test_slow_clients_are_cut_off_and_held_ones_are_not(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    serve(backend, gate, echo)
    for name in ("client_header_timeout 20s", "client_body_timeout 30s"):
        rewrite(gate, name, name.split()[0] + " 1s")
    with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as sock:
        sock.sendall(b"GET /llm/x HTTP/1.1\r\nHost: a\r\nX-Slow")
        assert sock.recv(1000) == b""
    backend.publish(service())
    wait_until(lambda: gate.get("/llm/x", headers={"Prefer": "wait=0"}).status == 503, "cold")
    with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as slow:
        slow.sendall(b"POST /llm/slow HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx")
        with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as held:
            held.sendall(b"POST /llm/held HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
            answer = slow.recv(10_000)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
            wait_until(lambda: backend.service_note("LLM")["waiting"] == 1, "one is still held")
            backend.publish(service(state="ready", replicas=[replica(echo.port)]))
            assert held.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert "/slow" not in echo.seen


def test_a_client_that_does_not_read_is_let_go(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    (one,) = services.start(1)
    backend.publish(service(state="ready", replicas=[one.entry()]))
    wait_until(lambda: gate.get("/llm/first").status == 200, "warm")
    rewrite(gate, "send_timeout 60s", "send_timeout 3s")
    gate.expected_errors.append("timed out")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.connect(("127.0.0.1", gate.port))
        sock.sendall(b"GET /llm/flood HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: backend.service_note("LLM").get("in_flight") == 1, "in flight")
        wait_until(lambda: backend.service_note("LLM").get("in_flight") == 0, "let go")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"POST /llm/x HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + b"X: y\r\n" * 300 + b"\r\n", 431),
        (b"GET /llm/x HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /llm/" + b"y" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    ],
)
def test_what_is_too_large_is_refused(
    folder: Path, gate_spec: GateSpec, backend: FakeBackend, raw: bytes, status: int
) -> None:
    gate = Gate(folder, replace(gate_spec, max_body=1_000_000), backend)
    gate.expected_errors.append("client intended to send too large")
    gate.start()
    try:
        backend.publish(service())
        wait_until(lambda: gate.get("/readyz").status == 200, "ready")
        text = gate.raw(raw)
    finally:
        gate.stop()
    assert text.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(text.partition(b"\r\n\r\n")[2])["status"] == status
    assert gate.error_lines() == []


# TLS ------------------------------------------------------------------------------------------


def handshake(port: int, **limits: Any) -> tuple[str, str, bool, bytes]:
    """Version, cipher, whether there is a ticket, and the certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for name, value in limits.items():
        if name == "ciphers":
            context.set_ciphers(value)
        else:
            setattr(context, name, value)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain) as sock,
    ):
        cipher = sock.cipher()
        session = sock.session
        certificate = sock.getpeercert(binary_form=True)
        assert cipher is not None
        assert certificate is not None
        return cipher[1], cipher[0], bool(session and session.has_ticket), certificate


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_is_modern_and_its_certificate_is_exchanged_without_a_reload(
    folder: Path, gate_spec: GateSpec, backend: FakeBackend
) -> None:
    spec = replace(gate_spec, tls=make_certificate(folder))
    gate = Gate(folder, spec, backend)
    gate.start()
    try:
        backend.publish(service())
        old = ssl.TLSVersion.TLSv1_2
        version, _, _, first = handshake(gate.port)
        assert version == "TLSv1.3"
        _, cipher, ticket, _ = handshake(gate.port, maximum_version=old)
        assert "GCM" in cipher or "POLY1305" in cipher
        assert not ticket
        for limits in (
            {"minimum_version": ssl.TLSVersion.TLSv1, "maximum_version": ssl.TLSVersion.TLSv1_1},
            {"maximum_version": old, "ciphers": "ECDHE-RSA-AES128-SHA256:AES128-GCM-SHA256"},
        ):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                handshake(gate.port, **limits)
        workers = gate.workers()
        make_certificate(folder)
        assert handshake(gate.port)[3] != first
        assert gate.workers() == workers
    finally:
        gate.stop()


def ask_h2(gate: Gate, *headers: tuple[str, str]) -> tuple[dict[str, str], bytes]:
    """One request over HTTP/2 with these headers, whatever the rules say; header and body."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", gate.port), timeout=10) as plain,
        context.wrap_socket(plain) as sock,
    ):
        connection = h2.connection.H2Connection(
            h2.config.H2Configuration(
                header_encoding="latin-1",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        connection.initiate_connection()
        start = [(":method", "GET"), (":scheme", "https"), (":path", "/llm/x")]
        connection.send_headers(1, [*start, (":authority", "a"), *headers], end_stream=True)
        sock.sendall(connection.data_to_send())
        got: dict[str, str] = {}
        body = b""
        while part := sock.recv(65536):
            for event in connection.receive_data(part):
                if isinstance(event, h2.events.ResponseReceived):
                    got.update((str(name), str(value)) for name, value in event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data
                elif isinstance(event, h2.events.StreamEnded):
                    return got, body
                elif isinstance(event, h2.events.StreamReset):
                    return {":status": "reset"}, body
        return got, body


def test_http2_has_no_headers_of_a_connection(
    folder: Path, gate_spec: GateSpec, backend: FakeBackend, echo: EchoService
) -> None:
    spec = replace(gate_spec, tls=make_certificate(folder))
    gate = Gate(folder, spec, backend)
    gate.start()
    try:
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        wait_until(lambda: ask_h2(gate)[0][":status"] == "200", "warm")
        _, body = ask_h2(gate, ("x-slurmgate-user", "root"), ("te", "trailers"), ("x-stays", "1"))
        names = {name.lower() for name in json.loads(body)["headers"]}
        assert "x-stays" in names
        assert not names & {"x-slurmgate-user", "te", "connection"}
        for bad in (
            [("transfer-encoding", "chunked")],
            [("connection", "x-stays")],
            [("host", "b")],
            [("x-api-key", "a"), ("x-api-key", "b")],
            [("content-length", "5")],
            [("x-a", "b\r\nx-c: d")],
            [("x-a", "b\0c")],
            [("X-A", "b")],
        ):
            assert ask_h2(gate, *bad)[0].get(":status") in ("400", "reset", None), bad
    finally:
        gate.stop()
    assert gate.error_lines() == []


# Other origins' pages -------------------------------------------------------------------------


def allowed(answer: Answer) -> str | None:
    values = answer.headers.get_all("Access-Control-Allow-Origin") or []
    assert len(values) <= 1, values
    return values[0] if values else None


@pytest.mark.parametrize("path", ["/llm/x", "/v1/chat/completions", "/v1/models"])
def test_a_preflight_is_answered_by_the_gate_and_wakes_nothing(
    open_to_page: Gate, backend: FakeBackend, path: str
) -> None:
    backend.publish(service())
    wait_until(lambda: open_to_page.get("/readyz").status == 200, "ready")
    good = open_to_page.get(path, "OPTIONS", headers={"Origin": PAGE, **PREFLIGHT})
    assert (good.status, good.body, allowed(good)) == (204, b"", PAGE)
    assert "POST" in good.headers["Access-Control-Allow-Methods"]
    assert good.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
    assert "Origin" in good.headers["Vary"]
    bad = open_to_page.get(path, "OPTIONS", headers={"Origin": OTHER, **PREFLIGHT})
    assert (bad.status, allowed(bad)) == (204, None)
    assert "Access-Control-Allow-Methods" not in bad.headers
    assert not any(note["services"] for note in backend.notes)


def test_answers_say_who_may_read_them(
    open_to_page: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    serve(backend, open_to_page, echo)
    answer = open_to_page.get("/llm/x", headers={"Origin": PAGE})
    assert allowed(answer) == PAGE
    assert "X-Slurmgate-Service" in answer.headers["Access-Control-Expose-Headers"]
    assert "Origin" in answer.headers["Vary"]
    assert "Origin" not in received(answer)
    for headers in ({"Origin": OTHER}, {}):
        closed = open_to_page.get("/llm/x", headers=headers)
        assert allowed(closed) is None
        assert "Origin" in closed.headers["Vary"]
        assert "Origin" not in received(closed)
    for path in ("/none/x", "/llm/%2f", "/v1/none"):
        refused = open_to_page.get(path, headers={"Origin": PAGE})
        assert refused.status >= 400
        assert allowed(refused) == PAGE


def test_a_service_may_have_its_own_list(
    open_to_page: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    serve(backend, open_to_page, echo, cors=[OTHER])
    assert allowed(open_to_page.get("/llm/x", headers={"Origin": OTHER})) == OTHER
    assert allowed(open_to_page.get("/llm/x", headers={"Origin": PAGE})) is None
    serve(backend, open_to_page, echo, cors=["*"])
    wait_until(
        lambda: allowed(open_to_page.get("/llm/x", headers={"Origin": PAGE})) == "*", "any origin"
    )


@pytest.mark.parametrize("own", [None, []])
def test_a_services_list_does_not_open_another_that_is_found_by_model(
    folder: Path,
    gate_spec: GateSpec,
    backend: FakeBackend,
    echo: EchoService,
    own: list[str] | None,
) -> None:
    backend.publish_keys(key(TOKEN))
    ready: dict[str, Any] = {"state": "ready", "replicas": [replica(echo.port)]}
    backend.publish(
        service("Open", models=["open"], cors=[PAGE], **ready),
        service(models=["m"], cors=own, **ready),
    )
    headers = {"Origin": PAGE, "X-Api-Key": TOKEN}
    closed = b'{"model": "m"}'
    with running(folder, replace(gate_spec, service_cors=True), backend) as gate:
        wait_until(lambda: gate.get("/llm/x").status == 401, "keys are asked for")
        for path in ("/llm/x", "/v1/x"):
            answer = gate.get(path, "POST", closed, headers)
            assert (answer.status, allowed(answer)) == (200, None), path
        answer = gate.get("/v1/x", "POST", b'{"model": "open"}', headers)
        assert (answer.status, allowed(answer)) == (200, PAGE)
        # Only who may use a service learns that there is one, and that it is closed to the page.
        assert gate.get("/v1/x", "POST", closed, {"Origin": PAGE}).status == 401


def test_without_a_list_origins_are_the_services_business(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    serve(backend, gate, echo)
    answer = gate.get("/llm/x", headers={"Origin": PAGE})
    assert received(answer)["Origin"] == PAGE
    assert "Vary" not in answer.headers
    assert received(gate.get("/llm/x", "OPTIONS", headers={"Origin": PAGE, **PREFLIGHT}))


# Silent connections ---------------------------------------------------------------------------


def in_flight(backend: FakeBackend) -> tuple[int | None, int | None]:
    """On the service and on its replica."""
    of_service: int | None = backend.service_note("LLM").get("in_flight")
    of_replica: int | None = backend.replica_note("r1").get("in_flight")
    return of_service, of_replica


def begin_long(gate: Gate, backend: FakeBackend, path: str, *lines: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", gate.port), timeout=20)
    sock.sendall(
        b"\r\n".join([b"GET /llm/%s HTTP/1.1" % path.encode(), b"Host: a", *lines, b"", b""])
    )
    assert sock.recv(1000).startswith(b"HTTP/1.1 ")
    return sock


def start_one(gate: Gate, backend: FakeBackend, services: Services, limit: float) -> SmallService:
    (one,) = services.start(1)
    backend.publish(service(state="ready", replicas=[one.entry()], max_idle_connection=limit))
    wait_until(lambda: gate.get("/llm/first").status == 200, "warm")
    wait_until(lambda: in_flight(backend) == (0, 0), "at rest")
    return one


UPGRADE = (b"Connection: Upgrade", b"Upgrade: websocket")


def test_a_silent_websocket_counts_no_longer_until_its_client_is_heard_of(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    start_one(gate, backend, services, SILENT_S)
    with begin_long(gate, backend, "upgrade", *UPGRADE) as sock:
        wait_until(lambda: in_flight(backend) == (1, 1), "counted")
        for _ in range(2):
            wait_until(lambda: in_flight(backend) == (0, 0), "silent")
            sock.sendall(b"x")
            wait_until(lambda: in_flight(backend) == (1, 1), "heard of")
        wait_until(lambda: in_flight(backend) == (0, 0), "silent again")
        assert sock.recv(1000), "and the service still writes"
    with begin_long(gate, backend, "upgrade", *UPGRADE):
        wait_until(lambda: in_flight(backend) == (1, 1), "nothing was given back twice")
    wait_until(lambda: in_flight(backend) == (0, 0), "given back")


def test_an_event_stream_counts_so_long_and_other_answers_for_ever(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    one = start_one(gate, backend, services, SILENT_S)
    with (
        begin_long(gate, backend, "stream", b"X-A: b"),
        begin_long(gate, backend, "events", b"X-A: b"),
    ):
        wait_until(lambda: in_flight(backend) == (2, 2), "both count")
        wait_until(lambda: in_flight(backend) == (1, 1), "one does")
        one.released = True
        wait_until(lambda: in_flight(backend) == (0, 0), "both have ended")
    assert gate.get("/llm/x").status == 200
    wait_until(lambda: in_flight(backend) == (0, 0), "nothing was given back twice")


def test_without_a_limit_silence_is_no_end(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    one = start_one(gate, backend, services, SILENT_S)
    with begin_long(gate, backend, "upgrade", *UPGRADE):
        wait_until(lambda: in_flight(backend) == (0, 0), "silent")
        backend.publish(service(state="ready", replicas=[one.entry()], max_idle_connection=0))
        wait_until(lambda: in_flight(backend) == (1, 1), "counts without a limit")


def test_an_old_worker_knows_its_silent_clients_after_a_reload(
    gate: Gate, backend: FakeBackend, services: Services
) -> None:
    start_one(gate, backend, services, SILENT_S)
    with begin_long(gate, backend, "upgrade", *UPGRADE) as sock:
        wait_until(lambda: in_flight(backend) == (0, 0), "silent")
        before = len(gate.workers())
        gate.reload()
        wait_until(lambda: len(gate.workers()) > before, "new workers beside the old")
        sock.sendall(b"x")
        wait_until(lambda: in_flight(backend) == (1, 1), "heard of")
    wait_until(lambda: in_flight(backend) == (0, 0), "given back")


# What outsiders learn -------------------------------------------------------------------------

TELLING = re.compile(
    r"nginx/|openresty|lua|/tmp/|/home/|traceback|python|\.py\b|[0-9]+\.[0-9]+\.[0-9]+"
)


def test_outsiders_learn_nothing_about_the_machine(
    folder: Path, gate_spec: GateSpec, backend: FakeBackend, echo: EchoService
) -> None:
    secret = {"code": "start-failed", "reason": "/home/joe/job.sh: exit 1", "log": ["Traceback"]}
    spec = replace(gate_spec, private=("10.0.0.0/8",))
    with running(folder, spec, backend) as gate:
        backend.publish(
            service(state="ready", replicas=[replica(echo.port)]),
            service("Failed", state="failed", refusal=secret),
            service("Cold", models=["cold"]),
        )
        wait_until(lambda: gate.get("/llm/first").status == 200, "warm")
        model = json.dumps({"model": "none"}).encode()
        answers = [
            gate.get(path, method, body)
            for path, method, body in [
                ("/none/x", "GET", None),
                ("/llm/%2f", "GET", None),
                ("/failed/x", "GET", None),
                ("/v1/chat/completions", "POST", model),
                ("/v1/chat/completions", "POST", b"{"),
                ("/v1/models", "GET", None),
                ("/healthz", "GET", None),
                ("/readyz", "GET", None),
                ("/metrics", "GET", None),
                ("/admin/reload", "POST", b""),
                ("/demand_llm", "POST", b""),
                ("/admin/reload", "GET", None),
                ("/@error", "GET", None),
                ("/@variables", "GET", None),
            ]
        ]
        raw = [
            gate.raw(text) for text in (b"nonsense\r\n\r\n", b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n")
        ]
    calls = [path for method, path, _ in backend.calls if method == "POST"]
    texts = [f"{answer.headers}{answer.body.decode()}" for answer in answers]
    texts += [text.decode() for text in raw]
    told = [text for text in texts if TELLING.search(hidden_ids(text).lower())]
    assert told == []
    assert calls == [], "admin calls of outsiders do not reach the backend"


def hidden_ids(text: str) -> str:
    """Without the request id, which has a dot in it."""
    return re.sub(r"(?i)x-request-id: .*|HTTP/1\.1", "", text)
