"""A service for tests: does what a test asks of it, and notes what came when.

    probe.py PORT

Environment: ``PROBE_NOTES`` a file that gets a JSON line for each start, each request other than
health checks, and SIGTERM; ``PROBE_LOAD_S`` seconds until healthy, and ``PROBE_LOADED`` a file
without which it is not; ``PROBE_LINGER_S`` how long it goes on serving after SIGTERM, so that a
request which comes too late is seen; ``PROBE_HOST`` the address to listen on (127.0.0.1);
``PROBE_SLOTS`` how many requests to /slow and /stream it works on at once (0: any number): the
rest, and health checks too, wait for their turn, and each check is noted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
import time

from aiohttp import web

HOST = os.environ.get("PROBE_HOST", "127.0.0.1")
NOTES = os.environ.get("PROBE_NOTES")
LOAD_S = float(os.environ.get("PROBE_LOAD_S", "0"))
LOADED = os.environ.get("PROBE_LOADED")
LINGER_S = float(os.environ.get("PROBE_LINGER_S", "0"))
SLOTS = int(os.environ.get("PROBE_SLOTS", "0"))
STARTED = time.monotonic()
terminated = False
sick = False
slots: asyncio.Semaphore | contextlib.nullcontext[None] = (
    asyncio.Semaphore(SLOTS) if SLOTS else contextlib.nullcontext()
)


def note(what: str, **more: object) -> None:
    if NOTES:
        line = json.dumps({"what": what, "pid": os.getpid(), "at": time.monotonic(), **more})
        with open(NOTES, "a") as file:
            file.write(line + "\n")


async def health(_request: web.Request) -> web.Response:
    if sick:
        await asyncio.sleep(60)
    if SLOTS:
        came = time.monotonic()
        async with slots:
            note("check", waited=time.monotonic() - came)
    loaded = time.monotonic() - STARTED >= LOAD_S and (not LOADED or os.path.exists(LOADED))
    return web.Response(status=200 if loaded else 503)


@web.middleware
async def noted(request: web.Request, handler) -> web.StreamResponse:
    if request.path != "/health":
        note("request", path=request.raw_path, terminated=terminated)
    return await handler(request)


async def pid(_request: web.Request) -> web.Response:
    return web.json_response({"pid": os.getpid()})


async def slow(request: web.Request) -> web.Response:
    async with slots:
        await asyncio.sleep(float(request.query.get("s", "0.05")))
    return web.json_response({"pid": os.getpid()})


async def stream(request: web.Request) -> web.StreamResponse:
    """``n`` lines, one each ``s`` seconds."""
    answer = web.StreamResponse()
    async with slots:
        await answer.prepare(request)
        for index in range(int(request.query.get("n", "10"))):
            await answer.write(f"{index}\n".encode())
            await asyncio.sleep(float(request.query.get("s", "0.1")))
    await answer.write_eof()
    return answer


async def digest(request: web.Request) -> web.Response:
    body, length = hashlib.sha256(), 0
    async for chunk in request.content.iter_any():
        body.update(chunk)
        length += len(chunk)
    return web.json_response({"sha256": body.hexdigest(), "length": length})


async def headers(request: web.Request) -> web.Response:
    """An answer with a header of ``bytes`` bytes."""
    return web.Response(text="ok", headers={"X-Large": "x" * int(request.query["bytes"])})


async def die(_request: web.Request) -> web.Response:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


async def fall_sick(_request: web.Request) -> web.Response:
    """Health checks are not answered any more; requests are."""
    global sick
    sick = True
    return web.Response(text="ok")


async def websocket(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        await socket.send_str(message.data)
    return socket


async def serve(port: int) -> None:
    global terminated
    app = web.Application(middlewares=[noted], client_max_size=1 << 30)
    app.add_routes(
        [
            web.get("/health", health),
            web.get("/slow", slow),
            web.get("/stream", stream),
            web.route("*", "/digest", digest),
            web.get("/headers", headers),
            web.route("*", "/die", die),
            web.get("/sick", fall_sick),
            web.get("/ws", websocket),
            web.route("*", "/{rest:.*}", pid),
        ]
    )
    runner = web.AppRunner(app, access_log=None, max_line_size=1 << 17, max_field_size=1 << 17)
    await runner.setup()
    await web.TCPSite(runner, HOST, port, backlog=4096).start()
    note("start")
    sys.stdout.write(f"probe on {port}\n")
    sys.stdout.flush()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    terminated = True
    note("term")
    await asyncio.sleep(LINGER_S)


asyncio.run(serve(int(sys.argv[1])))
