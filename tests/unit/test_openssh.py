"""Command lines of ssh, read back by ssh itself: ``ssh -G`` shows what it understood."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from slurmgate import openssh
from slurmgate.model import SshSpec

LOGIN = SshSpec("login.example", "alice")
STRANGE = Path('/tmp/a "b" %h \\ c#d')


def understood(options: list[str], destination: str) -> dict[str, str]:
    argv = ["ssh", "-G", *options, "--", destination]
    shown = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20)
    return dict(line.split(" ", 1) for line in shown.stdout.splitlines() if " " in line)


def test_ssh_understands_every_option_and_checks_host_keys_without_asking():
    ssh = replace(LOGIN, port=2222, key_file=Path("/keys/id"), known_hosts=Path("/keys/known"))
    got = understood(openssh.options(ssh), openssh.destination(ssh))
    assert got["hostname"] == "login.example"
    assert got["user"] == "alice"
    assert got["port"] == "2222"
    assert got["identityfile"] == "/keys/id"
    assert got["identitiesonly"] == "yes"
    assert got["userknownhostsfile"] == "/keys/known"
    assert got["globalknownhostsfile"] == "/etc/ssh/ssh_known_hosts"
    assert got["stricthostkeychecking"] == "true"
    assert got["updatehostkeys"] == "false"
    assert got["batchmode"] == "yes"
    assert got["controlmaster"] == "false"
    assert got["connecttimeout"] == "10"
    assert "proxycommand" not in got


def test_without_a_key_file_ssh_uses_its_usual_keys():
    options = openssh.options(LOGIN)
    assert not [word for word in options if word.startswith(("IdentityFile", "IdentitiesOnly"))]
    assert "UserKnownHostsFile=~/.ssh/known_hosts" in options


def test_paths_with_quotes_spaces_and_percent_signs_stay_whole():
    ssh = replace(LOGIN, key_file=STRANGE, known_hosts=STRANGE)
    got = understood(openssh.options(ssh), openssh.destination(ssh))
    # Some values are shown before ssh replaces %%, some after it.
    assert got["identityfile"].replace("%%", "%") == str(STRANGE)
    assert got["userknownhostsfile"].replace("%%", "%") == str(STRANGE)


def test_the_jump_host_gets_the_key_and_the_known_hosts_too():
    ssh = replace(LOGIN, jump="bob@gate:2200", key_file=Path("/k"), known_hosts=Path("/h"))
    proxy = understood(openssh.options(ssh), openssh.destination(ssh))["proxycommand"]
    assert 'IdentityFile="/k"' in proxy
    assert 'UserKnownHostsFile="/h"' in proxy
    assert "Port=2200" in proxy
    assert proxy.endswith("-W '[login.example]:22' -- bob@gate")


@pytest.mark.parametrize(
    ("text", "user", "host", "port"),
    [
        ("gate", "alice", "gate", 22),
        ("bob@gate", "bob", "gate", 22),
        ("gate:2200", "alice", "gate", 2200),
        ("bob@[fe80::1]:2200", "bob", "fe80::1", 2200),
    ],
)
def test_a_jump_host_is_read_as_user_host_and_port(text, user, host, port):
    found = openssh.jump(replace(LOGIN, jump=text))
    assert found is not None
    assert (found.username, found.host, found.port, found.jump) == (user, host, port, None)


@pytest.mark.parametrize("text", ["", "a@", "@b", "a:b", "a:0", "a:99999", "a,b", "::1", "-oX=y"])
def test_what_is_no_jump_host_is_refused(text):
    with pytest.raises(ValueError, match=r"ssh_jump|cannot be passed"):
        openssh.jump(replace(LOGIN, jump=text))


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "", "a b", "ssh://x", "a@b", "a\nb"])
def test_a_host_that_ssh_would_take_for_something_else_is_refused(host):
    with pytest.raises(ValueError, match="host"):
        openssh.destination(replace(LOGIN, host=host))


def test_a_user_name_that_ssh_would_take_for_an_option_is_refused():
    with pytest.raises(ValueError, match="user name"):
        openssh.destination(replace(LOGIN, username="-lroot"))


def test_a_node_is_reached_through_the_login_host_and_believed_by_its_pinned_key_only():
    options = openssh.node_options(LOGIN, "10.0.0.7", Path("/pins"), "n1", 2022)
    got = understood(options, openssh.node_destination(LOGIN, "n1"))
    assert got["hostkeyalias"] == "n1"
    assert got["userknownhostsfile"] == "/pins"
    assert got["globalknownhostsfile"] == "none"
    assert got["port"] == "2022"
    assert got["proxycommand"].endswith("-W '[10.0.0.7]:2022' -- alice@login.example")


def test_a_node_behind_a_master_is_reached_through_the_master():
    ssh = replace(LOGIN, control_path=Path("/c"))
    options = openssh.node_options(ssh, "n1", Path("/pins"), "n1")
    proxy = understood(options, openssh.node_destination(ssh, "n1"))["proxycommand"]
    assert "-S /c -W '[n1]:22'" in proxy
    assert "ProxyCommand=false" in proxy


def test_a_master_is_asked_by_its_socket():
    ssh = replace(LOGIN, control_path=Path("/c/%r@%h"), port=2222)
    argv = openssh.master(ssh, "forward", "-L", "/s:n1:80")
    assert argv[-6:] == ["-O", "forward", "-L", "/s:n1:80", "--", "alice@login.example"]
    assert argv[argv.index("-S") + 1] == "/c/%r@%h"
    assert "Port=2222" in argv
    command = openssh.master_command(ssh, "exec true")
    assert command[-3:] == ["--", "alice@login.example", "exec true"]
    assert openssh.master_remedy(ssh) == "ssh -M -S /c/%r@%h -p 2222 -N alice@login.example"
