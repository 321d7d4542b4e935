"""What `make test-containers` prepared: image tag, user, Compose tool; in the environment."""

from __future__ import annotations

import os

import pytest


def setting(name: str) -> str:
    """A value that scripts/containers exports. Fails the test when it was not run."""
    value = os.environ.get(name)
    if value is None:
        pytest.fail(f"{name} is not set: run these tests with `make test-containers`", False)
    return value


def give(path: str | os.PathLike[str]) -> None:
    """Give a file to the user that the containers run as; only root can, and only root needs to."""
    if os.getuid() == 0:
        os.chown(path, int(setting("SLURMGATE_UID")), int(setting("SLURMGATE_GID")))
