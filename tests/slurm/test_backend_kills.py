"""kill -9 of the backend at every moment of a job's life: one job, every answer, no stray ssh."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.lab import Lab
from tests.slurm.product import Asking, ClusterProduct, ask, serving
from tests.waiting import until


def slow_sbatch(lab: Lab, before: float, after: float) -> Path:
    """Let sbatch on the login host take its time, before it submits or before it answers; the file
    that is there when it has begun.
    """
    folder = lab.folder / "slow"
    begun = folder / "begun"
    steps = f'touch {begun}\nsleep {before}\n/usr/bin/sbatch "$@"\nrc=$?\nsleep {after}\nexit $rc'
    folder.mkdir(exist_ok=True)
    (folder / "sbatch").write_text(f"#!/bin/sh\n{steps}\n")
    (folder / "sbatch").chmod(0o755)
    lab.sshd_options(env={"PATH": f"{folder}:{lab.env['PATH']}"})
    return begun


def one_job_and_an_answer(product: ClusterProduct, waiting: Asking) -> None:
    answer = waiting.answer(100)
    assert answer.status_code == 200, answer.text
    until(lambda: len(product.live()) == 1)
    until(lambda: len(product.tunnels()) == 1)
    # Of a replica that was adopted, or that ends, the backend hears a moment later.
    until(lambda: [replica["state"] for replica in product.info()["replicas"]] == ["ready"])
    assert product.replica()["job_id"] == product.live()[0].id


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 5)], ids=["unsent", "unanswered"])
def test_killed_before_sbatch_returns(tmp_path, own_lab, before, after):
    lab = own_lab()
    begun = slow_sbatch(lab, before, after)
    with serving(ClusterProduct(tmp_path, lab)) as product:
        product.job()
        product.up()
        waiting = ask(product)
        until(begun.exists)
        product.kill_backend()
        one_job_and_an_answer(product, waiting)
        assert len([job for job in product.submitted() if job.state != "CANCELLED"]) == 1


def test_killed_while_the_job_is_pending(product: ClusterProduct):
    product.lab.fill()
    product.job()
    product.up()
    waiting = ask(product)
    (job,) = until(product.live)
    product.until_state("waking")
    until(lambda: product.replica()["state"] == "pending")
    product.kill_backend()
    until(lambda: product.replica()["state"] == "pending")
    product.lab.free()
    one_job_and_an_answer(product, waiting)
    assert [j.id for j in product.submitted()] == [job.id]


def test_killed_while_the_service_is_starting(product: ClusterProduct):
    product.job(load=4)
    product.up()
    waiting = ask(product)
    until(lambda: product.noted("start"))  # 4 s before it is ready
    product.kill_backend()
    one_job_and_an_answer(product, waiting)
    assert len(product.submitted()) == 1


def test_killed_while_it_is_ready_and_streams(product: ClusterProduct):
    product.job()
    product.up()
    product.get("/probe/pid")
    tunnels = product.tunnels()
    stream = ask(product, "/probe/stream?n=60&s=0.1")
    product.kill_backend()
    assert product.get("/probe/pid").status_code == 200
    assert stream.answer().text.split() == [str(n) for n in range(60)]
    product.until_state("ready")
    assert product.tunnels() == tunnels
    assert len(product.submitted()) == 1


def test_killed_while_it_drains(product: ClusterProduct):
    product.job()
    product.up()
    product.get("/probe/pid")
    stream = ask(product, "/probe/stream?n=80&s=0.1")
    until(lambda: product.info()["in_flight"] == 1)
    product.post("/admin/services/probe/stop")
    product.until_state("draining")
    waiting = ask(product)
    product.kill_backend()
    one_job_and_an_answer(product, waiting)
    assert stream.answer().text.split() == [str(n) for n in range(80)]


def test_killed_again_and_again(product: ClusterProduct):
    product.job(load=2)
    product.up()
    waiting = ask(product)
    for _ in range(4):
        product.kill_backend()
    one_job_and_an_answer(product, waiting)
    assert len([job for job in product.submitted() if job.state != "CANCELLED"]) == 1
