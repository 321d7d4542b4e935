"""What all unit tests share."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch):
    """A runtime directory of the test's own: sockets of long state paths go there, not to /tmp."""
    path = Path(tempfile.mkdtemp(prefix="sgt-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield path
    shutil.rmtree(path, ignore_errors=True)
