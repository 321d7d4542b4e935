"""The keys to log in with: the configured file, or else the agent's and the usual files.

Keeps no state. A key that cannot be used says what is wrong with it and what helps; nothing of a
key but its name and fingerprint is ever shown.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from paramiko.pkey import UnknownKeyType

from slurmgate.ssh.outcome import HostRefused

_USUAL = ("id_rsa", "id_ecdsa", "id_ed25519")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@contextlib.contextmanager
def candidates(
    key_file: Path | None, home: Path
) -> Iterator[tuple[list[tuple[str, paramiko.PKey]], list[str]]]:
    """Give the keys to try in order, each with its name, and what is wrong with the others.

    HostRefused when ``key_file`` is given and cannot be used. The agent is held open meanwhile.
    """
    if key_file is not None:
        yield [(f"the key {key_file}", load(key_file))], []
        return
    with contextlib.ExitStack() as stack:
        problems: list[str] = []
        found = _agent_keys(stack, problems)
        for path in (home / ".ssh" / name for name in _USUAL):
            if path.exists():
                try:
                    found.append((f"the key {path}", load(path)))
                except HostRefused as error:
                    problems.append(str(error))
        yield found, problems


def load(path: Path) -> paramiko.PKey:
    """Read a private key; HostRefused that says what is wrong with the file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise HostRefused(f"the SSH key {path} is not a file")
        # As ssh does: a file of somebody else's is judged by whoever owns it.
        if status.st_uid == os.geteuid() and status.st_mode & _OTHERS:
            raise HostRefused(
                f"the SSH key {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}),"
                f" ssh does not use such keys: {shlex.join(['chmod', '600', str(path)])}"
            )
        return paramiko.PKey.from_path(path)
    except FileNotFoundError as error:
        raise HostRefused(f"the SSH key {path} does not exist") from error
    except OSError as error:
        raise HostRefused(f"the SSH key {path} cannot be read: {error.strerror}") from error
    except (TypeError, paramiko.PasswordRequiredException) as error:
        raise HostRefused(
            f"the SSH key {path} has a passphrase, which nobody is there to type: load it into an"
            " ssh-agent and leave ssh_key_file out, or give the control socket of a running master"
            " as ssh_control_path, or use a key without one"
        ) from error
    except (ValueError, paramiko.SSHException, UnknownKeyType, UnsupportedAlgorithm) as error:
        raise HostRefused(
            f"{path} is not a private SSH key that can be used here"
            " (ed25519, ecdsa or rsa, as ssh-keygen makes them)"
        ) from error


def _agent_keys(
    stack: contextlib.ExitStack, problems: list[str]
) -> list[tuple[str, paramiko.PKey]]:
    try:
        agent = paramiko.Agent()
    except (OSError, paramiko.SSHException) as error:
        problems.append(f"the ssh-agent does not answer: {error}")
        return []
    stack.callback(agent.close)
    found: list[tuple[str, paramiko.PKey]] = []
    for key in agent.get_keys():
        name = f"the agent's key {key.comment or key.get_name()}"
        # paramiko drops the connection over a kind of key it does not know: one it could not read.
        if getattr(key, "inner_key", None) is None:
            problems.append(f"{name} is of a kind that cannot be used here ({key.get_name()})")
        else:
            found.append((name, key))
    return found
