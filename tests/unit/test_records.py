"""Replica records: complete or not there, and never the reason that nothing starts again."""

from __future__ import annotations

import json
import resource
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slurmgate.errors import StartRefused
from slurmgate.model import LauncherKind, SshSpec, TunnelMode
from slurmgate.records import JobRecord, Record, Records

RECORD = Record(
    replica="k3f9",
    service="LLM",
    launcher=LauncherKind.PROCESS,
    start_hash="0123abcd",
    port=20001,
    created=1700000000.5,
    log="/state/logs/LLM/k3f9.log",
    boot="a-boot",
)


JOB = JobRecord(
    name="sg.vm.0123456789.k3f9.20001.0123abcd.llm",
    ssh=SshSpec("login", "me", Path("/k"), 2222, Path("/known"), "jump", Path("/ctl")),
    setup=("module load slurm",),
    tunnel=TunnelMode.NODE_LOOPBACK,
    submitted=1700000000.5,
)
RUNNING_JOB = replace(
    JOB,
    ssh=None,
    job_id="4711",
    local=("127.0.0.1", 9000),
    gen=2,
    node="n2",
    address="10.0.0.2",
    started=1700000003.0,
    running=1700000003.5,
    endpoint="unix:/run/k3f9.2.sock",
)


@pytest.mark.parametrize("job", [JOB, replace(JOB, ssh=SshSpec("login")), RUNNING_JOB])
def test_what_is_known_of_a_job_comes_back_as_it_was_written(tmp_path, job):
    record = replace(RECORD, launcher=LauncherKind.SLURM, job=job)
    Records(tmp_path).write(record)
    assert Records(tmp_path).read_all() == [record]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("ssh", {"host": 1}),
        ("setup", [1]),
        ("local", ["127.0.0.1"]),
        ("tunnel", "bent"),
        ("gen", "1"),
        ("name", None),
    ],
)
def test_a_record_with_a_damaged_job_is_set_aside(tmp_path, name, damage):
    record = replace(RECORD, launcher=LauncherKind.SLURM, job=JOB)
    Records(tmp_path).write(record)
    path = tmp_path / "k3f9.json"
    data = json.loads(path.read_bytes())
    data["job"][name] = damage
    path.write_text(json.dumps(data))
    assert Records(tmp_path).read_all() == []
    assert (tmp_path / "k3f9.broken").exists()


def test_a_record_comes_back_as_it_was_written(tmp_path):
    records = Records(tmp_path)
    known = replace(RECORD, replica="b2", created=RECORD.created - 1, pid=7, pid_start=99)
    records.write(RECORD)
    records.write(known)
    assert Records(tmp_path).read_all() == [known, RECORD]


def test_records_are_closed_to_others_and_leave_no_temporary_files(tmp_path):
    Records(tmp_path).write(RECORD)
    (path,) = tmp_path.iterdir()
    assert path.name == "k3f9.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_comes_back_and_is_shown_nowhere(tmp_path, caplog):
    records = Records(tmp_path)
    record = replace(RECORD, api_key="the-key")
    records.write(record)
    assert records.read_all() == [record]
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "the-key" not in repr(record)
    damaged = {**json.loads(path.read_bytes()), "api_key": ["the-key"]}
    path.write_text(json.dumps(damaged))
    assert records.read_all() == []
    assert "api_key is no text" in caplog.text
    assert "the-key" not in caplog.text


def test_a_record_from_before_there_were_keys_is_read(tmp_path):
    records = Records(tmp_path)
    records.write(RECORD)
    (path,) = tmp_path.iterdir()
    assert "api_key" not in json.loads(path.read_bytes())
    assert records.read_all() == [RECORD]


def test_writing_again_replaces_and_removing_twice_is_no_error(tmp_path):
    records = Records(tmp_path)
    records.write(RECORD)
    records.write(replace(RECORD, stopping=True))
    assert [record.stopping for record in records.read_all()] == [True]
    records.remove("k3f9")
    records.remove("k3f9")
    assert records.read_all() == []


@pytest.mark.parametrize("replica", ["", "../k", "K3", "a" * 17, "a.b"])
def test_only_replica_ids_become_file_names(tmp_path, replica):
    with pytest.raises(ValueError, match="not a replica id"):
        Records(tmp_path).write(replace(RECORD, replica=replica))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        json.dumps({"replica": "k3f9"}).encode(),
        b'{"replica": "other", "service": "S", "launcher": "process", "start_hash": "", "port": 1,'
        b' "created": 1.0, "log": "", "boot": "", "stopping": false}',
        b'{"replica": "k3f9", "service": "S", "launcher": "process", "start_hash": "", "port": "1",'
        b' "created": 1.0, "log": "", "boot": "", "stopping": false}',
    ],
)
def test_a_damaged_record_is_set_aside_and_the_others_are_read(tmp_path, damage, caplog):
    records = Records(tmp_path)
    other = replace(RECORD, replica="b2")
    records.write(other)
    (tmp_path / "k3f9.json").write_bytes(damage)
    assert records.read_all() == [other]
    assert (tmp_path / "k3f9.broken").read_bytes() == damage
    assert "k3f9.json" in caplog.text


def test_a_file_left_half_written_is_removed(tmp_path):
    (tmp_path / ".k3f9.json.x1y2").write_bytes(b'{"repl')
    assert Records(tmp_path).read_all() == []
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_refuses_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StartRefused, match=r"cannot write the replica record .*: Not a directory"):
        Records(tmp_path / "file").write(RECORD)


def test_a_full_disk_refuses_the_start_and_leaves_the_old_record(tmp_path):
    records = Records(tmp_path)
    records.write(RECORD)
    script = (
        "import sys, pathlib; from slurmgate.records import *; from slurmgate.errors import *\n"
        "records = Records(pathlib.Path(sys.argv[1])); (record,) = records.read_all()\n"
        "try: records.write(dataclasses.replace(record, stopping=True))\n"
        "except StartRefused as error: print(error)\n"
    )

    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    result = subprocess.run(
        [sys.executable, "-B", "-c", script, str(tmp_path)],
        preexec_fn=no_room,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    assert "cannot write the replica record" in result.stdout
    assert "File too large" in result.stdout
    assert records.read_all() == [RECORD]
    assert [path.name for path in tmp_path.iterdir()] == ["k3f9.json"]
