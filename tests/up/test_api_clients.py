"""The client libraries people use, with nothing but base URL and key set, through cold starts."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import anthropic
import openai
import pytest

from tests.up.product import ROOT, Product

PROMPT = "one two three"
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
LIMIT = {"max_tokens": 6, "messages": MESSAGES}
ANSWER = "one two three one two three"
IDLE_LIMIT_S = 5.0
LONG_LOAD_S = 20


def serve_model(product: Product, name: str, **fields: Any) -> None:
    """Configure a demo model; ``load`` and ``exit_code`` are its own settings."""
    env = {"DEMO_MODEL": name, "DEMO_LOAD_S": str(fields.pop("load", 1))}
    if "exit_code" in fields:
        env["DEMO_EXIT_CODE"] = str(fields.pop("exit_code"))
    script = str(ROOT / "config" / "demo" / "serve.sh")
    product.service(name, script, env=env, models=[name], **fields)


def add_key(product: Product, name: str, *options: str) -> str:
    """Make a key before the product is up: it has it from the start."""
    product.write_config()
    argv = product.command("keys", "add", name, *options, "--config", str(product.config))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def keyed(product: Product) -> Product:
    product.top["keys_file"] = "keys.json"
    return product


def openai_client(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def anthropic_client(url: str, key: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)


# -- what each client asks for, given the gate's URL, a key and a model ------------------------


def chat(url: str, key: str, model: str) -> str | None:
    with openai_client(url, key) as client:
        done = client.chat.completions.create(model=model, **LIMIT)  # type: ignore[call-overload]
    return str(done.choices[0].message.content)


def chat_stream(url: str, key: str, model: str) -> str:
    with openai_client(url, key) as client:
        chunks = client.chat.completions.create(  # type: ignore[call-overload]
            model=model, stream=True, **LIMIT
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def chat_async(url: str, key: str, model: str) -> str:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            chunks = await client.chat.completions.create(  # type: ignore[call-overload]
                model=model, stream=True, **LIMIT
            )
            return "".join([c.choices[0].delta.content or "" async for c in chunks])

    return asyncio.run(ask())


def embed(url: str, key: str, model: str) -> str:
    with openai_client(url, key) as client:
        made = client.embeddings.create(model=model, input=[PROMPT, PROMPT])
    assert [len(entry.embedding) for entry in made.data] == [32, 32]
    return ANSWER


def claude(url: str, key: str, model: str) -> str:
    with anthropic_client(url, key) as client:
        done = client.messages.create(model=model, **LIMIT)  # type: ignore[call-overload]
    return str(done.content[0].text)


def claude_stream(url: str, key: str, model: str) -> str:
    with (
        anthropic_client(url, key) as client,
        client.messages.stream(model=model, **LIMIT) as stream,  # type: ignore[arg-type]
    ):
        return "".join(stream.text_stream)


def curl(url: str, key: str, model: str) -> str:
    body = json.dumps({"model": model, "stream": True, **LIMIT})
    argv = ["curl", "-sSN", "--max-time", "60", f"{url}/v1/chat/completions", "-d", body]
    argv += ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=70, check=True)
    events = [
        line.removeprefix("data: ") for line in done.stdout.splitlines() if line[:5] == "data:"
    ]
    assert events.pop() == "[DONE]", done.stdout
    return "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events)


CLIENTS: dict[str, Callable[[str, str, str], str | None]] = {
    asks.__name__.replace("_", "-"): asks
    for asks in (chat, chat_stream, chat_async, embed, claude, claude_stream, curl)
}
STREAMING = ("chat-stream", "chat-async", "claude-stream", "curl")


def test_each_client_gets_through_a_cold_start_of_its_own(keyed: Product):
    for name in CLIENTS:
        serve_model(keyed, name)
    key = add_key(keyed, "alice")
    keyed.up()
    with openai_client(keyed.url, key) as client:
        listed = {model.id: model.to_dict()["state"] for model in client.models.list()}
        assert listed == dict.fromkeys(CLIENTS, "cold")
        assert client.models.retrieve("chat").owned_by == "chat"
    with anthropic_client(keyed.url, key) as other:
        assert {model.id for model in other.models.list()} == set(CLIENTS)
    with ThreadPoolExecutor(len(CLIENTS)) as pool:
        answers = {name: pool.submit(asks, keyed.url, key, name) for name, asks in CLIENTS.items()}
    assert {name: answer.result() for name, answer in answers.items()} == dict.fromkeys(
        CLIENTS, ANSWER
    )


class Impatient:
    """A proxy that cuts every connection on which no byte came from the gate for a while."""

    def __init__(self, port: int) -> None:
        self._gate = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = 0

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _pass(self, client: socket.socket) -> None:
        gate = socket.create_connection(("127.0.0.1", self._gate))
        threading.Thread(target=self._up, args=(client, gate), daemon=True).start()
        gate.settimeout(IDLE_LIMIT_S)
        with closing(client), closing(gate):
            try:
                while part := gate.recv(65536):
                    client.sendall(part)
            except TimeoutError:
                self.cut += 1
                client.shutdown(socket.SHUT_RDWR)  # else whoever reads from it keeps it open
            except OSError:
                return

    def _up(self, client: socket.socket, gate: socket.socket) -> None:
        try:
            while part := client.recv(65536):
                gate.sendall(part)
            gate.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


@contextmanager
def impatient(port: int) -> Iterator[Impatient]:
    proxy = Impatient(port)
    thread = threading.Thread(target=proxy.serve)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()


def test_held_streams_outlive_a_proxy_that_cuts_silent_connections(keyed: Product):
    for name in ("quiet", *STREAMING):
        heartbeat = 0 if name == "quiet" else 1
        serve_model(keyed, name, load=LONG_LOAD_S, heartbeat=heartbeat)
    key = add_key(keyed, "alice")
    keyed.up()
    began = time.monotonic()
    with impatient(keyed.port) as proxy, ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(CLIENTS[name], proxy.url, key, name) for name in STREAMING]
        quiet = pool.submit(chat_stream, proxy.url, key, "quiet")
        assert [answer.result() for answer in answers] == [ANSWER] * len(STREAMING)
        assert time.monotonic() - began > LONG_LOAD_S
        with pytest.raises(openai.APIConnectionError):
            quiet.result()
        assert proxy.cut == 1, "the proxy is as impatient as that"


def test_a_start_that_fails_after_heartbeats_is_an_error_of_each_library(keyed: Product):
    for name in STREAMING:
        serve_model(keyed, name, load=3, exit_code=3, heartbeat=1)
    key = add_key(keyed, "alice")
    keyed.up()
    with ThreadPoolExecutor(len(STREAMING)) as pool:
        failed = {
            name: pool.submit(CLIENTS[name], keyed.url, key, name)
            for name in STREAMING
            if name != "curl"
        }
        spoken = pool.submit(curl_text, keyed.url, key, "curl")
    for name, error in (
        ("chat-stream", openai.APIError),
        ("chat-async", openai.APIError),
        ("claude-stream", anthropic.APIError),
    ):
        with pytest.raises(error, match="exited with code 3"):
            failed[name].result()
    assert ": waiting state=" in spoken.result()
    event = json.loads(spoken.result().strip().rpartition("data: ")[2])
    assert event["error"]["code"] == "start-failed"
    assert event["error"]["status"] == 503


def curl_text(url: str, key: str, model: str) -> str:
    body = json.dumps({"model": model, "stream": True, **LIMIT})
    argv = ["curl", "-sSN", "--max-time", "60", f"{url}/v1/chat/completions", "-d", body]
    argv += ["-H", f"x-api-key: {key}", "-H", "Content-Type: application/json"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=70, check=True).stdout


def test_libraries_raise_their_own_errors(keyed: Product):
    serve_model(keyed, "open")
    serve_model(keyed, "closed")
    key = add_key(keyed, "bob", "--services", "open")
    keyed.up()
    url = keyed.url
    with pytest.raises(openai.NotFoundError, match="open"):
        chat(url, key, "nobody")
    with pytest.raises(openai.PermissionDeniedError):
        chat(url, key, "closed")
    with pytest.raises(openai.AuthenticationError):
        chat(url, "sg-" + "x" * 43, "open")
    with pytest.raises(anthropic.NotFoundError, match="open"):
        claude(url, key, "nobody")
    with pytest.raises(anthropic.PermissionDeniedError):
        claude(url, key, "closed")
    with pytest.raises(anthropic.AuthenticationError):
        claude(url, "nonsense", "open")
    assert keyed.replicas() == [], "nothing was started for any of them"
