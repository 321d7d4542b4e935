"""What is in force of the file of keys, whatever becomes of the file, and what gates get of it."""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from flask import Flask

from slurmgate import keyring, keys, keys_file
from slurmgate.api import gate, metrics
from slurmgate.control import Control
from slurmgate.errors import KeysError, KeysMissing
from slurmgate.keyring import Keyring, Keyset, KeyUse, judge
from slurmgate.keys import Key
from tests.waiting import until

ALICE = Key("alice", "a" * 64, ("LLM",), 60, 4, 1798761600, 1)
BOB = Key("bob", "b" * 64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def ring(path):
    """Makes a watching keyring for the file."""
    made = []

    def make(file=path):
        made.append(Keyring(file))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.close()


def put(path, *known):
    keys_file.change(path, lambda found: known)


def names(ring):
    return [key.name for key in ring.current.keys]


def settles(ring, *expected, error=None):
    """The keys in force, and whether something is wrong with the file."""
    until(lambda: tuple(names(ring)) == expected and error == bool(ring.current.error))
    assert ring.current.required


# -- who is let in -------------------------------------------------------------------------


def test_broken_leaves_what_was_read_before_and_missing_leaves_nobody():
    good = Keyset(True, (ALICE,))
    assert judge(good, (BOB,)) == Keyset(True, (BOB,))
    broken = judge(good, KeysError(["keys.json: keys[0]: name: is missing"]))
    assert (broken.required, broken.keys) == (True, (ALICE,))
    assert "keys[0]" in (broken.error or "")
    missing = judge(broken, KeysMissing(["keys.json: there is no such file"]))
    assert (missing.required, missing.keys) == (True, ())
    assert judge(missing, KeysError(["keys.json: is broken"])).keys == ()


def test_a_long_list_of_faults_is_cut():
    said = judge(Keyset(True), KeysError([f"fault {n}" for n in range(500)])).error or ""
    assert "fault 19" in said
    assert "fault 20" not in said
    assert "480 more" in said


def test_without_a_file_nobody_needs_a_key(ring):
    assert ring(None).current == Keyset(False)


@pytest.mark.parametrize("content", [None, "", "{", '{"keys": [{"name": "alice"}]}'])
def test_a_file_that_is_no_good_at_first_lets_nobody_in(ring, path, content, caplog):
    if content is not None:
        path.write_text(content)
    made = ring()
    assert (made.current.required, made.current.keys) == (True, ())
    assert str(path) in (made.current.error or "")
    assert str(path) in caplog.text
    put(path) if content is None else path.unlink()
    put(path, ALICE)
    settles(made, "alice", error=False)


def test_every_change_is_followed_and_every_trouble_shown(ring, path, caplog):
    caplog.set_level(logging.INFO)
    put(path, ALICE)
    made = ring()
    settles(made, "alice", error=False)
    put(path, ALICE, BOB)
    settles(made, "alice", "bob", error=False)
    put(path, BOB)
    settles(made, "bob", error=False)
    path.write_text('{"keys": [{}]}')
    settles(made, "bob", error=True)
    path.write_bytes(keys.serialise((BOB,)))
    settles(made, "bob", error=False)
    path.unlink()
    settles(made, error=True)
    path.write_text("{")
    until(lambda: "JSON" in (made.current.error or ""))
    assert made.current.keys == ()
    put_again = path.with_suffix(".new")
    put_again.write_bytes(keys.serialise((ALICE,)))
    put_again.replace(path)
    settles(made, "alice", error=False)
    assert "b" * 64 not in caplog.text


def test_a_change_within_the_same_size_and_time_is_seen(ring, path):
    put(path, BOB)
    made = ring()
    before = path.stat()
    with path.open("r+b") as file:
        file.write(path.read_bytes().replace(b"bob", b"eve"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    settles(made, "eve", error=False)


def test_a_file_that_cannot_be_read_any_more_is_a_broken_one(ring, public_folder, as_ordinary_user):
    path = public_folder / "keys.json"
    path.write_bytes(keys.serialise((BOB,)))
    path.chmod(0o644)

    def follow():
        made = ring(path)
        assert names(made) == ["bob"]
        told.write(b"read\n")
        settles(made, "bob", error=True)

    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as told, os.fdopen(reading, "rb") as heard:
        pid = os.fork()
        if pid == 0:
            heard.readline()
            path.chmod(0)
            os._exit(0)
        as_ordinary_user(follow)
        os.waitpid(pid, 0)


def test_a_reload_may_set_change_and_remove_the_file(ring, path, tmp_path):
    made = ring(None)
    made.follow(path)
    assert (made.current.required, made.current.keys) == (True, ())
    put(path, ALICE)
    settles(made, "alice", error=False)
    other = tmp_path / "other.json"
    other.write_text("{")
    made.follow(other)
    assert (made.current.required, made.current.keys) == (True, ())
    put(path, BOB)
    made.follow(path)
    assert names(made) == ["bob"]
    made.follow(None)
    assert made.current == Keyset(False)


def test_a_moment_of_an_editor_is_no_trouble(path, monkeypatch):
    put(path, ALICE)
    made = Keyring(path)
    looks = [KeysMissing(["gone"]), keys.serialise((BOB,))]

    def read(_path):
        look = looks.pop(0)
        if isinstance(look, KeysError):
            raise look
        return look

    monkeypatch.setattr(keys, "read", read)
    seen: list[Keyset] = []
    monkeypatch.setattr(made, "_put_in_force", seen.append)
    made._look(path, made.current)
    assert seen == [Keyset(True, (BOB,))]


# -- what gates get ------------------------------------------------------------------------


def test_versions_are_equal_exactly_when_a_gate_does_the_same():
    base = Keyset(True, (ALICE,))
    assert Keyset(True, (ALICE,), "an error").version == base.version
    others = [
        Keyset(False),
        Keyset(True),
        Keyset(True, (BOB,)),
        Keyset(True, (ALICE, BOB)),
        Keyset(True, (Key("alice", "a" * 64),)),
    ]
    assert len({base.version, *(other.version for other in others)}) == 6


def test_the_wire_form():
    wire = Keyset(True, (ALICE, BOB)).wire()
    assert wire["required"] is True
    assert wire["entries"] == [
        {
            "name": "alice",
            "sha256": "a" * 64,
            "services": ["LLM"],
            "rpm": 60,
            "in_flight": 4,
            "expires": 1798761600,
        },
        {
            "name": "bob",
            "sha256": "b" * 64,
            "services": None,
            "rpm": 0,
            "in_flight": 0,
            "expires": None,
        },
    ]


SNAPSHOT = {"version": {"epoch": "e", "n": 2}, "services": []}


class Exchange:
    """Makes the notify calls of a gate; what the control loop would answer is given."""

    def __init__(self, path):
        self.ring = Keyring(path)
        self._answer: dict[str, Any] | None = None
        self._app = Flask("test")
        self._app.register_blueprint(gate.blueprint(cast(Control, self), self.ring))

    def notify(self, report):
        return self._answer

    def __call__(self, answer=None, /, **told):
        """Status and body of what a gate gets that tells this."""
        self._answer = answer
        body = {"gate": "g", "snapshot": None, "services": {}, "replicas": {}} | told
        given = self._app.test_client().post("/gate/notify", json=body)
        return given.status_code, given.json if given.status_code == 200 else None


@pytest.fixture
def exchange(path):
    put(path, ALICE)
    return Exchange(path)


def test_a_gate_that_knows_other_keys_is_told_with_or_without_a_snapshot(exchange):
    wire = exchange.ring.current.wire()
    assert exchange() == (200, {"keys": wire})
    assert exchange(keys="another") == (200, {"keys": wire})
    assert exchange(SNAPSHOT, keys="another") == (200, SNAPSHOT | {"keys": wire})
    known = {"keys": exchange.ring.current.version, "snapshot": {"epoch": "e", "n": 1}}
    assert exchange(**known) == (204, None)
    assert exchange(SNAPSHOT, **known) == (200, SNAPSHOT)


def test_the_first_snapshot_never_comes_without_keys(exchange):
    version = exchange.ring.current.version
    assert exchange(SNAPSHOT, keys=version)[1]["keys"]["version"] == version
    exchange.ring.follow(None)
    assert exchange(SNAPSHOT)[1]["keys"] == Keyset(False).wire()


def test_who_waits_for_the_gate_waits_until_it_says_that_it_has_the_keys(exchange, monkeypatch):
    monkeypatch.setattr(keyring, "GATE_WITHIN", 20)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(exchange.ring.await_gate)
        exchange(keys="another")
        assert not waiting.done()
        exchange(keys=exchange.ring.current.version)
        assert waiting.result(20)
    monkeypatch.setattr(keyring, "GATE_WITHIN", 0.01)
    exchange.ring.follow(None)
    assert not exchange.ring.await_gate()


def test_what_a_gate_counted_for_each_key_is_in_the_metrics(exchange):
    use = {"alice": {"requests": 7, "refused": 2, "in_flight": 1}, "gone": {"requests": 3}}
    exchange(key_use=use)
    assert exchange.ring.use["gone"] == KeyUse(3, 0, 0)
    lines = _lines(exchange.ring)
    assert 'slurmgate_key_requests_total{key="alice"} 7.0' in lines
    assert 'slurmgate_key_refused_total{key="alice"} 2.0' in lines
    assert 'slurmgate_key_in_flight{key="alice"} 1.0' in lines
    assert 'slurmgate_key_requests_total{key="gone"} 3.0' in lines
    exchange(key_use=[])  # what an empty table may look like
    assert 'slurmgate_key_requests_total{key="alice"} 0.0' in _lines(exchange.ring)


@pytest.mark.parametrize("use", [3, {"alice": 3}, {"alice": {"requests": "x"}}, "ab"])
def test_what_is_no_count_is_no_report(exchange, use):
    assert exchange(key_use=use)[0] == 400


def _lines(ring):
    return "\n".join(
        f'{sample.name}{{key="{sample.labels["key"]}"}} {float(sample.value)}'
        for metric in metrics._keys(ring)
        for sample in metric.samples
    ).splitlines()


def test_the_wire_is_json_that_any_reader_takes(path):
    put(path, Key("a", "c" * 64, ("Größe", "\x00")))
    text = json.dumps(Keyring(path).current.wire())
    assert text.isascii()
