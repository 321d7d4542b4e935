"""Traffic at a service for as long as a test wants it, and a watch on its jobs meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp

from tests.lab.lab import Job
from tests.slurm.product import ClusterProduct
from tests.up.clients import Background

TICK_S = 0.02
LOOK_S = 0.25


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request came to; ``trouble`` is None when it was answered whole. ``waited`` is how
    long the gate held it.
    """

    replica: str | None
    seconds: float
    trouble: str | None
    waited: float = 0.0


@dataclass
class Flow:
    """Clients with a connection each that ask for ``url`` one request after the other.

    ``size`` is how many clients there are, and may be changed at any time. Each asks once in
    ``period`` seconds, or as soon as it has its answer. ``body`` is what every answer must be,
    where that is known.
    """

    url: str
    size: int = 1
    period: float = 0.0
    body: bytes | None = None
    replies: list[Reply] = field(default_factory=list)

    def __enter__(self) -> Flow:
        self._ended = threading.Event()
        self._background = Background(self._all)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._background.result(120)

    @property
    def failures(self) -> list[str]:
        return [reply.trouble for reply in self.replies if reply.trouble is not None]

    def served_by(self, last: int | None = None) -> set[str | None]:
        """Replicas that answered, or that answered the last so many requests."""
        return {reply.replica for reply in self.replies[-last if last else 0 :]}

    async def _all(self) -> None:
        clients: dict[int, asyncio.Task[None]] = {}
        while not self._ended.is_set():
            for number in range(self.size):
                if number not in clients or clients[number].done():
                    clients[number] = asyncio.create_task(self._client(number))
            await asyncio.sleep(TICK_S)
        await asyncio.gather(*clients.values())

    async def _client(self, number: int) -> None:
        limit = aiohttp.ClientTimeout(total=90)
        async with aiohttp.ClientSession(timeout=limit) as session:
            due = time.monotonic()
            while number < self.size and not self._ended.is_set():
                self.replies.append(await self._ask(session))
                due = max(due + self.period, time.monotonic())
                await asyncio.sleep(due - time.monotonic())

    async def _ask(self, session: aiohttp.ClientSession) -> Reply:
        began, replica, trouble, waited = time.monotonic(), None, None, 0.0
        try:
            async with session.get(self.url) as answer:
                replica = answer.headers.get("X-Slurmgate-Replica")
                waited = float(answer.headers.get("X-Slurmgate-Waited", 0))
                body = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            trouble = f"{error!r} from {replica}"
        else:
            if answer.status != 200:
                trouble = f"{answer.status} {body[:300]!r}"
            elif self.body is not None and body != self.body:
                trouble = f"not whole, from {replica}: {body[-100:]!r}"
        return Reply(replica, time.monotonic() - began, trouble, waited)


class Watch:
    """Slurm's own list of a service's live jobs, looked at again and again."""

    def __init__(self) -> None:
        self.looks: list[list[Job]] = []

    @property
    def most(self) -> int:
        """How many jobs there were at most at one time."""
        return max(map(len, self.looks))

    @property
    def most_pending(self) -> int:
        return max(sum(job.state == "PENDING" for job in look) for look in self.looks)

    @property
    def ids(self) -> set[str]:
        return {job.id for look in self.looks for job in look}


@contextmanager
def watching(product: ClusterProduct, name: str = "probe") -> Iterator[Watch]:
    """Look at the jobs of a service until the block ends. The product must be up."""
    watch, ended = Watch(), threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            watch.looks.append(product.live(name))

    with ThreadPoolExecutor(1) as thread:
        looking = thread.submit(look)
        try:
            yield watch
        finally:
            ended.set()
        looking.result()


def job_ids(product: ClusterProduct, name: str = "probe", state: str = "ready") -> set[str]:
    """Jobs of the service's replicas that are in this state, as /info shows them."""
    return {r["job_id"] for r in product.info(name)["replicas"] if r["state"] == state}


def settled(
    product: ClusterProduct, count: int, name: str = "probe", without: str | None = None
) -> set[str] | None:
    """The ids of exactly ``count`` ready replicas' jobs, once Slurm and /info agree on them and
    the job ``without`` is not among them.
    """
    shown = product.info(name)["replicas"]
    ready = {r["job_id"] for r in shown if r["state"] == "ready"}
    live = {job.id for job in product.live(name)}
    agreed = len(shown) == len(ready) == count and live == ready and without not in ready
    return ready if agreed else None
