"""A tiny OpenAI-style model server: what Slurmgate serves in the demo and in its tests.

    model_server.py PORT

It listens at once and is healthy after its load time, as model servers are. Environment:
``DEMO_HOST`` address to listen on (127.0.0.1), ``DEMO_LOAD_S`` load time in seconds (0),
``DEMO_MODEL`` name of the model (demo), ``DEMO_TOKEN_S`` time for one token in seconds (0.02),
``DEMO_EXIT_CODE`` when the model has loaded, exit with that code instead of becoming healthy.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from aiohttp import WSMsgType, web

LARGEST_HEADERS = 256 << 10
LARGEST_JSON = 64 << 20
GRACE_S = 0.2  # what answers under way get after SIGTERM
WORDS = "the gate holds what it is sent until somebody is there to answer".split()


@dataclass(frozen=True)
class Settings:
    """What the environment says."""

    host: str
    model: str
    load_s: float
    token_s: float
    exit_code: int | None

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the ``DEMO_`` variables; ValueError when one is not a number."""
        code = os.environ.get("DEMO_EXIT_CODE")
        return cls(
            host=os.environ.get("DEMO_HOST", "127.0.0.1"),
            model=os.environ.get("DEMO_MODEL", "demo"),
            load_s=float(os.environ.get("DEMO_LOAD_S", "0")),
            token_s=float(os.environ.get("DEMO_TOKEN_S", "0.02")),
            exit_code=None if code is None else int(code),
        )


