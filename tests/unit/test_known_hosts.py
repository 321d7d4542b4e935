"""Files of known host keys, compared with what ssh-keygen finds in them."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest

from slurmgate.ssh import HostRefused
from slurmgate.ssh.known_hosts import HostKey, KnownHost, look_up

OURS = HostKey("ssh-ed25519", b"ours")
OTHER = HostKey("ssh-rsa", b"other")


def line(patterns: str, key: HostKey = OURS, marker: str = "") -> str:
    return f"{marker} {patterns} {key.kind} {base64.b64encode(key.blob).decode()} note".strip()


def known(tmp_path: Path, *lines: str, host: str = "login", port: int = 22) -> KnownHost:
    file = tmp_path / "known_hosts"
    file.write_text("# comment\n\nnonsense\n" + "\n".join(lines) + "\n")
    return look_up(host, port, [file, tmp_path / "absent"], direct=True)


@pytest.mark.parametrize(
    ("patterns", "host", "port"),
    [
        ("login", "login", 22),
        ("LOGIN", "Login", 22),
        ("a,login,b", "login", 22),
        ("log*", "login", 22),
        ("logi?", "login", 22),
        ("*,!other", "login", 22),
        ("[login]:2222", "login", 2222),
        ("[login]:*", "login", 2222),
        ("login", "login", 2222),
        ("fe80::1", "fe80::1", 22),
    ],
)
def test_a_host_is_found_as_ssh_finds_it(tmp_path, patterns, host, port):
    known(tmp_path, line(patterns), host=host, port=port).check(OURS)


@pytest.mark.parametrize(
    ("patterns", "port"), [("other", 22), ("*,!login", 22), ("[login]:2222", 22), ("login2", 22)]
)
def test_lines_about_others_are_not_believed(tmp_path, patterns, port):
    with pytest.raises(HostRefused, match="not a known host"):
        known(tmp_path, line(patterns), port=port).check(OURS)


@pytest.mark.parametrize("port", [22, 2222])
def test_hashed_names_are_found(tmp_path, port):
    file = tmp_path / "known_hosts"
    file.write_text(line("login" if port == 22 else f"[login]:{port}") + "\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(file)], check=True, timeout=20)
    assert "login" not in file.read_text()
    look_up("login", port, [file], direct=True).check(OURS)


def test_a_revoked_key_is_refused_even_where_it_is_also_trusted(tmp_path):
    host = known(tmp_path, line("login"), line("*", marker="@revoked"))
    with pytest.raises(HostRefused, match="@revoked"):
        host.check(OURS)


def test_the_key_of_an_authority_is_not_the_key_of_the_host(tmp_path):
    host = known(tmp_path, line("login", marker="@cert-authority"))
    with pytest.raises(HostRefused, match="not a known host"):
        host.check(OURS)


def test_one_of_several_keys_is_enough(tmp_path):
    host = known(tmp_path, line("login", OTHER), line("login"))
    host.check(OURS)
    assert host.kinds == ["ssh-rsa", "ssh-ed25519"]


def test_another_key_is_refused_with_both_fingerprints_and_the_way_out(tmp_path):
    host = known(tmp_path, line("[login]:2222", OTHER), port=2222)
    with pytest.raises(HostRefused) as refused:
        host.check(OURS)
    text = str(refused.value)
    assert OURS.fingerprint in text
    assert OTHER.fingerprint in text
    assert f"ssh-keygen -R '[login]:2222' -f {tmp_path}/known_hosts" in text
    assert f"ssh-keyscan -t ed25519 -p 2222 login >> {tmp_path}/known_hosts" in text


def test_a_host_behind_a_jump_host_is_added_by_its_line_because_no_scan_gets_there(tmp_path):
    file = tmp_path / "known_hosts"
    with pytest.raises(HostRefused) as refused:
        look_up("login", 22, [file], direct=False).check(OURS)
    command = str(refused.value).partition("then add it: ")[2]
    subprocess.run(["/bin/sh", "-c", command], check=True, timeout=20)
    look_up("login", 22, [file], direct=False).check(OURS)


def test_a_file_that_cannot_be_read_is_an_error_of_its_own(tmp_path):
    with pytest.raises(HostRefused, match=r"cannot be read: Is a directory"):
        look_up("login", 22, [tmp_path], direct=True)
