"""Clusters for the Slurm tests: one that all share, and new ones for tests that break things."""

from __future__ import annotations

import contextlib

import pytest

from tests.lab.lab import Lab
from tests.slurm.product import ClusterProduct, serving


@pytest.fixture(scope="session")
def shared_lab(tmp_path_factory):
    """The cluster of the whole run. Fixtures of a wider scope than one test use this one."""
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def lab(shared_lab):
    """The shared cluster, with no job in its queue afterwards. Leave its daemons alone."""
    yield shared_lab
    shared_lab.clear()


@pytest.fixture
def own_lab(tmp_path_factory):
    """Make a cluster of the test's own: ``own_lab(SlurmdTimeout=10)``, arguments as of Lab."""
    with contextlib.ExitStack() as stack:
        yield lambda **changes: stack.enter_context(
            Lab(tmp_path_factory.mktemp("own-lab"), **changes)
        )


@pytest.fixture
def product(tmp_path, lab):
    """The product in front of the shared cluster, looked over at the end."""
    with serving(ClusterProduct(tmp_path, lab)) as made:
        yield made


@pytest.fixture
def own_product(tmp_path, own_lab):
    """One whose cluster the test may break."""
    with serving(ClusterProduct(tmp_path, own_lab(SlurmdTimeout=10))) as made:
        yield made
