"""Cold starts on a real cluster: from the first request to the answer, and back to cold."""

from __future__ import annotations

import concurrent.futures
import json
import socket
from typing import Any

import httpx

from slurmgate import config
from tests.lab.daemon import answers
from tests.slurm.product import ClusterProduct, ask
from tests.up.product import free_port
from tests.waiting import until

SERVICE = {
    "name": "LLM",
    "route_name": "llm",
    "api_paths": ["/v1", "/health"],
    "bash_file": "run_llm.sh",
    "check_health_path": "health",
    "timeout": 2,
    "remote_host": "login.cluster.example",
    "ssh_username": "someone",
    "ssh_key_file": "~/.ssh/id_ed25519",
    "remote_port": 8000,
    "local_host": "127.0.0.1",
    "local_port": 8001,
}
ORIGINAL = {
    "nginxFile": "/etc/nginx/sites-enabled/services",
    "appPort": 5000,
    "Services": [SERVICE],
}


def test_the_original_systems_file_works_unchanged(product: ClusterProduct):
    """Only host names, paths, and a host key, as the operator of that system would have them."""
    entry: dict[str, Any] = {**SERVICE}
    fields = product.lab.ssh_fields()
    entry |= {
        **{key: fields[key] for key in ("remote_host", "ssh_username", "ssh_key_file")},
        "ssh_port": fields["ssh_port"],
        "ssh_known_hosts": fields["ssh_known_hosts"],
        "bash_file": product.lab.probe_script("any"),
        "local_port": free_port(),
        "remote_port": free_port(),
    }
    product.write_config(json.dumps({**ORIGINAL, "Services": [entry]}))
    product.services = [entry]
    product.top = {key: ORIGINAL[key] for key in ("nginxFile", "appPort")}
    assert config.examine(product.config).problems == ()
    product.up()
    for _ in range(2):
        assert product.info("LLM")["state"] == "cold"
        answer = product.get("/llm/v1/anything")
        assert answer.status_code == 200
        assert answer.headers["X-Slurmgate-Service"] == "LLM"
        assert float(answer.headers["X-Slurmgate-Waited"]) > 0
        until(lambda: answers("127.0.0.1", entry["local_port"]))
        direct = httpx.get(f"http://127.0.0.1:{entry['local_port']}/health")
        assert direct.status_code == 200
        product.until_state("cold", "LLM", 30)
        until(lambda: product.live("llm") == [])
    assert len(product.submitted("llm")) == 2


def test_a_job_is_shown_with_its_node_its_id_and_its_end(product: ClusterProduct):
    product.job(sbatch_args=["--time=30"])
    product.up()
    product.get("/probe/pid")
    (job,) = product.live()
    shown = product.replica()
    assert (shown["job_id"], shown["node"]) == (job.id, job.node)
    assert 1500 < shown["ends_in_s"] <= 1800
    table = product.run("status").stdout
    assert shown["id"] in table
    until(lambda: "probe on" in product.run("logs", "probe").stdout)


def test_two_services_share_a_port_on_different_nodes(product: ClusterProduct):
    port = free_port()
    first, second, _third = product.lab.nodes
    product.job("one", remote_port=port, sbatch_args=[f"--nodelist={first}"])
    product.job("two", remote_port=port, sbatch_args=[f"--nodelist={second}"])
    product.up()
    waiting = [ask(product, "/one/pid"), ask(product, "/two/pid")]
    pids = {waiter.answer().json()["pid"] for waiter in waiting}
    assert len(pids) == 2
    assert product.live("one")[0].node == first
    assert product.live("two")[0].node == second


def test_a_taken_port_is_exchanged_for_another_without_a_word(product: ClusterProduct):
    node = product.lab.nodes[0]
    with socket.socket() as taken:
        taken.bind((product.lab.addresses[node], 0))
        taken.listen()
        low = taken.getsockname()[1]
        product.job(port_range=[low, low + 1], sbatch_args=[f"--nodelist={node}"])
        product.up()
        for _ in range(20):  # the first choice is by chance
            answer = product.get("/probe/pid")
            assert answer.status_code == 200, answer.text
            assert product.info()["log"] == []
            product.post("/admin/services/probe/stop")
            product.until_state("cold")
            until(lambda: product.live() == [])
            if len(product.submitted()) > len(product.noted("start")):
                break
    assert len(product.submitted()) > len(product.noted("start")), "the taken port was never met"


def test_a_service_that_binds_the_nodes_loopback_is_reached_by_node_loopback(
    product: ClusterProduct,
):
    assert product.lab.port_22_problem is None, product.lab.port_22_problem
    product.job(bind="loopback", tunnel="node-loopback")
    product.up()
    assert product.get("/probe/pid").status_code == 200


def test_without_a_tunnel_the_node_is_dialled_directly(product: ClusterProduct):
    product.job(tunnel="none")
    product.up()
    assert product.get("/probe/pid").status_code == 200
    assert product.tunnels() == []


def test_a_hundred_parallel_cold_requests_make_one_job(product: ClusterProduct):
    product.job()
    product.up()
    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        got = list(pool.map(lambda _: product.get("/probe/pid"), range(100)))
    assert {answer.status_code for answer in got} == {200}
    assert len(product.submitted()) == 1


def test_an_idle_job_is_cancelled_and_the_next_request_starts_another(product: ClusterProduct):
    product.job(timeout=1)
    product.up()
    first = product.get("/probe/pid").json()
    until(lambda: product.live() == [], 30)
    until(lambda: product.tunnels() == [])
    assert product.get("/probe/pid").json() != first


def test_stop_jobs_cancels_them_at_the_end_and_otherwise_they_stay(product: ClusterProduct):
    product.job()
    product.up()
    product.get("/probe/pid")
    assert product.down() == 0
    (job,) = product.live()
    assert product.tunnels() == []
    product.up("--stop-jobs")
    assert product.get("/probe/pid").status_code == 200
    assert [j.id for j in product.live()] == [job.id], "it was adopted"
    assert product.down() == 0
    until(lambda: product.live() == [])
