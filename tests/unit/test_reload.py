"""The configuration is put in force as a whole, and watching it survives every refusal."""

from __future__ import annotations

import errno
import json

import pytest

from slurmgate import config as configuration
from slurmgate.errors import BackendAway, ConfigError
from slurmgate.reload import RESTART_THE_GATE, Reloader
from tests.waiting import until


class Backend:
    """A file and a reloader for it; ``fault`` is raised by the next step it names."""

    def __init__(self, folder):
        self.path = folder / "services.json"
        self.write(1)
        self.faults = {}
        self.applied = []
        config = configuration.load(self.path)
        self.gate: str | None = None
        self.reloader = Reloader(config, self._apply, self._try_gate, serving=lambda: self.gate)

    def write(self, workers: int) -> None:
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(json.dumps({"Services": [], "gate": {"workers": workers}}))
        fresh.replace(self.path)

    def _fail(self, step: str) -> None:
        if step in self.faults:
            raise self.faults.pop(step)

    def _apply(self, config, content):
        self._fail("apply")
        self.applied.append((config.gate.workers, content))

    def _try_gate(self, fresh, running):
        self._fail("try")

        def commit():
            self._fail("commit")
            return [f"from {running.gate.workers} to {fresh.gate.workers}"]

        return commit


@pytest.fixture
def backend(tmp_path):
    made = Backend(tmp_path)
    yield made
    made.reloader.close()


def test_what_was_read_is_what_is_kept(backend):
    backend.write(2)
    assert backend.reloader.reload() == ["from 1 to 2"]
    assert backend.applied == [(2, backend.path.read_bytes())]
    assert backend.reloader.config.gate.workers == 2


def test_a_gate_that_reads_its_section_only_at_its_start_is_to_be_restarted_until_it_was(backend):
    backend.gate = "first"
    backend.write(1)
    backend.reloader.reload()
    assert backend.reloader.gate_note is None
    backend.write(2)
    backend.faults["commit"] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConfigError):
        backend.reloader.reload()
    assert backend.reloader.gate_note is None
    backend.reloader.reload()
    for _ in range(2):
        assert backend.reloader.gate_note == RESTART_THE_GATE
        backend.reloader.reload()
    backend.gate = "second"
    assert backend.reloader.gate_note is None


@pytest.mark.parametrize("step", ["try", "commit"])
def test_a_full_disk_refuses_the_file_and_changes_nothing(backend, step):
    backend.write(2)
    backend.faults[step] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConfigError, match="No space left"):
        backend.reloader.reload()
    assert "No space left" in backend.reloader.error
    assert backend.applied == []
    assert backend.reloader.config.gate.workers == 1
    assert backend.reloader.reload() == ["from 1 to 2"]
    assert backend.reloader.error is None


def test_a_configuration_that_was_not_applied_is_not_the_one_in_force(backend):
    backend.write(2)
    backend.faults["apply"] = BackendAway("the control loop did not answer in time")
    with pytest.raises(BackendAway):
        backend.reloader.reload()
    assert backend.reloader.config.gate.workers == 1


def test_what_an_operator_should_know_of_a_change_that_was_noticed_is_logged(backend, caplog):
    backend.reloader.start()
    backend.write(2)
    until(lambda: "from 1 to 2" in caplog.messages)


def test_the_file_is_watched_on_after_an_error_of_the_machine(backend):
    backend.faults["try"] = OSError(errno.ENOSPC, "No space left on device")
    backend.reloader.start()
    backend.write(2)
    until(lambda: backend.reloader.error)
    backend.write(3)
    until(lambda: backend.reloader.config.gate.workers == 3)
