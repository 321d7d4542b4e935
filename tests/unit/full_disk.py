"""A program for test_history: keep starts on a disk that takes nothing for a while.

Run as ``python -m tests.unit.full_disk FOLDER KIND``; it prints as JSON what was kept and what was
said of it.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from slurmgate.history import History
from slurmgate.observed import Outcome, Start
from tests.waiting import until


class Messages(logging.Handler):
    """Everything that was said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def fill(folder: Path, kind: str) -> None:
    """From now on nothing more can be written, or only part of a line."""
    match kind:
        case "full":
            with (folder / "filler").open("wb", buffering=0) as file:
                with suppress(OSError):
                    while True:
                        file.write(bytes(1024))
        case "read-only":
            until(lambda: remount(folder, "ro"))
        case _:
            most = (folder / "history.jsonl").stat().st_size + 50
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def free(folder: Path, kind: str) -> None:
    """Everything can be written again."""
    match kind:
        case "full":
            (folder / "filler").unlink()
        case "read-only":
            assert remount(folder, "rw")
        case _:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def remount(folder: Path, how: str) -> bool:
    """Fails while a file is open for writing; without ``bind`` only root may do it."""
    command = ["mount", "-o", f"remount,bind,{how}", str(folder)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=20).returncode == 0


def main(folder: Path, kind: str) -> None:
    """Add a start, then others until one is missing, then one more when there is room again."""
    messages = Messages()
    logging.getLogger("slurmgate").addHandler(messages)
    logging.getLogger("slurmgate").setLevel(logging.INFO)
    path = folder / "history.jsonl"
    history = History(path)
    ids: list[str] = []

    def add(replica: str) -> None:
        history.add(Start("LLM", replica, time.monotonic(), Outcome.LOST, reason="x" * 200))
        ids.append(replica)

    def written() -> bool:
        return path.read_bytes().count(b"\n") == len(ids)

    add("first")
    until(lambda: path.exists() and written())
    fill(folder, kind)
    while not messages.said:
        add(f"r{len(ids)}")
        until(lambda: messages.said or written())
    missing = ids[-1]
    left = path.read_bytes()
    for _ in range(3):
        add("while it is full")
    free(folder, kind)
    add("last")
    history.close(20)
    lines = [json.loads(line)["replica"] for line in path.read_bytes().splitlines()]
    json.dump(
        {
            "user": os.getuid(),
            "missing": missing,
            "before": ids[: ids.index(missing)],
            "kept": lines,
            "whole": left.endswith(b"\n"),
            "recent": [start.replica for start in history.recent()] == ids,
            "said": messages.said,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
