"""Becoming the user Slurmgate runs as, when root starts it.

Changes the identity, environment and working directory of this process, for good. Called once,
before anything was started.
"""

from __future__ import annotations

import logging
import os
import pwd
import sys
from dataclasses import dataclass
from pathlib import Path

import slurmgate
from slurmgate.errors import StateError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class User:
    """An account; ``name`` is None for a uid without one, as in containers."""

    uid: int
    gid: int
    name: str | None
    home: Path | None


def choose(name: str | None, state: Path) -> User | None:
    """Say who is to run Slurmgate: ``name``, else the owner of the state directory.

    None when that is who we are. StateError when the user is unknown or out of our reach.
    """
    if name is not None:
        try:
            user = _account(pwd.getpwnam(name))
        except KeyError as error:
            raise StateError(f"--user {name}: this machine has no such user") from error
    else:
        owner = _owner(state) if os.geteuid() == 0 else None
        if owner is None:
            return None
        user = owner
    if user.uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise StateError(f"--user {name}: only root can become another user")
    return user


def become(user: User) -> None:
    """Give up root for good."""
    try:
        if user.name is None:
            os.setgroups([user.gid])
        else:
            os.initgroups(user.name, user.gid)
        os.setgid(user.gid)
        os.setuid(user.uid)
    except OSError as error:
        raise StateError(f"cannot become {user.name or user.uid}: {error.strerror}") from error
    if user.home is not None:
        os.environ["HOME"] = str(user.home)
    if user.name is not None:
        os.environ["USER"] = os.environ["LOGNAME"] = user.name
    runtime = Path(f"/run/user/{user.uid}")
    if runtime.is_dir():
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    else:
        os.environ.pop("XDG_RUNTIME_DIR", None)  # root's
    if not os.access(".", os.X_OK):
        os.chdir("/")
    _LOG.info("running as %s", user.name or f"uid {user.uid}")
    for path, mode in ((Path(sys.executable), os.X_OK), (Path(slurmgate.__file__), os.R_OK)):
        if not os.access(path, mode):
            raise StateError(
                f"{user.name or user.uid} may not use {path}; install Slurmgate where it can"
            )


def give_state(user: User, state: Path) -> None:
    """As root make a state directory the user could not make itself; leave one that exists."""
    if state.exists():
        return
    above = next(folder for folder in state.parents if folder.exists())
    if above.stat().st_uid == user.uid:
        return  # it can, and then the folders on the way are its own too
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        state.mkdir(mode=0o700)
        os.chown(state, user.uid, user.gid, follow_symlinks=False)
    except OSError as error:
        raise StateError(f"cannot make the state directory {state}: {error.strerror}") from error


def _owner(state: Path) -> User | None:
    try:
        found = state.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"cannot use the state directory {state}: {error.strerror}") from error
    try:
        return _account(pwd.getpwuid(found.st_uid))
    except KeyError:
        return User(found.st_uid, found.st_gid, None, None)


def _account(entry: pwd.struct_passwd) -> User:
    return User(entry.pw_uid, entry.pw_gid, entry.pw_name, Path(entry.pw_dir))
