"""A job's successor takes over before the job's time limit, and no client notices."""

from __future__ import annotations

import contextlib

import pytest

from tests.slurm.product import ClusterProduct
from tests.slurm.traffic import Flow, Watch, settled, watching
from tests.waiting import until

RENEW_BEFORE_S = 25
CHUNK_S = 0.2
CHUNKS = (25, 35, 50)  # streams of 5, 7 and 10 s: each is over before its job's end
HELD_S = 1.0  # less than any start takes
LATE_S = 10.0  # on a busy machine


def short_requests(product: ClusterProduct) -> Flow:
    """60 requests a second on six connections."""
    return Flow(f"{product.url}/probe/slow?s=0.05", size=6, period=0.1)


def streams(product: ClusterProduct, chunks: int, size: int = 2) -> Flow:
    body = "".join(f"{number}\n" for number in range(chunks))
    return Flow(f"{product.url}/probe/stream?n={chunks}&s={CHUNK_S}", size, body=body.encode())


def replicas_of(watch: Watch) -> set[str | None]:
    """The ids of all replicas whose jobs Slurm has shown: ``sg.<instance>.<owner>.<replica>…``."""
    return {job.name.split(".")[3] for look in watch.looks for job in look}


def states(product: ClusterProduct) -> dict[str, str]:
    return {job.id: job.state for job in product.submitted()}


def successor(product: ClusterProduct, old: str) -> str:
    """The job that has taken the place of another, once we have cancelled that one."""
    (new,) = until(lambda: settled(product, 1, without=old), 90)
    until(lambda: states(product)[old] == "CANCELLED")
    return new


@pytest.mark.timeout(300)
def test_two_hand_overs_in_a_row_under_load_with_streams(product: ClusterProduct):
    product.job(sbatch_args=["--time=1"], renew_before=RENEW_BEFORE_S, timeout=3600, replay=0)
    product.up()
    assert product.get("/probe/pid").status_code == 200
    order = [*until(lambda: settled(product, 1))]  # of jobs
    short, long = short_requests(product), [streams(product, chunks) for chunks in CHUNKS]
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(watching(product))
        for load in (short, *long):
            stack.enter_context(load)
        order.append(successor(product, order[-1]))
        until(lambda: len(states(product)) == 3, 90)
        last = [*states(product)][-1]  # on a slow machine its own successor would come too early
        product.lab.run("scontrol", "update", f"JobId={last}", "TimeLimit=UNLIMITED")
        order.append(successor(product, order[-1]))
    assert [failure for load in (short, *long) for failure in load.failures] == []
    assert max(reply.waited for load in (short, *long) for reply in load.replies) < HELD_S
    assert max(reply.seconds for reply in short.replies) < LATE_S
    for load, chunks in zip(long, CHUNKS, strict=True):
        assert max(reply.seconds for reply in load.replies) < chunks * CHUNK_S + LATE_S
    assert watch.most == 2
    assert [*states(product)] == order, "one successor for each, and no other job"
    assert short.served_by() == replicas_of(watch)
    for load in long:
        assert load.served_by() <= replicas_of(watch)
    assert [*states(product).values()] == ["CANCELLED", "CANCELLED", "RUNNING"]
