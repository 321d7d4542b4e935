"""Making a connection: name, TCP, jump host, host key, login; all within one deadline.

A dialer is used by one thread, once; ``abort`` may be called from another. It translates every
failure: HostRefused when only a person can help, HostAway when the next try may work.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import socket
import threading
from pathlib import Path

import paramiko

from slurmgate import openssh
from slurmgate.model import SshSpec
from slurmgate.ports import Clock
from slurmgate.ssh import keys, known_hosts
from slurmgate.ssh.connection import Connection, close_all
from slurmgate.ssh.outcome import HostAway, HostRefused

DIAL_MAX = 10.0

_KEEPALIVE = 15
_DEAD_AFTER_MS = 30_000


def describe(ssh: SshSpec) -> str:
    """Name a login host in texts for people."""
    name = f"{ssh.username}@{ssh.host}" if ssh.username else ssh.host
    return name if ssh.port == 22 else f"{name} port {ssh.port}"


def account() -> tuple[str, Path]:
    """Give name and home of the user this process runs as, the way ssh takes them."""
    try:
        entry = pwd.getpwuid(os.geteuid())
    except KeyError as error:
        raise HostRefused(f"user id {os.geteuid()} has no entry in the password file") from error
    return entry.pw_name, Path(entry.pw_dir)


class Dialer:
    """One try to connect."""

    def __init__(self, ssh: SshSpec, home: Path | None, clock: Clock) -> None:
        self._ssh = ssh
        self._home = home
        self._clock = clock
        self._deadline = clock() + DIAL_MAX
        self._lock = threading.Lock()
        self._transports: list[paramiko.Transport] = []
        self._aborted = False

    def dial(self) -> Connection:
        """Connect and log in; HostRefused, HostAway. Nothing is left open after a failure."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.abort)
            try:
                through = openssh.jump(self._ssh)
                openssh.destination(self._ssh)
            except ValueError as error:
                raise HostRefused(str(error)) from error
            if through is None:
                transport = self._negotiate(self._tcp(self._ssh), self._ssh, direct=True)
            else:
                first = self._negotiate(self._tcp(through), through, direct=True)
                self._log_in(first, through)
                transport = self._negotiate(self._forward(first), self._ssh, direct=False)
            self._log_in(transport, self._ssh)
            for each in self._transports:
                each.set_keepalive(_KEEPALIVE)
            stack.pop_all()
        return Connection(describe(self._ssh), tuple(self._transports), self._clock)

    def abort(self) -> None:
        """Close what is open; a dial under way fails soon after."""
        with self._lock:
            self._aborted = True
            open_now = tuple(self._transports)
        close_all(open_now)

    def _left(self) -> float:
        left = self._deadline - self._clock()
        if left <= 0:
            raise HostAway(f"{describe(self._ssh)} did not answer within {DIAL_MAX:g} s")
        return left

    def _tcp(self, ssh: SshSpec) -> socket.socket:
        where = describe(ssh)
        try:
            found = socket.getaddrinfo(ssh.host, ssh.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise HostAway(f"the name {ssh.host} was not resolved: {error.strerror}") from error
        except UnicodeError as error:
            raise HostRefused(f"{ssh.host!r} is not a host name") from error
        failure = "no address"
        for index, (family, kind, protocol, _, address) in enumerate(found):
            with contextlib.ExitStack() as stack:
                try:
                    sock = stack.enter_context(socket.socket(family, kind, protocol))
                    sock.settimeout(self._left() / (len(found) - index))
                    sock.connect(address)
                    _tune(sock)
                except OSError as error:
                    failure = error.strerror or str(error)
                    continue
                stack.pop_all()
                return sock
        raise HostAway(f"no connection to {where}: {failure}")

    def _forward(self, first: paramiko.Transport) -> paramiko.Channel:
        where = f"{describe(self._ssh)} through {self._ssh.jump}"
        try:
            return first.open_channel(
                "direct-tcpip",
                (self._ssh.host, self._ssh.port),
                ("127.0.0.1", 0),
                timeout=self._left(),
            )
        except paramiko.ChannelException as error:
            if error.code == 1:
                raise HostRefused(
                    f"no connection to {where}: the jump host prohibits forwarding"
                ) from error
            raise HostAway(f"no connection to {where}: {error.text}") from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise HostAway(f"no connection to {where}: {error}") from error

    def _negotiate(
        self, sock: socket.socket | paramiko.Channel, ssh: SshSpec, *, direct: bool
    ) -> paramiko.Transport:
        """Exchange keys and make sure that the host is the one it should be."""
        where = describe(ssh)
        user_file = ssh.known_hosts or self._home_folder() / ".ssh" / "known_hosts"
        files = (user_file, openssh.GLOBAL_KNOWN_HOSTS)
        transport = self._adopt(sock)
        known = known_hosts.look_up(ssh.host, ssh.port, files, direct=direct)
        _ask_for(transport, known.kinds)
        left = self._left()
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = left
        try:
            transport.start_client(timeout=left)
            key = transport.get_remote_server_key()
        except paramiko.ssh_exception.IncompatiblePeer as error:
            raise HostRefused(f"{where} has no SSH algorithms in common with us") from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            self._left()
            what = str(error) or "it hung up"
            raise HostAway(f"no SSH connection to {where}: {what}") from error
        known.check(known_hosts.HostKey(key.get_name(), key.asbytes()))
        return transport

    def _adopt(self, sock: socket.socket | paramiko.Channel) -> paramiko.Transport:
        transport = paramiko.Transport(sock)
        with self._lock:
            self._transports.append(transport)
            aborted = self._aborted
        if aborted:
            raise HostAway("the connection is no longer wanted")
        return transport

    def _home_folder(self) -> Path:
        return self._home or account()[1]

    def _log_in(self, transport: paramiko.Transport, ssh: SshSpec) -> None:
        user = ssh.username or account()[0]
        where = describe(ssh)
        with keys.candidates(ssh.key_file, self._home_folder()) as (found, problems):
            refused: list[str] = []
            for name, key in found:
                transport.auth_timeout = self._left()
                try:
                    more = transport.auth_publickey(user, key)
                except paramiko.BadAuthenticationType as error:
                    raise HostRefused(_no_keys(where, error.allowed_types)) from error
                except (paramiko.SSHException, EOFError, OSError) as error:
                    self._judge(transport, where, refused, error)
                    refused.append(f"{name} ({key.get_name()} {key.fingerprint})")
                    continue
                if more:
                    raise HostRefused(_second_factor(where, more))
                return
        if not refused:
            tried = "; ".join(problems) or "there is neither an ssh-agent with a key nor one"
            raise HostRefused(
                f"no key to log in to {where} with: {tried}. Give one as ssh_key_file"
            )
        raise HostRefused(_not_accepted(user, ssh, refused, problems))

    def _judge(
        self, transport: paramiko.Transport, where: str, refused: list[str], error: Exception
    ) -> None:
        """Return when a key was just refused, raise when something else happened."""
        self._left()
        if transport.is_active() and isinstance(error, paramiko.AuthenticationException):
            return
        if refused:  # as sshd does after MaxAuthTries keys
            raise HostRefused(
                f"{where} hung up after it had refused {', '.join(refused)}:"
                " give the right key as ssh_key_file"
            ) from error
        raise HostAway(f"{where} hung up during login") from error


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # A dead path shows when the keepalives stay unacknowledged for so long.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_AFTER_MS)


def _ask_for(transport: paramiko.Transport, kinds: list[str]) -> None:
    """Ask for the types of key the host is known by first, or it would look like another one."""
    options = transport.get_security_options()
    wanted = {"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in kinds else set()
    wanted.update(kinds)
    options.key_types = tuple(sorted(options.key_types, key=lambda kind: kind not in wanted))


def _no_keys(where: str, allowed: list[str]) -> str:
    return (
        f"{where} lets nobody in with a key alone, it wants: {', '.join(allowed)}."
        " Log in yourself with ssh -M and give its control socket as ssh_control_path"
    )


def _second_factor(where: str, more: list[str]) -> str:
    return (
        f"{where} accepts the key and wants more: {', '.join(more)}."
        " Log in yourself with ssh -M and give its control socket as ssh_control_path"
    )


def _not_accepted(user: str, ssh: SshSpec, refused: list[str], problems: list[str]) -> str:
    unusable = f" ({'; '.join(problems)})" if problems else ""
    remedy = f"append its public half to ~/.ssh/authorized_keys of {user} there"
    if ssh.key_file is not None:
        command = ["ssh-copy-id", "-i", f"{ssh.key_file}.pub", "-p", str(ssh.port)]
        remedy += ": " + shlex.join([*command, f"{user}@{ssh.host}"])
    return f"{user}@{ssh.host} does not accept {', '.join(refused)}{unusable}: {remedy}"
