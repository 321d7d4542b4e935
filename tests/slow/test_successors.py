"""Successors of several jobs that end together, and of one while the cluster is full."""

from __future__ import annotations

import pytest

from tests.slurm.product import ClusterProduct
from tests.slurm.traffic import Flow, job_ids, settled, watching
from tests.waiting import until


@pytest.mark.timeout(300)
def test_two_jobs_that_end_together_are_replaced_one_after_the_other(product: ClusterProduct):
    product.job(
        sbatch_args=["--partition=quick"],  # a limit of one minute that nobody asked for
        replicas={"min": 2, "max": 2, "target_in_flight": 100},
        renew_before=12,
        replay=0,
    )
    product.up()
    old = until(lambda: settled(product, 2), 60)
    with watching(product) as watch, Flow(f"{product.url}/probe/slow?s=0.1", 8) as load:
        new = until(lambda: successors(product, old), 90)
        until(lambda: old.isdisjoint(job.id for job in product.live()))
        until(lambda: load.served_by(last=50) == replica_ids(product))
    assert load.failures == []
    assert {job.id: job.state for job in product.submitted()} == {
        **dict.fromkeys(old, "CANCELLED"),
        **dict.fromkeys(new, "RUNNING"),
    }
    assert watch.most == 3, "one more than max, never two"
    assert min(map(len, watch.looks)) == 2, "never less than min"


def successors(product: ClusterProduct, old: set[str]) -> set[str] | None:
    ready = settled(product, 2)
    return ready if ready is not None and old.isdisjoint(ready) else None


def replica_ids(product: ClusterProduct) -> set[str]:
    return {replica["id"] for replica in product.info()["replicas"]}


@pytest.mark.timeout(300)
def test_a_successor_that_waits_in_the_queue_serves_whoever_waits_when_it_starts(
    product: ClusterProduct,
):
    """The cluster is full, and has room again only when the old job has met its limit: that cannot
    be had without a wait, but it can without an error.
    """
    product.job(sbatch_args=["--time=1"], renew_before=25, abandon_timeout=2)
    product.up()
    assert product.get("/probe/pid").status_code == 200
    (old,) = until(lambda: settled(product, 1))
    product.lab.fill()
    with watching(product) as watch, Flow(f"{product.url}/probe/slow?s=0.1", 4) as load:
        (new,) = until(lambda: job_ids(product, state="pending"), 60)
        assert job_ids(product) == {old}, "the successor is submitted while the old one serves"
        product.lab.until_job(old, "TIMEOUT", 180)
        assert until(lambda: settled(product, 1), 60) == {new}
        until(lambda: load.served_by(last=10) == replica_ids(product))
    assert load.failures == []
    assert watch.ids == {old, new}
