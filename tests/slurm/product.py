"""The whole product in front of a lab: services that run as jobs of a real Slurm cluster."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.lab.lab import Job, Lab
from tests.up.product import Product, children, command_line
from tests.waiting import until


class ClusterProduct(Product):
    """A running Slurmgate whose services are jobs of ``lab``."""

    def __init__(self, folder: Path, lab: Lab, **top: Any) -> None:
        super().__init__(folder, **top)
        self.lab = lab
        self.expected += [
            r"send\(\) failed .* context: ngx\.timer",  # a poll whose far end refuses
            r"upstream prematurely closed connection",
            r"connect\(\) to unix:.* failed",
            r"recv\(\) failed .* while reading response header",
            r"writev\(\) failed .* while sending request to upstream",
        ]

    def job(self, name: str = "probe", *, bind: str = "node", **fields: Any) -> dict[str, Any]:
        """Configure a service that runs the probe as a job, reached through the login host.

        ``load`` is how many seconds it takes to become healthy.
        """
        env = {
            "PROBE_NOTES": str(self.folder / f"notes-{name}"),
            "PROBE_LOAD_S": str(fields.pop("load", 0)),
        }
        script = fields.pop("bash_file", None) or self.lab.probe_script(bind)
        given = {"env": env, "launcher": "slurm", **self.lab.ssh_fields(), **fields}
        return self.service(name, script, **given)

    def live(self, name: str = "probe") -> list[Job]:
        """Jobs of one service in Slurm's own list that have not ended and are not about to."""
        ours = f".{self.owner}."
        return [
            job
            for job in self.lab.queue()
            if ours in job.name and job.name.endswith(f".{name}") and job.state != "COMPLETING"
        ]

    def submitted(self, name: str = "probe") -> list[Job]:
        """Every job of one service that Slurm still knows, ended ones too."""
        ours = f".{self.owner}."
        return [j for j in self.lab.jobs() if ours in j.name and j.name.endswith(f".{name}")]

    @property
    def owner(self) -> str:
        return (self.state_dir / "owner").read_text().strip()

    def tunnels(self) -> list[int]:
        """Pids of the ssh processes of this instance's tunnels."""
        mark = f"SLURMGATE_TUNNEL={self.owner}.".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    environ = (entry / "environ").read_bytes().split(b"\0")
                    if any(item.startswith(mark) for item in environ):
                        found.append(int(entry.name))
        return found

    def replica(self, name: str = "probe") -> dict[str, Any]:
        """Its one replica in /info."""
        (found,) = self.info(name)["replicas"]
        return found


class Asking:
    """A request in a thread of its own; ``answer()`` waits for it."""

    def __init__(self, ask: Callable[[], httpx.Response]) -> None:
        self._ask = ask
        self._answer: httpx.Response | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._ask()
        except httpx.HTTPError as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def answer(self, seconds: float = 60) -> httpx.Response:
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error
        assert self._answer is not None, f"no answer within {seconds} s"
        return self._answer


def ask(product: Product, path: str = "/probe/pid", timeout: float = 110, **options: Any) -> Asking:
    return Asking(lambda: product.get(path, timeout=timeout, **options))


@contextlib.contextmanager
def serving(product: ClusterProduct) -> Iterator[ClusterProduct]:
    """Stop it at the end, and look for what must not be left or logged."""
    try:
        yield product
    finally:
        if product.process is not None:
            code = product.down()
            assert code == 0, product.tail()
            until(lambda: product.tunnels() == [])
            assert product.trouble() == [], product.tail()


def descendants(pid: int) -> list[int]:
    below = children(pid)
    return below + [deeper for child in below for deeper in descendants(child)]


def ssh_processes(product: Product) -> list[int]:
    """ssh processes below the product's own: commands under way."""
    assert product.process is not None
    found = descendants(product.process.pid)
    return [pid for pid in found if os.path.basename((command_line(pid) or [""])[0]) == "ssh"]
