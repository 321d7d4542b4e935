"""A cluster of three containers on a network of their own: the login host and two nodes.

State: the containers, their network and the volume with the home directory they share; each has a
name of its own and is removed by ``stop``.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.network import Network

from tests.containers.engine import give, setting
from tests.waiting import until

NODES = ("n1", "n2")
ACCOUNT = "alice"
AUTHORIZED = "/srv/lab/authorized.pub"
UP_WITHIN_S = 90


@dataclass(frozen=True, slots=True)
class Job:
    """A line of squeue; ``node`` is empty while it is pending."""

    id: str
    state: str
    node: str
    name: str


class Cluster:
    """``keys`` is a folder that gets what opens the login host: a key and known_hosts."""

    def __init__(self, keys: Path) -> None:
        self.keys = keys
        self._image = f"slurmgate-cluster:{setting('SLURMGATE_TAG')}"
        self.network = Network()
        self._name = f"slurmgate-test-{secrets.token_hex(4)}"
        self._secret = secrets.token_hex()
        self._machines: dict[str, DockerContainer] = {}

    def start(self) -> None:
        """Returns when every node is idle. The first machine fills the shared home."""
        public = _make_key(self.keys / "id_ed25519")
        self.network.create()
        for role in ("login", *NODES):
            self._machines[role] = self._machine(role, public).start()
        for role in self._machines:
            self._wait_until_ready(role)
        known = [
            f"login {line.removeprefix('host-key ')}\n"
            for line in self._printed("login").splitlines()
            if line.startswith("host-key ")
        ]
        (self.keys / "known_hosts").write_text("".join(known))
        for path in (self.keys, *self.keys.iterdir()):
            give(path)

    def _machine(self, role: str, public: bytes) -> DockerContainer:
        nodes = " ".join(f"--node {name}={name}" for name in NODES)
        return DockerContainer(
            self._image,
            command=f"--role {role} --login login {nodes}"
            f" --authorized-key {AUTHORIZED} --secret {self._secret}",
            name=f"{self._name}-{role}",
            network=self.network,
            network_aliases=[role],
            volumes=[(self._name, f"/home/{ACCOUNT}", "rw")],
            transferables=[(public, AUTHORIZED)],
            hostname=role,
            init=True,
        )

    def _wait_until_ready(self, role: str) -> None:
        def settled() -> bool:
            running = self._machines[role].get_wrapped_container()
            running.reload()
            return running.status != "running" or "ready" in self._printed(role).split()

        until(settled, UP_WITHIN_S)
        assert "ready" in self._printed(role).split(), self.logs()

    def _printed(self, role: str) -> str:
        return self._machines[role].get_logs()[0].decode()

    def stop(self) -> None:
        """Remove all of it; what was not started is no error."""
        for machine in self._machines.values():
            machine.stop()
        client = DockerClient().client
        for volume in client.volumes.list(filters={"name": self._name}):
            volume.remove()
        for network in client.networks.list(names=[self.network.name]):
            network.remove()

    def run(self, *argv: str) -> str:
        """Run a command on the login host as the account; what it printed."""
        words = ["env", "SLURM_CONF=/srv/lab/cluster/slurm.conf", *argv]
        code, output = self._machines["login"].exec(words)
        assert code == 0, f"{argv}: {output.decode()}"
        return output.decode()

    def jobs(self, *, ended: bool = False) -> list[Job]:
        """The jobs that Slurm has, oldest first; with ``ended`` also those it still remembers."""
        states = ["--states=all"] if ended else []
        lines = self.run("squeue", "--noheader", "--sort=i", *states, "--format=%i|%T|%N|%j")
        return [Job(*line.split("|", 3)) for line in lines.splitlines()]

    def logs(self) -> str:
        """What the machines printed, for the report of a failed test."""
        told = []
        for name, machine in self._machines.items():
            output, errors = machine.get_logs()
            told += [f"--- {name}", output.decode(), errors.decode()]
        return "\n".join(told)


@contextlib.contextmanager
def running(keys: Path) -> Iterator[Cluster]:
    """A cluster that is up; removed at the end, also when it did not come up."""
    cluster = Cluster(keys)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _make_key(path: Path) -> bytes:
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "slurmgate", "-f", str(path)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, timeout=30)
    return path.with_suffix(".pub").read_bytes()
