"""The demo model server does what the demo and the gate's tests rely on."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
import pytest

from slurmgate.config import examine
from tests.ports import free_port

CONFIG = Path(__file__).parents[2] / "config"
SERVE = CONFIG / "demo" / "serve.sh"
DEADLINE_S = 30


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    url: str


Start = Callable[..., Server]


@contextlib.contextmanager
def starter() -> Iterator[Start]:
    servers: list[subprocess.Popen[str]] = []

    def start_server(**env: str) -> Server:
        port = free_port()
        process = subprocess.Popen(
            [SERVE, str(port)],
            env=os.environ | {"DEMO_TOKEN_S": "0"} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        servers.append(process)
        return Server(process, port, f"http://127.0.0.1:{port}")

    yield start_server
    for process in servers:
        process.kill()
        process.wait(DEADLINE_S)
        if process.stdout:
            process.stdout.close()


@pytest.fixture
def start() -> Iterator[Start]:
    with starter() as start_server:
        yield start_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A healthy server for tests that leave nothing behind in it."""
    with starter() as start_server:
        server = start_server(DEMO_MODEL="tiny")
        wait_for_health(server)
        yield server


def wait_for_answer(server: Server) -> httpx.Response:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return httpx.get(f"{server.url}/health", timeout=DEADLINE_S)
        except httpx.ConnectError:
            assert server.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.02)


def wait_for_health(server: Server) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while wait_for_answer(server).status_code != 200:
        assert time.monotonic() < deadline, "the server does not become healthy"
        time.sleep(0.02)


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def test_it_listens_while_it_loads_and_is_healthy_afterwards(start: Start):
    server = start(DEMO_LOAD_S="6")
    assert wait_for_answer(server).status_code == 503
    wait_for_health(server)


def test_a_start_is_one_line_with_port_and_load_time(start: Start):
    server = start(DEMO_MODEL="tiny")
    wait_for_health(server)
    server.process.terminate()
    output, _ = server.process.communicate(timeout=DEADLINE_S)
    assert output == f"demo: tiny on 127.0.0.1:{server.port}, loading for 0 s\n"


def test_sigterm_ends_it_at_once_even_with_a_stream_under_way(start: Start):
    server = start(DEMO_TOKEN_S="1000")
    wait_for_health(server)
    question = {"prompt": "a", "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=question) as response:
        assert response.status_code == 200
        server.process.terminate()
        assert server.process.wait(DEADLINE_S) == 0


def test_a_start_that_fails_exits_with_the_code_and_says_so(start: Start):
    server = start(DEMO_EXIT_CODE="3", DEMO_LOAD_S="0.1")
    output, _ = server.process.communicate(timeout=DEADLINE_S)
    assert server.process.returncode == 3
    assert output.endswith("demo: cannot load demo\n")


def test_a_taken_port_is_one_line_not_a_traceback(start: Start):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = subprocess.run(
            [SERVE, str(port)], capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_chat_completions_plain_and_streamed_say_the_same(server: Server):
    question = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "one two three"}],
        "max_tokens": 4,
    }
    url = f"{server.url}/v1/chat/completions"
    whole = httpx.post(url, json=question).json()
    assert whole["model"] == "tiny"
    assert whole["choices"][0]["message"]["content"] == "one two three one"

    streamed = httpx.post(url, json=question | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, end = events(streamed)
    assert end == "[DONE]"
    deltas = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert deltas == ["one", " two", " three", " one", ""]


def test_models_are_listed(server: Server):
    listed = httpx.get(f"{server.url}/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]


def test_generate_plain_and_streamed(server: Server):
    url = f"{server.url}/generate"
    question = {"prompt": "a b", "max_tokens": 3}
    assert httpx.post(url, json=question).json() == {"text": "a b a"}
    streamed = events(httpx.post(url, json=question | {"stream": True}))
    assert [json.loads(event)["text"] for event in streamed[:-1]] == ["a", " b", " a"]
    assert streamed[-1] == "[DONE]"


@pytest.mark.parametrize("body", ["", "[]", '{"max_tokens": -1}', '{"delay_s": "x"}'])
def test_generate_refuses_what_is_no_request(server: Server, body: str):
    assert httpx.post(f"{server.url}/generate", content=body).status_code == 400


def test_echo_gives_back_what_came_byte_for_byte(server: Server):
    body = os.urandom(5 << 20)
    target = b"/echo/%2f/../x%20y//?q=%41&b+"
    large = "x" * 60_000
    head = (
        b"PATCH "
        + target
        + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Large: "
        + large.encode()
        + b"\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as client:
        client.sendall(head + body)
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    echo = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert echo["method"] == "PATCH"
    assert echo["path"] == target.decode()
    assert ["X-Large", large] in echo["headers"]
    assert echo["body_length"] == len(body)
    assert echo["body_sha256"] == hashlib.sha256(body).hexdigest()


def test_the_websocket_echoes_text_and_bytes(server: Server):

    async def talk() -> tuple[str, bytes]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws") as ws:
            await ws.send_str("hello")
            text = await ws.receive_str(timeout=DEADLINE_S)
            await ws.send_bytes(b"\x00\xff")
            return text, await ws.receive_bytes(timeout=DEADLINE_S)

    assert asyncio.run(talk()) == ("hello", b"\x00\xff")


def test_the_script_uses_the_python_of_the_project_when_there_is_one(tmp_path: Path):
    demo = tmp_path / "config" / "demo"
    demo.mkdir(parents=True)
    (demo / "serve.sh").write_bytes(SERVE.read_bytes())
    (demo / "model_server.py").write_text("import sys; print(sys.argv[0], sys.executable)")
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text('#!/bin/sh\necho own "$@"\n')
    own.chmod(0o755)
    done = subprocess.run(
        ["sh", demo / "serve.sh", "1234"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"own {demo.resolve()}/model_server.py 1234\n"
    own.unlink()
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", demo / "serve.sh", "1234"], capture_output=True, text=True, check=True, env=environ
    )
    assert done.stdout.startswith(f"{demo.resolve()}/model_server.py ")


def test_the_configuration_of_make_run_is_valid_and_without_warnings():
    findings = examine(CONFIG / "services.json")
    assert findings.problems == ()
    assert findings.warnings == ()
    assert findings.config is not None
    assert [service.route_name for service in findings.config.services] == ["llm", "echo"]
