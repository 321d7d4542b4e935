"""TLS, HTTP/2, changed protocols, IPv6: what reaches a service besides plain HTTP/1.1."""

from __future__ import annotations

import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from slurmgate.errors import ConfigError
from slurmgate.model import GateSpec, TlsSpec
from slurmgate.nginx import NginxPaths, render
from tests.gate.harness import (
    EchoService,
    FakeBackend,
    Gate,
    free_port,
    replica,
    service,
    wait_until,
)


def make_certificate(folder: Path) -> TlsSpec:
    tls = TlsSpec(folder / "cert.pem", folder / "key.pem")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=localhost",
            "-days",
            "2",
            "-keyout",
            str(tls.key),
            "-out",
            str(tls.certificate),
        ],
        check=True,
        capture_output=True,
    )
    return tls


def test_http2_over_tls_through_a_hold(
    folder: Path, backend: FakeBackend, echo: EchoService
) -> None:
    spec = GateSpec(listen=f"127.0.0.1:{free_port()}", tls=make_certificate(folder))
    gate = Gate(folder, spec, backend)
    gate.start()
    try:
        backend.publish(service())
        trust = ssl.create_default_context(cafile=str(folder / "cert.pem"))
        trust.check_hostname = False
        with httpx.Client(http2=True, verify=trust, timeout=30) as client:
            url = f"https://127.0.0.1:{gate.port}"
            cold = client.post(url + "/llm/x", content=b"abc", headers={"Prefer": "wait=0"})
            assert cold.status_code == 503
            backend.publish(service(state="ready", replicas=[replica(echo.port)]))
            answer = client.post(url + "/llm/x", content=iter([b"abc", b"def"]))
        assert (answer.http_version, answer.status_code) == ("HTTP/2", 200)
        plain = gate.get("/llm/x")
        assert (plain.status, plain.code) == (400, "bad-request")
        assert "HTTPS" in plain.json["detail"]
        assert answer.json()["headers"]["X-Forwarded-Proto"] == "https"
        wait_until(lambda: backend.service_note("LLM")["in_flight"] == 0, "counts given back")
    finally:
        gate.stop()
    assert gate.error_lines() == []


def test_a_changed_protocol_passes_through_a_hold(
    gate: Gate, backend: FakeBackend, echo: EchoService
) -> None:
    backend.publish(service())
    with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as sock:
        sock.sendall(b"GET /llm/ws HTTP/1.1\r\nHost: a\r\n")
        sock.sendall(b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        wait_until(lambda: backend.service_note("LLM").get("waiting") == 1, "one waits")
        backend.publish(service(state="ready", replicas=[replica(echo.port)]))
        assert sock.recv(1000).startswith(b"HTTP/1.1 101")
        sock.sendall(b"hello\n")
        assert sock.recv(1000) == b"hello\n"


@pytest.mark.parametrize("listen", ["[::1]:8080", "*:80", "0.0.0.0:1", "localhost:8080"])
def test_listeners_render(tmp_path: Path, listen: str) -> None:
    assert f"listen {listen} " in render(GateSpec(listen=listen), paths(tmp_path))


@pytest.mark.parametrize("listen", ["8080", "a:99999", "a:1; evil", "[::1]", "::1:80x"])
def test_bad_listeners_are_refused(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match=r"gate\.listen"):
        render(GateSpec(listen=listen), paths(tmp_path))


@pytest.mark.parametrize("name", ["a$b", "a\nb"])
def test_paths_nginx_cannot_quote_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        render(GateSpec(), paths(tmp_path / name))


def test_paths_with_blanks_and_quotes_are_quoted(tmp_path: Path) -> None:
    text = render(GateSpec(), paths(tmp_path / 'a "b" \\c'), user="nobody")
    assert 'a \\"b\\" \\\\c/nginx.pid"' in text
    assert "user nobody;" in text


def paths(folder: Path) -> NginxPaths:
    return NginxPaths(
        run_dir=folder,
        state_dir=folder,
        lua_dir=folder / "lua",
        access_log=folder / "access.log",
        pid=folder / "nginx.pid",
        temp_dir=folder / "temp",
    )
