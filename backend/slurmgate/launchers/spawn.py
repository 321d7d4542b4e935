"""Starts the script of a service as a process in a session of its own.

Keeps no state; callable from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from slurmgate.errors import StartRefused
from slurmgate.model import ServiceSpec


def command(spec: ServiceSpec) -> list[str]:
    """Give the argv of a service, without the port; StartRefused when there is nothing to run."""
    if not spec.folder.is_dir():
        raise StartRefused(f"the folder {spec.folder} does not exist")
    script = spec.folder / os.path.expanduser(spec.bash_file)
    if not script.exists():
        raise StartRefused(f"bash_file {script} does not exist")
    if not script.is_file():
        raise StartRefused(f"bash_file {script} is not a file")
    if os.access(script, os.X_OK):
        return [str(script)]
    if not os.access(script, os.R_OK):
        raise StartRefused(f"bash_file {script} cannot be read: Permission denied")
    return ["/bin/bash", str(script)]


def start(argv: list[str], folder: Path, environ: Mapping[str, str], log: Path) -> int:
    """Start a process that writes to ``log`` and give its pid; StartRefused says why not.

    The caller must wait for the process by a pidfd: nothing here does.
    """
    with _open_log(log) as output:
        try:
            process = subprocess.Popen(
                argv,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise StartRefused(_why_not(argv[0], error)) from error
        except ValueError as error:  # a zero byte in an argument or a variable
            raise StartRefused(f"cannot start {argv[0]}: {error}") from error
    # Whoever has the pidfd waits for the process: this object must neither poll nor complain.
    process.returncode = 0
    return process.pid


def _why_not(program: str, error: OSError) -> str:
    """Say why a program did not start; the kernel's words alone mislead about the first line."""
    detail = error.strerror or str(error)
    if error.errno == errno.ENOEXEC:
        detail += " (a script needs a first line like #!/bin/bash)"
    elif error.errno == errno.ENOENT and Path(program).exists():
        with contextlib.suppress(OSError), Path(program).open("rb") as file:
            line = file.readline(256).removeprefix(b"#!").strip(b" \t\n")
            detail = f"its first line asks for {line.decode(errors='replace')!r}, which is missing"
    return f"cannot start {program}: {detail}"


def _open_log(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return open(os.open(path, flags, 0o600), "wb", buffering=0)
    except OSError as error:
        raise StartRefused(f"cannot write the log {path}: {error.strerror}") from error
