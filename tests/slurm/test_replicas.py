"""Several replicas as jobs of a real cluster: their number, what disturbs them, what bounds it."""

from __future__ import annotations

import httpx
import pytest

from tests.slurm.product import ClusterProduct, serving
from tests.slurm.traffic import Flow, job_ids, settled, watching
from tests.waiting import until

SLOW = "/probe/slow?s=0.4"
ALONE = "--exclusive"  # one replica on a node, so that what happens to a node happens to one


def flow(product: ClusterProduct, path: str = SLOW, size: int = 1) -> Flow:
    return Flow(product.url + path, size)


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].rsplit("/", 1)[-1]


def asked(product: ClusterProduct) -> tuple[int, str]:
    answer = product.get("/probe/pid")
    return (200, "") if answer.status_code == 200 else problem(answer)


# -- how many ------------------------------------------------------------------------------


def test_replicas_follow_the_load_up_to_max_and_back_to_min(product: ClusterProduct):
    product.job(replicas={"min": 1, "max": 4, "target_in_flight": 8}, timeout=2, scale_up_after=0.5)
    product.up()
    first = until(lambda: settled(product, 1), 30)
    assert product.noted("request") == [], "min is there before anybody asks"
    with watching(product) as watch, flow(product) as load:
        until(lambda: len(load.replies) >= 3)
        assert settled(product, 1) == first
        load.size = 40
        four = until(lambda: settled(product, 4), 45)
        assert first < four
        until(lambda: len(load.served_by(last=60)) == 4)
        assert product.info()["replicas_wanted"] == 4
        load.size = 1
        last = until(lambda: settled(product, 1), 60)
        assert last <= four
        load.size = 0
        until(lambda: (product.info()["idle_s"] or 0) > 3 * 2, 30)
        assert settled(product, 1) == last, "min stays, whether anybody asks or not"
    assert load.failures == []
    assert watch.most == 4
    assert watch.ids == four, "none was replaced on the way"


def test_a_stopped_service_stays_down_in_spite_of_min_until_somebody_asks(product: ClusterProduct):
    product.job(replicas={"min": 1, "max": 1})
    product.up()
    (first,) = until(lambda: settled(product, 1), 30)
    assert product.post("/admin/services/probe/stop").status_code == 200
    until(lambda: product.info()["replicas"] == [], 30)
    with watching(product) as watch:
        until(lambda: len(watch.looks) >= 12)
    assert watch.most == 0
    assert product.get("/probe/pid", timeout=60).status_code == 200
    (second,) = until(lambda: settled(product, 1))
    assert second != first


# -- disturbances --------------------------------------------------------------------------


def three(product: ClusterProduct, *args: str) -> set[str]:
    """Three replicas; their jobs."""
    bounds = {"min": 3, "max": 3, "target_in_flight": 8}
    product.job(replicas=bounds, replay=1, sbatch_args=list(args))
    product.up()
    return until(lambda: settled(product, 3), 60)


def renewed(product: ClusterProduct, old: set[str]) -> set[str] | None:
    """The jobs of three replicas none of which is an old one."""
    ready = settled(product, 3)
    return ready if ready is not None and old.isdisjoint(ready) else None


def test_one_of_three_is_cancelled_under_load(product: ClusterProduct):
    jobs = three(product, ALONE)
    with watching(product) as watch, flow(product, size=12) as load:
        until(lambda: len(load.served_by()) == 3)
        victim = min(jobs)
        product.lab.run("scancel", victim)
        after = until(lambda: settled(product, 3, without=victim), 60)
        until(lambda: len(load.served_by(last=30)) == 3)
    assert load.failures == []
    assert len(after - jobs) == 1
    assert watch.most <= 3


def test_the_node_of_one_of_three_is_set_down_under_load(tmp_path, own_lab):
    lab = own_lab(SlurmdTimeout=10, nodes=4)
    with serving(ClusterProduct(tmp_path, lab)) as product:
        jobs = three(product, ALONE, "--no-requeue")
        victim = product.live()[0]
        with watching(product) as watch, flow(product, size=12) as load:
            until(lambda: len(load.served_by()) == 3)
            lab.run("scontrol", "update", f"NodeName={victim.node}", "State=DOWN", "Reason=test")
            after = until(lambda: settled(product, 3, without=victim.id), 60)
            until(lambda: len(load.served_by(last=30)) == 3)
        assert load.failures == []
        assert len(after - jobs) == 1
        assert victim.node not in {job.node for job in product.live()}
        assert watch.most <= 3


def test_one_of_three_is_preempted_under_load(product: ClusterProduct):
    jobs = three(product, ALONE, "--partition=low", "--requeue")
    victim = product.live()[0]
    with watching(product) as watch, flow(product, size=12) as load:
        until(lambda: len(load.served_by()) == 3)
        blocker = product.lab.sbatch(
            "--partition=high", f"--nodelist={victim.node}", ALONE, "--wrap=exec sleep 3600"
        )
        product.lab.until_job(blocker, "RUNNING", 60)
        until(lambda: job_ids(product, state="pending") == {victim.id}, 60)
        product.lab.run("scancel", blocker)
        assert until(lambda: settled(product, 3), 60) == jobs, "it is queued again by Slurm"
        until(lambda: len(load.served_by(last=30)) == 3)
    assert load.failures == []
    assert watch.ids == jobs


