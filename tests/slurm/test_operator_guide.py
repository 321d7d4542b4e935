"""The README's way from nothing to the first answered request, followed on a cluster.

Names and paths are those of the lab; ssh-copy-id, which would ask for a password, is replaced.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.lab import Lab
from tests.slurm.product import ClusterProduct, serving
from tests.up.product import ROOT
from tests.waiting import until

SECTION = re.compile(r"^## On a Slurm cluster\n(.*?)^## ", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Operator:
    """Somebody with an empty home directory, who types what the README says."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.home = folder / "operator"
        (self.home / "bin").mkdir(parents=True)
        found = SECTION.search((ROOT / "README.md").read_text())
        assert found
        blocks = BLOCK.findall(found[1])
        self.commands = [
            line for kind, text in blocks if kind == "bash" for line in text.splitlines()
        ]
        (self.config,) = [text for kind, text in blocks if kind == "json"]
        # They know the user's real home directory, whatever $HOME says.
        self._stand_in(
            "scp", f'exec {self._real("scp")} -O -F none -o UserKnownHostsFile="$known" "$@"'
        )
        keys = lab.folder / "ssh" / "authorized_keys"
        self._stand_in("ssh-copy-id", f'[ "$1" = -i ] && cat "$2" >> "{keys}"')

    def _real(self, name: str) -> str:
        path = subprocess.run(
            ["/bin/sh", "-c", f"command -v {name}"], capture_output=True, text=True, check=True
        )
        return path.stdout.strip()

    def _stand_in(self, name: str, body: str) -> None:
        path = self.home / "bin" / name
        path.write_text(f"#!/bin/sh\nknown={self.home}/.ssh/known_hosts\n{body}\n")
        path.chmod(0o755)

    def fill_in(self, text: str) -> str:
        """Put the lab's names in place of the README's."""
        text = text.replace("alice", self.lab.user).replace("~", str(self.home))
        return text.replace("login.cluster.example", self.lab.address)

    def type(self, beginning: str) -> str:
        """Run the README's one command that begins so; what it prints."""
        (line,) = [line for line in self.commands if line.startswith(beginning)]
        done = subprocess.run(
            ["/bin/sh", "-c", self.fill_in(line)],
            cwd=ROOT,
            env={**os.environ, "PATH": f"{self.home}/bin:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (line, done)
        return done.stdout

    def services(self) -> list[dict[str, object]]:
        """The README's services; its known_hosts is named, being in no real home directory."""
        services = json.loads(self.fill_in(self.config))["Services"]
        known = str(self.home / ".ssh" / "known_hosts")
        return [{**service, "ssh_known_hosts": known} for service in services]


@pytest.fixture
def operator(tmp_path, lab: Lab):
    lab.need_port_22()
    return Operator(lab, tmp_path)


def test_the_guide_leads_to_an_answered_request(operator: Operator, tmp_path):
    lab = operator.lab
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", lab.folder / "ssh" / "host_login.pub"],
        capture_output=True,
        text=True,
        check=True,
    )
    operator.type("mkdir")
    operator.type("ssh-keyscan")
    assert shown.stdout.split()[1] in operator.type("ssh-keygen -l")
    operator.type("ssh-keygen -q")
    operator.type("ssh-copy-id")
    operator.type("scp")
    assert (lab.home / "hello.sh").is_file()
    with serving(ClusterProduct(tmp_path, lab)) as product:
        product.services = operator.services()
        product.write_config()
        product.services[0]["timeout"] = 3
        checked = subprocess.run(
            [sys.executable, "-m", "slurmgate", "check", product.config, "--connect"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert checked.returncode == 0, checked
        product.up()
        answer = product.get("/hello/")
        assert answer.status_code == 200
        assert answer.text.startswith("hello from ")
        (job,) = product.live("hello")
        assert job.name.startswith("sg.")
        assert product.replica("Hello")["job_id"] == job.id
        product.until_state("cold", "Hello", 30)
        until(lambda: product.live("hello") == [])
