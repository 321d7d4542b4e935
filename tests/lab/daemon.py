"""Handles for the daemons of a lab. State: the pid of each, and the pipe to the warden."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.lab.files import LabError
from tests.lab.warden import descendants
from tests.waiting import until

WARDEN = Path(__file__).with_name("warden.py")


class Warden:
    """Starts daemons below a warden process. Callable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WARDEN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is for the lab, not for it
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def below(self) -> list[int]:
        """Pids of everything that it started, and of what that started."""
        return descendants(self.pid)

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> int:
        """The pid of a new daemon; LabError when it cannot be executed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"argv": list(argv), "env": dict(env), "log": str(log)}
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = json.loads(self._process.stdout.readline())
        if "error" in reply:
            raise LabError(reply["error"])
        return int(reply["pid"])

    def end(self) -> None:
        """Kill everything below the warden, and wait until it is gone. Idempotent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.close()
            self._process.wait(30)
            self._process.stdout.close()


class Daemon:
    """One daemon. A stopped one can be started again."""

    def __init__(
        self,
        warden: Warden,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        ready: Callable[[], bool],
    ) -> None:
        self.name = name
        self.pid: int | None = None
        self._warden = warden
        self._argv = argv
        self._env = env
        self._log = log
        self._ready = ready

    def start(self, *, wait: bool = True) -> None:
        """Start it, and with ``wait`` return when it answers."""
        assert not self.alive, f"{self.name} runs already"
        self.pid = self._warden.start(self._argv, self._env, self._log)
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self, seconds: float = 60) -> None:
        """LabError with its log when it dies or does not answer."""

        def settled() -> bool:
            return self._ready() or not self.alive

        with contextlib.suppress(AssertionError):
            until(settled, seconds)
        if not (self.alive and self._ready()):
            tail = self._log.read_text(errors="replace").splitlines()[-15:]
            raise LabError("\n".join([f"{self.name} did not start:", *tail]))

    @property
    def alive(self) -> bool:
        # The warden buries its dead, so a pid that is there runs.
        return self.pid is not None and Path(f"/proc/{self.pid}").exists()

    def stop(self) -> None:
        """End it cleanly (SIGTERM), or by force when that takes more than 10 s."""
        self._signal(signal.SIGTERM)
        try:
            until(lambda: not self.alive, 10)
        except AssertionError:
            self.kill()
        self.pid = None

    def kill(self) -> None:
        """kill -9; returns when it is gone."""
        self._signal(signal.SIGKILL)
        until(lambda: not self.alive)
        self.pid = None

    def pause(self) -> None:
        """Freeze it (SIGSTOP): it keeps its connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            assert self.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class SshServer(Daemon):
    """An sshd; its sessions are processes of their own and outlive it, as everywhere."""

    def sessions(self) -> list[int]:
        """The server's processes for the connections of now."""
        if self.pid is None:
            return []
        found = descendants(self.pid)
        return [pid for pid in found if _program(pid) == "sshd"]

    def cut(self) -> None:
        """End all connections, without a word to the clients."""
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self, *, cut: bool = True) -> None:
        """End it, with its sessions unless ``cut`` is false."""
        if cut and self.alive:
            self.pause()  # so that no connection comes in between
            self.cut()
            self.kill()
        else:
            super().stop()

    def restart(self, *, cut: bool = True) -> None:
        self.stop(cut=cut)
        self.start()


def _program(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def answers(address: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


def answers_unix(path: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        return True
    return False
