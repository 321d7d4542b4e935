"""What happens to jobs, nodes and connections from outside: the next request is answered."""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest

from tests.slurm.product import ClusterProduct, ask, serving
from tests.waiting import until


def answered(product: ClusterProduct) -> int:
    answer = product.get("/probe/pid", timeout=100)
    assert answer.status_code == 200, answer.text
    return answer.json()["pid"]


def test_the_login_hosts_sshd_is_restarted(own_product: ClusterProduct):
    own_product.job()
    own_product.job("other")
    own_product.up()
    pid = answered(own_product)
    own_product.lab.sshd.restart()
    assert answered(own_product) == pid
    assert own_product.get("/other/pid").status_code == 200
    assert len(own_product.submitted()) == 1


def test_the_login_hosts_sshd_is_away_for_a_moment(own_product: ClusterProduct):
    own_product.job()
    own_product.up()
    pid = answered(own_product)
    own_product.lab.sshd.stop()
    waiting = ask(own_product)
    own_product.lab.sshd.start()
    assert waiting.answer().json()["pid"] == pid


def test_a_tunnel_is_killed(product: ClusterProduct):
    product.job()
    product.up()
    pid = answered(product)
    for _ in range(3):
        (tunnel,) = until(product.tunnels)
        os.kill(tunnel, signal.SIGKILL)
        assert answered(product) == pid
        assert tunnel not in product.tunnels()
    assert len(product.submitted()) == 1


def test_a_tunnel_hangs(product: ClusterProduct):
    product.job(health={"interval": 0.5, "timeout": 1, "failures": 2})
    product.up()
    pid = answered(product)
    (tunnel,) = product.tunnels()
    os.kill(tunnel, signal.SIGSTOP)
    until(lambda: product.tunnels() not in ([], [tunnel]), 30)
    assert answered(product) == pid


def test_a_job_is_cancelled_from_outside(product: ClusterProduct):
    product.job()
    product.up()
    pid = answered(product)
    (job,) = product.live()
    product.lab.run("scancel", job.id)
    until(lambda: product.live() == [])
    assert answered(product) != pid
    until(lambda: f"job {job.id} was cancelled" in product.tail())


def test_a_job_is_cancelled_from_outside_while_a_request_waits_for_it(product: ClusterProduct):
    product.lab.fill()
    product.job()
    product.up()
    waiting = ask(product)
    (job,) = until(product.live)
    product.lab.run("scancel", job.id)
    until(lambda: product.live() not in ([], [job]), 30)
    product.lab.free()
    assert waiting.answer().status_code == 200


def test_a_node_is_set_down(own_product: ClusterProduct):
    own_product.job(sbatch_args=["--no-requeue"])
    own_product.up()
    pid = answered(own_product)
    (job,) = own_product.live()
    own_product.lab.run("scontrol", "update", f"NodeName={job.node}", "State=DOWN", "Reason=test")
    assert answered(own_product) != pid
    assert until(own_product.live)[0].node != job.node


def test_a_node_that_cannot_launch_the_job_is_left_for_another(tmp_path, own_lab):
    prolog = tmp_path / "prolog.sh"  # fails on one node, which Slurm then drains
    prolog.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" != n1 ]\n')
    prolog.chmod(0o755)
    with serving(ClusterProduct(tmp_path, own_lab(Prolog=prolog))) as product:
        product.job()
        product.up()
        answered(product)
        assert [job.node for job in product.live()] != ["n1"]
        until(lambda: "launch failed requeued held" in product.tail())


def test_a_preempted_job_is_queued_again_and_found_on_its_next_node(product: ClusterProduct):
    node = product.lab.nodes[0]
    product.job(sbatch_args=["--partition=low", f"--nodelist={node}", "--requeue"])
    product.up()
    pid = answered(product)
    (job,) = product.live()
    blocker = product.lab.sbatch(
        "--partition=high", f"--nodelist={node}", "--exclusive", "--wrap=exec sleep 3600"
    )
    until(lambda: product.lab.until_job(blocker, "RUNNING"), 60)
    waiting = ask(product)
    until(lambda: product.replica()["state"] == "pending", 60)
    product.lab.run("scancel", blocker)
    assert waiting.answer(100).json()["pid"] != pid
    assert [j.id for j in product.live()] == [job.id]


