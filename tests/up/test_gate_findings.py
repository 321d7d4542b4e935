"""What the gate tells clients holds, also when they come at just that moment."""

from __future__ import annotations

import asyncio
import time

from tests.up.clients import Background, fetch, session
from tests.waiting import until


async def in_pieces():
    """A body sent without its length."""
    yield b"a"
    yield b"b"


def until_time(moment: float) -> None:
    until(lambda: time.monotonic() >= moment, 60)


def test_a_client_that_comes_back_after_retry_after_is_not_refused_again(product):
    tries = product.folder / "tries"
    script = product.script("bad.sh", f'echo try >> "{tries}"; exit 1')
    product.service("bad", script)
    product.up()

    def count() -> int:
        return len(tries.read_text().splitlines()) if tries.exists() else 0

    for _ in range(3):
        tries_before = count()
        began = time.monotonic()
        answer = product.get("/bad/")
        assert answer.json()["type"].endswith("start-failed")
        assert count() == tries_before + 1, "refused without a start"
        back_at = time.monotonic() + int(answer.headers["Retry-After"])
        # Others who ask meanwhile are told the time that is left, not the whole again.
        until_time(began + 0.6)
        left = back_at - time.monotonic()
        other = product.get("/bad/")
        if count() == tries_before + 1:
            assert other.json()["retry_after_s"] <= max(1, left + 0.3)
        else:  # the machine stood still for so long that this one could start it
            back_at = time.monotonic() + int(other.headers["Retry-After"])
        until_time(back_at)


def test_small_bodies_of_unknown_length_are_held_where_few_bytes_may_be(product):
    product.top["gate"] = {"max_held_bytes": 1000000}
    product.probe(load=1)
    product.up()

    async def send_all():
        async with session() as client:
            return await asyncio.gather(
                *(
                    fetch(client, f"{product.url}/probe/digest", method="POST", data=in_pieces())
                    for _ in range(100)  # far fewer than take turns in the time for that
                )
            )

    answers = Background(send_all).result()
    assert [a.status for a in answers] == [200] * 100
    assert {a.json["length"] for a in answers} == {2}
