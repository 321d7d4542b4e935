"""How the commands talk to the running backend: HTTP over its unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from slurmgate.errors import BackendAway, SlurmgateError, StateError
from slurmgate.files import write_atomic
from slurmgate.state import StateDir

TIMEOUT = 30.0
TOKEN_NOTE = "admin-token-file"


def admin_token(state: StateDir) -> str:
    """Find the token the running backend wants, in the file its configuration names if it does."""
    note = state.path / TOKEN_NOTE
    given = note.read_text().strip() if note.exists() else ""
    return state.admin_token(Path(given) if given else None)


def note_admin_token(state: StateDir, file: Path | None) -> None:
    """Leave word where the admin token is, for commands that do not read the configuration."""
    write_atomic(state.path / TOKEN_NOTE, f"{file or ''}\n".encode())


class Refused(SlurmgateError):
    """The backend answered with a problem."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(str(self._path))


def call(state: StateDir, method: str, path: str, token: str | None = None) -> Any:
    """Make one call; give the JSON answer.

    Raises BackendAway when nobody listens and Refused with the backend's words otherwise.
    """
    connection = _UnixConnection(state.api_socket)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise BackendAway(
            f"no backend answers for the state directory {state.path}; start it with slurmgate up"
        ) from error
    finally:
        connection.close()
    try:
        value = json.loads(body)
    except ValueError as error:
        raise StateError(f"the backend answered {answer.status} without JSON") from error
    if answer.status >= 400:
        raise Refused(str(value.get("detail", body)))
    return value
