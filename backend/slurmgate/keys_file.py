"""Changing the file of clients' keys: mode 0600, always complete, of changes at once none is lost.

Keeps no state. Whoever changes the file holds a lock on it and puts a new one in its place; who
waited for the lock of a file that was replaced begins again with the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from slurmgate.errors import KeysError
from slurmgate.files import Owner, write_atomic, write_new
from slurmgate.keys import Key, content, parse, serialise

_LOCK_PATIENCE = 10.0
_LOCK_LOOK = 0.02


def change(path: Path, fold: Callable[[tuple[Key, ...]], tuple[Key, ...]]) -> None:
    """Have ``fold`` make the new keys of those in the file, and write them; KeysError.

    A file that is missing or empty has no keys. What ``fold`` raises leaves the file as it is.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    try:
        while True:
            with _locked(path) as found:
                if found is None:
                    with contextlib.suppress(FileExistsError):  # another one was quicker
                        write_new(path, serialise(fold(())), _owner_for(path.parent.stat()))
                        return
                else:
                    text = content(found, path)
                    known = parse(text, path) if text.strip() else ()
                    fresh = serialise(fold(known))
                    write_atomic(path, fresh, _owner_for(os.fstat(found)))
                    return
    except FileNotFoundError as error:
        raise KeysError([f"{path}: there is no folder {path.parent}; make it first"]) from error
    except PermissionError as error:
        whom = "the user that Slurmgate runs as, or as root"
        raise KeysError([f"{path}: cannot be written; run this as {whom}"]) from error
    except OSError as error:
        raise KeysError([f"{path}: cannot be written: {error.strerror}"]) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """Give the file opened and locked; None when there is none. KeysError when that takes long."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        try:
            if _lock(fd) and _is_at(fd, path):
                _must_be_ours(fd, path)
                yield fd
                return
        finally:
            os.close(fd)
        if time.monotonic() > deadline:
            raise KeysError([f"{path}: another command has been changing it for long; try again"])
        time.sleep(_LOCK_LOOK)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Say whether nobody has put another file there before we had the lock."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _must_be_ours(fd: int, path: Path) -> None:
    """A file that we wrote anew would be closed to its owner."""
    owner = os.fstat(fd).st_uid
    if os.geteuid() not in (0, owner):
        raise KeysError([f"{path}: belongs to uid {owner}; run this as that user or as root"])


def _owner_for(found: os.stat_result) -> Owner | None:
    """Root writes for whom the file, or its folder, is."""
    return (found.st_uid, found.st_gid) if os.geteuid() == 0 else None
