"""A real sshd of a test's own: on a free loopback port, as whoever runs the tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from slurmgate import procfs
from slurmgate.model import SshSpec
from tests.ports import free_port as free_port
from tests.waiting import until

HOST = "127.0.0.1"
USER = pwd.getpwuid(os.geteuid()).pw_name


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> str:
    """Make a key pair and give its public line."""
    size = ["-b", "2048"] if kind == "rsa" else []
    command = [
        "ssh-keygen",
        "-q",
        "-t",
        kind,
        *size,
        "-N",
        passphrase,
        "-C",
        "test",
        "-f",
        str(path),
    ]
    subprocess.run(command, check=True, timeout=60)
    return path.with_name(path.name + ".pub").read_text().strip()


def fingerprint(path: Path) -> str:
    """Give the SHA256 fingerprint of a key as ssh-keygen shows it."""
    command = ["ssh-keygen", "-l", "-E", "sha256", "-f", str(path)]
    shown = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    return shown.stdout.split()[1]


class Sshd:
    """One login host: keys, files and the server process; ends everything it started."""

    def __init__(self, folder: Path, *, kinds: Sequence[str] = ("ed25519",), config: str = ""):
        folder.mkdir(exist_ok=True)
        self.folder = folder.resolve()
        self.port = free_port()
        self.config = config
        self.key = self.folder / "key"
        self.known_hosts = self.folder / "known_hosts"
        self.authorized_keys = self.folder / "authorized_keys"
        self.host_keys: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.authorized_keys.write_text(make_key(self.key) + "\n")
        self.new_host_keys(kinds)
        self.trust()

    def new_host_keys(self, kinds: Sequence[str] = ("ed25519",)) -> None:
        """Make other host keys; a running server has them after its next start."""
        self.host_keys = [self.folder / f"host_{kind}_key" for kind in kinds]
        for path, kind in zip(self.host_keys, kinds, strict=True):
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".pub").unlink(missing_ok=True)
            make_key(path, kind)

    def host_line(self, index: int = 0) -> str:
        """Give type and public half of a host key, as they stand in known_hosts."""
        key = self.host_keys[index]
        return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])

    def trust(self) -> None:
        """Write a known_hosts with every host key."""
        lines = [f"[{HOST}]:{self.port} {self.host_line(i)}" for i in range(len(self.host_keys))]
        self.known_hosts.write_text("\n".join(lines) + "\n")

    @property
    def ssh(self) -> SshSpec:
        """How to log in."""
        return SshSpec(HOST, USER, self.key, self.port, self.known_hosts)

    def __enter__(self) -> Sshd:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        config = self.folder / "sshd_config"
        config.write_text(self._settings())
        # sshd executes itself anew for each connection: only absolute paths work there.
        binary = shutil.which("sshd", path=f"/usr/sbin:{os.environ.get('PATH', '')}")
        assert binary is not None, "sshd is not installed"
        command = [binary, "-D", "-e", "-f", str(config)]
        with open(self.folder / "sshd.log", "ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        until(self._answers)

    def stop(self) -> None:
        """End the server and every connection of its."""
        process, self._process = self._process, None
        if process is None:
            return
        members = self._family(process.pid)
        for member in members:
            _signal(member, signal.SIGKILL)
        process.wait(timeout=20)
        until(lambda: not any(procfs.alive(m.pid, m.start) for m in members))

    def cut(self) -> None:
        """Kill every connection, commands included; the server stays."""
        assert self._process is not None
        for member in self._family(self._process.pid):
            if member.pid != self._process.pid:
                _signal(member, signal.SIGKILL)

    def pause(self) -> None:
        """Freeze the server and its connections: the network is as good as dead."""
        assert self._process is not None
        for member in self._family(self._process.pid):
            _signal(member, signal.SIGSTOP)

    def pause_connections(self) -> None:
        """Freeze the connections that are open now; new ones work."""
        assert self._process is not None
        for member in self._family(self._process.pid):
            if member.pid != self._process.pid:
                _signal(member, signal.SIGSTOP)

    def resume(self) -> None:
        """Take a pause back."""
        assert self._process is not None
        for member in self._family(self._process.pid):
            _signal(member, signal.SIGCONT)

    def connections(self) -> int:
        """Count the connections that are logged in or about to."""
        assert self._process is not None
        pid = self._process.pid
        return sum(p.parent == pid and not p.ended for p in procfs.processes())

    def log(self) -> str:
        """Give what the server wrote."""
        return (self.folder / "sshd.log").read_text(errors="replace")

    def _settings(self) -> str:
        lines = [
            self.config,  # first: sshd takes the first value it finds
            f"ListenAddress {HOST}",
            f"Port {self.port}",
            *(f"HostKey {key}" for key in self.host_keys),
            f"AuthorizedKeysFile {self.authorized_keys}",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "UseDNS no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "LogLevel VERBOSE",
        ]
        return "\n".join(lines) + "\n"

    def _answers(self) -> bool:
        """sshd answers"""
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as sock:
                return sock.recv(4) == b"SSH-"
        except OSError:
            return False

    @staticmethod
    def _family(pid: int) -> list[procfs.Process]:
        return [p for p in procfs.processes() if pid in procfs.ancestors(p.pid)]


def _signal(process: procfs.Process, number: signal.Signals) -> None:
    pidfd = procfs.open_process(process.pid, process.start)
    if pidfd is None:
        return
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)
    os.close(pidfd)
