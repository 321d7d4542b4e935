"""Commands in processes of this machine: a local shell, or ssh through the operator's master.

Keeps no state. Each command leads a session of its own and is gone when the call returns; any
thread may call.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from dataclasses import dataclass
from typing import IO

from slurmgate import openssh
from slurmgate.model import SshSpec
from slurmgate.ports import Clock
from slurmgate.ssh import script
from slurmgate.ssh.connection import GRACE
from slurmgate.ssh.dialing import describe
from slurmgate.ssh.outcome import HostAway, HostRefused, Output, Unfinished
from slurmgate.ssh.script import Framed, Stream

HERE = "this machine"
CHECK_MAX = 5.0

_CHUNK = 1 << 16
_SSH_FAILED = 255
_FREED_WAIT = 0.2
# What ssh says when it did not get through the master and tried the proxy command that never works.
_NO_MASTER = b"UNKNOWN port 65535"


def run_here(framed: Framed, clock: Clock, *, login: bool) -> Output:
    """Run a framed script in a shell of this machine."""
    argv = script.command(framed.timeout, login_shell=login)
    return _Child(HERE, argv, framed, clock).run()


def run_through_master(ssh: SshSpec, framed: Framed, clock: Clock, *, login: bool) -> Output:
    """Run a framed script through the running master; HostRefused when there is none."""
    _check_master(ssh)
    argv = openssh.master_command(ssh, script.remote_command(framed.timeout, login_shell=login))
    return _Child(describe(ssh), argv, framed, clock).run()


def _check_master(ssh: SshSpec) -> None:
    try:
        argv = openssh.master(ssh, "check")
        remedy = openssh.master_remedy(ssh)
    except ValueError as error:
        raise HostRefused(str(error)) from error
    try:
        checked = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_MAX, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise HostAway(f"the master at {ssh.control_path} does not answer") from error
    except OSError as error:
        raise HostRefused(f"ssh cannot be run: {error.strerror}") from error
    if checked.returncode != 0:
        said = checked.stderr.decode(errors="replace").strip()
        raise HostRefused(
            f"no SSH master runs at ssh_control_path {ssh.control_path} ({said}): log in with"
            f" {remedy}"
        )


@dataclass(slots=True)
class _Child:
    where: str
    argv: list[str]
    framed: Framed
    clock: Clock

    def run(self) -> Output:
        out, err = self.framed.streams()
        began = self.clock()
        end = began + self.framed.timeout + GRACE
        with self._start() as process:
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                self._read({process.stdout: out, process.stderr: err}, end)
                exit_code = self._exit_code(process, end, ended=out.ended)
            finally:
                if process.returncode is None:
                    _kill(process)
        if self._through_master and exit_code == _SSH_FAILED:
            exit_code = self._explain(out, err, began)
        return script.outcome(self.where, exit_code, out, err, self.framed.timeout, began)

    @property
    def _through_master(self) -> bool:
        return self.argv[0] == openssh.SSH

    def _explain(self, out: Stream, err: Stream, began: float) -> int | None:
        """Say what ssh's own exit code means; HostAway when the command was not sent."""
        if not out.begun and _NO_MASTER in err.data:
            raise HostAway(f"the master did not take a command for {self.where}: {err.noise()}")
        # ssh says it also of a command that was killed, as timeout(1) does in the end.
        return script.KILLED if self.clock() - began >= self.framed.timeout else None

    def _start(self) -> subprocess.Popen[bytes]:
        # The script is a file without a name: nobody has to feed a pipe while the output is read.
        with os.fdopen(os.memfd_create("script"), "wb+") as file:
            file.write(self.framed.stdin)
            file.seek(0)
            try:
                return subprocess.Popen(
                    self.argv,
                    stdin=file,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,
                )
            except OSError as error:
                raise HostRefused(f"{self.argv[0]} cannot be run: {error.strerror}") from error

    def _read(self, streams: dict[IO[bytes], Stream], end: float) -> None:
        """Read until every stream has ended; Unfinished at ``end``."""
        with selectors.DefaultSelector() as selector:
            for pipe, stream in streams.items():
                selector.register(pipe, selectors.EVENT_READ, stream)
            while selector.get_map():
                left = end - self.clock()
                if left <= 0:
                    limit = self.framed.timeout
                    raise Unfinished(f"no answer from {self.where} within {limit:g} s")
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, _CHUNK)
                    key.data.feed(chunk)
                    if not chunk or key.data.ended:
                        selector.unregister(key.fd)

    def _exit_code(
        self, process: subprocess.Popen[bytes], end: float, *, ended: bool
    ) -> int | None:
        """Wait for the process; None when what is left of it does not matter."""
        # ssh stays while anything the script left behind holds its streams.
        patience = _FREED_WAIT if ended and self._through_master else end - self.clock()
        try:
            code = process.wait(max(_FREED_WAIT, patience))
        except subprocess.TimeoutExpired as error:
            if ended:
                return None
            raise Unfinished(f"a command on {self.where} did not end") from error
        return code if code >= 0 else 128 - code


def _kill(process: subprocess.Popen[bytes]) -> None:
    # It leads a session and was not reaped: the number is still its own.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
