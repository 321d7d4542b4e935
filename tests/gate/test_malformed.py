"""Malformed requests by the hundred: refused, none read as two, none wakes a service."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from slurmgate.model import GateSpec
from tests.gate.harness import DEADLINE_S, FakeBackend, Gate, replica, service, wait_until
from tests.gate.malformed import MODEL, Case, Keeper, Kept, corpus

AT_ONCE = 200
SILENCE_S = 0.6
STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) ", re.MULTILINE)
LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: ?[^\x00\r\n]*")
ONCE = (b"host", b"content-length", b"content-type", b"authorization", b"x-api-key")
NEVER = (b"transfer-encoding", b"connection", b"te", b"trailer", b"keep-alive", b"upgrade")


@pytest.fixture
def gate_spec(gate_spec: GateSpec) -> GateSpec:
    return replace(gate_spec, max_body=1 << 20)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    running = Keeper()
    running.start()
    yield running
    running.stop()


async def send(gate: Gate, case: Case) -> tuple[Case, bytes]:
    """What comes back on the case's connection until it ends or falls silent; whoever is not
    refused is answered first, however busy the machine is.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    got = b""
    try:
        writer.write(case.raw)
        while True:
            patience = SILENCE_S if got or case.refused else DEADLINE_S
            part = await asyncio.wait_for(reader.read(65536), patience)
            if not part:
                break
            got += part
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return case, got


async def send_all(gate: Gate, cases: list[Case]) -> list[tuple[Case, bytes]]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def send_one(case: Case) -> tuple[Case, bytes]:
        async with turn:
            return await send(gate, case)

    return await asyncio.gather(*(send_one(case) for case in cases))


def marked(cases: list[Case]) -> list[Case]:
    """Each case with a request id of its own where it has header lines, to know it again."""
    return [
        replace(
            case, raw=case.raw.replace(b"\r\nHost: a\r\n", b"\r\nHost: a\r\nX-Case: %d\r\n" % i, 1)
        )
        for i, case in enumerate(cases)
    ]


def is_clean(kept: Kept) -> bool:
    names = [line.partition(b":")[0].lower() for line in kept.lines]
    return (
        all(LINE.fullmatch(line) for line in kept.lines)
        and all(names.count(name) <= 1 for name in ONCE)
        and not any(name in NEVER or name.startswith(b"x-slurmgate") for name in names)
        and b"stowaway" not in kept.head
    )


def case_of(kept: Kept) -> int:
    found = re.search(rb"\r\nX-Case: (\d+)\r\n", kept.head)
    assert found, kept.head
    return int(found.group(1))


def test_malformed_requests_are_refused_and_wake_nothing(
    keeper: Keeper, gate: Gate, backend: FakeBackend
) -> None:
    gate.expected_errors += ["client intended to send too large", "invalid chunked body"]
    backend.publish(
        service(state="ready", replicas=[replica(keeper.port)]),
        service("Sleepy", models=[MODEL]),
    )
    wait_until(lambda: gate.get("/llm/first").status == 200, "warm")
    keeper.kept.clear()
    before = gate.workers()
    cases = marked(corpus())
    assert len(cases) > 1000

    results = asyncio.run(send_all(gate, cases))

    wrong = [
        (case.name, got[:200])
        for case, got in results
        if any(int(status) >= 500 for status in STATUS.findall(got))
        or (case.refused and any(int(status) < 400 for status in STATUS.findall(got)))
    ]
    assert wrong == []
    assert keeper.odd == []
    assert [kept for kept in keeper.kept if not is_clean(kept)] == []
    reached = [case_of(kept) for kept in keeper.kept]
    assert len(set(reached)) == len(reached), "two requests out of one"
    assert [cases[i].name for i in reached if cases[i].refused] == []
    assert {i for i, case in enumerate(cases) if not case.refused} == set(reached)
    assert gate.workers() == before
    wait_until(lambda: backend.service_note("LLM").get("in_flight") == 0, "counts given back")
    assert not any("Sleepy" in note["services"] for note in backend.notes)
