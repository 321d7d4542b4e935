"""The configuration is read again: all or nothing, and nobody's request fails for it."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.up.clients import Load, ask_in_background
from tests.waiting import until


@pytest.mark.timeout(300)
def test_a_thousand_reloads_under_load_fail_no_request_and_restart_nothing(product):
    product.probe()
    product.probe("other")
    product.up()
    product.get("/probe/")
    with Load(f"{product.url}/probe/", clients=4, pause=0.01) as load:
        for number in range(1000):
            product.probe("other", max_waiting=100 + number)
            product.write_config()
            assert product.post("/admin/reload").status_code == 200
    assert load.failures == []
    assert load.sent > 500
    assert len(product.noted("start")) == 1


def test_a_broken_file_is_refused_with_every_error_and_traffic_goes_on(product):
    product.probe()
    product.up()
    product.get("/probe/")
    product.expected.append("configuration refused")
    product.write_config('{"Services": [{"name": 1, "tiemout": 2}]}')
    answer = product.post("/admin/reload")
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) > 2
    assert any("Services[0].tiemout" in e and "timeout" in e for e in answer.json()["errors"])
    assert "tiemout" in product.status()["config"]["error"]
    assert product.run("reload", check=False).returncode == 1
    assert product.get("/probe/").status_code == 200
    product.write_config()
    product.run("reload")
    assert product.status()["config"]["error"] is None


def test_a_token_file_that_is_not_there_locks_nobody_out(product):
    product.probe()
    product.up()
    product.expected.append("configuration refused")
    product.top["admin_token_file"] = "token"
    product.write_config()
    refused = product.run("reload", check=False)
    assert refused.returncode == 1
    assert "admin_token_file: cannot read the admin token" in refused.stderr
    assert product.post("/admin/management/enable").status_code == 200
    (product.folder / "token").write_text("our-own\n")
    (product.folder / "token").chmod(0o600)
    product.run("reload")
    assert product.post("/admin/management/enable").status_code == 401


def test_a_changed_file_is_noticed_also_by_rename_and_by_signal(product):
    product.probe()
    product.up()
    product.probe("second")
    product.write_config()
    until(lambda: product.get("/second/").status_code == 200)
    before = until(product.loaded)
    product.top["watch"] = False
    product.write_config()
    until(lambda: product.loaded() > before)
    product.probe("third")
    product.write_config()
    assert product.process is not None
    os.kill(product.process.pid, signal.SIGHUP)
    until(lambda: product.get("/third/").status_code == 200)


def test_a_removed_service_ends_its_requests_then_its_replica(product):
    product.probe()
    product.probe("other")
    product.up()
    streaming = ask_in_background([f"{product.url}/probe/stream?n=50&s=0.1"])
    until(lambda: product.info()["in_flight"] == 1)
    product.services = [s for s in product.services if s["name"] != "probe"]
    product.write_config()
    product.run("reload")
    until(lambda: product.get("/probe/").status_code == 404)
    answer = streaming.result()[0]
    assert answer.body.decode().split() == [str(n) for n in range(50)]
    until(lambda: product.replicas() == [])


def test_changed_start_parameters_replace_the_replica_once_it_is_not_used(product):
    product.probe()
    product.up()
    streaming = ask_in_background([f"{product.url}/probe/stream?n=50&s=0.1"])
    until(lambda: product.info()["in_flight"] == 1)
    entry = product.probe()
    entry["env"]["PROBE_EXTRA"] = "1"
    product.write_config()
    product.run("reload")
    assert streaming.result()[0].body.decode().split() == [str(n) for n in range(50)]
    until(lambda: len(product.noted("start")) == 2)
    until(lambda: len(product.replicas()) == 1)
    assert product.get("/probe/").json()["pid"] == product.noted("start")[1]["pid"]


def test_a_service_that_gets_another_launcher_leaves_nothing_running_with_the_one_before(product):
    product.probe()
    product.up()
    product.get("/probe/")
    product.probe(launcher="slurm")
    product.write_config()
    product.run("reload")
    until(lambda: product.replicas() == [])


def test_changed_limits_apply_at_once_without_a_restart(product):
    product.probe(timeout=60)
    product.up()
    product.get("/probe/")
    product.probe(timeout=0.5)
    product.write_config()
    product.run("reload")
    product.until_state("cold", seconds=10)
    assert len(product.noted("start")) == 1


def status_of_body(product, size: int) -> int:
    url = f"{product.url}/probe/"
    return ask_in_background([url], method="POST", data=b"x" * size).result()[0].status


def up_with_small_bodies(product) -> None:
    product.expected.append("client intended to send too large body")
    product.top["gate"] = {"max_body": 1000}
    product.probe()
    product.up()
    product.get("/probe/")
    assert status_of_body(product, 2000) == 413


def test_a_changed_gate_section_is_tried_then_applied_by_an_nginx_reload(product):
    up_with_small_bodies(product)
    product.top["gate"] = {"max_body": 10000}
    product.write_config()
    product.run("reload")
    until(lambda: status_of_body(product, 2000) == 200)
    assert len(product.noted("start")) == 1


def test_a_gate_section_changed_while_no_backend_runs_is_applied_by_the_next_one(product):
    up_with_small_bodies(product)
    product.process.send_signal(signal.SIGSTOP)  # nobody starts the next one yet
    try:
        product.kill_backend(wait=False)
        product.top["gate"] = {"max_body": 10000}
        product.write_config()
    finally:
        product.process.send_signal(signal.SIGCONT)
    until(lambda: status_of_body(product, 2000) == 200)
    assert product.get("/probe/").headers["X-Slurmgate-Waited"] == "0.000"


def test_a_supervised_backend_restarted_over_a_broken_file_goes_on_with_the_last_good_one(product):
    product.probe()
    product.up()
    product.get("/probe/")
    product.expected.append("configuration refused")
    product.write_config("{")
    until(lambda: json.dumps(product.status()["config"]["error"]) != "null")
    product.kill_backend()
    assert product.get("/probe/").headers["X-Slurmgate-Waited"] == "0.000"
    assert product.status()["config"]["error"]
