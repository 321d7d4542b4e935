"""What ssh's lines mean, and what a tunnel's command line is: the pure parts of tunnels."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from slurmgate.model import SshSpec
from slurmgate.tunnels import Route, routes
from slurmgate.tunnels.children import Log
from slurmgate.tunnels.link import backoff
from slurmgate.tunnels.observer import TunnelObserver
from slurmgate.tunnels.routes import Folders, Kind
from slurmgate.tunnels.stderr import Meaning, Place, connection_failed, ended
from slurmgate.tunnels.tellers import ReplicaTeller

PLACE = Place("n1:20017", "login1")
NODE = Place("127.0.0.1:20017", "n1", "/state/pins/n1@login1.known")
LOGIN = SshSpec("login1", "me", Path("/home/me/.ssh/key"))
FOLDERS = Folders(Path("/run/t"), Path("/state/pins"))


@pytest.mark.parametrize(
    ("words", "meaning", "said"),
    [
        ("connect failed: Connection refused", Meaning.REFUSED, "Connection refused"),
        (
            "administratively prohibited: open failed",
            Meaning.HOPELESS,
            "login1 does not forward to n1:20017: administratively prohibited: open failed; "
            "its sshd_config must allow it (AllowTcpForwarding yes, PermitOpen)",
        ),
        (
            "connect failed: Name or service not known",
            Meaning.HOPELESS,
            "login1 cannot find the address of n1",
        ),
        ("connect failed: Temporary failure in name resolution", Meaning.DOUBTFUL, "address of n1"),
        (
            "connect failed: No route to host",
            Meaning.HOPELESS,
            "login1 cannot reach n1:20017: connect failed: No route to host; open the port in the "
            'firewall between them or use "tunnel": "node-loopback"',
        ),
        ("connect failed: Connection timed out", Meaning.OTHER, "n1:20017: connect failed"),
        ("resource shortage", Meaning.OTHER, "resource shortage"),
    ],
)
def test_a_failed_connection_is_told_apart_by_ssh_own_words(words, meaning, said):
    found = connection_failed(f"channel 2: open failed: {words}", PLACE)
    assert found is not None
    assert found.meaning is meaning
    assert said in found.text


@pytest.mark.parametrize(
    ("told", "given_up"),
    [
        ({0: "away", 1: "refused", 40: "away", 41: "refused"}, False),
        ({0: "away", 29: "away"}, False),
        ({0: "away", 1: "away", 100: "away", 101: "away"}, False),
        (dict.fromkeys(range(0, 31, 5), "away"), True),
        (dict.fromkeys(range(0, 63, 21), "away"), True),  # two name servers that say nothing
        ({0: "unknown"}, True),
    ],
)
def test_a_resolver_that_is_away_for_a_moment_is_no_reason_to_give_up(monkeypatch, told, given_up):
    words = {
        "away": "Temporary failure in name resolution",
        "refused": "Connection refused",
        "unknown": "Name or service not known",
    }
    observer = create_autospec(TunnelObserver)
    teller = ReplicaTeller(observer, "r1", PLACE)
    for at, word in told.items():
        monkeypatch.setattr("time.monotonic", lambda at=at: 1000.0 + at)
        line = f"channel 2: open failed: connect failed: {words[word]}"
        teller.connection_failed(connection_failed(line, PLACE))
    assert observer.hopeless.called is given_up


@pytest.mark.parametrize("line", ["", "Welcome!", "channel 2: closed", "Connection refused"])
def test_other_lines_say_nothing_of_a_connection(line):
    assert connection_failed(line, PLACE) is None


def test_who_is_on_the_node_already_is_not_sent_there():
    found = connection_failed("channel 2: open failed: connect failed: No route to host", NODE)
    assert found is not None
    assert "node-loopback" not in found.text


def test_a_refused_login_is_hopeless():
    found = ended(["Welcome", "me@login1: Permission denied (publickey)."], PLACE, "exited")
    assert found.meaning is Meaning.HOPELESS
    assert found.text == "login1 refused the login: me@login1: Permission denied (publickey)."


def test_a_login_refused_on_the_way_names_that_host():
    found = ended(["me@login1: Permission denied (publickey)."], NODE, "exited")
    assert found.text.startswith("login1 refused the login")
    line = "Received disconnect from 10.0.0.1 port 22:2: Too many authentication failures"
    found = ended([line, "Disconnected from 10.0.0.1 port 22"], PLACE, "exited")
    assert found.meaning is Meaning.HOPELESS
    assert found.text.startswith("10.0.0.1 refused the login")


def test_the_key_of_the_login_host_is_not_mended_among_the_pins():
    lines = CHANGED.replace("/state/pins/n1@login1.known", "/home/me/.ssh/known_hosts")
    text = ended(lines.replace("for n1", "for login1").splitlines(), NODE, "exited").text
    assert text.startswith("the host key of login1 has changed")
    assert text.endswith("correct /home/me/.ssh/known_hosts")
    lines = "No RSA host key is known for login1 and you\nHost key verification failed."
    assert "add its key to ssh_known_hosts" in ended(lines.splitlines(), NODE, "exited").text


def test_a_banner_about_permissions_is_no_refused_login():
    lines = [
        "Permission denied (to strangers) applies here.",
        "Connection closed by login1 port 22",
    ]
    assert ended(lines, PLACE, "exited").meaning is Meaning.OTHER


CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
The fingerprint for the ED25519 key sent by the remote host is
SHA256:xU3+iQ/dv3ytXv4+rGuihMDonNrpzyz6WKu+LgTY09Y.
Add correct host key in /state/pins/n1@login1.known to get rid of this message.
Offending ED25519 key in /state/pins/n1@login1.known:1
Host key for n1 has changed and you have requested strict checking.
Host key verification failed.
Connection closed by UNKNOWN port 65535"""


