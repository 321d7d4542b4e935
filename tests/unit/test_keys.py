"""Clients' keys: their file is read strictly and changed as a whole; the commands say why not."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import subprocess
import sys
import time
from datetime import datetime

import pytest

from slurmgate import cli, config, keys, keys_file
from slurmgate.errors import KeysError, KeysMissing
from slurmgate.keys import Key
from slurmgate.model import Config, GateSpec
from tests.unit.builders import spec

HASH = "0123456789abcdef" * 4
OTHER = "f" * 64


def entry(**changes):
    return {"name": "alice", "sha256": HASH} | changes


def text(*entries) -> bytes:
    return json.dumps({"keys": entries}).encode()


def refusal(path, content: bytes) -> str:
    with pytest.raises(KeysError) as caught:
        keys.parse(content, path)
    return str(caught.value)


# -- what stands in the file ---------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
    known = (
        Key("alice", HASH, ("LLM", "Größe, groß"), 60, 4, 1798761600, 1795346226),
        Key("b.o_b@example-1", OTHER),
    )
    assert keys.parse(keys.serialise(known), tmp_path) == known


def test_an_entry_needs_only_a_name_and_a_hash(tmp_path):
    assert keys.parse(text(entry()), tmp_path) == (Key("alice", HASH),)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "a b"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "alice\n"}, "name"),
        ({"name": 7}, "name"),
        ({"sha256": HASH.upper()}, "sha256"),
        ({"sha256": HASH[:-1]}, "sha256"),
        ({"sha256": HASH + "\n"}, "sha256"),
        ({"sha256": None}, "sha256"),
        ({"services": "LLM"}, "services"),
        ({"services": []}, "services"),
        ({"services": [""]}, "services"),
        ({"services": ["\ud800"]}, "services"),
        ({"services": [None]}, "services"),
        ({"rpm": -1}, "rpm"),
        ({"rpm": True}, "rpm"),
        ({"rpm": 1.5}, "rpm"),
        ({"rpm": 10**10}, "rpm"),
        ({"in_flight": "4"}, "in_flight"),
        ({"expires": 1798761600}, "expires"),
        ({"expires": "soon"}, "expires"),
        ({"expires": "2027-02-30"}, "expires"),
        ({"expires": "2027-02-03T10:00:00"}, "expires"),
        ({"expires": "9999-12-31T23:59:59-12:00"}, "expires"),
        ({"created": "1969-12-31T00:00:00Z"}, "created"),
        ({"rmp": 3}, "rmp"),
    ],
)
def test_a_wrong_field_is_named_with_its_entry(tmp_path, changes, field):
    said = refusal(
        tmp_path / "keys.json", text(entry(name="first", sha256=OTHER), entry(**changes))
    )
    assert f"{tmp_path}/keys.json: keys[1]" in said
    assert field in said.partition("keys[1]")[2]


def test_all_that_is_wrong_is_said_at_once_and_no_value_is_shown(tmp_path):
    secret = keys.new_secret()
    said = refusal(tmp_path, text(entry(sha256=secret, rpm=secret), {"name": secret + "!"}, 3))
    assert len(said.splitlines()) == 5
    assert secret not in said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": [], "more": 1}',
        b'{"keys": [], "keys": []}',
        b'{"keys": [{"name": "a", "sha256": "'
        + HASH.encode()
        + b'", "rpm": '
        + b"9" * 5000
        + b"}]}",
        b"[" * 100_000,
        b'{"keys": ["\xff"]}',
    ],
)
def test_what_is_no_file_of_keys_is_refused(tmp_path, content):
    assert str(tmp_path) in refusal(tmp_path, content)


def test_names_hashes_and_fields_that_come_twice_are_refused(tmp_path):
    assert "keys[1] (alice): name" in refusal(tmp_path, text(entry(), entry(sha256=OTHER)))
    assert "keys[1] (bob): sha256" in refusal(tmp_path, text(entry(), entry(name="bob")))
    twice = b'{"keys": [{"name": "a", "sha256": "%s", "rpm": 1, "rpm": 0}]}' % HASH.encode()
    assert "keys[0] (a): 'rpm' is given twice" in refusal(tmp_path, twice)


def test_what_cannot_be_read_is_told_from_what_is_not_there(tmp_path):
    with pytest.raises(KeysMissing):
        keys.load(tmp_path / "keys.json")
    (tmp_path / "large").write_bytes(b" " * (keys.MAX_BYTES + 1))
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "large", tmp_path / "pipe"):
        with pytest.raises(KeysError, match=re.escape(str(path))) as caught:
            keys.load(path)
        assert not isinstance(caught.value, KeysMissing)


def test_a_day_is_valid_to_its_end_and_a_time_to_the_second(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        end = keys.parse_expiry("2027-03-28")  # a day of 23 hours there
        assert datetime.fromtimestamp(end).isoformat() == "2027-03-29T00:00:00"
        assert keys.parse_expiry("2027-03-28T22:00:00Z") == end
        assert keys.parse_expiry("2027-03-29t00:00:00.5+02:00") == end
    finally:
        monkeypatch.undo()
        time.tzset()


def test_no_two_secrets_are_the_same_and_none_is_shown_by_a_key():
    secret = keys.new_secret()
    assert re.fullmatch(r"sg-[A-Za-z0-9_-]{43}", secret)
    assert keys.new_secret() != secret
    assert keys.digest(secret) not in repr(Key("alice", keys.digest(secret)))


# -- changing it ---------------------------------------------------------------------------


def adding(name):
    return lambda found: (*found, Key(name, keys.digest(name)))


def names(path):
    return [key.name for key in keys.load(path)]


def test_a_changed_file_is_closed_to_others_and_nothing_lies_beside_it(tmp_path):
    path = tmp_path / "keys.json"
    keys_file.change(path, adding("a"))
    path.chmod(0o644)
    keys_file.change(path, adding("b"))
    assert names(path) == ["a", "b"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_of_changes_made_at_once_none_is_lost(tmp_path):
    path = tmp_path / "keys.json"
    program = (
        "import sys; from pathlib import Path; from slurmgate import keys, keys_file\n"
        "keys_file._LOCK_PATIENCE = 60\n"  # a disk may be slow, and whoever comes last waits long
        "for n in range(20):\n"
        "    name = f'{sys.argv[2]}-{n}'\n"
        "    keys_file.change(Path(sys.argv[1]),"
        " lambda found: (*found, keys.Key(name, keys.digest(name))))\n"
    )
    argv = [sys.executable, "-c", program, str(path)]
    writers = [subprocess.Popen([*argv, str(writer)]) for writer in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert sorted(names(path)) == sorted(f"{w}-{n}" for w in range(4) for n in range(20))


def test_a_file_made_meanwhile_is_changed_not_replaced(tmp_path):
    path = tmp_path / "keys.json"

    def late(found):
        if not path.exists():
            keys_file.change(path, adding("other"))
        return adding("mine")(found)

    keys_file.change(path, late)
    assert names(path) == ["other", "mine"]


def test_who_waits_too_long_for_another_command_says_so(tmp_path, monkeypatch):
    path = tmp_path / "keys.json"
    keys_file.change(path, adding("a"))
    monkeypatch.setattr(keys_file, "_LOCK_PATIENCE", 0.1)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(KeysError, match="another command"):
            keys_file.change(path, adding("b"))
    keys_file.change(path, adding("b"))
    assert names(path) == ["a", "b"]


def test_a_link_stays_one_and_an_empty_file_has_no_keys(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (place / "keys.json").touch()
    link = tmp_path / "keys.json"
    link.symlink_to(place / "keys.json")
    keys_file.change(link, adding("a"))
    assert link.is_symlink()
    assert names(place / "keys.json") == ["a"]


def test_a_broken_file_is_left_as_it_is(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text('{"keys": [3]}')
    with pytest.raises(KeysError, match=r"keys\[0\]"):
        keys_file.change(path, adding("a"))
    assert path.read_text() == '{"keys": [3]}'


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KeysError, match=f"no folder {tmp_path}/none"):
        keys_file.change(tmp_path / "none" / "keys.json", adding("a"))


def test_a_folder_or_a_file_of_somebody_else_is_not_for_an_ordinary_user(
    public_folder, as_ordinary_user
):
    if os.geteuid() != 0:
        pytest.skip("only root can make files of somebody else")
    public_folder.chmod(0o777)
    theirs = public_folder / "keys.json"
    keys_file.change(theirs, adding("a"))
    theirs.chmod(0o666)
    closed = public_folder / "closed"
    closed.mkdir(mode=0o755)
    (public_folder / "shut").mkdir(mode=0o700)

    def change():
        with pytest.raises(KeysError, match="belongs to uid 0"):
            keys_file.change(theirs, adding("b"))
        with pytest.raises(KeysError, match="cannot be written; run this as"):
            keys_file.change(closed / "keys.json", adding("b"))
        with pytest.raises(KeysError, match="cannot be read"):
            keys.load(public_folder / "shut" / "keys.json")

    as_ordinary_user(change)


def test_root_writes_for_whom_the_file_or_its_folder_is(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(tmp_path, 1234, 2345)
    path = tmp_path / "keys.json"
    keys_file.change(path, adding("a"))
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)
    os.chown(path, 1235, 2346)
    keys_file.change(path, adding("b"))
    assert (path.stat().st_uid, path.stat().st_gid) == (1235, 2346)


# -- the commands --------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs ``slurmgate keys`` with a configuration of two services; code, output, words."""
    services = (spec(), spec(name="Speech to text", route_name="whisper"))
    known = Config(
        tmp_path / "services.json", services, GateSpec(), keys_file=tmp_path / "keys.json"
    )
    monkeypatch.setattr(config, "load", lambda path: known)

    def run(*args):
        code = cli.main(["keys", *args])
        return code, *capsys.readouterr()

    return run


