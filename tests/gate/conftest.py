"""A real nginx per test; any error line in its log that the test did not expect fails it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurmgate.model import GateSpec
from tests.gate.body_reader import BodyReader
from tests.gate.harness import EchoService, FakeBackend, Gate, free_port


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sg-gate-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def backend(folder: Path) -> Iterator[FakeBackend]:
    run_dir = folder / "run"
    run_dir.mkdir()
    fake = FakeBackend(run_dir)
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def echo() -> Iterator[EchoService]:
    upstream = EchoService()
    upstream.start()
    yield upstream
    upstream.stop()


@pytest.fixture
def gate_spec() -> GateSpec:
    return GateSpec(listen=f"127.0.0.1:{free_port()}", workers=2)


@pytest.fixture
def gate(
    folder: Path, gate_spec: GateSpec, backend: FakeBackend, echo: EchoService
) -> Iterator[Gate]:
    # The service is asked for so that it outlives the gate, which polls it.
    running = Gate(folder, gate_spec, backend)
    running.start()
    yield running
    running.stop()
    assert running.error_lines() == []


@pytest.fixture(scope="module")
def reader() -> Iterator[BodyReader]:
    path = Path(tempfile.mkdtemp(prefix="sg-scan-"))
    running = BodyReader(path)
    yield running
    running.stop()
    lines = running.error_lines()
    shutil.rmtree(path, ignore_errors=True)
    assert lines == []