def test_a_changed_key_is_shown_with_the_file_to_mend():
    found = ended(CHANGED.splitlines(), NODE, "exited with code 255")
    assert found.meaning is Meaning.HOPELESS
    assert found.text == (
        "the host key of n1 has changed, it is now SHA256:xU3+iQ/dv3ytXv4+rGuihMDonNrpzyz6WKu"
        "+LgTY09Y; if that is right, remove /state/pins/n1@login1.known"
    )
    known = CHANGED.replace("/state/pins/n1@login1.known", "/home/me/.ssh/known_hosts")
    found = ended(known.splitlines(), PLACE, "exited with code 255")
    assert found.text.endswith("if that is right, correct /home/me/.ssh/known_hosts")


def test_an_unknown_key_is_hopeless():
    lines = [
        "No ED25519 host key is known for login1 and you have requested strict checking.",
        "Host key verification failed.",
    ]
    found = ended(lines, PLACE, "exited with code 255")
    assert found.meaning is Meaning.HOPELESS
    assert "the ED25519 host key of login1 is not known" in found.text


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            [
                "bind [127.0.0.1]:9000: Address already in use",
                "channel_setup_fwd_listener_tcpip: cannot listen to port: 9000",
                "Could not request local forwarding.",
            ],
            "Address already in use",
        ),
        (
            [
                "channel_setup_fwd_listener_tcpip: "
                "getaddrinfo(x.invalid): Name or service not known",
                "Could not request local forwarding.",
            ],
            "Name or service not known",
        ),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_told_apart(lines, said):
    found = ended(lines, PLACE, "exited with code 255")
    assert (found.meaning, found.text) == (Meaning.LOCAL, said)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["ssh: connect to host login1 port 22: Connection refused"],
            "connect to host login1 port 22: Connection refused",
        ),
        (
            ["ssh: Could not resolve hostname login1: Temporary failure in name resolution"],
            "Could not resolve hostname login1: Temporary failure in name resolution",
        ),
        (["Connection to login1 closed by remote host."], "Connection to login1 closed by"),
        (
            ["Timeout, server login1 not responding.", "Connection closed by UNKNOWN port 65535"],
            "Timeout, server login1 not responding.",
        ),
        ([], "ssh was killed by signal 9"),
    ],
)
def test_a_login_host_that_is_away_may_come_back(lines, said):
    found = ended(lines, PLACE, "was killed by signal 9")
    assert found.meaning is Meaning.OTHER
    assert said in found.text


