"""The whole product as an operator runs it: ``slurmgate up`` in a directory of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from slurmgate import client
from slurmgate.errors import BackendAway
from slurmgate.state import StateDir
from tests.ports import free_port as free_port
from tests.ports import service_ports
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("probe.py")
NGINX_TROUBLE = re.compile(r"\[(error|alert|crit|emerg)\]")
OUR_TROUBLE = re.compile(r"Traceback| ERROR | CRITICAL ")


class Product:
    """A running Slurmgate with its files. ``expected`` holds patterns of log lines that a test
    provokes; every other line of trouble fails it.
    """

    def __init__(self, folder: Path, **top: Any) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.config = folder / "services.json"
        self.notes = folder / "notes"
        self._loaded = folder / "loaded"
        self.top = top
        self.services: list[dict[str, Any]] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.expected = [r"recv\(\) failed .* context: ngx\.timer"]  # a poll of one that ends
        self.log: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    # -- what it serves --------------------------------------------------------------------

    def probe(self, name: str = "probe", **fields: Any) -> dict[str, Any]:
        """Configure a probe service; ``load`` and ``linger`` are the probe's own settings. With
        ``held`` it loads until ``let_load`` is called.
        """
        notes = self.folder / f"notes-{name}"
        env = {
            "PROBE_NOTES": str(notes),
            "PROBE_LOAD_S": str(fields.pop("load", 0)),
            "PROBE_LINGER_S": str(fields.pop("linger", 0)),
        }
        if fields.pop("held", False):
            env["PROBE_LOADED"] = str(self._loaded)
        script = self.script("probe.sh", f'exec "{sys.executable}" "{PROBE}" "$1"')
        return self.service(name, script, env=env, **fields)

    def let_load(self) -> None:
        """What was configured as ``held`` becomes healthy."""
        self._loaded.touch()

    def service(self, name: str, bash_file: str, **fields: Any) -> dict[str, Any]:
        """Configure a service that a script starts."""
        entry = {
            "name": name,
            "route_name": name,
            "launcher": "process",
            "bash_file": bash_file,
            "api_paths": ["/"],
            "check_health_path": "/health",
            "remote_port": "auto",
            "port_range": service_ports(),
            "timeout": 60,
            **fields,
        }
        self.services = [s for s in self.services if s["name"] != name] + [entry]
        return entry

    def script(self, name: str, body: str) -> str:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return name

    def write_config(self, text: str | None = None) -> None:
        if text is None:
            text = json.dumps({**self.top, "Services": self.services}, indent=1)
        fresh = self.config.with_suffix(".tmp")
        fresh.write_text(text)
        fresh.replace(self.config)

    # -- running it ------------------------------------------------------------------------

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "slurmgate", *args]

    def up(self, *args: str, listen: bool = True) -> Product:
        self.write_config()
        if "tls" in self.top.get("gate", {}):
            self.url = f"https://127.0.0.1:{self.port}"
        argv = self.command(
            "up",
            *("--config", str(self.config)),
            *("--state-dir", str(self.state_dir)),
            *(("--listen", f"127.0.0.1:{self.port}") if listen else ()),
            *args,
        )
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._collect, args=(self.process.stderr,))
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"ready {self.url}\n", self.tail()
        return self

    def _collect(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self.log.append(line.rstrip("\n"))

    def tail(self) -> str:
        return "\n".join(self.log[-60:])

    def down(self, seconds: float = 60) -> int:
        """Stop it cleanly; its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._reader.join()
        return code

    def run(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to it."""
        argv = self.command(*args, "--state-dir", str(self.state_dir))
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    def trouble(self) -> list[str]:
        """Log lines no test provoked."""
        return [
            line
            for line in self.log
            if (NGINX_TROUBLE.search(line) or OUR_TROUBLE.search(line))
            and not any(re.search(pattern, line) for pattern in self.expected)
        ]

    # -- looking at it ---------------------------------------------------------------------

    @property
    def token(self) -> str:
        return (self.state_dir / "admin-token").read_text().strip()

    def post(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.post(self.url + path, headers=headers, timeout=60)

    def get(self, path: str, timeout: float = 60, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=timeout, **options)

    def status(self) -> dict[str, Any]:
        """/info straight from the backend: never a copy."""
        return json.loads(self.run("status", "--json").stdout)

    def info(self, name: str = "probe") -> dict[str, Any]:
        return client.call(StateDir.find(self.state_dir), "GET", f"/info/{name}")

    def api_answers(self) -> bool:
        try:
            self.info(self.services[0]["name"])
        except BackendAway:
            return False
        return True

    def until_state(self, state: str, name: str = "probe", seconds: float = 20) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            found = self.info(name)
            return found if found["state"] == state else None

        reached.__doc__ = f"{name} {state}"
        return until(reached, seconds)

    @property
    def run_dir(self) -> Path:
        return Path((self.state_dir / "run-directory").read_text().strip())

    def noted(self, what: str, name: str = "probe") -> list[dict[str, Any]]:
        """What the probes of a service noted: its starts, requests, or SIGTERMs."""
        path = self.folder / f"notes-{name}"
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [entry for entry in map(json.loads, lines) if entry["what"] == what]

    def nginx_master(self) -> int:
        return int((self.run_dir / "nginx.pid").read_text())

    def serves_again(self, killed: int) -> bool:
        """Whether another master serves; the killed one's workers may outlive it a moment."""
        with contextlib.suppress(OSError, ValueError, httpx.TransportError):
            return self.nginx_master() != killed and self.get("/readyz").status_code == 200
        return False

    def loaded(self) -> int:
        """How often a configuration was put in force, as the log says."""
        return sum("configuration loaded" in line for line in self.log)

    def nginx_workers(self) -> list[int]:
        return children(self.nginx_master())

    def backend(self) -> int | None:
        """Its pid; None between its death and the next start."""
        assert self.process is not None
        pids = [c for c in children(self.process.pid) if "backend" in command_line(c)]
        return pids[0] if pids else None

    def kill_backend(self, *, wait: bool = True) -> None:
        """Kill it with -9, and wait for the next one to answer."""
        killed = until(self.backend)
        self.expected.append("control.sock|context: ngx.timer")
        os.kill(killed, signal.SIGKILL)
        if wait:
            until(lambda: self.backend() not in (None, killed) and self.api_answers(), 60)

    def replicas(self) -> list[int]:
        """Processes of this instance's services."""
        owner = (self.state_dir / "owner").read_text().strip()
        return marked(f"SLURMGATE_OWNER={owner}")


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def command_line(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return []


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def marked(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def running(product: Product) -> Iterator[Product]:
    """Stop it at the end, and look for what must not be left or logged."""
    try:
        yield product
    finally:
        if product.process is not None:
            code = product.down()
            assert code == 0, product.tail()
            assert product.replicas() == [], "processes left behind"
            assert product.trouble() == []
