"""A steady load from a process of its own: ``python -m tests.bench.steady_client PORT PATH RATE``.

It ends when its standard input does, and prints when each request was due, when it ended, and its
status, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench.steady import Asked, Steady

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


class Elsewhere:
    """The load as its starter sees it."""

    def __init__(self, port: int, path: str, rate: float) -> None:
        argv = [sys.executable, "-m", "tests.bench.steady_client", str(port), path, str(rate)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "asking\n"

    def finish(self) -> list[Asked]:
        """End the load and give its answers; every one must be good."""
        shown, _ = self._process.communicate(timeout=PATIENCE_S)
        answers = [Asked(due, due, ended, status, "") for due, ended, status in json.loads(shown)]
        assert all(one.status == 200 for one in answers), "a small request failed"
        return answers

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def steady_elsewhere(port: int, path: str, rate: float) -> Iterator[Elsewhere]:
    """Ask from another process, until ``finish`` is called or the block ends."""
    load = Elsewhere(port, path, rate)
    try:
        yield load
    finally:
        load.close()


def main() -> None:
    port, path, rate = sys.argv[1:]
    with Steady(int(port), path, float(rate)) as load:
        sys.stdout.write("asking\n")
        sys.stdout.flush()
        sys.stdin.read()
    json.dump([(one.due, one.ended, one.status) for one in load.answers], sys.stdout)


if __name__ == "__main__":
    main()
