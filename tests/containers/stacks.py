"""Gate and backend as docker-compose.yml starts them, in a project of the test's own.

State: the project's containers, network and volume; ``down`` removes them by the project's name.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from testcontainers.core.docker_client import DockerClient

from tests.containers.engine import setting
from tests.up.product import free_port
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
FILES = (ROOT / "docker-compose.yml", Path(__file__).with_name("compose.cluster.yml"))


class Stack:
    """Made by ``running``. ``config`` is what services.json says; ``configure`` writes it. ``url``
    is the port published on loopback.
    """

    def __init__(self, folder: Path, config: dict[str, Any], keys: Path, network: str) -> None:
        self.config = config
        self._folder = folder
        self.project = f"slurmgate-test-{secrets.token_hex(4)}"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._client: Any = DockerClient().client
        self._env = {
            **os.environ,
            "SLURMGATE_CONFIG_DIR": str(folder),
            "SLURMGATE_SSH_DIR": str(keys),
            "SLURMGATE_PORT": str(self.port),
            "TEST_CLUSTER_NETWORK": network,
        }

    def compose(self, *args: str) -> str:
        """Run Compose on this project; AssertionError with its words when it fails."""
        files = [word for file in FILES for word in ("-f", str(file))]
        argv = [*setting("SLURMGATE_COMPOSE").split(), "-p", self.project, *files, *args]
        done = subprocess.run(
            argv,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
        return done.stdout

    def configure(self) -> None:
        """Put the configuration into the mounted folder as editors do, by renaming."""
        fresh = self._folder / "services.json.new"
        fresh.write_text(json.dumps(self.config, indent=1))
        fresh.rename(self._folder / "services.json")

    def up(self) -> None:
        """Start it; returns when both containers are healthy."""
        self.configure()
        try:
            self.compose("up", "-d", "--no-build")
            self.wait_until_healthy()
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def down(self) -> None:
        """Remove containers, network and volume."""
        self.compose("down", "--volumes", "--timeout", "5")

    def wait_until_healthy(self) -> None:
        """By the health checks of the compose file."""
        until(lambda: self.health("backend") == self.health("gate") == "healthy", 60)

    def container(self, service: str) -> Any:
        """The container of a service, as it is now."""
        labels = [
            f"com.docker.compose.project={self.project}",
            f"com.docker.compose.service={service}",
        ]
        (found,) = self._client.containers.list(all=True, filters={"label": labels})
        return found

    def health(self, service: str) -> str:
        """``starting``, ``healthy`` or ``unhealthy``; empty while it does not run."""
        state = self.container(service).attrs["State"]
        return state["Health"]["Status"] if state["Running"] else ""

    def run(self, service: str, *argv: str, check: bool = True) -> str:
        """Run a command in a container; its output."""
        code, output = self.container(service).exec_run(list(argv))
        assert not check or code == 0, f"{argv} in {service}: {output.decode()}"
        return output.decode()

    def kill_backend(self) -> None:
        """Kill all processes of its container from within, as the kernel does when memory ends.

        (Docker does not restart what `docker kill` ended: it takes that for an operator's wish.)
        """
        before = self.container("backend").attrs["RestartCount"]
        self.container("backend").exec_run(["sh", "-c", "kill -9 -1"])
        until(lambda: self.container("backend").attrs["RestartCount"] > before, 30)

    def get(self, path: str, timeout: float = 60) -> httpx.Response:
        return httpx.get(self.url + path, timeout=timeout)

    def logs(self) -> str:
        """What both containers printed, for the report of a failed test."""
        return self.compose("logs", "--no-color", "--tail", "200")


@contextlib.contextmanager
def running(folder: Path, config: dict[str, Any], keys: Path, network: str) -> Iterator[Stack]:
    """A stack that is up and healthy; removed at the end, also when it did not come up."""
    stack = Stack(folder, config, keys, network)
    try:
        stack.up()
        yield stack
    finally:
        stack.down()
