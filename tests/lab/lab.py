"""A real Slurm cluster on this machine, in a folder of its own: what the Slurm tests run against.

munged, slurmctld, three slurmd and an sshd as the login host, each lab on a block of loopback
addresses of its own (127.a.b.1 the login host, 127.a.b.11, .12, .13 the nodes), so that several
labs run side by side and services on different nodes can use the same port. Nothing of the
machine's own Slurm, munge or ssh is read or written; as root an empty /run/sshd is made where it
is missing, which sshd insists on.

All of it runs as the current user. ``home`` is the home directory of ssh logins and jobs, so the
user's real one stays as it is; ``.profile`` and ``.bashrc`` there are those of the login host.

State: the daemons, through their handles. A lab may be used from several threads.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.lab import texts
from tests.lab.daemon import Daemon, LabError, SshServer, Warden, answers, answers_unix
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
PROBE = ROOT / "tests" / "up" / "probe.py"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "sshd", "ssh-keygen")
PORTS = range(11000, 20000)  # below what kernels hand out, and no port of a service
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY TIMEOUT".split()
)


@dataclass(frozen=True, slots=True)
class Job:
    """A line of squeue; ``node`` is empty while it is pending."""

    id: str
    state: str
    reason: str
    node: str
    partition: str
    name: str


class Lab:
    """A cluster below ``folder``. Attributes are for tests to read.

    ``min_job_age``, ``slurmd_timeout`` and ``requeue_delay`` are Slurm's, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 3,
        min_job_age: int = 60,
        slurmd_timeout: int = 300,
        requeue_delay: int = 8,
    ) -> None:
        self.folder = folder.resolve()
        self.user = pwd.getpwuid(os.getuid()).pw_name
        block = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}"
        self.address = f"{block}.1"
        self.addresses = {f"n{i}": f"{block}.{10 + i}" for i in range(1, nodes + 1)}
        self.nodes = list(self.addresses)
        ports = _free_ports(nodes + 2)
        self.ssh_port, control_port, *node_ports = ports
        self.settings = texts.Settings(
            cluster="lab-" + block.replace(".", "-"),
            user=self.user,
            folder=self.folder,
            login=self.address,
            nodes=self.addresses,
            control_port=control_port,
            node_ports=dict(zip(self.nodes, node_ports, strict=True)),
            min_job_age=min_job_age,
            slurmd_timeout=slurmd_timeout,
            requeue_delay=requeue_delay,
        )
        self.home = self.folder / "home"
        self.keys = self.folder / "ssh"
        self.key_file = self.keys / "id_ed25519"
        self.known_hosts = self.keys / "known_hosts"
        self.slurm_conf = self.folder / "slurm.conf"
        #: Why no sshd can listen on port 22 of the nodes and the login host; None: they do.
        self.port_22_problem = _bind_problem(self.address, 22)
        self.slurmd: dict[str, Daemon] = {}
        self.node_sshd: dict[str, SshServer] = {}
        self._fillers: list[str] = []
        self._warden: Warden | None = None

    # -- up and down -----------------------------------------------------------------------

    def start(self) -> Lab:
        """Start it; returns when every node is idle. LabError says what did not start."""
        _look_for_programs()
        self._write()
        self._warden = Warden()
        try:
            self._start_daemons(self._warden)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End every process of the lab, jobs included, and remove the folder. Idempotent."""
        if self._warden is not None:
            self._warden.end()
            self._warden = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Lab:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _write(self) -> None:
        for name in ("munge", "slurmctld", "log", "home", "ssh", "jobs", "bin", *self.nodes):
            (self.folder / name).mkdir(parents=True, mode=0o700)
        (self.folder / "munge").chmod(0o711)
        munge_key = self.folder / "munge" / "key"
        munge_key.touch(0o600)
        munge_key.write_bytes(secrets.token_bytes(128))
        self.slurm_conf.write_text(texts.slurm_conf(self.settings))
        self._write_keys()
        self._write_address_script()

    def _write_keys(self) -> None:
        public = self._make_key(self.key_file)
        (self.keys / "authorized_keys").write_text(public)
        host = self._make_key(self.keys / "host_login")
        self.known_hosts.write_text(f"[{self.address}]:{self.ssh_port} {host}{self.address} {host}")
        for name in self.nodes:
            self._make_key(self.keys / f"host_{name}")

    def _make_key(self, path: Path) -> str:
        """A new key pair; its public line."""
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(path)]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, timeout=30)
        return path.with_suffix(".pub").read_text()

    def _write_address_script(self) -> None:
        cases = "\n".join(
            f"    {name}) echo {address} ;;" for name, address in self.addresses.items()
        )
        self.address_script = self.folder / "bin" / "lab-address"
        self.address_script.write_text(
            "#!/bin/sh\n# Prints the address of the node that a job runs on.\n"
            f'case "$SLURMD_NODENAME" in\n{cases}\n    *) echo {self.address} ;;\nesac\n'
        )
        self.address_script.chmod(0o755)

    # -- daemons ---------------------------------------------------------------------------

    def _start_daemons(self, warden: Warden) -> None:
        self._make_handles(warden)
        self.munged.start()
        self.slurmctld.start(wait=False)
        self.sshd.start(wait=False)
        for server in self.node_sshd.values():
            server.start(wait=False)
        self.slurmctld.wait_until_ready()
        for slurmd in self.slurmd.values():
            slurmd.start(wait=False)
        for daemon in (*self.slurmd.values(), self.sshd, *self.node_sshd.values()):
            daemon.wait_until_ready()
        self.wait_until_idle()

    def _make_handles(self, warden: Warden) -> None:
        folder, settings = self.folder, self.settings
        self.munged = self._daemon(
            warden,
            "munged",
            [_find("munged"), "--foreground", "--force", "--num-threads=4"]
            + [f"--{what}-file={folder}/munge/{what}" for what in ("key", "pid", "seed")]
            + [f"--log-file={folder}/log/munged.log", f"--socket={folder}/munge/socket"],
            lambda: answers_unix(folder / "munge" / "socket"),
        )
        conf = ["-D", "-f", str(self.slurm_conf)]
        self.slurmctld = self._daemon(
            warden,
            "slurmctld",
            [_find("slurmctld"), *conf],
            lambda: answers(self.address, settings.control_port),
        )
        for name, port in settings.node_ports.items():
            self.slurmd[name] = self._daemon(
                warden,
                f"slurmd-{name}",
                [_find("slurmd"), *conf, "-N", name],
                lambda name=name, port=port: answers(self.addresses[name], port),
            )
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.sshd = self._ssh_server(warden, "sshd", "login", self.address, self.ssh_port)
        if self.port_22_problem is None:
            for name, address in self.addresses.items():
                self.node_sshd[name] = self._ssh_server(warden, f"sshd-{name}", name, address, 22)

    def _daemon(self, warden: Warden, name: str, argv: list[str], ready: Any) -> Daemon:
        log = self.folder / "log" / f"{name}.err"
        return Daemon(warden, name, argv, self._daemon_env(), log, ready)

    def _ssh_server(
        self, warden: Warden, name: str, host: str, address: str, port: int
    ) -> SshServer:
        config = self._write_sshd_config(name, host, address, port)
        argv = [_find("sshd"), "-D", "-e", "-f", str(config)]
        log = self.folder / "log" / f"{name}.log"
        return SshServer(
            warden, name, argv, self._daemon_env(), log, lambda: answers(address, port)
        )

    def _write_sshd_config(
        self, name: str, host: str, address: str, port: int, extra: tuple[str, ...] = ()
    ) -> Path:
        ports = {port} if self.port_22_problem else {port, 22}
        server = texts.Sshd(
            listen=[f"{address}:{number}" for number in sorted(ports)],
            host_key=self.keys / f"host_{host}",
            authorized_keys=self.keys / "authorized_keys",
            environment=self._session_env(),
            pam=_is_locked(self.user),
        )
        path = self.keys / f"{name}.conf"
        path.write_text(texts.sshd_config(server, extra))
        return path

    def sshd_options(self, *lines: str) -> None:
        """Restart the login host's sshd with these lines of sshd_config, or with none again."""
        self._write_sshd_config("sshd", "login", self.address, self.ssh_port, lines)
        self.sshd.restart()

    def change_host_key(self) -> None:
        """Give the login host another key, which ``known_hosts`` does not know."""
        path = self.keys / "host_login"
        path.unlink()
        self._make_key(path)
        self.sshd.restart()

    def _daemon_env(self) -> dict[str, str]:
        return {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", "HOME": str(self.home)}

    def _session_env(self) -> dict[str, str]:
        path = f"{Path(_find('sbatch')).parent}:{SYSTEM_PATH}"
        return {"SLURM_CONF": str(self.slurm_conf), "HOME": str(self.home), "PATH": path}

    # -- using it --------------------------------------------------------------------------

    @property
    def env(self) -> dict[str, str]:
        """The environment of a shell on the login host."""
        return {"LANG": "C.UTF-8", **self._session_env()}

    def ssh_fields(self) -> dict[str, Any]:
        """Fields of a services.json that lead to the login host."""
        return {
            "remote_host": self.address,
            "ssh_port": self.ssh_port,
            "ssh_username": self.user,
            "ssh_key_file": str(self.key_file),
            "ssh_known_hosts": str(self.known_hosts),
        }

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as on the login host; AssertionError when it fails."""
        done = subprocess.run(
            argv,
            env=self.env,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def sbatch(self, *args: str) -> str:
        """Submit a job; its id."""
        return self.run("sbatch", "--parsable", *args).stdout.strip()

    def script(self, name: str, body: str) -> str:
        """Write a job script; its absolute path."""
        path = self.folder / "jobs" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    def probe_script(self, bind: str = "node", *, name: str | None = None) -> str:
        """A job script that runs tests/up/probe.py on port $1 of the node's own address, of
        loopback (127.0.0.1) or of any address; its path.
        """
        where = {
            "node": f'"$({self.address_script})"',
            "loopback": "127.0.0.1",
            "any": "0.0.0.0",
        }[bind]
        return self.script(
            name or f"probe-{bind}.sh",
            f'PROBE_HOST={where}\nexport PROBE_HOST\nexec "{sys.executable}" "{PROBE}" "$1"',
        )

    # -- the queue -------------------------------------------------------------------------

    def queue(self) -> list[Job]:
        """Jobs that have not ended (those that are completing among them), oldest first."""
        return self._squeue()

    def jobs(self) -> list[Job]:
        """All jobs that slurmctld still knows, oldest first."""
        return self._squeue("--states=all")

    def _squeue(self, *args: str) -> list[Job]:
        lines = self.run("squeue", "--noheader", "-o", "%i|%T|%r|%N|%P|%j", *args).stdout
        jobs = [Job(*line.split("|", 5)) for line in lines.splitlines()]
        return sorted(jobs, key=lambda job: int(re.split(r"\D", job.id)[0]))

    def job(self, job_id: str) -> Job | None:
        """A job that slurmctld still knows."""
        return next((job for job in self.jobs() if job.id == job_id), None)

    def until_job(self, job_id: str, state: str, seconds: float = 30) -> Job:
        """Wait until a job is in a state."""

        def reached() -> Job | None:
            found = self.job(job_id)
            return found if found is not None and found.state == state else None

        reached.__doc__ = f"job {job_id} {state}"
        return until(reached, seconds)

    def node_states(self) -> dict[str, str]:
        """As sinfo shows them, for example ``idle`` or ``down*``."""
        lines = self.run("sinfo", "--noheader", "-p", "main", "-N", "-o", "%N %T").stdout
        return dict(line.split() for line in lines.splitlines())

    def is_idle(self) -> bool:
        """Whether every node is idle and a job would be accepted."""
        states = self.run(
            "sinfo", "--noheader", "-p", "main", "-N", "-o", "%N %T", check=False
        ).stdout.split()[1::2]
        if len(states) < len(self.nodes) or set(states) != {"idle"}:
            return False
        return self.run("sbatch", "--test-only", "--wrap=true", check=False).returncode == 0

    def wait_until_idle(self, seconds: float = 30) -> None:
        """LabError with the nodes' states when they do not get idle."""
        try:
            until(self.is_idle, seconds)
        except AssertionError:
            seen = self.run("sinfo", "-N", "-l", check=False)
            raise LabError(f"nodes are not idle:\n{seen.stdout}{seen.stderr}") from None

    def fill(self, *, minutes: int = 60, nodes: list[str] | None = None) -> None:
        """Take every free CPU with dummy jobs, until ``free()``."""
        for name in nodes or self.nodes:
            shown = self.run("scontrol", "show", "node", name, "-o").stdout
            used, total = (int(_value(shown, key)) for key in ("CPUAlloc", "CPUTot"))
            if used < total:
                what = [f"--time={minutes}", "--job-name=filler", "--output=/dev/null"]
                size = ["-n1", f"-c{total - used}", f"--nodelist={name}"]
                self._fillers.append(self.sbatch(*what, *size, "--wrap=exec sleep 3600"))
        for job_id in self._fillers:
            self.until_job(job_id, "RUNNING")

    def free(self) -> None:
        """End the dummy jobs of ``fill``."""
        if self._fillers:
            self.run("scancel", *self._fillers)
            fillers = set(self._fillers)
            until(lambda: not fillers & {job.id for job in self.queue()})
            self._fillers.clear()

    def clear(self) -> None:
        """Cancel every job, wait until they have ended, and put nodes back that a test set down."""
        self._fillers.clear()
        self.run("scancel", f"--user={self.user}")
        for name, state in self.node_states().items():
            if re.search("down|drain", state):
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        until(lambda: not self.queue(), 60)
        self.wait_until_idle()


def with_settings(lab: Lab, **changes: Any) -> None:
    """Change Slurm settings of a lab that is not started yet."""
    lab.settings = replace(lab.settings, **changes)


def _value(shown: str, key: str) -> str:
    found = re.search(rf"\b{key}=(\S+)", shown)
    assert found, f"no {key} in {shown}"
    return found[1]


def _find(program: str) -> str:
    """sshd wants to be called by its absolute path."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    if path is None:
        raise LabError(f"{program} is not installed; `scripts/setup dev` installs it")
    return path


def _look_for_programs() -> None:
    for program in NEEDED:
        _find(program)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has on any address, and which no other lab is likely to choose."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("0.0.0.0", port))
            found.append(port)
        if len(found) == count:
            return found
    raise LabError("no free ports")


def _bind_problem(address: str, port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return f"cannot listen on {address}:{port}: {error.strerror}"
    return None


def _is_locked(user: str) -> bool:
    """Whether the account has a locked password: sshd lets it in through PAM only."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/etc/shadow").read_text().splitlines()
    fields: Mapping[str, str] = {line.split(":")[0]: line.split(":")[1] for line in lines if line}
    return fields.get(user, "").startswith("!")
