"""Slurmgate in containers, on a Slurm cluster in containers.

The tests that want the service warm share one job: which job answers is what they are about.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.containers.machines import NODES
from tests.waiting import until


@pytest.fixture
def job(stack):
    """The id of the service's job, which runs."""
    return stack.get("/teller/warm").json()["job"]


def jobs_ever(cluster, route="teller"):
    """All jobs of a service that there were, oldest first."""
    return [job for job in cluster.jobs(ended=True) if job.name.endswith(f".{route}")]


def ids_ever(cluster, route="teller"):
    return [job.id for job in jobs_ever(cluster, route)]


@contextlib.contextmanager
def asking(stack, answers: list[httpx.Response]) -> Iterator[None]:
    """One client that asks again and again, all the while."""
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=stack.url, timeout=90) as client:
            while not over.is_set():
                answers.append(client.post("/teller/asked", content=b"still there?"))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        until(lambda: answers)
        yield
    finally:
        over.set()
        thread.join()


def test_the_containers_run_as_an_ordinary_user_and_cannot_write_their_images(stack):
    for service in ("gate", "backend"):
        assert stack.run(service, "id", "-u").strip() != "0"
        assert "Read-only" in stack.run(service, "touch", "/opt/x", check=False)
        assert "CapEff:\t0000000000000000" in stack.run(service, "cat", "/proc/self/status")
    assert "Read-only" in stack.run("backend", "touch", "/etc/slurmgate/x", check=False)
    assert "Read-only" in stack.run("backend", "touch", "/home/slurmgate/.ssh/x", check=False)


def test_the_gate_answers_on_the_published_port(stack):
    assert stack.get("/healthz").json() == {"status": "ok"}
    assert stack.get("/readyz").json() == {"status": "ready"}
    assert [s["name"] for s in stack.get("/info").json()["services"]] == ["teller", "slow"]


def test_a_changed_gate_section_is_in_force_after_a_restart_of_the_gate(stack):
    def rendered() -> bool:
        conf = stack.run("gate", "cat", "/var/lib/slurmgate/nginx/nginx.conf")
        return "client_max_body_size 1000;" in conf

    stack.config["gate"]["max_body"] = 1000
    stack.configure()
    until(rendered)
    restart = "gate: changed; restart the gate"
    until(lambda: restart in stack.run("backend", "slurmgate", "status"))
    stack.compose("restart", "gate")
    stack.wait_until_healthy()
    until(lambda: restart not in stack.run("backend", "slurmgate", "status"))
    assert httpx.post(f"{stack.url}/teller/large", content=bytes(1001)).status_code == 413


def test_check_finds_everything_in_place(stack):
    assert "no errors" in stack.run("backend", "slurmgate", "check", "--connect")


def test_a_cold_request_starts_one_job_and_is_answered_by_it(stack, cluster):
    assert jobs_ever(cluster) == []
    answer = httpx.post(f"{stack.url}/teller/echo", content=b"hello cold world", timeout=90)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["body"] == "hello cold world"
    assert told["node"] in NODES
    assert float(answer.headers["X-Slurmgate-Waited"]) > 0
    (job,) = jobs_ever(cluster)
    assert (job.id, job.state, job.node) == (told["job"], "RUNNING", told["node"])
    assert job.name.startswith("sg.")


def test_no_request_fails_while_the_backend_is_killed_and_comes_back(stack, cluster, job):
    answers: list[httpx.Response] = []
    with asking(stack, answers):
        stack.kill_backend()
        stack.wait_until_healthy()
        assert stack.get("/teller/after").json()["job"] == job
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["job"] for answer in answers} == {job}
    assert ids_ever(cluster) == [job]


def test_a_request_held_while_the_backend_is_killed_is_answered_by_the_job_it_waits_for(
    stack, cluster
):
    with ThreadPoolExecutor() as pool:
        held = pool.submit(stack.get, "/slow/held", 90)
        until(lambda: jobs_ever(cluster, "slow"))
        stack.kill_backend()
        assert not held.done()
        answer = held.result()
    assert answer.status_code == 200, answer.text
    assert ids_ever(cluster, "slow") == [answer.json()["job"]]


def test_a_restarted_stack_adopts_the_job(stack, cluster, job):
    stack.compose("restart")
    stack.wait_until_healthy()
    assert stack.get("/teller/after").json()["job"] == job
    assert ids_ever(cluster) == [job]


def test_a_stack_taken_down_and_up_again_adopts_the_job(stack, cluster, job):
    stack.compose("down")
    assert ids_ever(cluster) == [job]
    stack.up()
    assert stack.get("/teller/after").json()["job"] == job
    assert ids_ever(cluster) == [job]


def test_an_operator_stops_the_service_and_its_job_ends(stack, cluster, job):
    stack.run("backend", "slurmgate", "stop", "teller")
    until(lambda: job not in [running.id for running in cluster.jobs()], 30)
    assert ids_ever(cluster) == [job]
