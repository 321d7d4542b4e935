"""Why an address cannot be listened on, in words."""

from __future__ import annotations

import os
import socket

import pytest

from slurmgate import listening, procfs


@pytest.fixture
def listener():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def test_a_free_address_is_no_problem(listener):
    port = listener.getsockname()[1]
    listener.close()
    assert listening.problem("127.0.0.1", port) is None
    assert listening.problem("localhost", port) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_taken_port_is_explained_with_the_process_that_has_it(listener, host):
    port = listener.getsockname()[1]
    me = procfs.read(os.getpid())
    assert me is not None
    assert listening.problem(host, port) == f"port {port} is taken by {me.comm} (pid {me.pid})"


def test_another_address_of_the_machine_is_free(listener):
    assert listening.problem("127.0.0.9", listener.getsockname()[1]) is None


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_named(host):
    problem = listening.problem(host, 8080)
    assert problem is not None
    assert problem.startswith(f"{host} is no address of this machine")


def test_a_port_for_root_is_explained(as_ordinary_user):
    def look() -> None:
        problem = listening.problem("127.0.0.1", 81)
        assert problem is None or "needs more rights" in problem

    as_ordinary_user(look)