class ModelServer:
    """The handlers; ``started`` is when loading began, on the monotonic clock."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._started = time.monotonic()

    def app(self) -> web.Application:
        """Build the application with its routes."""
        app = web.Application(client_max_size=LARGEST_JSON)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/v1/models", self.models),
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/embeddings", self.embeddings),
                web.post("/v1/messages", self.messages),
                web.post("/generate", self.generate),
                web.get("/ws", self.websocket),
                web.route("*", "/echo", self.echo),
                web.route("*", "/echo/{rest:.*}", self.echo),
            ]
        )
        if self._settings.exit_code is not None:
            app.cleanup_ctx.append(self._fail_after_loading)
        return app

    async def health(self, _request: web.Request) -> web.Response:
        """503 while the model loads, then 200."""
        left = self._settings.load_s - (time.monotonic() - self._started)
        if left > 0 or self._settings.exit_code is not None:
            return web.json_response({"status": "loading"}, status=503)
        return web.json_response({"status": "ok"})

    async def models(self, _request: web.Request) -> web.Response:
        """The list of models, in OpenAI's shape."""
        model = {"id": self._settings.model, "object": "model", "created": 0, "owned_by": "demo"}
        return web.json_response({"object": "list", "data": [model]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """A chat completion, whole or token by token."""
        body = await _json_object(request)
        prompt = _last_message(body)
        count = _number(body, "max_tokens", 16)
        if not body.get("stream"):
            text = "".join([token async for token in self._tokens(prompt, count)])
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response(self._completion("chat.completion", choice))
        response = await _event_stream(request)
        async for token in self._tokens(prompt, count):
            choice = {"index": 0, "delta": {"content": token}, "finish_reason": None}
            await _event(response, self._completion("chat.completion.chunk", choice))
        choice = {"index": 0, "delta": {}, "finish_reason": "stop"}
        await _event(response, self._completion("chat.completion.chunk", choice))
        await _end_events(response)
        return response

    async def embeddings(self, request: web.Request) -> web.Response:
        """A vector for each input, always the same for the same text."""
        body = await _json_object(request)
        given = body.get("input", "")
        texts = given if isinstance(given, list) else [given]
        data = [
            {"object": "embedding", "index": index, "embedding": _vector(str(text))}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        answer = {"object": "list", "model": self._settings.model, "data": data, "usage": usage}
        return web.json_response(answer)

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """A message in Anthropic's shape, whole or token by token."""
        body = await _json_object(request)
        tokens = self._tokens(_last_message(body), _number(body, "max_tokens", 16))
        message: dict[str, Any] = {
            "id": "demo",
            "type": "message",
            "role": "assistant",
            "model": self._settings.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }
        if not body.get("stream"):
            text = "".join([token async for token in tokens])
            content = [{"type": "text", "text": text}]
            return web.json_response({**message, "content": content, "stop_reason": "end_turn"})
        response = await _event_stream(request)
        await _named_event(response, {"type": "message_start", "message": message})
        block = {"type": "text", "text": ""}
        start = {"type": "content_block_start", "index": 0, "content_block": block}
        await _named_event(response, start)
        async for token in tokens:
            delta = {"type": "text_delta", "text": token}
            event = {"type": "content_block_delta", "index": 0, "delta": delta}
            await _named_event(response, event)
        await _named_event(response, {"type": "content_block_stop", "index": 0})
        end = {"stop_reason": "end_turn", "stop_sequence": None}
        usage = {"output_tokens": 1}
        await _named_event(response, {"type": "message_delta", "delta": end, "usage": usage})
        await _named_event(response, {"type": "message_stop"})
        await response.write_eof()
        return response

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Text for ``prompt``; ``delay_s`` waits first, ``stream`` sends token by token."""
        body = await _json_object(request)
        prompt = str(body.get("prompt", ""))
        tokens = self._tokens(prompt, _number(body, "max_tokens", 16))
        await asyncio.sleep(_number(body, "delay_s", 0))
        if not body.get("stream"):
            return web.json_response({"text": "".join([token async for token in tokens])})
        response = await _event_stream(request)
        async for token in tokens:
            await _event(response, {"text": token})
        await _end_events(response)
        return response

    async def echo(self, request: web.Request) -> web.Response:
        """What came in: method, path with query byte for byte, headers, length and hash."""
        digest = hashlib.sha256()
        length = 0
        async for chunk in request.content.iter_any():
            digest.update(chunk)
            length += len(chunk)
        return web.json_response(
            {
                "method": request.method,
                "path": request.raw_path,
                "headers": [list(header) for header in request.headers.items()],
                "body_length": length,
                "body_sha256": digest.hexdigest(),
            }
        )

    async def websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Send every message back."""
        socket = web.WebSocketResponse(max_msg_size=LARGEST_JSON)
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                await socket.send_str(message.data)
            elif message.type is WSMsgType.BINARY:
                await socket.send_bytes(message.data)
        return socket

    async def _tokens(self, prompt: str, count: float) -> AsyncIterator[str]:
        words = prompt.split() or WORDS
        for index in range(int(count)):
            await asyncio.sleep(self._settings.token_s)
            yield (" " if index else "") + words[index % len(words)]

    def _completion(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "demo",
            "object": kind,
            "created": int(time.time()),
            "model": self._settings.model,
            "choices": [choice],
        }

    async def _fail_after_loading(self, _app: web.Application) -> AsyncIterator[None]:
        code = self._settings.exit_code

        async def fail() -> None:
            await asyncio.sleep(self._settings.load_s)
            _say(f"demo: cannot load {self._settings.model}")
            os._exit(code or 0)

        task = asyncio.create_task(fail())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _json_object(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="the body is no JSON object")
    return body


def _number(body: dict[str, Any], key: str, default: float) -> float:
    value = body.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e6:
        raise web.HTTPBadRequest(text=f"{key} is not a number from 0 to 1000000")
    return value


def _last_message(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        raise web.HTTPBadRequest(text="messages is not a list of messages")
    return str(messages[-1].get("content", ""))


async def _event_stream(request: web.Request) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    return response


def _vector(text: str) -> list[float]:
    return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()]


async def _named_event(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())


async def _event(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())


async def _end_events(response: web.StreamResponse) -> None:
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        sys.exit("usage: model_server.py PORT")
    port = int(sys.argv[1])
    settings = Settings.from_environment()
    _say(f"demo: {settings.model} on {settings.host}:{port}, loading for {settings.load_s:g} s")
    try:
        web.run_app(
            ModelServer(settings).app(),
            host=settings.host,
            port=port,
            print=None,
            access_log=None,
            backlog=4096,
            shutdown_timeout=GRACE_S,
            max_line_size=LARGEST_HEADERS,
            max_field_size=LARGEST_HEADERS,
        )
    except OSError as error:
        sys.exit(f"demo: {error.strerror}")


if __name__ == "__main__":
    main()
