"""One SSH connection that runs commands, several at a time.

Owned by ``remotes``; any thread may run a command on it. It is closed when it was retired and the
last command on it has ended, or at once by ``close``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import paramiko

from slurmgate.ports import Clock
from slurmgate.ssh.outcome import HostAway, Output, Unfinished
from slurmgate.ssh.script import KILLED, OUTPUT_MAX, Framed, Stream, outcome

CHANNELS_MAX = 6
GRACE = 5.0

_WINDOW = 2 * OUTPUT_MAX
_CHUNK = 1 << 16
_JOIN = 1.0
_STATUS_WAIT = 2.0
_FREED_WAIT = 0.2


class NotSent(Exception):
    """The connection could not take the command; ``refused``: it lives, but wants no channel."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


@dataclass(frozen=True, slots=True)
class Task:
    """A command and the script that it reads."""

    command: str
    framed: Framed


class Connection:
    """A login; ``transports`` are those on the way to it, the host's own last."""

    def __init__(self, where: str, transports: Sequence[paramiko.Transport], clock: Clock) -> None:
        self.where = where
        self._transports = transports
        self._transport = transports[-1]
        self._clock = clock
        self._slots = threading.BoundedSemaphore(CHANNELS_MAX)
        self._lock = threading.Lock()
        self._users = 0
        self._retired = False

    @property
    def usable(self) -> bool:
        """Whether a command may be sent on it, as far as anybody knows."""
        return self.open and not self._retired

    @property
    def open(self) -> bool:
        """Whether it is connected."""
        return self._transport.is_active()

    def retire(self) -> None:
        """Use it for no further command; closed once nobody uses it."""
        with self._lock:
            self._retired = True
            idle = self._users == 0
        if idle:
            self.close()

    def close(self) -> None:
        """Close it at once; commands on it end as Unfinished."""
        close_all(self._transports)

    def run(self, task: Task, deadline: float, patience: float) -> Output:
        """Run a command: sent before ``deadline``, finished within its own time after that.

        ``patience`` is how long the other side may take to open a channel. NotSent when it does not
        take the command: nothing has happened then. HostAway when all channels stay in use;
        Unfinished, HostRefused.
        """
        with self._channel_slot(deadline):
            if self._retired:
                raise NotSent(f"the connection to {self.where} was given up", refused=True)
            channel = self._open(task.command, deadline, patience)
            try:
                return self._talk(channel, task)
            finally:
                _close(channel)

    @contextlib.contextmanager
    def _channel_slot(self, deadline: float) -> Iterator[None]:
        with self._lock:
            self._users += 1
        try:
            if not self._slots.acquire(timeout=max(0.0, deadline - self._clock())):
                raise HostAway(f"{CHANNELS_MAX} commands are under way on {self.where} already")
            try:
                yield
            finally:
                self._slots.release()
        finally:
            with self._lock:
                self._users -= 1
                over = self._retired and self._users == 0
            if over:
                self.close()

    def _open(self, command: str, deadline: float, patience: float) -> paramiko.Channel:
        soon = min(deadline, self._clock() + patience)
        try:
            channel = self._transport.open_session(
                window_size=_WINDOW, timeout=max(0.1, soon - self._clock())
            )
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise self._not_sent("did not open a channel", error, soon) from error
        try:
            with self._limit(deadline):
                channel.exec_command(command)
        except (paramiko.SSHException, EOFError, OSError) as error:
            _close(channel)
            raise self._not_sent("did not start a command", error, deadline) from error
        return channel

    def _not_sent(self, what: str, error: Exception, deadline: float) -> NotSent:
        if not self._transport.is_active():
            return NotSent(f"the connection to {self.where} was lost")
        if self._clock() >= deadline:
            return NotSent(f"{self.where} {what} in time")
        # The text of a refusal may have gone to another thread that was refused at the same time.
        return NotSent(f"{self.where} {what}: {error}", refused=True)

    def _talk(self, channel: paramiko.Channel, task: Task) -> Output:
        began = self._clock()
        timeout = task.framed.timeout
        end = began + timeout + GRACE
        out, err = task.framed.streams()
        try:
            with self._limit(end):
                channel.settimeout(timeout + GRACE)
                _send(channel, task.framed.stdin)
                self._read(channel, channel.recv, out, end)
                self._read(channel, channel.recv_stderr, err, end)
                exit_code = None if out.ended else self._exit_code(channel)
        except TimeoutError as error:
            # timeout(1) on the other side had its chance: nobody is there any more.
            self.retire()
            raise Unfinished(f"no answer from {self.where} within {timeout:g} s") from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise Unfinished(
                f"the connection to {self.where} was lost while a command was sent"
            ) from error
        if out.ended:
            # A channel counts at the other side until the command's shell is gone.
            channel.status_event.wait(_FREED_WAIT)
        return outcome(self.where, exit_code, out, err, timeout, began)

    def _read(
        self,
        channel: paramiko.Channel,
        receive: Callable[[int], bytes],
        stream: Stream,
        end: float,
    ) -> None:
        while not stream.ended:
            left = end - self._clock()
            if left <= 0:
                raise TimeoutError
            channel.settimeout(left)
            chunk = receive(_CHUNK)
            if not chunk:
                return
            stream.feed(chunk)

    def _exit_code(self, channel: paramiko.Channel) -> int | None:
        """Give the exit code; None when the connection was lost, KILLED when a signal ended it."""
        channel.status_event.wait(_STATUS_WAIT)
        if channel.exit_status >= 0:
            return channel.exit_status
        # paramiko does not read the message that tells the signal.
        return KILLED if self._transport.is_active() and channel.closed else None

    @contextlib.contextmanager
    def _limit(self, deadline: float) -> Iterator[None]:
        """Close the connection at ``deadline``: some calls of paramiko wait without a limit."""
        watchdog = threading.Timer(
            max(0.0, deadline - self._clock()) + 0.5, close_all, [self._transports]
        )
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            watchdog.join(_JOIN)


def _send(channel: paramiko.Channel, script: bytes) -> None:
    """Send all of a script. What ended without reading it may have said why: no error then."""
    try:
        channel.sendall(script)
        channel.shutdown_write()
    except TimeoutError:
        raise
    except OSError:
        if not channel.closed:
            raise


def _close(channel: paramiko.Channel) -> None:
    # It says so to the other side, which may be gone without anybody having noticed.
    with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
        channel.close()


def close_all(transports: Sequence[paramiko.Transport]) -> None:
    """Close transports, the last first, and wait until their threads are gone."""
    for transport in reversed(transports):
        transport.close()
        # Ends the timer that paramiko starts for a handshake and leaves behind when it fails.
        transport.packetizer.complete_handshake()
        transport.sock.close()
        if transport.is_alive() and transport is not threading.current_thread():
            transport.join(_JOIN)
