"""A forward that the operator's running OpenSSH master does: no process of ours.

Everything belongs to the loop's thread; the short ssh commands that talk to the master run on
threads of their own.
"""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from slurmgate import openssh
from slurmgate.model import SshSpec
from slurmgate.tunnels.children import Found, environment
from slurmgate.tunnels.link import LISTEN_AGAIN, accepts, backoff
from slurmgate.tunnels.loop import Loop, Timer
from slurmgate.tunnels.stderr import Finding, Meaning, Place, ended
from slurmgate.tunnels.tellers import Teller

_PATIENCE = 10.0
_CHECK = 5.0


class MasterLink:
    """One forward, asked for until the master does it, and looked at every few seconds.

    ``path`` is the unix socket it listens on; None when it is a TCP port. Asking a master once
    more for a port it has does nothing, so that is how a port is looked at.
    """

    def __init__(
        self,
        loop: Loop,
        teller: Teller,
        ssh: SshSpec,
        forward: str,
        place: Place,
        path: Path | None,
    ) -> None:
        self.is_open = False
        self.pid: int | None = None
        self.command = (ssh, forward)
        self._loop = loop
        self._teller = teller
        self._ssh = ssh
        self._forward = forward
        self._place = place
        self._path = path
        self._timer: Timer | None = None
        self._failures = 0
        self._asked = 0
        self._closed = False
        self._one_at_a_time = threading.Lock()

    def start(self, _found: Found | None = None) -> None:
        """Ask the master for the forward; one it does for an earlier backend is made anew."""
        if self._closed:
            return
        self._cancel_timer()
        self._asked += 1
        asked = self._asked

        def work() -> None:
            found = self._request(fresh=True)
            self._loop.call(lambda: self._answered(asked, found))

        threading.Thread(target=work, name="ssh-master", daemon=True).start()

    def tick(self) -> None:
        """Nothing to read: the master's output is the operator's."""

    def reopen(self) -> None:
        """Ask for the forward anew."""
        self.is_open = False
        self.start()

    def close(self, then: Callable[[], None] | None = None) -> None:
        """Take the forward back; ``then`` is called when that is done."""
        self._closed = True
        self.is_open = False
        self._cancel_timer()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

        def work() -> None:
            with self._one_at_a_time:
                self._master("cancel")
            if then is not None:
                self._loop.call(then)

        threading.Thread(target=work, name="ssh-master", daemon=True).start()

    def let_go(self) -> None:
        """Look after it no more; the master goes on."""
        self._closed = True
        self._cancel_timer()

    def _request(self, *, fresh: bool) -> Finding | None:
        with self._one_at_a_time:
            if self._closed:
                return None
            if fresh:
                self._master("cancel")
                if self._path is not None:
                    self._path.unlink(missing_ok=True)
            return self._master("forward")

    def _master(self, operation: str) -> Finding | None:
        """Ask the master; give what it said when it did not do it."""
        try:
            result = subprocess.run(
                openssh.master(self._ssh, operation, "-L", self._forward),
                env=environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Finding(Meaning.OTHER, f"the ssh master at {self._ssh.control_path} hangs")
        except OSError as error:
            return Finding(Meaning.OTHER, f"ssh cannot be started: {error.strerror}")
        if result.returncode == 0:
            return None
        lines = result.stderr.decode(errors="replace").splitlines()
        found = ended(lines, self._place, f"exited with code {result.returncode}")
        remedy = f"if the master has ended, start it: {openssh.master_remedy(self._ssh)}"
        return Finding(found.meaning, f"{found.text}; {remedy}")

    def _answered(self, asked: int, found: Finding | None) -> None:
        if self._closed or asked != self._asked:
            return
        if found is None:
            if not self.is_open:
                self._failures = 0
                self.is_open = True
                self._teller.opened()
            self._timer = self._loop.after(_CHECK, self._check)
            return
        self.is_open = False
        self._failures += 1
        self._teller.failed(found)
        local = found.meaning is Meaning.LOCAL or self._path is None
        # The first failure is no sudden end, as it is with a child: asking again at once is vain.
        pause = LISTEN_AGAIN if local else backoff(self._failures + 1) * random.uniform(0.8, 1.0)
        self._timer = self._loop.after(pause, self.start)

    def _check(self) -> None:
        if self._path is None:
            asked = self._asked

            def work() -> None:
                found = self._request(fresh=False)
                self._loop.call(lambda: self._answered(asked, found))

            threading.Thread(target=work, name="ssh-master", daemon=True).start()
        elif accepts(self._path):
            self._timer = self._loop.after(_CHECK, self._check)
        else:
            self.is_open = False
            self.start()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
