"""Command lines of the OpenSSH client: made by pure functions, run by others.

The user's and the machine's ssh_config must not change what happens, so every option that matters
is given. A value of the configuration never becomes an option or a word of a shell: host and user
may not begin with "-", and paths and proxy commands are quoted the way ssh reads them.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

from slurmgate.model import SshSpec

GLOBAL_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
NODE_PORT = 22
SSH = "ssh"

_JUMP = re.compile(
    r"(?:(?P<user>[^@]+)@)?(?:\[(?P<literal>[^\]@]+)\]|(?P<name>[^\[\]:@,]+))(?::(?P<port>\d{1,5}))?"
)
_FIXED = (
    "BatchMode=yes",
    "PreferredAuthentications=publickey",
    "StrictHostKeyChecking=yes",
    "CheckHostIP=no",
    "VerifyHostKeyDNS=no",
    "UpdateHostKeys=no",
    "CanonicalizeHostname=no",
    "ConnectTimeout=10",
    "ConnectionAttempts=1",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "TCPKeepAlive=yes",
    "ControlMaster=no",
    "ControlPath=none",
    "AddKeysToAgent=no",
    "ForwardAgent=no",
    "ForwardX11=no",
    "Tunnel=no",
    "PermitLocalCommand=no",
    "RequestTTY=no",
    "EscapeChar=none",
    "LogLevel=INFO",
    # Processors have instructions for AES-GCM: 200 MB cost both ends 0.7 s of CPU, not 1.2.
    "Ciphers=aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com,"
    "aes128-ctr,aes192-ctr,aes256-ctr",
)


def options(ssh: SshSpec) -> list[str]:
    """Give every option for a connection of our own to the login host, jump host included.

    ``["ssh", *options(ssh), ..., "--", destination(ssh)]`` is a whole command line.
    """
    chosen = [f"GlobalKnownHostsFile={GLOBAL_KNOWN_HOSTS}", *_identity(ssh)]
    if ssh.known_hosts is not None:
        chosen.append(f"UserKnownHostsFile={_path(ssh.known_hosts)}")
    else:
        chosen.append("UserKnownHostsFile=~/.ssh/known_hosts")
    through = jump(ssh)
    if through is not None:
        chosen.append(f"ProxyCommand={_proxy(through, ssh.host, ssh.port)}")
    return _spell([*_FIXED, *chosen, f"Port={ssh.port}"])


def node_options(
    ssh: SshSpec, address: str, known_hosts: Path, alias: str, port: int = NODE_PORT
) -> list[str]:
    """Give every option for a connection to a compute node, made through the login host.

    ``known_hosts`` holds the pinned keys of the node and nothing else is believed; ``alias`` is
    the name they are filed under. The destination to use is ``node_destination``.
    """
    chosen = [
        "GlobalKnownHostsFile=none",
        f"UserKnownHostsFile={_path(known_hosts)}",
        f"HostKeyAlias={_word(alias)}",
        f"ProxyCommand={_proxy(ssh, address, port)}",
        *_identity(ssh),
    ]
    return _spell([*_FIXED, *chosen, f"Port={port}"])


def destination(ssh: SshSpec) -> str:
    """Name the login host as ssh's last argument; ValueError when ssh would read it otherwise."""
    return node_destination(ssh, ssh.host)


def node_destination(ssh: SshSpec, host: str) -> str:
    """Name another host, logged into with the same user name; ValueError as ``destination``."""
    _check("host", host)
    if "@" in host:
        raise ValueError(f"host {host!r} has a user name in it")
    if ssh.username is None:
        return host
    _check("user name", ssh.username)
    return f"{ssh.username}@{host}"


def master(ssh: SshSpec, operation: str, *arguments: str) -> list[str]:
    """Give the command line that asks the operator's running master for something.

    ``operation`` is ``check``, ``forward`` or ``cancel``; ``arguments`` are for example
    ``-L /path.sock:host:port``. The service has a ``control_path``.
    """
    return [*_master(ssh), "-O", operation, *arguments, "--", destination(ssh)]


def master_command(ssh: SshSpec, command: str) -> list[str]:
    """Give the command line that runs a remote command through the operator's master.

    It fails when no master runs: it never logs in by itself.
    """
    return [*_master(ssh), "-T", "--", destination(ssh), command]


def master_remedy(ssh: SshSpec) -> str:
    """Give what an operator types to start the master that ``control_path`` means."""
    port = [] if ssh.port == 22 else ["-p", str(ssh.port)]
    return shlex.join([SSH, "-M", "-S", str(ssh.control_path), *port, "-N", destination(ssh)])


def jump(ssh: SshSpec) -> SshSpec | None:
    """Describe the host to go through, None without; ValueError when ``jump`` is not one.

    Key, known hosts and, unless it names another, the user are those of the login host.
    """
    if ssh.jump is None:
        return None
    parts = _JUMP.fullmatch(ssh.jump)
    port = int(parts["port"] or 22) if parts else 0
    if parts is None or not 0 < port < 65536:
        raise ValueError(f"ssh_jump {ssh.jump!r} is not [user@]host[:port]")
    host = parts["literal"] or parts["name"]
    user = parts["user"] or ssh.username
    found = dataclasses.replace(ssh, host=host, port=port, username=user, jump=None)
    destination(found)
    return dataclasses.replace(found, control_path=None)


def _master(ssh: SshSpec) -> list[str]:
    # % in a control path is left to ssh: operators write %h and %r there as in their ssh_config.
    # The proxy command keeps ssh from logging in by itself when the master is gone.
    chosen = ["BatchMode=yes", "ControlMaster=no", "ProxyCommand=false", "EscapeChar=none"]
    chosen += ["ForwardAgent=no", "ForwardX11=no", "LogLevel=INFO", f"Port={ssh.port}"]
    return [SSH, *_spell(chosen), "-S", str(ssh.control_path)]


def _proxy(through: SshSpec, host: str, port: int) -> str:
    """Give the shell command that connects its standard streams to a port behind a host."""
    _check("host", host)
    start = [SSH, *options(through)] if through.control_path is None else _master(through)
    target = f"[{host}]:{port}"
    # ssh replaces %h and the like in a proxy command, and so does the inner one in its own turn.
    return _percent(shlex.join([*start, "-W", target, "--", destination(through)]))


def _identity(ssh: SshSpec) -> list[str]:
    if ssh.key_file is None:
        return []
    return ["IdentitiesOnly=yes", f"IdentityFile={_path(ssh.key_file)}"]


def _spell(chosen: list[str]) -> list[str]:
    return ["-F", "none", *(word for option in chosen for word in ("-o", option))]


def _path(path: Path) -> str:
    """Quote a path as the value of an option: words, quotes, backslashes and % mean something."""
    return _word(_percent(str(path)))


def _word(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _percent(value: str) -> str:
    return value.replace("%", "%%")


def _check(what: str, value: str) -> None:
    """Refuse what ssh would take for an option or a URI, or what no host or user is called."""
    if value.startswith(("-", "ssh://")) or not value or re.search(r"[\x00-\x20\x7f]", value):
        raise ValueError(f"{what} {value!r} cannot be passed to ssh")