def test_the_secret_comes_once_and_alone_and_only_its_hash_is_kept(command, tmp_path):
    code, secret, words = command("add", "alice")
    assert code == 0
    assert re.fullmatch(r"sg-[A-Za-z0-9_-]{43}\n", secret)
    assert "alice" in words
    assert secret.strip() not in words
    content = (tmp_path / "keys.json").read_text()
    assert secret.strip() not in content
    assert keys.digest(secret.strip()) in content


def test_what_a_key_is_for_is_kept_and_listed(command, tmp_path):
    options = "--services llm,Speech\x20to\x20text --rpm 60 --in-flight 4 --expires 2100-12-31"
    command("add", "alice", *re.split(r" (?!to|text)", options))
    (key,) = keys.load(tmp_path / "keys.json")
    assert key.services == ("LLM", "Speech to text")
    assert (key.rpm, key.in_flight) == (60, 4)
    assert key.expires == keys.parse_expiry("2100-12-31")
    command("add", "bob")
    _, table, _ = command("list")
    assert [line.split()[0] for line in table.splitlines()] == ["NAME", "alice", "bob"]
    listed = json.loads(command("list", "--json")[1])
    assert listed[0]["services"] == ["LLM", "Speech to text"]
    assert listed[1] == listed[1] | {"services": None, "rpm": 0, "expires": None, "expired": False}
    assert all("sha256" not in entry for entry in listed)


