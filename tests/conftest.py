"""Settings of all tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# What the tests share asserts too, and its asserts should say as much as theirs.
pytest.register_assert_rewrite(
    "tests.containers.machines",
    "tests.containers.stacks",
    "tests.lab",
    "tests.slurm.product",
    "tests.up.product",
    "tests.waiting",
)

# Busy machines are slow: a test says what happens, not how long it takes.
settings.register_profile("slurmgate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slurmgate")
