"""Starts that cannot work: who waits is told why, soon, and nothing is left behind."""

from __future__ import annotations

import socket
import sys
import time

from tests.ports import free_port, free_ports
from tests.up.clients import ask_in_background
from tests.up.product import PROBE
from tests.waiting import until


def ask(product, name: str, count: int = 3):
    return ask_in_background([f"{product.url}/{name}/{i}" for i in range(count)]).result()


def test_a_service_that_exits_at_once_fails_all_who_wait_with_its_last_words(product):
    product.service("bad", product.script("bad.sh", "echo no GPU found; exit 3"))
    product.up()
    for answer in ask(product, "bad"):
        assert answer.status == 503
        assert answer.json["type"].endswith("start-failed")
        assert "exited with code 3" in answer.json["reason"]
        assert answer.json["log"] == ["no GPU found"]
        assert int(answer.headers["Retry-After"]) >= 1
    assert "code 3" in product.info("bad")["reason"]
    assert product.info("bad")["log"] == ["no GPU found"]
    assert any("no GPU found" in line for line in product.log)
    assert product.replicas() == []


def test_the_next_start_waits_out_a_backoff_that_grows(product):
    product.service("bad", product.script("bad.sh", 'echo try >> "$0.tries"; exit 1'))
    product.up()
    tries = product.folder / "bad.sh.tries"

    def count() -> int:
        return len(tries.read_text().splitlines()) if tries.exists() else 0

    began = time.monotonic()
    while count() < 4:
        answer = product.get("/bad/")
        assert answer.status_code == 503
        assert answer.json()["type"].endswith("start-failed")
    assert time.monotonic() - began >= 1 + 2 + 4
    assert count() == 4
    product.post("/admin/services/bad/start")
    until(lambda: count() == 5, 5)  # the backoff is eight seconds by now


def test_a_script_that_does_not_exist(product):
    product.service("bad", "missing.sh")
    product.up()
    answer = ask(product, "bad", 1)[0]
    assert answer.status == 503
    assert "missing.sh" in answer.json["reason"]


def test_a_service_that_never_becomes_healthy_is_given_up(product):
    product.probe(load=3600)
    product.up()
    asked = ask_in_background([f"{product.url}/probe/{i}" for i in range(3)])
    until(lambda: "503" in (product.info()["reason"] or ""))  # it was polled, and still loads
    product.probe(load=3600, start_timeout=1)
    product.write_config()
    product.run("reload")
    answer = asked.result()[0]
    assert answer.status == 503
    assert answer.json["type"].endswith("start-failed")
    assert "start_timeout" in answer.json["reason"]
    assert "503" in answer.json["reason"]
    assert any("probe on" in line for line in answer.json["log"])
    until(lambda: product.replicas() == [])
    assert len(product.noted("start")) == 1


def test_a_stop_during_a_start_is_told_to_those_who_wait(product):
    product.probe(load=3600)
    product.up()
    asked = ask_in_background([f"{product.url}/probe/{i}" for i in range(3)])
    until(lambda: product.info()["waiting"] == 3 and product.noted("start"))
    product.run("stop", "probe")
    for answer in asked.result():
        assert answer.status == 503
        assert "operator" in answer.json["reason"]
    until(lambda: product.replicas() == [])
    assert len(product.noted("start")) == 1


def test_a_port_that_is_taken(product):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        product.probe(remote_port=port)
        product.up()
        answer = ask(product, "probe", 1)[0]
        assert answer.status == 503
        assert str(port) in answer.json["reason"]
    time_left = product.info()["retry_after_s"]
    assert time_left is not None
    until(lambda: product.get("/probe/").status_code == 200)


def test_an_automatic_port_that_is_taken_is_passed_over(product):
    port = free_ports(2)
    with socket.create_server(("127.0.0.1", port)):
        product.probe(port_range=[port, port + 1])
        product.up()
        assert product.get("/probe/").status_code == 200


def test_a_disk_that_is_full_starts_nothing_and_says_why(product):
    product.probe()
    product.up()
    (product.state_dir / "replicas").rmdir()
    (product.state_dir / "replicas").touch()
    answer = ask(product, "probe", 1)[0]
    assert answer.status == 503
    assert "record" in answer.json["reason"]
    assert product.noted("start") == []
    (product.state_dir / "replicas").unlink()
    (product.state_dir / "replicas").mkdir()


def test_a_port_that_somebody_took_after_it_was_chosen_fails_nobody(product):
    script = product.script(
        "taken.sh",
        'if mkdir once; then echo "OSError: [Errno 98] Address already in use"; exit 1; fi\n'
        f'exec "{sys.executable}" "{PROBE}" "$1"',
    )
    product.service("taken", script)
    product.up()
    assert product.get("/taken/").status_code == 200
