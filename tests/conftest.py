"""Settings of all tests."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from tests.coverage_data import remove_broken

# What the tests share asserts too, and its asserts should say as much as theirs.
pytest.register_assert_rewrite(
    "tests.containers.machines",
    "tests.containers.stacks",
    "tests.lab",
    "tests.slurm.product",
    "tests.up.product",
    "tests.waiting",
)

# Busy machines are slow: a test says what happens, not how long it takes. And what is drawn is the
# same in each run, so that a failure is of the change it was run for.
# ``--hypothesis-profile=anew`` draws other examples in each run, and keeps those that failed.
settings.register_profile("anew", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("slurmgate", settings.get_profile("anew"), derandomize=True)
settings.load_profile("slurmgate")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """All tests have run, and pytest-cov, which is around this, has not yet combined its data."""
    result = yield
    if not hasattr(session.config, "workerinput"):
        remove_broken(session.config.rootpath)
    return result
