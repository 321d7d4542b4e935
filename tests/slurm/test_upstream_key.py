"""Services that demand a key: the gate and the job know it, and nobody else on the cluster."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.lab.lab import Lab
from tests.slurm.product import ClusterProduct, serving
from tests.waiting import until

SERVICE = Path(__file__).with_name("keyed_service.py")
LOOK_S = 0.002


def keyed(product: ClusterProduct, **fields: Any) -> None:
    """Configure a service that answers only who shows the key of its replica."""
    where = product.lab.address_script
    body = f'exec "{sys.executable}" "{SERVICE}" "$({where})" "$1"'
    script = product.lab.script("keyed.sh", body)
    product.job("keyed", bash_file=script, upstream_key=True, **fields)


def key_of(product: ClusterProduct) -> str:
    """The key in the record of the one replica."""
    (record,) = (product.state_dir / "replicas").glob("*.json")
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    key = json.loads(record.read_bytes())["api_key"]
    assert isinstance(key, str)
    assert len(key) == 43
    return key


def around(product: ClusterProduct, authorization: str | None = None) -> int:
    """Ask the service on its node, past the gate; the status of the answer."""
    (job,) = product.live("keyed")
    port = job.name.split(".")[4]
    headers = {} if authorization is None else {"Authorization": authorization}
    url = f"http://{product.lab.addresses[job.node]}:{port}/x"
    return httpx.get(url, headers=headers, timeout=20).status_code


@contextlib.contextmanager
def process_lists() -> Iterator[set[bytes]]:
    """Everything that a look at the processes of this machine would show, until the block ends."""
    seen: set[bytes] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            for entry in os.listdir("/proc"):
                if entry.isdecimal():
                    with contextlib.suppress(OSError):
                        seen.add(Path(f"/proc/{entry}/cmdline").read_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def slow_sbatch(lab: Lab) -> None:
    """Let sbatch take so long that nobody who looks can miss it."""
    folder = lab.folder / "slow"
    folder.mkdir()
    (folder / "sbatch").write_text('#!/bin/sh\nsleep 2\n/usr/bin/sbatch "$@"\n')
    (folder / "sbatch").chmod(0o755)
    lab.sshd_options(env={"PATH": f"{folder}:{lab.env['PATH']}"})


def files_with(text: str, *folders: Path) -> tuple[list[Path], list[Path]]:
    """Files that hold ``text``, and those of them that are open to others by their mode."""
    found, public = [], []
    for folder in folders:
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):  # one that was renamed or removed since
                if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes():
                    found.append(path)
                    if path.stat().st_mode & 0o077:
                        public.append(path)
    return found, public


@pytest.fixture
def keyed_product(tmp_path, own_lab):
    lab = own_lab()
    with serving(ClusterProduct(tmp_path, lab)) as made:
        yield made


def test_only_the_gate_and_the_job_know_the_key(keyed_product: ClusterProduct):
    product, lab = keyed_product, keyed_product.lab
    slow_sbatch(lab)
    keyed(product)
    with process_lists() as seen:
        product.up()
        own = {"Authorization": "Bearer of-the-client", "X-Api-Key": "of-the-client"}
        answer = product.get("/keyed/x", headers=own)
        assert (answer.status_code, answer.json()["x_api_key"]) == (200, None)
        key = key_of(product)
        pid = answer.json()["pid"]
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert f"SLURMGATE_API_KEY={key}".encode() in environ
        assert [around(product), around(product, "Bearer x"), around(product, f"Bearer {key}")] == [
            401,
            401,
            200,
        ]
        (job,) = product.live("keyed")
        shown = [
            *(lab.run("scontrol", *how, "show", "job", job.id).stdout for how in ([], ["-dd"])),
            lab.run("squeue", "-o", "%all", "--jobs", job.id).stdout,
            product.get("/info").text,
            product.get("/info/keyed").text,
            product.get("/metrics").text,
            json.dumps(product.status()),
            product.run("status").stdout,
            product.run("logs", "keyed").stdout,
        ]
    assert any(b"/sbatch" in line and job.name.encode() in line for line in seen)
    assert not [line for line in seen if key.encode() in line]
    assert not [text for text in shown if key in text]
    assert product.down() == 0
    assert not [line for line in product.log if key in line]
    found, readable = files_with(key, product.folder, lab.folder)
    assert readable == []
    ours = [path for path in found if lab.folder not in path.parents]
    assert [path.parent.name for path in ours] == ["replicas"]


def test_the_key_is_known_to_the_next_backend_and_the_next_start(product: ClusterProduct):
    keyed(product)
    product.up()
    pid = product.get("/keyed/x").json()["pid"]
    key = key_of(product)
    product.kill_backend()
    for _ in range(2):
        assert product.get("/keyed/x").json()["pid"] == pid
        product.until_state("ready", "keyed")
    assert product.down() == 0
    product.up()
    assert product.get("/keyed/x").json()["pid"] == pid
    assert key_of(product) == key
    assert len(product.submitted("keyed")) == 1


def test_a_job_that_was_put_back_into_the_queue_keeps_its_key(product: ClusterProduct):
    keyed(product, sbatch_args=["--requeue"])
    product.up()
    pid = product.get("/keyed/x").json()["pid"]
    key = key_of(product)
    (job,) = product.live("keyed")
    product.lab.run("scontrol", "requeue", job.id)
    until(lambda: product.replica("keyed")["state"] != "ready", 30)
    product.lab.run("scontrol", "update", f"JobId={job.id}", "StartTime=now", check=False)
    answer = product.get("/keyed/x", timeout=180)
    assert (answer.status_code, answer.json()["pid"] == pid) == (200, False)
    assert key_of(product) == key
    assert [j.id for j in product.submitted("keyed")] == [job.id]


def test_each_replica_has_its_own_key_and_one_that_prints_it_is_not_quoted(
    product: ClusterProduct,
):
    keyed(product)
    talk = product.lab.script("talk.sh", 'set -x\nKEY="$SLURMGATE_API_KEY"\nexit 3')
    product.job("talk", bash_file=talk, upstream_key=True)
    product.up()
    assert product.get("/keyed/x").status_code == 200
    answer = product.get("/talk/x")
    assert answer.status_code == 503
    told = answer.text + product.get("/info").text + product.run("logs", "talk").stdout
    assert "[upstream key]" in told
    (log,) = (
        path
        for path in (product.lab.home / ".slurmgate/logs").glob("*.log")
        if "KEY=" in path.read_text()
    )
    key = log.read_text().split("KEY=")[1].split()[0]
    assert len(key) == 43
    assert key != key_of(product)
    assert key not in told + "\n".join(product.log)
    assert log.parent.stat().st_mode & 0o077 == 0
