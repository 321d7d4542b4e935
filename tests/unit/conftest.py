"""What all unit tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch):
    """A runtime directory of the test's own: sockets of long state paths go there, not to /tmp."""
    path = Path(tempfile.mkdtemp(prefix="sgt-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def public_folder(runtime_directory: Path) -> Path:
    """A folder of the test's own that any user of this machine may enter."""
    runtime_directory.chmod(0o755)
    path = runtime_directory / "public"
    path.mkdir()
    return path


@pytest.fixture
def as_ordinary_user() -> Callable[[Callable[[], None]], None]:
    """Calls a function in a child process without root's rights, and fails when it does."""

    def call(function: Callable[[], None]) -> None:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                function()
                code = 0
            except BaseException:  # noqa: BLE001 - the parent fails, with this on standard error
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0

    return call