def test_three_replicas_under_load_are_changed_over_one_at_a_time(product: ClusterProduct):
    jobs = three(product)
    with watching(product) as watch, flow(product, size=12) as load:
        until(lambda: len(load.served_by()) == 3)
        product.services[0]["sbatch_args"] = ["--comment=changed"]
        product.write_config()
        after = until(lambda: renewed(product, jobs), 90)
        until(lambda: len(load.served_by(last=30)) == 3)
    assert load.failures == []
    assert watch.ids == jobs | after
    assert watch.most <= 4
    assert min(map(len, watch.looks)) >= 3


@pytest.mark.parametrize(("path", "size"), [(SLOW, 24), ("/probe/stream?n=30&s=0.2", 6)])
def test_health_checks_that_time_out_under_full_load_replace_nobody(
    product: ClusterProduct, path: str, size: int
):
    """As in a server with so many workers: a check gets its turn behind the requests before it."""
    entry = product.job(
        replicas={"min": 2, "max": 2, "target_in_flight": 100},
        health={"interval": 0.5, "timeout": 0.4, "failures": 2},
        replace_after=1.5,
    )
    entry["env"]["PROBE_SLOTS"] = "2"
    product.up()
    jobs = until(lambda: settled(product, 2), 60)
    pids = {note["pid"] for note in product.noted("start")}

    def late(pid: int) -> int:
        return sum(check["waited"] > 0.4 for check in product.noted("check") if check["pid"] == pid)

    with watching(product) as watch, flow(product, path, size) as load:
        until(lambda: all(late(pid) >= 12 for pid in pids), 60)
        assert settled(product, 2) == jobs
    assert load.failures == []
    assert watch.ids == jobs
    assert watch.most == 2


# -- guards --------------------------------------------------------------------------------


def refused_for(product: ClusterProduct, field: str) -> None:
    answer = product.get("/probe/pid")
    assert problem(answer) == (503, "cannot-start")
    assert field in answer.json()["reason"]
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert answer.json()["retry_after_s"] > 60, "the hour is not over soon"


def test_no_more_than_max_starts_per_hour_for_a_service_that_is_stopped(product: ClusterProduct):
    product.job(max_starts_per_hour=2)
    product.up()
    for _ in range(2):
        assert product.get("/probe/pid").status_code == 200
        assert product.post("/admin/services/probe/stop").status_code == 200
        until(lambda: product.info()["replicas"] == [], 30)
    refused_for(product, "max_starts_per_hour")
    assert len(product.submitted()) == 2


def test_no_more_than_max_starts_per_hour_for_a_service_that_fails(product: ClusterProduct):
    product.job(max_starts_per_hour=2, bash_file=product.lab.script("fails.sh", "exit 1"))
    product.up()
    assert asked(product) == (503, "start-failed")
    until(lambda: asked(product) == (503, "cannot-start"), 30)
    refused_for(product, "max_starts_per_hour")
    assert len(product.submitted()) == 2


@pytest.mark.timeout(200)
def test_while_the_login_host_is_away_nothing_is_started_that_counts(own_product: ClusterProduct):
    own_product.job(max_starts_per_hour=2)
    own_product.up()
    own_product.lab.sshd.stop()

    def tried_three_times() -> bool:
        assert own_product.get("/probe/pid").status_code == 503
        return sum("start failed" in line for line in own_product.log) >= 3

    until(tried_three_times, 90)
    own_product.lab.sshd.start()
    until(lambda: own_product.get("/probe/pid").status_code == 200, 60)


def test_no_more_than_max_pending_jobs_wait_in_the_queue(product: ClusterProduct):
    product.lab.fill()
    bounds = {"max": 3, "target_in_flight": 2}
    product.job(replicas=bounds, max_pending=1, scale_up_after=0.2)
    product.up()
    with watching(product) as watch, flow(product, size=8) as load:
        until(lambda: product.info()["waiting"] == 8 and product.info()["replicas_wanted"] == 3)
        until(lambda: len(watch.looks) >= 12)
        assert watch.most == 1, "all others would wait as well"
        product.lab.free()
        until(lambda: settled(product, 3), 60)
    assert load.failures == []
    assert watch.most_pending == 1


def test_a_node_where_two_starts_fail_is_left_out_of_the_next(product: ClusterProduct):
    start = product.lab.probe_script()
    body = f'[ "$SLURMD_NODENAME" = n1 ] && exit 1\nexec "{start}" "$1"'
    product.job(bash_file=product.lab.script("not-on-n1.sh", body))
    product.up()
    until(lambda: asked(product) == (200, ""), 60)
    first, second, third = product.submitted()
    assert [first.node, second.node] == ["n1", "n1"]
    assert third.node != "n1"
    shown = product.lab.run("scontrol", "show", "job", third.id).stdout
    assert "ExcNodeList=n1\n" in shown
    assert product.info()["excluded_nodes"] == ["n1"]
