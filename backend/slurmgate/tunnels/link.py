"""One ssh kept running: opening, open, or waiting for its next try.

Everything here belongs to the loop's thread, but for ``is_open``, which any thread may read.
"""

from __future__ import annotations

import random
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slurmgate.tunnels import children, listeners
from slurmgate.tunnels.children import Child, Found, Log
from slurmgate.tunnels.loop import Loop, Timer
from slurmgate.tunnels.routes import Address, Command
from slurmgate.tunnels.stderr import Finding, Meaning, Place, connection_failed, ended
from slurmgate.tunnels.tellers import Teller
from slurmgate.tunnels.turns import Turn

_POLL = (0.01, 0.25)  # while opening; in between a twentieth of the time it takes
_OPENING_MAX = 60.0
_STEADY = 30.0  # a tunnel open so long has recovered from what broke it before
LISTEN_AGAIN = 30.0
_CLOSE_PATIENCE, _REOPEN_PATIENCE = 2.0, 1.0

Prepare = Callable[[Callable[[Command | Finding], None]], None]
"""Does what must be done before ssh can start, and gives what to run or what went wrong."""


def backoff(failures: int) -> float:
    """Give the seconds to wait after so many failures: none after the first, then longer ones."""
    return 0.0 if failures <= 1 else min(15.0, 0.5 * 2.0 ** min(failures - 2, 8))


@dataclass(frozen=True, slots=True)
class Means:
    """What a link needs: its thread, its command, and whom it deals with."""

    loop: Loop
    teller: Teller
    command: Command
    place: Place
    turn: Turn
    prepare: Prepare | None


