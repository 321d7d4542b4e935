"""Time in Slurm's queue: shown while it passes, refused only when it would never end."""

from __future__ import annotations

import time
from typing import Any

import pytest

from slurmgate import history
from slurmgate.observed import Outcome
from tests.slurm.product import ClusterProduct, ask
from tests.waiting import until


def test_on_a_full_cluster_the_wait_is_shown_and_ends_when_it_frees_up(product: ClusterProduct):
    product.lab.fill(minutes=10)
    product.job(sbatch_args=["--time=30"])
    product.up()
    waiting = ask(product)
    until(lambda: "Resources" in (product.info()["reason"] or ""), 30)
    until(lambda: product.info()["retry_after_s"] > 60, 60)  # Slurm's first estimate is too good
    shown = product.info()
    assert shown["state"] == "waking"
    assert product.replica()["starts_in_s"] > 60
    assert not waiting.done
    refused = product.get("/probe/pid", headers={"Prefer": "wait=0"})
    assert refused.status_code == 503
    assert "Resources" in refused.json()["reason"]
    assert int(refused.headers["Retry-After"]) <= 60
    until(lambda: nobody_waits_for(product)["retry_after_s"] > 60)
    product.lab.free()
    assert waiting.answer().status_code == 200


def test_a_job_that_began_while_nothing_was_up_was_in_the_queue_until_it_began(
    product: ClusterProduct,
):
    product.lab.fill(minutes=10)
    product.job()
    product.up()
    asked = time.monotonic()
    product.post("/admin/services/probe/start")
    until(lambda: [job.state for job in product.live()] == ["PENDING"])
    until(lambda: product.replica()["job_id"])
    assert product.down() == 0
    product.lab.free()
    until(lambda: [job.state for job in product.live()] == ["RUNNING"])
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 3, 60)  # of which the queue has no part
    product.up()
    (start,) = until(lambda: history.read(product.state_dir / "history.jsonl").starts, 60)
    assert start.outcome is Outcome.READY
    assert start.queue_s is not None
    assert start.queue_s < began - asked + 1, "Slurm and we count in different clocks"
    assert start.start_s is None or start.start_s > 2


def nobody_waits_for(product: ClusterProduct) -> dict[str, Any]:
    """What a client is told that will not wait."""
    return product.get("/probe/pid", headers={"Prefer": "wait=0"}).json()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--partition=quick", "--time=10"], "PartitionTimeLimit"),
        (["--hold"], "JobHeldUser"),
        (["--dependency=afterok:{failed}"], "DependencyNeverSatisfied"),
    ],
)
def test_a_job_that_would_wait_for_ever_is_refused_in_slurms_words(
    product: ClusterProduct, args, words
):
    failed = product.lab.sbatch("--output=/dev/null", "--wrap=false")
    product.lab.until_job(failed, "FAILED")
    product.job(sbatch_args=[arg.format(failed=failed) for arg in args])
    product.up()
    answer = product.get("/probe/pid", timeout=60)
    assert answer.status_code == 503
    assert answer.json()["type"].endswith("cannot-start")
    assert words in answer.json()["reason"]
    until(lambda: product.live() == [])
    assert len(product.submitted()) == 1


def test_a_client_that_comes_back_after_retry_after_finds_its_place_kept(product: ClusterProduct):
    product.lab.fill()
    product.job(hold_timeout=2, abandon_timeout=1)
    product.up()
    answer = product.get("/probe/pid")
    assert answer.status_code == 503
    assert answer.json()["type"].endswith("hold-timeout")
    assert "Retry-After" in answer.headers
    (job,) = until(product.live)  # the hold may have ended before sbatch had answered
    again = product.get("/probe/pid")
    assert again.status_code == 503
    product.lab.free()
    until(lambda: product.get("/probe/pid").status_code == 200, 30)
    assert [j.id for j in product.submitted()] == [job.id]


def test_a_queued_job_is_cancelled_when_every_client_has_hung_up(product: ClusterProduct):
    product.lab.fill()
    product.job(abandon_timeout=1)
    product.up()
    with pytest.raises(Exception, match="timed out"):
        product.get("/probe/pid", timeout=4)
    until(lambda: product.submitted() and not product.live(), 30)
    product.until_state("cold")


def test_the_queue_timeout_gives_up(product: ClusterProduct):
    product.lab.fill()
    product.job(queue_timeout=2)
    product.up()
    answer = product.get("/probe/pid")
    assert answer.status_code == 503
    assert "queue_timeout" in answer.json()["reason"]
    until(lambda: product.live() == [])
