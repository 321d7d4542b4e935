"""``slurmgate logs``: what the replicas of a service print.

Those of processes are files of this machine; those of Slurm jobs lie with their cluster, and the
running backend fetches their last lines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from slurmgate import client
from slurmgate.errors import SlurmgateError, StateError
from slurmgate.launchers import logs
from slurmgate.model import LauncherKind
from slurmgate.state import StateDir, safe_name

LOOK_EVERY = 0.2
ASK_EVERY = 2.0
FOLLOWED_LINES = 1000


def run_logs(args: argparse.Namespace) -> int:
    """``logs``: with ``-f`` also those of replicas that are started later."""
    state = StateDir.find(args.state_dir)
    known = _service_of(state, args.name)
    if known is not None and known["launcher"] == LauncherKind.SLURM:
        return _run_job_logs(args, state, known["name"])
    name = args.name if known is None else known["name"]
    folder = state.logs / safe_name(name)
    seen = _logs(folder)
    if not seen:
        if known is not None:
            raise StateError(f"{name} has no logs yet: it was never started")
        raise StateError(
            f"no service {args.name}, or it has no logs yet; slurmgate status lists the services"
        )
    newest = seen[-1]
    with newest.open("rb") as file:
        _show(b"".join(line + b"\n" for line in logs.last_lines(file, args.n, most=sys.maxsize)))
        if args.f:
            _follow(file, folder, set(seen))
    return 0


def _service_of(state: StateDir, name: str) -> dict[str, Any] | None:
    """Ask the backend for a service by name or route; None when it knows none, or none runs."""
    try:
        found: dict[str, Any] = client.call(state, "GET", f"/info/{quote(name, safe='')}")
    except SlurmgateError:
        return None
    return found


def _run_job_logs(args: argparse.Namespace, state: StateDir, name: str) -> int:
    """Show the last lines of the newest job; with ``-f`` ask again and again."""
    wanted = max(args.n, FOLLOWED_LINES) if args.f else args.n
    path = f"/admin/logs/{quote(name, safe='')}?lines={wanted}"
    found = client.call(state, "GET", path, client.admin_token(state))
    _show_lines(found["lines"][-args.n :] if args.n > 0 else [])
    while args.f:
        time.sleep(ASK_EVERY)
        before, found = found, client.call(state, "GET", path, client.admin_token(state))
        if found["replica"] == before["replica"]:
            _show_lines(added(before["lines"], found["lines"]))
        else:
            sys.stderr.write(f"slurmgate: replica {found['replica']}\n")
            _show_lines(found["lines"])
    return 0


def added(before: list[str], after: list[str]) -> list[str]:
    """Give what was added to a log between two looks at its last lines."""
    for passed in range(len(before)):
        kept = before[passed:]
        if after[: len(kept)] == kept:
            return after[len(kept) :]
    return after


def _show_lines(lines: Sequence[str]) -> None:
    sys.stdout.writelines(line + "\n" for line in lines)
    sys.stdout.flush()


def _logs(folder: Path) -> list[Path]:
    """List the logs of a service, the one last written to last."""

    def written(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except FileNotFoundError:  # a start of the service removed it
            return 0.0

    return sorted(folder.glob("*.log"), key=written)


def _follow(file: BinaryIO, folder: Path, seen: set[Path]) -> None:
    """Show what is added, then the logs of newer replicas; until Ctrl-C."""
    with contextlib.ExitStack() as stack:
        while True:
            fresh = [path for path in _logs(folder) if path not in seen]
            _rewind(file)
            _show(file.read())  # after the look for newer ones: this one may just have ended
            for path in fresh:
                seen.add(path)
                sys.stderr.write(f"slurmgate: replica {path.stem}\n")
                stack.close()
                file = stack.enter_context(path.open("rb"))
                _show(file.read())
            time.sleep(LOOK_EVERY)


def _rewind(file: BinaryIO) -> None:
    """Go on at the beginning of a log that was cut because it had become too long."""
    if os.fstat(file.fileno()).st_size < file.tell():
        file.seek(0)


def _show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()
