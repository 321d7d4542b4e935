"""Files that are either complete or not there, whatever happens while they are written.

Keeps no state. Used by whoever keeps something on disk; callable from any thread.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

Owner = tuple[int, int]
"""Uid and gid that root gives a file away to."""


def write_atomic(path: Path, data: bytes, owner: Owner | None = None) -> None:
    """Replace a file by a complete new one, mode 0600 and on the disk when this returns."""
    temporary = _write_temporary(path, data, owner)
    try:
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, data: bytes, owner: Owner | None = None) -> None:
    """Like ``write_atomic``, but never replace a file; FileExistsError when there is one."""
    temporary = _write_temporary(path, data, owner)
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_temporary(path: Path, data: bytes, owner: Owner | None) -> Path:
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with open(fd, "wb") as file:
            if owner is not None:
                os.fchown(fd, *owner)
            file.write(data)
            file.flush()
            os.fsync(fd)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
