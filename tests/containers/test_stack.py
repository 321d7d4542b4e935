"""Slurmgate in containers, on a Slurm cluster in containers."""

from __future__ import annotations


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
    assert [s["name"] for s in stack.get("/info").json()["services"]] == ["Teller"]