def test_an_expired_key_is_shown_as_such(command, tmp_path):
    past = keys.serialise((Key("alice", HASH, ("\x1b[2J",), expires=1),))
    (tmp_path / "keys.json").write_bytes(past)
    table = command("list")[1]
    assert "(expired)" in table
    assert "\x1b" not in table


def test_a_revoked_key_is_gone_and_its_name_free(command, tmp_path):
    command("add", "alice")
    command("add", "bob")
    assert command("revoke", "alice")[0] == 0
    assert names(tmp_path / "keys.json") == ["bob"]
    assert command("add", "alice")[0] == 0


def test_without_keys_there_is_nothing_to_list(command):
    assert "slurmgate keys add" in command("list")[1]
    assert json.loads(command("list", "--json")[1]) == []


@pytest.mark.parametrize(
    ("args", "remedy"),
    [
        (("add", "alice"), "slurmgate keys revoke alice"),
        (("add", "b/b"), "1 to 64 letters"),
        (("add", "bob", "--services", "LLN"), "did you mean 'LLM'"),
        (("add", "bob", "--services", "LLM,"), "there are: LLM, Speech to text"),
        (("add", "bob", "--services", "qqqq"), "there are: LLM, Speech to text"),
        (("add", "bob", "--expires", "2020-01-01"), "a day or time to come"),
        (("add", "bob", "--expires", "tomorrow"), "such as 2027-03-31"),
        (("add", "bob", "--expires", "2100-02-30"), "such as 2027-03-31"),
        (("revoke", "alicia"), "did you mean 'alice'"),
        (("revoke", "zz"), "slurmgate keys list"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_remedy_and_changes_nothing(
    command, tmp_path, args, remedy
):
    command("add", "alice")
    before = (tmp_path / "keys.json").read_bytes()
    code, output, words = command(*args)
    assert (code, output) == (1, "")
    assert remedy in words
    assert (tmp_path / "keys.json").read_bytes() == before


@pytest.mark.parametrize("number", ["-1", "x", "1.5", "", "٣", str(10**9 + 1)])
def test_a_limit_is_a_number(command, number, capsys):
    with pytest.raises(SystemExit):
        command("add", "bob", f"--rpm={number}")
    assert "should be a number" in capsys.readouterr().err


def test_a_key_can_be_revoked_while_the_configuration_has_mistakes(tmp_path, capsys):
    keys_file.change(tmp_path / "keys.json", adding("alice"))
    wrong = tmp_path / "services.json"
    wrong.write_text('{"keys_file": "keys.json", "Services": [{"name": 3}]}')
    options = ["--config", str(wrong)]
    assert cli.main(["keys", "add", "bob", *options]) == 1
    assert "Services[0]" in capsys.readouterr().err
    assert cli.main(["keys", "revoke", "alice", *options]) == 0
    assert names(tmp_path / "keys.json") == []
    for content in ('{"keys_file": 3}', r'{"keys_file": "a\u0000b"}', "{"):
        wrong.write_text(content)
        assert cli.main(["keys", "revoke", "alice", *options]) == 1
        assert re.search("keys_file|services.json", capsys.readouterr().err)


def test_without_a_keys_file_in_the_configuration_the_remedy_is_named(
    command, tmp_path, monkeypatch
):
    known = Config(tmp_path / "services.json", (), GateSpec())
    monkeypatch.setattr(config, "load", lambda path: known)
    for args in (("add", "alice"), ("list",), ("revoke", "alice")):
        code, output, words = command(*args)
        assert (code, output) == (1, "")
        assert '"keys_file": "keys.json"' in words
