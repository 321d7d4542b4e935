"""One fixture: the product in a directory of the test's own, stopped and looked over at the end."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.up.product", "tests.waiting")

from tests.up.product import Product, running  # noqa: E402


@pytest.fixture
def product(tmp_path):
    with running(Product(tmp_path)) as made:
        yield made
