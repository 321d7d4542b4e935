"""Whose job is whose: two gates on one account, look-alikes, and taking jobs over."""

from __future__ import annotations

import contextlib

import pytest

from tests.lab.lab import Lab
from tests.slurm.product import ClusterProduct, serving
from tests.waiting import until


@pytest.fixture
def gates(tmp_path, lab: Lab):
    """Two gates with the same file, on the same account."""
    with contextlib.ExitStack() as stack:
        made = []
        for name in ("first", "second"):
            folder = tmp_path / name
            folder.mkdir()
            product = ClusterProduct(folder, lab, instance="shared")
            made.append(stack.enter_context(serving(product)))
        yield made


def test_two_gates_on_one_account_leave_each_other_alone(gates):
    first, second = gates
    lab = first.lab
    look_alike = lab.sbatch(
        "--job-name=sg.shared.someone.abcdef.20001.0123abcd.probe",
        "--output=/dev/null",
        "--wrap=exec sleep 600",
    )
    for product in gates:
        product.job(timeout=3600)
        product.up()
        assert product.get("/probe/pid").status_code == 200
    (one,), (two,) = first.live(), second.live()
    assert one.id != two.id
    first.post("/admin/services/probe/stop")
    until(lambda: first.live() == [])
    second.kill_backend()
    second.until_state("ready")
    assert second.live()[0].id == two.id
    second.down()
    assert second.live()[0].id == two.id
    found = lab.job(look_alike)
    assert found is not None
    assert found.state == "RUNNING"


def test_jobs_of_another_owner_are_shown_and_taken_over_on_request(gates):
    first, second = gates
    for product in gates:
        product.job(timeout=3600)["env"] = {"PROBE_LOAD_S": "0"}
    first.up()
    pid = first.get("/probe/pid").json()["pid"]
    (job,) = first.live()
    first.down()
    second.up()
    until(lambda: first.owner in second.run("status").stdout, 30)
    assert second.info()["state"] == "cold"
    said = second.run("adopt", first.owner).stdout
    assert "1 job" in said
    second.until_state("ready", seconds=40)
    assert second.replica()["job_id"] == job.id
    assert second.get("/probe/pid").json()["pid"] == pid
    assert len(second.live()) == 1
    assert len(second.submitted()) == 1
