"""Certificates and keys that a server cannot use are found before one tries."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from slurmgate.config import tls_problem
from slurmgate.model import TlsSpec


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two certificates with their keys, and the key of the first one encrypted."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("one", "two"):
        what = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=a"
        openssl(*what.split(), "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem")
    encrypt = ("ec", "-aes128", "-passout", "pass:secret")
    openssl(*encrypt, "-in", folder / "one.key", "-out", folder / "encrypted.key")
    (folder / "words.txt").write_text("no certificate\n")
    (folder / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n")
    return folder


def openssl(*arguments) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def test_a_certificate_with_its_key_is_good(pairs):
    assert tls_problem(TlsSpec(pairs / "one.pem", pairs / "one.key")) is None


@pytest.mark.parametrize(
    ("certificate", "key", "field", "words"),
    [
        ("none.pem", "one.key", "certificate", "No such file"),
        ("one.pem", "none.key", "key", "No such file"),
        ("", "one.key", "certificate", "Is a directory"),
        ("words.txt", "one.key", "certificate", "PEM"),
        ("one.pem", "words.txt", "key", "PEM"),
        ("one.pem", "two.key", "key", "does not belong"),
        ("one.pem", "encrypted.key", "key", "encrypted"),
        ("broken.pem", "one.key", "key", "cannot be used"),
    ],
)
def test_what_is_wrong_is_said_with_its_field(pairs, certificate, key, field, words):
    found = tls_problem(TlsSpec(pairs / certificate, pairs / key))
    assert found is not None
    assert found.startswith(f"gate.tls.{field}: ")
    assert words in found


def test_a_key_that_may_not_be_read_is_said(pairs, as_ordinary_user):
    folder = Path(tempfile.mkdtemp(prefix="sgt-", dir="/tmp"))
    folder.chmod(0o755)
    chain = folder / "one.pem"
    chain.write_bytes((pairs / "one.pem").read_bytes())
    (folder / "closed.key").touch(mode=0)

    def look() -> None:
        found = tls_problem(TlsSpec(chain, folder / "closed.key"))
        assert found is not None
        assert "gate.tls.key" in found
        assert "Permission denied" in found

    try:
        as_ordinary_user(look)
    finally:
        shutil.rmtree(folder)
