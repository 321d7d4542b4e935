"""Hand-overs during which something else goes wrong: no client notices that either."""

from __future__ import annotations

from typing import Any

import pytest

from tests.slurm.product import ClusterProduct
from tests.slurm.traffic import Flow, job_ids, settled, watching
from tests.waiting import until

LIMITS: dict[str, Any] = {
    "sbatch_args": ["--time=1"],
    "renew_before": 25,
    "timeout": 3600,
    "replay": 0,
}


def begun(product: ClusterProduct) -> str:
    """The first job, once it serves."""
    product.up()
    assert product.get("/probe/pid").status_code == 200
    (first,) = until(lambda: settled(product, 1))
    return first


@pytest.mark.timeout(240)
def test_the_backend_is_killed_while_one_job_takes_over_from_another(product: ClusterProduct):
    product.job(load=2, **LIMITS)
    old = begun(product)
    streams = Flow(f"{product.url}/probe/stream?n=50&s=0.2", 4)
    with watching(product) as watch, Flow(f"{product.url}/probe/slow?s=0.1", 4) as load, streams:
        until(lambda: len(product.live()) == 2, 60)
        product.kill_backend()  # the successor is on its way
        until(lambda: len(job_ids(product)) == 2 or job_ids(product, state="draining"), 30)
        product.kill_backend()  # and now the old one drains, because streams are left on it
        (new,) = until(lambda: settled(product, 1, without=old), 60)
    assert load.failures == []
    assert streams.failures == []
    assert watch.ids == {old, new}, "nothing was started twice"
    ends = {job.id: job.state for job in product.submitted()}
    assert ends == {old: "CANCELLED", new: "RUNNING"}


@pytest.mark.timeout(240)
def test_a_successor_that_fails_to_start_is_followed_by_another(product: ClusterProduct):
    broken = product.folder / "broken"
    start = product.lab.probe_script()
    body = f'[ -e "{broken}" ] && exit 1\nexec "{start}" "$1"'
    product.job(bash_file=product.lab.script("sometimes.sh", body), **LIMITS)
    old = begun(product)
    broken.touch()
    with watching(product) as watch, Flow(f"{product.url}/probe/slow?s=0.1", 4) as load:
        until(lambda: any("start failed" in line for line in product.log), 60)
        assert product.info()["state"] == "ready"
        broken.unlink()
        until(lambda: settled(product, 1, without=old), 60)
        until(lambda: load.served_by(last=10) == {r["id"] for r in product.info()["replicas"]})
    assert load.failures == []
    assert watch.most <= 2
    ends = [job.state for job in product.submitted()]
    assert [ends[0], ends[-1]] == ["CANCELLED", "RUNNING"]
    assert set(ends[1:-1]) == {"FAILED"}
