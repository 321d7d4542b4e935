"""Parts of the gate's tests: a real nginx, and a backend that says what the test tells it."""

from __future__ import annotations

import contextlib
import getpass
import grp
import hashlib
import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from slurmgate import nginx, share
from slurmgate.model import GateSpec
from tests.ports import free_port as free_port

DEADLINE_S = 20.0


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """Wait for a condition; fail with its name when the deadline passes."""
    end = time.monotonic() + seconds
    while True:
        # Looked at before, so that a machine which stands still does not cost the last look.
        over = time.monotonic() > end
        value = condition()
        if value:
            return value
        if over:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)


class _UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


class FakeBackend:
    """Both of the backend's sockets; keeps what the gate told and hands out a chosen snapshot."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.notes: list[dict[str, Any]] = []
        self.pages: dict[str, tuple[int, str]] = {}
        self.calls: list[tuple[str, str, dict[str, str]]] = []
        self.on_note: Callable[[dict[str, Any]], None] = lambda note: None
        self.on_call: Callable[[str, str], None] = lambda method, path: None
        self._epoch = "0001"
        self._n = 0
        self._keys_made = 0
        self._services: list[dict[str, Any]] | None = None
        self._keys: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._servers: list[_UnixServer] = []

    def start(self) -> None:
        for name, handler in (("control.sock", self._control()), ("api.sock", self._api())):
            path = self.run_dir / name
            path.unlink(missing_ok=True)
            server = _UnixServer(str(path), handler)
            # The workers may be another user; in the product all are one user.
            path.chmod(0o777)
            self._servers.append(server)
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    def publish(self, *services: dict[str, Any]) -> str:
        """Make a new snapshot; returns its version."""
        with self._lock:
            self._n += 1
            self._services = list(services)
            return f"{self._epoch}:{self._n}"

    def publish_keys(self, *entries: dict[str, Any], required: bool = True) -> str:
        """Make a new list of clients' keys; returns its version."""
        with self._lock:
            self._keys_made += 1
            version = f"k{self._keys_made}"
            self._keys = {"version": version, "required": required, "entries": list(entries)}
            return version

    @property
    def version(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "n": self._n}

    def service_note(self, name: str) -> dict[str, Any]:
        """What the newest call told about a service."""
        for note in reversed(self.notes[-1:]):
            found: dict[str, Any] = note["services"].get(name, {})
            return found
        return {}

    def replica_note(self, replica: str) -> dict[str, Any]:
        for note in reversed(self.notes[-1:]):
            found: dict[str, Any] = note["replicas"].get(replica, {})
            return found
        return {}

    def key_note(self, name: str) -> dict[str, Any]:
        for note in reversed(self.notes[-1:]):
            found: dict[str, Any] = note["key_use"].get(name, {})
            return found
        return {}

    def _answer(self, note: dict[str, Any]) -> bytes | None:
        self.on_note(note)
        answer: dict[str, Any] = {}
        with self._lock:
            self.notes.append(note)
            if self._services is not None and note["snapshot"] != self.version:
                answer = {"version": self.version, "services": self._services}
            if self._keys is not None and note["keys"] != self._keys["version"]:
                answer["keys"] = self._keys
        return json.dumps(answer).encode() if answer else None

    def _control(self) -> type[BaseHTTPRequestHandler]:
        backend = self

        class Control(_Handler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = backend._answer(json.loads(body))
                self.reply(204 if answer is None else 200, answer or b"")

        return Control

    def _api(self) -> type[BaseHTTPRequestHandler]:
        backend = self

        class Api(_Handler):
            def do_GET(self) -> None:
                backend.calls.append((self.command, self.path, dict(self.headers)))
                backend.on_call(self.command, self.path)
                status, text = backend.pages.get(self.path, (404, "{}"))
                self.reply(status, text.encode())

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.do_GET()

        return Api


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes) -> None:
        self.send_response_only(status)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)


class _TcpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024


