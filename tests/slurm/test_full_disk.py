"""The state directory on a disk that is full for a while: what serves goes on, starts are refused
with the reason, and everything heals when there is room again.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.product import ClusterProduct, ask, serving
from tests.waiting import until


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own at ``folder``; the test is skipped where none can be mounted."""
    folder.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here; test_history has a full disk of its own")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def history(product: ClusterProduct) -> list[dict]:
    return json.loads(product.run("history", "--json").stdout)


def ready_starts(product: ClusterProduct) -> list[str]:
    return [start["service"] for start in history(product) if start["outcome"] == "ready"]


def test_a_full_disk_costs_starts_but_nothing_that_serves_and_no_kept_start(tmp_path, lab):
    product = ClusterProduct(tmp_path, lab)
    product.expected.append(r"access\.log.*No space left on device")
    with small_disk(product.state_dir), serving(product):
        product.job()
        product.job("other")
        product.up()
        pid = product.get("/probe/").json()["pid"]
        until(lambda: ready_starts(product) == ["probe"])
        (job,) = product.live()

        filler = fill(product.state_dir)
        assert product.get("/probe/").json()["pid"] == pid
        refused = product.get("/other/")
        assert refused.status_code == 503
        assert refused.json()["type"].endswith("start-failed")
        assert "cannot write the replica record" in refused.json()["reason"]
        assert "No space left on device" in refused.json()["reason"]
        assert product.live("other") == []
        assert ready_starts(product) == ["probe"]
        assert "No space left on device" in product.info("other")["reason"]
        assert product.live() == [job]

        filler.unlink()
        until(lambda: product.get("/other/").status_code == 200)
        until(lambda: ready_starts(product) == ["probe", "other"])
        product.lab.run("scancel", job.id)
        until(lambda: product.live() == [])
        assert product.get("/probe/").json()["pid"] != pid
        until(lambda: ready_starts(product) == ["probe", "other", "probe"])


def test_what_is_started_while_the_disk_fills_is_served_and_ended_all_the_same(tmp_path, lab):
    product = ClusterProduct(tmp_path, lab)
    product.expected.append(r"access\.log.*No space left on device")
    goes_on = tmp_path / "goes-on"
    steps = f'until [ -e "{goes_on}" ]; do sleep 0.1; done\nexec "{lab.probe_script()}" "$1"'
    with small_disk(product.state_dir), serving(product):
        product.job(bash_file=lab.script("waits.sh", steps), timeout=1)
        product.up()
        waiting = ask(product, "/probe/")
        until(lambda: [job.state for job in product.live()] == ["RUNNING"])
        filler = fill(product.state_dir)  # after the first record, before it is ready
        goes_on.touch()
        assert waiting.answer().status_code == 200
        until(lambda: "cannot keep recent starts" in product.tail())
        assert history(product) == []
        until(lambda: product.live() == [])
        until(lambda: product.info()["replicas"] == [])
        filler.unlink()
        until(lambda: product.get("/probe/").status_code == 200)
        until(lambda: ready_starts(product) == ["probe"])  # the start before it is missing
        assert "are kept in" in product.tail()