def test_what_the_proxy_command_runs_into_is_told_of_the_host_before():
    lines = [
        "channel 0: open failed: administratively prohibited: open failed",
        "stdio forwarding failed",
        "Connection closed by UNKNOWN port 65535",
    ]
    found = ended(lines, NODE, "exited with code 255")
    assert found.meaning is Meaning.HOPELESS
    assert "the host before it does not forward to sshd of n1" in found.text
    lines[0] = "channel 0: open failed: connect failed: Connection refused"
    assert ended(lines, NODE, "exited").meaning is Meaning.OTHER


def test_the_first_new_try_is_at_once_and_later_ones_wait_longer():
    assert [backoff(n) for n in range(1, 9)] == [0, 0.5, 1, 2, 4, 8, 15, 15]
    assert backoff(10_000) == 15


def test_a_socket_path_is_spelled_as_ssh_reads_it():
    odd = routes.forward(Path("/a:b%c\\d/k.sock"), Route(LOGIN, "fd00::1", 80), None)
    assert odd == "/a\\:b%%c\\\\d/k.sock:[fd00::1]:80"
    local = routes.forward(Path("/x"), Route(LOGIN, "n1", 80), ("::1", 9000))
    assert local == "[::1]:9000:n1:80"
    assert local.startswith(routes.listens_on(("::1", 9000)))


def test_a_node_is_logged_in_to_when_its_loopback_is_meant():
    route = Route(LOGIN, "n1", 20017, loopback=True)
    command = routes.command("o1", FOLDERS, "k.1", route, None)
    assert command.argv[-2:] == ("--", "me@n1")
    assert "/run/t/k.1.sock:127.0.0.1:20017" in command.argv
    assert command.proxied
    assert routes.place(FOLDERS, route) == NODE


def test_nodes_of_one_name_behind_two_hosts_have_two_pins():
    other = SshSpec("login2", "me", port=2222)
    pins = {FOLDERS.pin(Route(ssh, "n1", 1, loopback=True)) for ssh in (LOGIN, other)}
    assert len(pins) == 2


def test_a_mark_gives_back_key_and_kind_to_its_owner_only():
    mark = routes.mark("o1", "k3f9.2", Kind.LOCAL)
    assert routes.read_mark(mark, "o1") == ("k3f9.2", "local")
    assert routes.read_mark(mark, "o2") is None
    assert routes.read_mark(mark, "o") is None


@pytest.mark.parametrize("name", ["k.1.sock", "k.1.unix.log", "k.1.local.log"])
def test_a_file_is_known_by_its_key(name):
    assert routes.key_of_file(name) == "k.1"


def test_a_log_is_read_as_it_comes_and_kept_small(tmp_path):
    path = tmp_path / "log"
    log = Log(path)
    assert log.new_lines() == []
    with path.open("ab") as writer:
        writer.write(b"one\ntw")
        writer.flush()
        assert log.new_lines() == ["one"]
        assert log.new_lines() == []
        writer.write(b"o\n")
        writer.flush()
        assert log.new_lines() == ["two"]
        writer.write(b"x" * 99 + b"\n" + b"y" * (256 << 10) + b"\n")
        writer.flush()
        assert log.new_lines()[0] == "x" * 99
        log.new_lines()
        assert os.stat(path).st_size < 256 << 10
        writer.write(b"end")
        writer.flush()
        assert log.new_lines(whole=True)[-1].endswith("end")