class EchoService:
    """A small service: health, echo of what arrived, slow, streamed and breaking answers; what is
    asked of ``/until-told`` waits until ``go_on`` is set.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.healthy = True
        self.go_on = threading.Event()
        self.seen: list[str] = []
        self._server: _TcpServer | None = None

    def start(self) -> None:
        service = self

        class Handler(_Handler):
            # Header and body are two writes.
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                service.answer(self)

            do_POST = do_OPTIONS = do_HEAD = do_GET

        self._server = _TcpServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.go_on.set()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, handler: _Handler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        path = handler.path
        if path == "/health":
            handler.reply(200 if self.healthy else 503, b"{}")
            return
        self.seen.append(path)
        if path.startswith("/break"):
            handler.close_connection = True
            return
        if path.startswith("/until-told"):
            self.go_on.wait(DEADLINE_S)
        if path.startswith("/slow/"):
            time.sleep(float(path.removeprefix("/slow/")))
        if handler.headers.get("Upgrade"):
            handler.send_response_only(101)
            handler.send_header("Connection", "upgrade")
            handler.send_header("Upgrade", handler.headers["Upgrade"])
            handler.end_headers()
            handler.wfile.write(handler.rfile.readline())
            handler.close_connection = True
            return
        if path.startswith("/header/"):
            handler.send_response_only(200)
            handler.send_header("X-Long", "x" * int(path.removeprefix("/header/")))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        echo = {
            "method": handler.command,
            "path": path,
            "length": len(body),
            "body": body[:4096].decode("latin-1"),
            "headers": dict(handler.headers),
        }
        handler.reply(200, json.dumps(echo).encode())


class Gate:
    """A running nginx with the rendered configuration, in a directory of its own."""

    def __init__(self, folder: Path, spec: GateSpec, backend: FakeBackend) -> None:
        self.folder = folder
        self.spec = spec
        self.backend = backend
        self.port = int(spec.listen.rpartition(":")[2])
        self.conf = folder / "nginx.conf"
        self.errors = folder / "error.log"
        # A poll of a service that ends
        self.expected_errors = ["recv() failed (104: Connection reset by peer), context: ngx.timer"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        paths = nginx.NginxPaths(
            run_dir=self.backend.run_dir,
            state_dir=self.folder,
            lua_dir=share.lua_dir(),
            access_log=self.folder / "access.log",
            pid=self.folder / "nginx.pid",
            temp_dir=self.folder / "temp",
            error_log=str(self.errors),
        )
        paths.temp_dir.mkdir(exist_ok=True)
        # One that was killed leaves it, and none can bind a socket that is there already.
        (paths.run_dir / "inner.sock").unlink(missing_ok=True)
        user = None
        if os.geteuid() == 0:
            user = f"{getpass.getuser()} {grp.getgrgid(os.getegid()).gr_name}"
        nginx.write(nginx.render(self.spec, paths, user=user), self.conf)
        binary = nginx.find_nginx()
        nginx.test(binary, self.conf)
        self.process = subprocess.Popen(
            [binary, "-e", "stderr", "-c", str(self.conf)], start_new_session=True
        )
        wait_until(self._listens, "nginx listens")

    def stop(self) -> None:
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def reload(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGHUP)

    def workers(self) -> list[int]:
        assert self.process
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def _listens(self) -> bool:
        assert self.process
        assert self.process.poll() is None, "nginx ended"
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def get(
        self,
        path: str,
        method: str = "GET",
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 30.0,
    ) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def ask(self, request: bytes) -> Answer:
        """Send bytes as they are; the answer to them, without those that only say to go on."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            sock.sendall(request)
            response = HTTPResponse(sock)
            response.begin()
            return Answer(response)

    def raw(self, request: bytes) -> bytes:
        """Send bytes as they are; give all that comes back until the gate closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            sock.sendall(request)
            parts = []
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(65536):
                    parts.append(part)
            return b"".join(parts)

    def error_lines(self) -> list[str]:
        text = self.errors.read_text() if self.errors.exists() else ""
        bad = re.compile(r"\[(error|crit|alert|emerg)\]")
        lines = [line for line in text.splitlines() if bad.search(line)]
        return [
            line for line in lines if not any(expected in line for expected in self.expected_errors)
        ]


class Answer:
    def __init__(self, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """End of the problem's type."""
        return str(self.json["type"]).rpartition("/")[2]


def waiting(backend: FakeBackend) -> int:
    """How many wait for the usual service, by the newest call."""
    return int(backend.service_note("LLM").get("waiting", 0))


def service(name: str = "LLM", **changes: Any) -> dict[str, Any]:
    """One service of a snapshot: cold, unless changed."""
    entry: dict[str, Any] = {
        "name": name,
        "route_name": name.lower(),
        "retired": False,
        "unknown": False,
        "api_paths": ["/"],
        "no_wake": [],
        "models": [],
        "state": "cold",
        "reason": None,
        "refusal": None,
        "retry_after_s": 30.0,
        "hold_timeout": 60,
        "max_waiting": 1000,
        "replay": 1,
        "read_timeout": 60,
        "health": {
            "path": "/health",
            "interval": 5,
            "start_interval": [0.05, 1],
            "timeout": 10,
            "failures": 3,
        },
        "replicas": [],
    }
    return {**entry, **changes}


def replica(port: int, name: str = "r1", **changes: Any) -> dict[str, Any]:
    """One replica of a snapshot: ready, unless changed."""
    entry: dict[str, Any] = {
        "id": name,
        "gen": 1,
        "endpoint": f"127.0.0.1:{port}",
        "phase": "ready",
        "routable": True,
        "age_s": 1.0,
        "job_id": "1",
        "node": "localhost",
    }
    return {**entry, **changes}


def key(token: str, name: str = "anna", **changes: Any) -> dict[str, Any]:
    """One of the clients' keys as the gate is told of it: for all services, without limits."""
    entry: dict[str, Any] = {
        "name": name,
        "sha256": hashlib.sha256(token.encode()).hexdigest(),
        "services": None,
        "rpm": 0,
        "in_flight": 0,
        "expires": None,
    }
    return {**entry, **changes}
