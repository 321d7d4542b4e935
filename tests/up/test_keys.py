"""Clients' keys, as an operator hands them out: nobody without one starts anything."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest

from slurmgate import keys
from tests.up.clients import ask_in_background
from tests.up.product import free_port
from tests.waiting import until

SOON = 4  # seconds: twice what is promised, for machines that are busy
MANY = 10_000  # keys, so many that reading them takes longer than an nginx reload
NO_KEYS = r"keys: .*there is no such file"


class Hammer:
    """A client without a key that asks on and on; ``seen`` are the statuses it was answered."""

    def __init__(self, url: str):
        self.seen: list[int] = []
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Hammer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(timeout=20, headers={"Connection": "close"}) as client:
            while not self._stop.is_set():
                try:
                    self.seen.append(client.get(self._url).status_code)
                except httpx.TransportError:
                    self._stop.wait(0.005)  # nobody listens yet


class Keys:
    """The keys of a product: its commands, and requests with and without."""

    def __init__(self, product):
        self.product = product
        self.file = product.folder / "keys.json"
        self.secrets: list[str] = []
        product.top["keys_file"] = self.file.name
        product.expected.append(NO_KEYS)

    def command(self, *args: str) -> subprocess.CompletedProcess[str]:
        argv = self.product.command("keys", *args, "--config", str(self.product.config))
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)

    def add(self, *args: str) -> str:
        done = self.command("add", *args)
        secret = done.stdout.removesuffix("\n")
        assert re.fullmatch(r"sg-[A-Za-z0-9_-]{43}", secret)
        assert secret not in done.stderr
        self.secrets.append(secret)
        return secret

    def status(self, secret: str | None = None, path: str = "/probe/") -> int:
        """What a request gets that shows this key."""
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        return self.product.get(path, headers=headers).status_code

    def until_status(self, code: int, secret: str | None = None, path: str = "/probe/") -> None:
        until(lambda: self.status(secret, path) == code)


@pytest.fixture
def guarded(product):
    """A product with a cold service that needs a key."""
    product.probe(no_wake=["/none"])
    made = Keys(product)
    product.write_config()
    return made


def test_without_a_key_nothing_starts_and_a_revoked_one_is_none(guarded):
    guarded.product.up()
    assert guarded.status() == 401
    assert guarded.status("sg-" + "A" * 43) == 401
    secret = guarded.add("alice")
    guarded.until_status(503, secret, "/probe/none")  # in force, and it wakes nothing
    assert guarded.status() == 401
    assert guarded.product.noted("start") == []
    assert guarded.status(secret) == 200
    answer = guarded.product.get("/probe/", headers={"x-api-key": secret})
    assert answer.status_code == 200
    guarded.command("revoke", "alice")
    guarded.until_status(401, secret)
    assert len(guarded.product.noted("start")) == 1


def test_a_revoked_key_is_none_soon(guarded):
    guarded.product.up()

    def seconds_until_refused(name: str) -> float:
        secret = guarded.add(name)
        guarded.until_status(503, secret, "/probe/none")
        guarded.command("revoke", name)
        revoked = time.monotonic()
        guarded.until_status(401, secret, "/probe/none")
        return time.monotonic() - revoked

    # A machine that stands still for a while does not do so each time.
    assert any(seconds_until_refused(f"key{number}") < SOON for number in range(3))


def test_a_stream_goes_on_when_its_key_is_revoked(guarded):
    secret = guarded.add("alice")
    guarded.product.up()
    headers = {"Authorization": f"Bearer {secret}"}
    assert guarded.status(secret) == 200
    url = f"{guarded.product.url}/probe/stream?n=60&s=0.1"
    stream = ask_in_background([url], headers=headers)
    until(lambda: any("stream" in r["path"] for r in guarded.product.noted("request")))
    guarded.command("revoke", "alice")
    guarded.until_status(401, secret)
    (answer,) = stream.result()
    assert answer.status == 200
    assert answer.body.split() == [str(n).encode() for n in range(60)]


def test_a_key_is_for_its_services_and_its_time(guarded):
    guarded.product.probe("other")
    guarded.product.write_config()
    only = guarded.add("alice", "--services", "probe", "--expires", "2100-12-31")
    guarded.product.up()
    assert guarded.status(only) == 200
    assert guarded.status(only, "/other/") == 403
    past = json.loads(guarded.file.read_text())
    past["keys"][0]["expires"] = "2020-01-01T00:00:00Z"
    fresh = guarded.file.with_suffix(".tmp")
    fresh.write_text(json.dumps(past))
    fresh.replace(guarded.file)
    guarded.until_status(401, only)
    assert guarded.product.noted("start", "other") == []


def test_a_public_service_needs_no_key(guarded):
    guarded.product.probe("open", public=True)
    guarded.product.up()
    assert guarded.status(path="/open/") == 200
    assert guarded.status() == 401


def test_keys_outlive_the_backend_and_those_revoked_meanwhile_are_refused(guarded):
    alice, bob = guarded.add("alice"), guarded.add("bob")
    guarded.product.up()
    assert guarded.status(alice) == 200
    guarded.product.kill_backend(wait=False)
    guarded.command("revoke", "bob")
    assert guarded.status(alice) == 200
    until(guarded.product.api_answers)
    guarded.until_status(401, bob)
    assert guarded.status(alice) == 200


def test_a_broken_file_changes_nothing_and_status_says_so(guarded):
    alice = guarded.add("alice")
    guarded.product.up()
    assert guarded.status(alice) == 200
    guarded.product.expected.append(r"ERROR keys: .*keys.json: line 1")
    good = guarded.file.read_text()
    guarded.file.write_text("{")
    until(lambda: guarded.product.status()["config"]["keys_error"])
    assert "keys.json" in guarded.product.run("status").stdout
    assert guarded.status(alice) == 200
    assert guarded.status() == 401
    guarded.file.write_text(good)
    until(lambda: guarded.product.status()["config"]["keys_error"] is None)
    guarded.file.unlink()
    guarded.until_status(401, alice)


def test_a_reload_sets_and_removes_the_file(guarded):
    del guarded.product.top["keys_file"]
    guarded.product.up()
    assert guarded.status() == 200
    guarded.product.top["keys_file"] = guarded.file.name
    guarded.product.write_config()
    guarded.product.run("reload")
    assert guarded.status() == 401
    secret = guarded.add("alice")
    guarded.until_status(200, secret)
    del guarded.product.top["keys_file"]
    guarded.product.write_config()
    guarded.until_status(200)


def test_a_reload_that_also_moves_the_gate_opens_no_way_in_before_the_keys(guarded):
    product = guarded.product
    product.probe("cold")
    file = product.top.pop("keys_file")
    # Only the call below has it read again, and the gate expects what comes of that.
    product.top |= {"watch": False, "gate": {"listen": f"127.0.0.1:{product.port}"}}
    product.up(listen=False)
    assert guarded.status() == 200
    moved = f"127.0.0.1:{free_port()}"
    product.top |= {"keys_file": file, "gate": {"listen": moved}}
    product.write_config()
    product.expected.append("configuration refused")

    def reloaded_with(count: int) -> bool:
        """Where a busy gate takes so many keys too late, nothing changes and it is told so."""
        some = {"keys": [{"name": f"n{n}", "sha256": f"{n:064x}"} for n in range(count)]}
        guarded.file.write_text(json.dumps(some))
        answer = product.post("/admin/reload")
        assert answer.status_code == 200 or "try again" in answer.text, answer.text
        return answer.status_code == 200

    with Hammer(f"http://{moved}/probe/") as warm, Hammer(f"http://{moved}/cold/") as cold:
        assert any(map(reloaded_with, (MANY, MANY // 4, MANY // 16, MANY // 64)))
        until(lambda: min(hammer.seen.count(401) for hammer in (warm, cold)) > 10)
    assert set(warm.seen + cold.seen) == {401}
    assert product.noted("start", "cold") == []


def test_no_secret_is_anywhere_but_with_its_client(guarded):
    guarded.product.probe("open", public=True)
    secret = guarded.add("alice", "--rpm", "3")
    guarded.product.up()
    for path in ("/probe/", "/probe/none", "/open/", "/v1/models", "/probe/", "/probe/"):
        guarded.status(secret, path)
        guarded.product.get(path, headers={"x-api-key": secret})
    assert guarded.status(secret) == 429
    metrics = guarded.product.get("/metrics").text
    assert re.search(r'slurmgate_key_requests_total\{key="alice"\} [1-9]', metrics)
    access_log = guarded.product.state_dir / "access.log"
    until(lambda: '"alice"' in access_log.read_text())  # it is written in pieces
    guarded.product.run("status")
    guarded.product.post("/admin/reload")
    shown = [guarded.product.get(path).text for path in ("/info", "/metrics", "/")]
    shown += guarded.product.log
    shown += [_contents(path) for path in guarded.product.folder.rglob("*") if path.is_file()]
    shown += [_contents(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
    for text in shown:
        assert secret not in text
    assert sum(keys.digest(secret) in text for text in shown) == 1  # the file of keys itself


def _contents(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # a process that has ended since, a file that was renamed
        return ""


@pytest.mark.parametrize("how", ["reload", "nginx"])
def test_a_gate_that_starts_again_lets_nobody_in_without_a_key(guarded, how):
    secret = guarded.add("alice")
    guarded.product.up()
    assert guarded.status(secret) == 200
    master = guarded.product.nginx_master()
    guarded.product.expected.append("exited|context: ngx|signal 9|gate ended")
    workers = guarded.product.nginx_workers()
    if how == "reload":
        guarded.product.top["gate"] = {"max_body": 1 << 20}
        guarded.product.write_config()
        until(lambda: not set(workers) & set(guarded.product.nginx_workers()))
    else:
        subprocess.run(["kill", f"-{signal.SIGKILL.value}", str(master)], check=True)
        until(lambda: guarded.product.serves_again(master))
    assert guarded.status() == 401
    assert guarded.status(secret) == 200
