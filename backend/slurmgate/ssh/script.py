"""A script as it goes through a shell of somebody's, and what comes back between its marks.

Pure. The shell parses all of a framed script before it runs the first line, so one that arrives cut
off runs not at all; whatever a login shell or ``remote_setup`` prints stays outside the marks.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, field

from slurmgate import upstream_keys
from slurmgate.ssh.outcome import HostAway, HostRefused, Output, Unfinished

OUTPUT_MAX = 8 << 20

_KILL_AFTER = 2
_SAID_MAX = 300
# Of `timeout`: it ended the command; the same, by force.
_ENDED, KILLED = 124, 137
_TIMED_OUT = (_ENDED, KILLED)
# `timeout` could not fork; sshd's own "no logins now" (/etc/nologin); ssh's own failure.
_NOT_NOW = (125, 254, 255)
# The script comes in by descriptor 3: a profile that reads its standard input must not eat it.
_LOGIN = 'script=$(cat <&3); exec 3<&-; eval "$script"'
_LOGIN_SHELL = f"exec /bin/bash -lc {shlex.quote(_LOGIN)} 3<&0 </dev/null"


def command(timeout: float, *, login_shell: bool) -> list[str]:
    """Give the command that reads a framed script; no shell reads its words as anything else."""
    limit = ["timeout", "-k", str(_KILL_AFTER), str(max(1, math.ceil(timeout)))]
    if login_shell:
        return [*limit, "/bin/sh", "-c", _LOGIN_SHELL]
    return [*limit, "/bin/sh", "-s"]


def remote_command(timeout: float, *, login_shell: bool) -> str:
    """Give ``command`` for a login shell of any kind: sh, csh and fish read it alike."""
    return "exec " + shlex.join(command(timeout, login_shell=login_shell))


@dataclass(frozen=True, slots=True)
class Framed:
    """What is sent to ``command``; it is ended after ``timeout`` seconds.

    ``secret`` is left out of what comes back.
    """

    stdin: bytes = field(repr=False)
    nonce: str
    timeout: float
    secret: str | None = field(default=None, repr=False)

    def streams(self) -> tuple[Stream, Stream]:
        """Give what reads its output and its errors."""
        return Stream(self.nonce, self.secret), Stream(self.nonce, self.secret)


def frame(script: str, setup: tuple[str, ...], nonce: str) -> bytes:
    """Give the whole standard input of ``command``."""
    lines = (
        "{",
        # Stay until those below have ended: timeout(1) kills the stubborn only while we live.
        f"trap 'exit {_ENDED}' TERM",
        *setup,
        "set +e",
        f"echo begin-{nonce}",
        f"echo begin-{nonce} >&2",
        "(",
        ":",
        script,
        ")",
        "slurmgate_code=$?",
        f'echo "end-{nonce} $slurmgate_code"',
        f'echo "end-{nonce} $slurmgate_code" >&2',
        "exit 0",
        "} </dev/null",
    )
    return ("\n".join(lines) + "\n").encode(errors="surrogateescape")


@dataclass(slots=True)
class Stream:
    """One of the two streams of a command, as it comes in; belongs to the thread that reads it.

    ``secret`` is in none of the texts it gives: shells can be told to print what they run.
    """

    nonce: str
    secret: str | None = field(default=None, repr=False)
    data: bytearray = field(default_factory=bytearray, repr=False)
    _end: re.Match[bytes] | None = None

    def feed(self, chunk: bytes) -> None:
        """Take in more; Unfinished when it is more than anybody will read."""
        mark = f"end-{self.nonce} (\\d+)\n".encode()
        seen = max(0, len(self.data) - len(mark))
        self.data += chunk
        # Of a copy: a match of the buffer itself would forbid it to grow.
        self._end = self._end or re.compile(mark).search(bytes(self.data[seen:]))
        if self._end is None and len(self.data) > OUTPUT_MAX:
            raise Unfinished(f"the command printed more than {OUTPUT_MAX >> 20} MiB")

    @property
    def begun(self) -> bool:
        """Whether the script itself has begun."""
        return self._begin() >= 0

    @property
    def ended(self) -> bool:
        """Whether the script itself has ended."""
        return self._end is not None

    @property
    def code(self) -> int:
        """The exit code of the script; only when it has ended."""
        assert self._end is not None
        return int(self._end[1])

    def text(self) -> str:
        """Give what the script printed."""
        start = self._begin()
        end = self.data.rfind(f"end-{self.nonce} ".encode())
        return self._shown(start, end) if 0 <= start <= end else ""

    def noise(self) -> str:
        """Give the last of what was printed, by the script or, before it began, by others."""
        return self._shown(max(self._begin(), 0), len(self.data))[-_SAID_MAX:].strip()

    def _shown(self, start: int, end: int) -> str:
        said = upstream_keys.hide(bytes(self.data[start:end]), self.secret)
        return said.decode(errors="replace")

    def _begin(self) -> int:
        mark = f"begin-{self.nonce}\n".encode()
        found = self.data.find(mark)
        return found + len(mark) if found >= 0 else -1


def outcome(
    where: str, exit_code: int | None, out: Stream, err: Stream, timeout: float, began: float
) -> Output:
    """Say what became of a command whose streams have ended.

    ``exit_code`` is that of the whole command as sshd or the kernel told it; None: nobody did.
    """
    if out.ended:
        return Output(out.code, out.text(), err.text(), began)
    if exit_code is None:
        raise Unfinished(f"the connection to {where} was lost while a command ran there")
    said = err.noise() or out.noise()
    said = f", it said: {said}" if said else ""
    if out.begun:
        if exit_code in _TIMED_OUT:
            raise Unfinished(f"a command on {where} was ended after its {timeout:g} s")
        raise Unfinished(f"a command on {where} broke off with exit code {exit_code}{said}")
    if exit_code in _TIMED_OUT:
        raise HostAway(
            f"the login shell or remote_setup on {where} was ended after {timeout:g} s{said}"
        )
    if exit_code in _NOT_NOW:
        raise HostAway(f"no command could be run on {where} (exit code {exit_code}){said}")
    raise HostRefused(
        f"the login shell or remote_setup on {where} ended with exit code {exit_code} before the"
        f" command was run{said}"
    )
