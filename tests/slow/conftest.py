"""What the slow tests run against: Slurmgate in front of a cluster of the test's own."""

from __future__ import annotations

import pytest

from tests.lab.lab import Lab
from tests.slurm.product import ClusterProduct, serving


@pytest.fixture
def product(tmp_path, tmp_path_factory):
    """The product in front of a new cluster, looked over at the end."""
    with (
        Lab(tmp_path_factory.mktemp("lab")) as lab,
        serving(ClusterProduct(tmp_path, lab)) as made,
    ):
        yield made
