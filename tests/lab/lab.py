"""A real Slurm cluster on this machine, in a folder of its own: what the Slurm tests run against.

munged, slurmctld, three slurmd and an sshd as the login host, each lab on a block of loopback
addresses of its own (127.a.b.1 the login host, 127.a.b.11, .12, .13 the nodes), so that several
labs run side by side and services on different nodes can use the same port. Nothing of the
machine's own Slurm, munge or ssh is read or written; as root an empty /run/sshd is made where it
is missing, because sshd insists on it.

All of it runs as the current user. ``home`` is the home directory of ssh logins and jobs, so the
user's real one stays as it is; ``.profile`` and ``.bashrc`` there are those of the login host.

Partitions, all on all nodes: ``main`` (default); ``low``, whose jobs are requeued for those of
``high``; ``quick`` with a limit of one minute, where longer jobs wait for ever; ``staff`` for an
account that nobody has.

State: the daemons, through their handles.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.lab import files, texts
from tests.lab.daemon import Daemon, SshServer, Warden, answers, answers_unix
from tests.lab.files import SYSTEM_PATH, LabError, find
from tests.lab.login import Job, LoginHost
from tests.lab.place import Place, loopback
from tests.waiting import until

__all__ = ["Job", "Lab", "LabError"]

ROOT = Path(__file__).resolve().parents[2]
PROBE = ROOT / "tests" / "up" / "probe.py"


class Lab(LoginHost):
    """A cluster below ``folder``; ``changes`` are settings of slurm.conf, such as MinJobAge=5."""

    def __init__(
        self, folder: Path, *, nodes: int = 3, place: Place | None = None, **changes: object
    ) -> None:
        self.folder = folder.resolve()
        self.place = place or loopback(self.folder, nodes, secrets.token_hex())
        self._changes = changes
        self.address = self.place.login
        self.addresses = dict(self.place.nodes)
        self.slurm_conf = self.folder / "slurm.conf"
        self.key_file = self.folder / "ssh" / "id_ed25519"
        self.known_hosts = self.folder / "ssh" / "known_hosts"
        self.slurmd: dict[str, Daemon] = {}
        self.node_sshd: dict[str, SshServer] = {}
        #: Why neither login host nor nodes have an sshd on port 22; None: they have.
        self.port_22_problem = self.place.port_22_problem
        self._warden: Warden | None = None
        path = f"{SYSTEM_PATH}:{Path(find('sbatch')).parent}"
        home = self.place.home
        self._session_env = {"SLURM_CONF": str(self.slurm_conf), "HOME": str(home), "PATH": path}
        super().__init__(
            user=pwd.getpwuid(os.getuid()).pw_name,
            nodes=list(self.addresses),
            home=home,
            env={"LANG": "C.UTF-8", **self._session_env},
        )

    # -- up and down -----------------------------------------------------------------------

    def start(self) -> Lab:
        """Start it; returns when every node is idle. LabError says what did not start."""
        files.lay_out(self.place)
        self.slurm_conf.write_text(texts.slurm_conf(self.place, self.user, self._changes))
        self.address_script = files.write_address_script(self.place)
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self._warden = Warden()
        try:
            self._make_handles(self._warden)
            self._start_daemons()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End every process of the lab, jobs included, and remove the folder. Idempotent."""
        if self._warden is not None:
            self._warden.end()
            self._warden = None
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def __enter__(self) -> Lab:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _start_daemons(self) -> None:
        """Together where possible: slurmd wants slurmctld, and both want munged."""
        self.munged.start()
        servers = [*([self.sshd] if "login" in self.place.roles else []), *self.node_sshd.values()]
        for server in servers:
            server.start(wait=False)
        if "login" in self.place.roles:
            self.slurmctld.start()
        for slurmd in self.slurmd.values():
            slurmd.start(wait=False)
        for daemon in (*self.slurmd.values(), *servers):
            daemon.wait_until_ready()
        if "login" in self.place.roles:
            self._wait_until_idle()

    def _wait_until_idle(self, seconds: float = 120) -> None:
        try:
            until(self.is_idle, seconds)
        except AssertionError:
            seen = self.run("sinfo", "-N", "-l", check=False)
            raise LabError(f"nodes are not idle:\n{seen.stdout}{seen.stderr}") from None

    # -- daemons ---------------------------------------------------------------------------

    def _make_handles(self, warden: Warden) -> None:
        place, munge = self.place, self.folder / "munge"
        self.munged = self._daemon(
            warden,
            "munged",
            [find("munged"), "--foreground", "--force", f"--socket={munge}/socket"]
            + [f"--{what}-file={munge}/{what}" for what in ("key", "pid", "seed", "log")],
            lambda: answers_unix(munge / "socket"),
        )
        conf = ["-D", "-f", str(self.slurm_conf)]
        self.slurmctld = self._daemon(
            warden,
            "slurmctld",
            [find("slurmctld"), *conf],
            lambda: answers(place.login, place.control_port),
        )
        self.sshd = self._ssh_server(warden, "login", place.ssh_port)
        for name in filter(place.roles.__contains__, place.nodes):
            argv = [find("slurmd"), *conf, "-N", name]
            self.slurmd[name] = self._daemon(
                warden, f"slurmd-{name}", argv, self._answers(name, place.node_ports[name])
            )
            if place.port_22_problem is None:
                self.node_sshd[name] = self._ssh_server(warden, name, 22)

    def _answers(self, role: str, port: int) -> Callable[[], bool]:
        address = self.place.listen[role]
        return lambda: answers(address, port)

    def _daemon(
        self, warden: Warden, name: str, argv: list[str], ready: Callable[[], bool]
    ) -> Daemon:
        log = self.folder / "log" / f"{name}.err"
        return Daemon(warden, name, argv, self._daemon_env(), log, ready)

    def _ssh_server(self, warden: Warden, role: str, port: int) -> SshServer:
        config = self._write_sshd_config(role, port)
        argv = [find("sshd"), "-D", "-e", "-f", str(config)]
        log = self.folder / "log" / f"sshd-{role}.log"
        ready = self._answers(role, port)
        return SshServer(warden, f"sshd-{role}", argv, self._daemon_env(), log, ready)

    def _write_sshd_config(
        self, role: str, port: int, extra: tuple[str, ...] = (), env: Mapping[str, str] = {}
    ) -> Path:
        ports = {port} if self.port_22_problem else {port, 22}
        server = texts.Sshd(
            listen=[f"{self.place.listen[role]}:{number}" for number in sorted(ports)],
            host_key=self.folder / "ssh" / f"host_{role}",
            authorized_keys=self.folder / "ssh" / "authorized_keys",
            environment={**self._session_env, **env},
            pam=files.is_locked(self.user),
        )
        path = self.folder / "ssh" / f"{role}.conf"
        path.write_text(texts.sshd_config(server, extra))
        return path

    def _daemon_env(self) -> dict[str, str]:
        return {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", "HOME": str(self.home)}

    def sshd_options(self, *lines: str, env: Mapping[str, str] = {}) -> None:
        """Restart the login host's sshd, cutting its sessions, with these lines of sshd_config and
        this environment of sessions; without any: as it was at first.
        """
        self._write_sshd_config("login", self.place.ssh_port, lines, env)
        self.sshd.restart()

    def change_host_key(self, role: str = "login") -> None:
        """Give an ssh server another host key, which ``known_hosts`` does not know."""
        path = self.folder / "ssh" / f"host_{role}"
        path.unlink()
        path.with_suffix(".pub").unlink()
        files.make_key(path)
        (self.sshd if role == "login" else self.node_sshd[role]).restart()

    # -- what services need ----------------------------------------------------------------

    def ssh_fields(self) -> dict[str, Any]:
        """Fields of a services.json that lead to the login host."""
        return {
            "remote_host": self.address,
            "ssh_port": self.place.ssh_port,
            "ssh_username": self.user,
            "ssh_key_file": str(self.key_file),
            "ssh_known_hosts": str(self.known_hosts),
        }

    def need_port_22(self) -> None:
        """AssertionError with a remedy when there are no ssh servers on port 22."""
        remedy = (
            "run as root, or `sysctl net.ipv4.ip_unprivileged_port_start=22`; an sshd of the "
            "machine's own must not listen on 0.0.0.0:22"
        )
        assert self.port_22_problem is None, f"{self.port_22_problem} ({remedy})"

    def bare_path(self) -> str:
        """A PATH with every command of the system but Slurm's: ``sshd_options(env={"PATH": …})``
        hides Slurm from all but login shells, whose /etc/profile sets another.
        """
        return str(files.make_bare_path(self.folder / "bare"))

    def script(self, name: str, body: str) -> str:
        """Write a job script; its absolute path."""
        return str(files.write_script(self.folder / "jobs" / name, body))

    def probe_script(self, bind: str = "node") -> str:
        """A job script that runs tests/up/probe.py on port $1 of the node's own address ("node"),
        of 127.0.0.1 ("loopback") or of every address ("any"); its path.
        """
        where = {
            "node": f'"$({self.address_script})"',
            "loopback": "127.0.0.1",
            "any": "0.0.0.0",
        }[bind]
        return self.script(
            f"probe-{bind}.sh",
            f'PROBE_HOST={where}\nexport PROBE_HOST\nexec "{sys.executable}" "{PROBE}" "$1"',
        )

    def processes(self) -> list[int]:
        """Everything that runs in the lab now: daemons, ssh sessions, jobs."""
        return self._warden.below() if self._warden is not None else []
