"""The cluster and the stack, each started once for all tests: they take seconds to come up."""

from __future__ import annotations

import pytest

from tests.containers import machines, stacks


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with machines.running(tmp_path_factory.mktemp("keys")) as made:
        yield made


def service(name, **more):
    """A service on the cluster, as services.json has it."""
    return {
        "name": name,
        "route_name": name,
        "api_paths": ["/"],
        "bash_file": "serve.sh",
        "check_health_path": "/health",
        "timeout": 600,
        "remote_host": "login",
        "ssh_username": machines.ACCOUNT,
        "ssh_key_file": "~/.ssh/id_ed25519",
        "remote_port": "auto",
        **more,
    }


@pytest.fixture(scope="session")
def stack(tmp_path_factory, cluster):
    """The compose stack with two services on the cluster."""
    folder = tmp_path_factory.mktemp("config")
    config = {
        "gate": {"listen": "0.0.0.0:8080", "open": True},
        "Services": [service("teller"), service("slow", env={"LOAD_S": "10"})],
    }
    folder.chmod(0o755)
    with stacks.running(folder, config, cluster.keys, cluster.network.name) as made:
        yield made


@pytest.fixture(autouse=True)
def story(request, stack, cluster):
    """What the containers printed, beside a failed test."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before:
        print(stack.logs())  # noqa: T201
