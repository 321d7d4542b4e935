"""One kept connection per login host, shared by everybody who has a command for it.

``Remotes`` owns all connections and is used by many threads at once. Each host has a lock of its
own, held only to look and to note, never while the network is waited for: connecting is done by one
thread per try, which all callers join.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from pathlib import Path

from slurmgate.model import SshSpec
from slurmgate.ports import Clock
from slurmgate.ssh import children
from slurmgate.ssh.connection import CHANNELS_MAX, Connection, NotSent, Task
from slurmgate.ssh.dialing import DIAL_MAX, Dialer, describe
from slurmgate.ssh.outcome import HostAway, HostRefused, Output
from slurmgate.ssh.script import Framed, frame, remote_command

_LOG = logging.getLogger(__name__)

# A host that takes longer to open a channel on a kept connection is asked on a new one.
_KEPT_PATIENCE = 4.0
_REFUSALS_MAX = CHANNELS_MAX
_BACKOFF_FIRST, _BACKOFF_MAX = 0.2, 5.0
_FORGET_AFTER = 900.0
_JOIN = 2.0


class Remotes:
    """Runs scripts on login hosts, or on this machine where there is none.

    ``home`` is whose ``.ssh`` holds the usual keys and known hosts; default: this user's.
    """

    def __init__(self, clock: Clock = time.monotonic, home: Path | None = None) -> None:
        self._clock = clock
        self._home = home
        self._lock = threading.Lock()
        self._hosts: dict[SshSpec, _Host] = {}
        self._local_slots: dict[SshSpec | None, threading.BoundedSemaphore] = {}
        self._closed = False
        # It logs every refused channel with a traceback; what matters of that is in our errors.
        logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)

    def run(
        self,
        ssh: SshSpec | None,
        script: str,
        *,
        setup: tuple[str, ...] = (),
        timeout: float,
        login_shell: bool = False,
        secret: str | None = None,
    ) -> Output:
        """Run a shell script after the lines of ``setup``; it is ended after ``timeout`` seconds.

        HostAway and HostRefused: it was not run. Unfinished: it was sent, and what it did is not
        known. Returns or raises within ``timeout`` and 15 s more, whatever the other side does. One
        try to connect; who wants another calls again. ``secret`` is left out of what is printed.
        """
        nonce = secrets.token_hex(8)
        framed = Framed(frame(script, setup, nonce), nonce, timeout, secret)
        if ssh is None or ssh.control_path is not None:
            return self._run_child(ssh, framed, login=login_shell)
        command = remote_command(timeout, login_shell=login_shell)
        task = Task(command, framed)
        return self._run_remote(self._host(ssh), task)

    def close(self) -> None:
        """Close every connection; commands under way end as Unfinished, later ones as HostAway."""
        with self._lock:
            self._closed = True
            hosts = list(self._hosts.values())
            self._hosts.clear()
        for host in hosts:
            host.close()

    def _run_child(self, ssh: SshSpec | None, framed: Framed, *, login: bool) -> Output:
        with self._lock:
            self._check_open()
            slots = self._local_slots.setdefault(ssh, threading.BoundedSemaphore(CHANNELS_MAX))
        if not slots.acquire(timeout=DIAL_MAX - children.CHECK_MAX):
            where = children.HERE if ssh is None else ssh.host
            raise HostAway(f"{CHANNELS_MAX} commands are under way on {where} already")
        try:
            if ssh is None:
                return children.run_here(framed, self._clock, login=login)
            return children.run_through_master(ssh, framed, self._clock, login=login)
        finally:
            slots.release()

    def _run_remote(self, host: _Host, task: Task) -> Output:
        deadline = self._clock() + DIAL_MAX
        lost = False
        for _ in range(_REFUSALS_MAX):
            connection, fresh = host.connection(deadline)
            try:
                return connection.run(task, deadline, DIAL_MAX if fresh else _KEPT_PATIENCE)
            except NotSent as error:
                host.drop(connection)
                if not error.refused and (fresh or lost):
                    raise HostAway(str(error)) from error
                lost = lost or not error.refused
                reason = str(error)
                _LOG.info("%s; trying a new connection", reason)
        raise HostAway(reason)

    def _host(self, ssh: SshSpec) -> _Host:
        now = self._clock()
        with self._lock:
            self._check_open()
            host = self._hosts.setdefault(ssh, _Host(ssh, self._home, self._clock))
            host.used_at = now
            old = [s for s, h in self._hosts.items() if h.used_at < now - _FORGET_AFTER]
            forgotten = [self._hosts.pop(spec) for spec in old]
        for each in forgotten:
            each.close()
        return host

    def _check_open(self) -> None:
        if self._closed:
            raise HostAway("the connections were closed: Slurmgate ends")


class _Host:
    """One login host; ``used_at`` belongs to ``Remotes``, all else is guarded by the own lock."""

    def __init__(self, ssh: SshSpec, home: Path | None, clock: Clock) -> None:
        self.used_at = clock()
        self._ssh = ssh
        self._home = home
        self._clock = clock
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._dropped: list[Connection] = []
        self._attempt: _Attempt | None = None
        self._error: HostAway | HostRefused | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._closed = False

    def connection(self, deadline: float) -> tuple[Connection, bool]:
        """Give a connection and whether it is new; connects when there is none.

        HostAway and HostRefused; at once, with the last error, while a backoff runs.
        """
        dead: Connection | None = None
        with self._lock:
            if self._connection is not None:
                if self._connection.usable:
                    return self._connection, False
                dead, self._connection = self._connection, None
            attempt = self._attempt or self._begin()
        if dead is not None:
            _LOG.info("the connection to %s was lost", dead.where)
            dead.retire()
        if not attempt.done.wait(max(0.0, deadline - self._clock())):
            raise HostAway(f"{describe(self._ssh)} did not answer within {DIAL_MAX:g} s")
        if attempt.connection is None:
            raise _copy(attempt.error)
        return attempt.connection, True

    def drop(self, connection: Connection) -> None:
        """Use a connection for nothing new."""
        with self._lock:
            if self._connection is connection:
                self._connection = None
            # Others may still have a command on it: kept for ``close`` until it is closed.
            self._dropped = [c for c in (*self._dropped, connection) if c.open]
        connection.retire()

    def close(self) -> None:
        """Close the connection and end a try to make one."""
        with self._lock:
            self._closed = True
            left = [c for c in (self._connection, *self._dropped) if c is not None]
            self._connection, self._dropped = None, []
            attempt = self._attempt
        if attempt is not None:
            attempt.dialer.abort()
            attempt.join(_JOIN)
        for connection in left:
            connection.close()

    def finished(self, attempt: _Attempt) -> None:
        """Note how a try ended; called by its thread."""
        with self._lock:
            self._attempt = None
            wanted = not self._closed
            if attempt.connection is None:
                known, self._error = self._error, attempt.error
                self._failures += 1
                pause = _BACKOFF_FIRST * 2 ** min(self._failures - 1, 10)
                self._retry_at = self._clock() + min(_BACKOFF_MAX, pause)
                if wanted and str(known) != str(self._error):
                    _LOG.warning("cannot connect: %s", self._error)
            else:
                self._failures, self._error = 0, None
                self._connection = attempt.connection if wanted else None
                _LOG.info("connected to %s", attempt.connection.where)
        if not wanted and attempt.connection is not None:
            attempt.connection.close()

    def _begin(self) -> _Attempt:
        """Start connecting; the lock is held."""
        if self._closed:
            raise HostAway("the connections were closed: Slurmgate ends")
        if self._error is not None and self._clock() < self._retry_at:
            raise _copy(self._error)
        self._attempt = _Attempt(self, Dialer(self._ssh, self._home, self._clock))
        self._attempt.start()
        return self._attempt


class _Attempt(threading.Thread):
    """One try to connect; ``done`` is set when either ``connection`` or ``error`` is final.

    A daemon: a name server that does not answer can hold it for longer than anybody waits.
    """

    def __init__(self, host: _Host, dialer: Dialer) -> None:
        super().__init__(name="ssh-connect", daemon=True)
        self.dialer = dialer
        self.done = threading.Event()
        self.connection: Connection | None = None
        self.error: HostAway | HostRefused = HostAway("connecting failed, see the log")
        self._host = host

    def run(self) -> None:
        """Connect, and tell the host whatever happened."""
        try:
            self.connection = self.dialer.dial()
        except (HostAway, HostRefused) as error:
            self.error = error
        finally:
            self._host.finished(self)
            self.done.set()


def _copy(error: HostAway | HostRefused) -> HostAway | HostRefused:
    """Make a new one of the same kind: an exception object belongs to one thread."""
    return type(error)(str(error))
