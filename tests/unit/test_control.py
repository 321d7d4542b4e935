"""The control loop itself, with a launcher that only notes and a clock that jumps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import pytest

from slurmgate.control import Control
from slurmgate.fleet import Report
from slurmgate.model import Config, GateSpec, Health, LauncherKind, Phase
from slurmgate.observed import ReplicaReport, ServiceReport
from slurmgate.ports import Adoption, Launcher
from tests.unit.builders import sighting, spec
from tests.waiting import until


class Noting:
    def __init__(self) -> None:
        self.stopped: list[str] = []

    def adopt(self, specs, observer) -> Adoption:
        return Adoption((sighting("r1", created_at=time.monotonic()),))

    def stop(self, replica: str) -> None:
        self.stopped.append(replica)

    def log_tail(self, replica: str, lines: int) -> list[str]:
        return []

    def close(self, *, stop_replicas: bool, keep_ways: bool = True) -> None:
        """Nothing to do."""


class NoHistory:
    def recent(self):
        return ()

    def add(self, start) -> None:
        """Nothing to do."""


@pytest.mark.parametrize("during", ["a wait", "an event"])
def test_a_backend_that_stood_still_does_not_take_its_own_silence_for_the_gates(during):
    ahead = 0.0
    launcher = Noting()
    control = Control(
        {LauncherKind.PROCESS: cast(Launcher, launcher)},
        lambda: time.monotonic() + ahead,
        "e",
        NoHistory(),
        enabled=True,
    )
    control.start(Config(Path("/x/services.json"), (spec(),), GateSpec()))

    def report() -> None:
        used = {"LLM": ServiceReport(1, waiting=0, in_flight=1)}
        up = {"r1": ReplicaReport(1, 1, Health.UP)}
        control.notify(Report("gate", "e", control.view.number, used, up))

    try:
        report()
        assert control.view.services[0].replicas[0].phase is Phase.READY
        seen = control.view.gate_seen

        def stand_still() -> None:
            nonlocal ahead
            ahead = 400.0

        if during == "an event":
            control.hear(stand_still)
        else:
            stand_still()
        until(lambda: control.view.gate_seen != seen or launcher.stopped)
        report()
        assert control.view.services[0].replicas[0].phase is Phase.READY
        assert launcher.stopped == []
    finally:
        control.close(stop_replicas={})
