"""Parent of all daemons of a lab: when it ends, or when its standard input does, so do they all.

    warden.py < requests > answers

A request is a JSON line, ``{"argv": [...], "env": {...}, "log": "..."}``; the answer names the
daemon's pid or says why it was not started. The warden adopts what its daemons leave behind (job
steps, detached children of jobs, ssh sessions), so all that runs in a lab is below it. Standard
input is a pipe that only the lab holds: it ends with the lab's process, however that one dies.

State: the processes below it. One thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
prctl = ctypes.CDLL(None, use_errno=True).prctl


def die_with_the_warden() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(argv: list[str], env: dict[str, str], log: str) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        return subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd="/",
            start_new_session=True,
            preexec_fn=die_with_the_warden,
        )


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``, as they are just now."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def reap(_number: int = 0, _frame: FrameType | None = None) -> None:
    """Bury the dead; ChildProcessError is silent because nobody need be left."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_all() -> None:
    """Kill until nothing is below; what forks meanwhile is met in the next round."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap()
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        time.sleep(0.005)


def answer(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def leave(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def main() -> None:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)
    signal.signal(signal.SIGCHLD, reap)
    started = []  # kept: a dropped Popen would wait for its child, which reap() does
    try:
        for line in sys.stdin:
            try:
                started.append(start(**json.loads(line)))
            except OSError as error:
                answer({"error": str(error)})
            else:
                answer({"pid": started[-1].pid})
    finally:
        end_all()


if __name__ == "__main__":
    main()