def is_taken_off(product: ClusterProduct) -> bool:
    """Whether the gate sends no request to the one replica, which is suspended."""
    if product.replica()["reason"] != "suspended by Slurm":
        return False
    try:
        answer = product.get("/probe/pid", timeout=2, headers={"Prefer": "wait=0"})
    except httpx.ReadTimeout:  # the gate had not been told yet
        return False
    return answer.status_code == 503


@pytest.mark.timeout(240)
def test_a_suspended_job_gets_no_request_until_it_goes_on_or_another_takes_its_place(
    product: ClusterProduct,
):
    entry = product.job(replace_after=3600)
    product.up()
    pid = answered(product)
    (job,) = product.live()
    product.lab.run("scontrol", "suspend", job.id)
    until(lambda: is_taken_off(product), 60)
    assert product.info()["reason"] == "suspended by Slurm"
    waiting = ask(product)
    until(lambda: product.info()["waiting"] == 1)
    product.lab.run("scontrol", "resume", job.id)
    assert waiting.answer().json()["pid"] == pid
    assert [j.id for j in product.submitted()] == [job.id]

    product.lab.run("scontrol", "suspend", job.id)
    sent = ask(product)  # before that is known, or after
    until(lambda: is_taken_off(product), 60)
    waiting = ask(product)
    until(lambda: product.info()["waiting"] >= 1)
    entry["replace_after"] = 0.1
    product.write_config()
    pids = {request.answer(100).json()["pid"] for request in (sent, waiting)}
    assert pid not in pids
    assert len(pids) == 1
    until(lambda: len(product.live()) == 1, 60)
    assert job.id not in [j.id for j in product.live()]
    assert len({j.id for j in product.submitted()} - {job.id}) == 1
    assert product.info()["reason"] is None, "that was nobody's fault"


@pytest.mark.timeout(240)
def test_the_time_limit_is_reached(own_product: ClusterProduct):
    own_product.job(sbatch_args=["--time=1"], timeout=3600, renew_before=0)
    own_product.up()
    pid = answered(own_product)
    (job,) = own_product.live()
    own_product.lab.until_job(job.id, "TIMEOUT", 180)
    assert answered(own_product) != pid
    until(lambda: "time limit" in own_product.tail())


def test_a_job_that_dies_while_ready_is_started_anew_and_its_last_lines_are_logged(
    product: ClusterProduct,
):
    product.job()
    product.up()
    pid = answered(product)
    assert product.get("/probe/die").status_code in (200, 502)
    assert answered(product) != pid
    until(lambda: any("probe on" in line for line in product.log), 30)


def test_a_service_that_gets_another_launcher_has_its_job_cancelled(product: ClusterProduct):
    product.job()
    product.up()
    answered(product)
    assert len(product.live()) == 1
    product.probe()
    product.write_config()
    product.run("reload")
    until(lambda: product.live() == [], 60)
    assert product.get("/probe/pid").status_code == 200


def test_a_job_that_is_put_back_into_the_queue_and_held_is_given_up(product: ClusterProduct):
    product.job(sbatch_args=["--requeue"])
    product.up()
    answered(product)
    (job,) = product.live()
    product.lab.run("scontrol", "requeuehold", job.id)
    answer = ask(product).answer(60)
    assert answer.status_code == 503, answer.text
    assert answer.json()["type"].endswith("cannot-start")
    until(lambda: job.id not in [j.id for j in product.live()], 30)


@pytest.mark.timeout(200)
def test_a_job_that_is_queued_again_may_wait_as_long_as_a_new_one(product: ClusterProduct):
    node = product.lab.nodes[0]
    args = ["--partition=low", f"--nodelist={node}", "--requeue"]
    product.job(sbatch_args=args, queue_timeout=30)
    product.up()
    began = time.monotonic()
    pid = answered(product)
    until(lambda: time.monotonic() - began > 32, 60)
    blocker = product.lab.sbatch(
        "--partition=high", f"--nodelist={node}", "--exclusive", "--wrap=exec sleep 3600"
    )
    until(lambda: product.lab.until_job(blocker, "RUNNING"), 60)
    waiting = ask(product)
    until(lambda: waiting.done or product.replica()["state"] == "pending", 60)
    product.lab.run("scancel", blocker)
    answer = waiting.answer(100)
    assert answer.status_code == 200, answer.text
    assert answer.json()["pid"] != pid