class Link(ABC):
    """The ssh of one key and kind."""

    def __init__(self, means: Means) -> None:
        self.command = means.command
        self.is_open = False
        self._loop = means.loop
        self._teller = means.teller
        self._place = means.place
        self._turn = means.turn
        self._prepare = means.prepare
        self._log = Log(means.command.log)
        self._child: Child | None = None
        self._timer: Timer | None = None
        self._began = 0.0
        self._opened_at: float | None = None
        self._failures = 0
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process that is looked after."""
        return None if self._child is None else self._child.pid

    def start(self, found: Found | None = None) -> None:
        """Take over an ssh that runs, or start one."""
        child = None
        if found is not None:
            child = children.take_over(self._loop, self.command, found, self._exited)
        if child is None:
            self._begin()
            return
        for line in self._log.new_lines():  # what it means was told to who followed it then
            self._teller.count(connection_failed(line, self._place))
        if self._accepts(child):
            self._child = child
            self._opened()
        else:
            self._end(child, _REOPEN_PATIENCE)

    def tick(self) -> None:
        """Read what ssh has printed while the tunnel is open."""
        if self.is_open:
            for line in self._log.new_lines():
                self._teller.connection_failed(connection_failed(line, self._place))

    def reopen(self) -> None:
        """End the ssh and start another one now; one that is just being opened is left alone."""
        child, self._child = self._child, None
        if child is not None and not self.is_open:
            self._child = child
            return
        self._is_open_no_more()
        if child is None:
            self._begin()
        else:
            self._end(child, _REOPEN_PATIENCE)

    def close(self, then: Callable[[], None] | None = None) -> None:
        """End the ssh for good; ``then`` is called when it has ended."""
        self._stop()
        self.is_open = False
        self._clean()
        self.command.log.unlink(missing_ok=True)
        child, self._child = self._child, None
        if child is not None:
            child.end(_CLOSE_PATIENCE, then)
        elif then is not None:
            then()

    def let_go(self) -> None:
        """Look after it no more and let the ssh run."""
        self._stop()
        if self._child is not None:
            self._child.let_go()
            self._child = None

    @abstractmethod
    def _accepts(self, child: Child) -> bool:
        """Whether the ssh listens."""

    @abstractmethod
    def _clean(self) -> None:
        """Remove what an earlier ssh left behind."""

    @abstractmethod
    def _end(self, child: Child, patience: float) -> None:
        """End an ssh that another one is to follow, and start that."""

    def _delay(self, found: Finding) -> float:
        """How long to wait after a failure; spread, so that not all tunnels log in at once."""
        return backoff(self._failures) * random.uniform(0.8, 1.0)

    def _begin(self) -> None:
        self._cancel_timer()
        if self._closed or self._child is not None:
            return
        self._turn.take(self._log_in)

    def _log_in(self) -> None:
        if self._prepare is None:
            self._spawn(self.command)
        else:
            self._prepare(self._spawn)

    def _spawn(self, prepared: Command | Finding) -> None:
        if self._closed or self._child is not None:
            return
        if isinstance(prepared, Finding):
            self._failed(prepared)
            return
        self.command = prepared
        self._log.restart()
        try:
            self._clean()
            self._child = children.start(self._loop, self.command, self._exited)
        except OSError as error:
            self._failed(Finding(Meaning.OTHER, f"ssh cannot be started: {error}"))
            return
        self._began = time.monotonic()
        self._poll()

    def _poll(self) -> None:
        child = self._child
        if child is None or self.is_open:
            return
        passed = time.monotonic() - self._began
        if self._accepts(child):
            self._opened()
        elif passed < _OPENING_MAX:
            pause = min(max(_POLL[0], passed / 20), _POLL[1])
            self._timer = self._loop.after(pause, self._poll)
        else:
            self._child = None
            child.end(_REOPEN_PATIENCE)
            text = f"{self._place.via} did not let us in within {_OPENING_MAX:.0f} s"
            self._failed(Finding(Meaning.OTHER, text))

    def _opened(self) -> None:
        self._cancel_timer()
        self._turn.leave()
        self._log.new_lines()  # banners
        self.is_open = True
        self._opened_at = time.monotonic()
        self._teller.opened()

    def _exited(self, child: Child, words: str) -> None:
        if child is not self._child:
            return
        self._child = None
        self._cancel_timer()
        lines = self._log.new_lines(whole=True)
        self._failed(ended(lines, self._place, words))

    def _failed(self, found: Finding) -> None:
        self._turn.leave()
        self._is_open_no_more()
        self._failures += 1
        self._teller.failed(found)
        self._timer = self._loop.after(self._delay(found), self._begin)

    def _is_open_no_more(self) -> None:
        if self.is_open and self._opened_at is not None:
            if time.monotonic() - self._opened_at >= _STEADY:
                self._failures = 0
        self.is_open = False

    def _stop(self) -> None:
        self._closed = True
        self._turn.leave()
        self._cancel_timer()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class UnixLink(Link):
    """The tunnel of a replica: what nginx dials."""

    def __init__(self, means: Means, path: Path) -> None:
        super().__init__(means)
        self._socket = path

    def _accepts(self, child: Child) -> bool:
        # ssh listens only when it has logged in, and no earlier socket of that name was left.
        # Dialling it would make a connection to the service, so only one that was taken over is.
        if self._child is child:
            return self._socket.is_socket()
        return accepts(self._socket)

    def _clean(self) -> None:
        self._socket.unlink(missing_ok=True)

    def _end(self, child: Child, patience: float) -> None:
        self._clean()
        child.end(patience)
        self._begin()


class LocalLink(Link):
    """The listener of a ``local_port``."""

    def __init__(self, means: Means, address: Address) -> None:
        super().__init__(means)
        self._address = address

    def _accepts(self, child: Child) -> bool:
        return listeners.listens(child.pid, self._address[1])

    def _clean(self) -> None:
        pass

    def _end(self, child: Child, patience: float) -> None:
        child.end(patience, self._begin)  # two cannot listen on one port

    def _delay(self, found: Finding) -> float:
        return LISTEN_AGAIN if found.meaning is Meaning.LOCAL else super()._delay(found)


def accepts(path: Path) -> bool:
    """Say whether somebody listens on a unix socket, by dialling it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:  # many others wait to be accepted
            return True
        except OSError:
            return False
    return True
