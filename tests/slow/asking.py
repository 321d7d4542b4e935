"""What the clients of a schedule send, and what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading

import aiohttp

from tests.slow.outcomes import Outcome
from tests.up.clients import session

UNHARMED = 40.0  # the longest that a request may take, all starts and backoffs included


def short(_chance: random.Random) -> tuple[str, str | None]:
    return "/probe/x", None


def slow(chance: random.Random) -> tuple[str, str | None]:
    return f"/probe/slow?s={chance.uniform(0.2, 1.2):.2f}", None


def stream(chance: random.Random) -> tuple[str, str | None]:
    count = chance.randint(5, 20)
    return f"/probe/stream?n={count}&s=0.1", "".join(f"{n}\n" for n in range(count))


async def ask(http: aiohttp.ClientSession, url: str, expected: str | None) -> tuple[Outcome, str]:
    """Send one request; ``expected`` is the whole body where it is known."""
    status = None
    try:
        async with http.get(url, headers={"Connection": "close"}) as answer:
            status = answer.status
            body = (await answer.read()).decode()
    except TimeoutError:
        return Outcome.UNANSWERED, f"status {status}"
    except aiohttp.ClientError as error:
        return (Outcome.RESET if status is None else Outcome.CUT), repr(error)
    if status == 200 and expected in (None, body):
        return Outcome.WHOLE, ""
    with contextlib.suppress(ValueError):
        problem = f"{status} {json.loads(body)['type'].rpartition('/')[2]}"
        if problem in set(Outcome):
            return Outcome(problem), body
    return Outcome.WRONG, f"{status} {body[:500]}"


async def hold_load(url: str, load: int, ended: threading.Event) -> None:
    """Keep so many requests in flight until the end."""

    async def one(http: aiohttp.ClientSession) -> None:
        while not ended.is_set():
            outcome, detail = await ask(http, f"{url}/probe/slow?s=1.5", None)
            assert outcome is Outcome.WHOLE, detail

    async with session(UNHARMED) as http:
        await asyncio.gather(*(one(http) for _ in range(load)))
