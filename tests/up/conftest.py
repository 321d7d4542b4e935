"""One fixture: the product in a directory of the test's own, stopped and looked over at the end."""

from __future__ import annotations

import subprocess

import pytest

from tests.up.product import Product, running


@pytest.fixture
def product(tmp_path):
    with running(Product(tmp_path)) as made:
        yield made


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """A product that runs for a whole module: one cold service that nobody may wake."""
    with running(Product(tmp_path_factory.mktemp("limited"))) as made:
        made.probe(api_paths=["/api"])
        yield made.up()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 and its key, as ``gate.tls`` names them."""
    folder = tmp_path_factory.mktemp("tls")
    chain, key = folder / "chain.pem", folder / "key.pem"
    what = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    )
    subprocess.run(
        ["openssl", *what.split(), "-keyout", str(key), "-out", str(chain)],
        check=True,
        capture_output=True,
    )
    return {"certificate": str(chain), "key": str(key)}
