"""Commands over SSH: a real sshd that is stopped, frozen, cut and misconfigured."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from slurmgate import openssh, procfs
from slurmgate.errors import CannotStart
from slurmgate.ssh import HostAway, HostRefused, Remotes, Unfinished
from tests.slurm.sshd import HOST, USER, Sshd, fingerprint, free_port, make_key
from tests.waiting import until

BOUND = 15.0


@pytest.fixture
def remotes(tmp_path: Path) -> Iterator[Remotes]:
    before = set(threading.enumerate())
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    remotes = Remotes(home=home)
    yield remotes
    remotes.close()
    until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture
def login(tmp_path: Path) -> Iterator[Sshd]:
    with host(tmp_path / "login") as sshd:
        yield sshd


def host(folder: Path, **options) -> Sshd:
    """A login host whose shells have an empty home: what people's profiles do is not tested."""
    home = folder / "home"
    home.mkdir(parents=True)
    config = f"SetEnv HOME={home}\n" + options.pop("config", "")
    return Sshd(folder, config=config, **options)


def echo(remotes: Remotes, sshd: Sshd) -> str:
    return remotes.run(sshd.ssh, "echo hello", timeout=10).out


def refused(remotes: Remotes, spec, script: str = "true") -> str:
    with pytest.raises(HostRefused) as error:
        remotes.run(spec, script, timeout=5)
    return str(error.value)


def away(remotes: Remotes, spec) -> str:
    began = time.monotonic()
    with pytest.raises(HostAway) as error:
        remotes.run(spec, "true", timeout=5)
    assert time.monotonic() - began < 5 + BOUND
    return str(error.value)


def unfinished(remotes: Remotes, spec, script: str, timeout: float = 20, **options) -> str:
    began = time.monotonic()
    with pytest.raises(Unfinished) as error:
        remotes.run(spec, script, timeout=timeout, **options)
    assert time.monotonic() - began < timeout + BOUND
    return str(error.value)


def works_again(remotes: Remotes, spec) -> None:
    """Commands work again once the backoff is over."""

    def answered() -> bool:
        """a command is answered"""
        try:
            return remotes.run(spec, "echo hello", timeout=10).out == "hello\n"
        except (HostAway, HostRefused):
            return False

    until(answered, 30)


# What every kind of host does: over SSH, through a master, on this machine.


@pytest.fixture(params=["ssh", "master", "here"])
def spec(request, tmp_path):
    if request.param == "here":
        yield None
        return
    with host(tmp_path / "any") as sshd:
        if request.param == "ssh":
            yield sshd.ssh
            return
        with master(sshd, tmp_path / "control") as through:
            yield through


def test_a_setup_that_sends_its_errors_away_does_no_harm(remotes, spec):
    setup = ("echo noise >&2", "exec 2>/dev/null")
    got = remotes.run(spec, "echo out; echo err >&2", setup=setup, timeout=10)
    assert (got.code, got.out, got.err) == (0, "out\n", "")


@contextlib.contextmanager
def master(sshd: Sshd, control: Path):
    argv = ["ssh", "-M", "-S", str(control), *openssh.options(sshd.ssh), "-N"]
    process = subprocess.Popen([*argv, "--", openssh.destination(sshd.ssh)])
    try:
        until(control.exists)
        yield replace(sshd.ssh, control_path=control)
    finally:
        process.kill()
        process.wait()


def test_a_frozen_master_is_away(remotes, tmp_path):
    with host(tmp_path / "login") as sshd, master(sshd, tmp_path / "control") as spec:
        number = next(p.pid for p in procfs.processes() if _runs(p.pid, tmp_path / "control"))
        os.kill(number, signal.SIGSTOP)
        assert "does not answer" in away(remotes, spec)


def _runs(pid: int, control: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.fsencode(control) in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def test_a_script_gives_its_output_its_errors_and_its_code(remotes, spec):
    began = time.monotonic()
    got = remotes.run(spec, "echo out; echo err >&2; printf more; exit 3", timeout=10)
    assert (got.code, got.out, got.err) == (3, "out\nmore", "err\n")
    assert began <= got.began <= time.monotonic()


def test_setup_lines_run_first_and_what_they_print_is_left_out(remotes, spec):
    setup = ("echo noise; echo noise >&2", "GREETING=hello", "cat", "set -e")
    got = remotes.run(spec, 'false; echo "$GREETING"; cat', setup=setup, timeout=10)
    assert (got.code, got.out, got.err) == (0, "hello\n", "")


def test_an_empty_script_and_strange_bytes_do_no_harm(remotes, spec):
    assert remotes.run(spec, "", timeout=10).code == 0
    got = remotes.run(spec, r"printf 'a\377b\n'; echo 'ä $(x) \'", timeout=10)
    assert got.out == "a\N{REPLACEMENT CHARACTER}b\nä $(x) \\\n"


def test_megabytes_come_through_on_both_streams(remotes, spec):
    script = "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; echo done"
    got = remotes.run(spec, script, timeout=30)
    assert len(got.out) == 3_000_005
    assert len(got.err) == 3_000_000


def test_endless_output_is_cut_off(remotes, spec):
    assert "more than 8 MiB" in unfinished(remotes, spec, "yes")


def test_what_runs_longer_than_it_may_is_killed_however_stubborn(remotes, spec, tmp_path):
    pid = tmp_path / "pid"
    script = f"trap '' TERM; sh -c 'echo $$ > {pid}; exec sleep 1000'"
    assert "was ended after its 1 s" in unfinished(remotes, spec, script, timeout=1)
    number = int(pid.read_text())
    until(lambda: (p := procfs.read(number)) is None or p.ended)


def test_a_child_left_behind_does_not_hold_up_the_answer(remotes, spec, tmp_path):
    pid = tmp_path / "pid"
    got = remotes.run(spec, f"sleep 1000 & echo $! > {pid}; echo started", timeout=30)
    assert got.out == "started\n"
    os.kill(int(pid.read_text()), 9)


def test_a_setup_that_fails_is_for_good_and_shows_what_it_said(remotes, spec):
    with pytest.raises(HostRefused, match=r"exit code 3 .* it said: no module slurm"):
        remotes.run(spec, "echo x", setup=("echo no module slurm >&2; exit 3",), timeout=5)


def test_a_setup_that_hangs_means_the_script_was_not_run(remotes, spec, tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(HostAway, match="remote_setup"):
        remotes.run(spec, f"touch {trace}", setup=("sleep 1000",), timeout=1)
    assert not trace.exists()


def test_a_login_shell_reads_the_profile_which_cannot_eat_the_script(remotes, tmp_path):
    with host(tmp_path / "login") as sshd:
        profile = 'echo welcome\ncat\nmodule() { echo "module $*"; }\n'
        (sshd.folder / "home" / ".bash_profile").write_text(profile)
        script = "echo $0 $HELLO; shopt -q login_shell && echo login"
        got = remotes.run(
            sshd.ssh, script, setup=("HELLO=$(module load)",), timeout=10, login_shell=True
        )
        assert got.out == "/bin/bash module load\nlogin\n"


def test_this_machine_has_a_login_shell_too(remotes):
    got = remotes.run(None, "shopt -q login_shell && echo login", timeout=20, login_shell=True)
    assert got.out == "login\n"


# Connections: one, kept, renewed.


def test_many_threads_share_one_connection_and_at_most_six_channels(remotes, login, tmp_path):
    count = tmp_path / "count"
    count.mkdir()
    script = f"mkdir {count}/$$; ls {count} | wc -l; sleep 0.1; rmdir {count}/$$"
    with ThreadPoolExecutor(20) as pool:
        runs = [pool.submit(remotes.run, login.ssh, script, timeout=20) for _ in range(40)]
        together = [int(run.result().out) for run in runs]
    assert 2 <= max(together) <= 6
    until(lambda: login.connections() == 1)  # the one that asked whether it answers may linger


def test_a_host_that_allows_one_session_gets_more_connections(remotes, tmp_path):
    with host(tmp_path / "login", config="MaxSessions 1") as sshd:
        with ThreadPoolExecutor(4) as pool:
            runs = [
                pool.submit(remotes.run, sshd.ssh, "sleep 0.3; echo x", timeout=20)
                for _ in range(8)
            ]
            assert [run.result().out for run in runs] == ["x\n"] * 8
        until(lambda: sshd.connections() == 1)


def test_a_host_that_allows_no_session_is_away_and_says_so(remotes, tmp_path):
    with host(tmp_path / "login", config="MaxSessions 0") as sshd:
        assert "did not open a channel" in away(remotes, sshd.ssh)


def test_a_cut_connection_is_made_anew_for_the_next_command(remotes, login):
    assert echo(remotes, login) == "hello\n"
    login.cut()
    assert echo(remotes, login) == "hello\n"


def test_a_restarted_sshd_is_found_again(remotes, login):
    assert echo(remotes, login) == "hello\n"
    login.stop()
    assert "Connection refused" in away(remotes, login.ssh)
    login.start()
    works_again(remotes, login.ssh)


def test_a_backoff_answers_with_the_last_error_without_connecting(remotes, tmp_path):
    sshd = host(tmp_path / "login")
    for _ in range(5):
        assert "Connection refused" in away(remotes, sshd.ssh)
    with ThreadPoolExecutor(10) as pool, socket.create_server((HOST, sshd.port)) as server:
        server.settimeout(0.0)
        list(pool.map(lambda _: away(remotes, sshd.ssh), range(10)))
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_connection_cut_during_a_command_leaves_its_outcome_unknown(remotes, login, tmp_path):
    trace = tmp_path / "trace"
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(remotes.run, login.ssh, f"touch {trace}; sleep 1000", timeout=20)
        until(trace.exists)
        login.cut()
        with pytest.raises(Unfinished, match="was lost"):
            run.result(timeout=20)
    assert echo(remotes, login) == "hello\n"


def test_a_frozen_host_ends_a_command_in_time_as_unknown(remotes, login, tmp_path):
    trace = tmp_path / "trace"
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(unfinished, remotes, login.ssh, f"touch {trace}; sleep 1000", 2)
        until(trace.exists)
        login.pause()
        assert "no answer" in run.result(timeout=2 + BOUND)
    login.resume()
    works_again(remotes, login.ssh)


def test_a_frozen_host_is_away_and_nothing_is_sent(remotes, login, tmp_path):
    assert echo(remotes, login) == "hello\n"
    login.pause()
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: away(remotes, login.ssh), range(8)))
    assert time.monotonic() - began < 5 + BOUND
    assert all("in time" in text or "did not answer" in text for text in texts), texts
    login.resume()
    works_again(remotes, login.ssh)


def test_a_connection_whose_other_end_froze_is_replaced_within_one_command(remotes, login):
    assert echo(remotes, login) == "hello\n"
    login.pause_connections()
    assert echo(remotes, login) == "hello\n"
    login.resume()


def test_a_server_that_says_nothing_is_away(remotes, login):
    with socket.create_server((HOST, 0)) as server:
        away(remotes, replace(login.ssh, port=server.getsockname()[1]))


def test_a_name_that_does_not_exist_is_away(remotes, login):
    text = away(remotes, replace(login.ssh, host="no-such-host.invalid"))
    assert "no-such-host.invalid was not resolved" in text


def test_close_ends_commands_and_leaves_no_connection(remotes, login, tmp_path):
    trace = tmp_path / "trace"
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(remotes.run, login.ssh, f"touch {trace}; sleep 3", timeout=20)
        until(trace.exists)
        remotes.close()
        with pytest.raises(Unfinished):
            run.result(timeout=20)
    until(lambda: login.connections() == 0)
    for spec in (login.ssh, None):
        with pytest.raises(HostAway, match="closed"):
            remotes.run(spec, "true", timeout=5)


def test_close_ends_commands_on_connections_that_were_given_up_too(remotes, tmp_path):
    traces = [tmp_path / "first", tmp_path / "second"]
    with host(tmp_path / "login", config="MaxSessions 1") as sshd, ThreadPoolExecutor(2) as pool:
        runs = []
        for trace in traces:
            script = f"touch {trace}; sleep 1000"
            runs.append(pool.submit(remotes.run, sshd.ssh, script, timeout=20))
            until(trace.exists)
        until(lambda: sshd.connections() == 2)
        remotes.close()
        for run in runs:
            with pytest.raises(Unfinished, match="was lost"):
                run.result(timeout=15)


def test_close_ends_a_try_to_connect(remotes, login):
    login.pause()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(remotes.run, login.ssh, "true", timeout=20)
        until(lambda: any(t.name == "ssh-connect" for t in threading.enumerate()))
        remotes.close()
        with pytest.raises(HostAway):
            run.result(timeout=15)
    login.resume()


# Who the host is.


def test_an_unknown_host_is_refused_with_its_fingerprint_and_the_command_that_adds_it(
    remotes, login
):
    login.known_hosts.unlink()
    text = refused(remotes, login.ssh)
    assert f"{HOST} port {login.port}" in text
    assert f"ssh-ed25519 {fingerprint(login.host_keys[0])}" in text
    shell(text.partition("then add it: ")[2])
    works_again(remotes, login.ssh)


def test_a_changed_host_key_is_refused_with_both_fingerprints_and_the_way_out(remotes, login):
    old = fingerprint(login.host_keys[0])
    login.stop()
    login.new_host_keys()
    login.start()
    text = refused(remotes, login.ssh)
    assert f"expected ssh-ed25519 {old}" in text
    assert f"it shows ssh-ed25519 {fingerprint(login.host_keys[0])}" in text
    shell(text.partition("forget the old key: ")[2].partition("; then add")[0])
    shell(text.partition("add the new one: ")[2])
    works_again(remotes, login.ssh)


@pytest.mark.parametrize("index", range(3))
def test_the_host_is_asked_for_the_kind_of_key_it_is_known_by(remotes, tmp_path, index):
    with host(tmp_path / "login", kinds=("ed25519", "ecdsa", "rsa")) as sshd:
        sshd.known_hosts.write_text(f"[{HOST}]:{sshd.port} {sshd.host_line(index)}\n")
        assert echo(remotes, sshd) == "hello\n"


def test_a_revoked_host_key_is_refused(remotes, login):
    with login.known_hosts.open("a") as file:
        file.write(f"@revoked * {login.host_line()}\n")
    assert "@revoked" in refused(remotes, login.ssh)


def test_known_hosts_of_the_home_are_used_when_none_are_given(remotes, login, tmp_path):
    ssh = tmp_path / "home" / ".ssh"
    ssh.mkdir()
    shutil.copy(login.known_hosts, ssh / "known_hosts")
    assert remotes.run(replace(login.ssh, known_hosts=None), "echo x", timeout=9).out == "x\n"


# Who we are.


def test_a_missing_key_is_named(remotes, login, tmp_path):
    key = tmp_path / "none"
    assert refused(remotes, replace(login.ssh, key_file=key)).endswith(f"{key} does not exist")


def test_a_key_open_to_others_is_refused_with_the_command_that_closes_it(remotes, login):
    login.key.chmod(0o640)
    text = refused(remotes, login.ssh)
    assert "mode 0640" in text
    shell(text.partition("such keys: ")[2])
    works_again(remotes, login.ssh)


def test_a_key_with_a_passphrase_is_refused_with_the_ways_out(remotes, login, tmp_path):
    make_key(tmp_path / "locked", passphrase="open sesame")
    text = refused(remotes, replace(login.ssh, key_file=tmp_path / "locked"))
    assert "has a passphrase" in text
    assert "ssh-agent" in text
    assert "ssh_control_path" in text


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\xff\0\n", None])
def test_a_file_that_is_no_private_key_is_refused(remotes, login, tmp_path, content):
    key = tmp_path / "junk"
    key.write_bytes(login.key.with_name("key.pub").read_bytes() if content is None else content)
    key.chmod(0o600)
    assert "not a private SSH key" in refused(remotes, replace(login.ssh, key_file=key))


def test_a_folder_is_no_key(remotes, login, tmp_path):
    assert "is not a file" in refused(remotes, replace(login.ssh, key_file=tmp_path))


def test_a_key_the_host_does_not_accept_is_named_with_the_remedy(remotes, login, tmp_path):
    make_key(tmp_path / "other")
    text = refused(remotes, replace(login.ssh, key_file=tmp_path / "other"))
    assert f"{USER}@{HOST} does not accept the key {tmp_path}/other" in text
    assert fingerprint(tmp_path / "other") in text
    assert f"ssh-copy-id -i {tmp_path}/other.pub -p {login.port} {USER}@{HOST}" in text


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_the_usual_keys_are_tried_when_none_is_given(remotes, login, tmp_path, kind):
    folder = tmp_path / "home" / ".ssh"
    folder.mkdir()
    make_key(folder / "id_rsa", "rsa", passphrase="unusable, but in nobody's way")
    (folder / f"id_{kind}").unlink(missing_ok=True)
    line = make_key(folder / f"id_{kind}", kind)
    login.authorized_keys.write_text(line + "\n")
    assert remotes.run(replace(login.ssh, key_file=None), "echo x", timeout=9).out == "x\n"


def test_without_any_key_the_text_says_what_to_give(remotes, login, monkeypatch):
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    assert "Give one as ssh_key_file" in refused(remotes, replace(login.ssh, key_file=None))


def test_keys_of_an_agent_are_used(remotes, login, tmp_path, monkeypatch):
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")])
    try:
        until((tmp_path / "agent").exists)
        subprocess.run(["ssh-add", "-q", str(login.key)], check=True, timeout=20)
        got = remotes.run(replace(login.ssh, key_file=None), "echo x", timeout=9)
        assert got.out == "x\n"
    finally:
        agent.kill()
        agent.wait()


def test_a_host_that_hangs_up_after_some_keys_asks_for_the_right_one(remotes, tmp_path):
    folder = tmp_path / "home" / ".ssh"
    folder.mkdir()
    for kind in ("rsa", "ecdsa", "ed25519"):
        make_key(folder / f"id_{kind}", kind)
    with host(tmp_path / "login", config="MaxAuthTries 2") as sshd:
        text = refused(remotes, replace(sshd.ssh, key_file=None))
    assert "hung up after it had refused" in text
    assert "ssh_key_file" in text


def test_a_second_factor_is_refused_with_the_way_to_a_master(remotes, tmp_path):
    config = (
        "KbdInteractiveAuthentication yes\nAuthenticationMethods publickey,keyboard-interactive"
    )
    with host(tmp_path / "login", config=config) as sshd:
        text = refused(remotes, sshd.ssh)
    assert "wants more: keyboard-interactive" in text
    assert "ssh_control_path" in text


# What stands in the way.


def test_a_shell_that_prints_a_banner_does_no_harm(remotes, tmp_path):
    config = 'ForceCommand echo WELCOME; echo TIRED >&2; eval "$SSH_ORIGINAL_COMMAND"'
    with host(tmp_path / "login", config=config) as sshd:
        got = remotes.run(sshd.ssh, "echo x; echo y >&2", timeout=9)
    assert (got.out, got.err) == ("x\n", "y\n")


def test_a_login_that_runs_nothing_is_refused_in_its_own_words(remotes, tmp_path):
    with host(tmp_path / "login", config="ForceCommand /usr/sbin/nologin") as sshd:
        text = refused(remotes, sshd.ssh)
    assert "exit code 1" in text
    assert "This account is currently not available" in text
    with host(tmp_path / "other", config="ForceCommand /bin/false") as sshd:
        assert "exit code 1" in refused(remotes, sshd.ssh)


def test_no_logins_for_now_means_away(remotes, tmp_path):
    with host(tmp_path / "login", config="ForceCommand echo maintenance; exit 254") as sshd:
        assert "it said: maintenance" in away(remotes, sshd.ssh)


def test_a_login_that_ended_before_it_read_the_command_is_heard_as_well(remotes, tmp_path):
    with (
        host(tmp_path / "login", config="ForceCommand echo maintenance; exit 254") as sshd,
        pytest.raises(HostAway, match="it said: maintenance"),
    ):
        remotes.run(sshd.ssh, "true " + "x" * (8 << 20), timeout=9)


def test_paramiko_says_nothing_in_the_log(remotes, login, tmp_path, caplog):
    caplog.set_level("DEBUG")
    make_key(tmp_path / "other")
    refused(remotes, replace(login.ssh, key_file=tmp_path / "other"))
    echo(remotes, login)
    login.cut()
    echo(remotes, login)
    login.stop()
    away(remotes, login.ssh)
    assert {record.name for record in caplog.records} == {"slurmgate.ssh.remotes"}


# By way of others.


@pytest.fixture
def jump(tmp_path, login) -> Iterator[Sshd]:
    with host(tmp_path / "jump") as sshd:
        shutil.copy(login.authorized_keys, sshd.authorized_keys)
        with login.known_hosts.open("a") as file:
            file.write(sshd.known_hosts.read_text())
        yield sshd


def test_a_jump_host_is_gone_through(remotes, login, jump):
    spec = replace(login.ssh, jump=f"{USER}@{HOST}:{jump.port}")
    for _ in range(3):
        assert remotes.run(spec, "echo $SSH_CONNECTION", timeout=9).out.split()[3] == str(
            login.port
        )
    until(lambda: (jump.connections(), login.connections()) == (1, 1))
    jump.cut()
    assert remotes.run(spec, "echo x", timeout=9).out == "x\n"


def test_the_key_of_the_jump_host_is_checked_too(remotes, login, jump):
    login.trust()
    spec = replace(login.ssh, jump=f"{HOST}:{jump.port}")
    assert f"{HOST} port {jump.port} is not a known host" in refused(remotes, spec)
    until(lambda: login.connections() == 0)
    assert "Accepted publickey" not in login.log()


def test_a_jump_host_that_forbids_forwarding_is_for_good(remotes, login, jump):
    jump.stop()
    jump.config += "\nAllowTcpForwarding no"
    jump.start()
    assert "prohibits forwarding" in refused(
        remotes, replace(login.ssh, jump=f"{HOST}:{jump.port}")
    )


def test_a_login_host_the_jump_host_cannot_reach_is_away(remotes, login, jump):
    spec = replace(login.ssh, jump=f"{HOST}:{jump.port}", port=free_port())
    assert f"through {HOST}:{jump.port}" in away(remotes, spec)


def test_what_is_no_jump_host_is_refused(remotes, login):
    assert "[user@]host[:port]" in refused(remotes, replace(login.ssh, jump="a:b:c"))


def test_no_running_master_is_refused_with_the_command_that_starts_it(remotes, login, tmp_path):
    spec = replace(login.ssh, control_path=tmp_path / "control")
    text = refused(remotes, spec)
    command = f"ssh -M -S {tmp_path}/control -p {login.port} -N {USER}@{HOST}"
    assert text.endswith(command)
    with master(login, tmp_path / "control"):
        assert remotes.run(spec, "echo x", timeout=9).out == "x\n"
        until(lambda: login.connections() == 1)
    assert command in refused(remotes, spec)


def test_a_master_that_ends_during_a_command_leaves_its_outcome_unknown(remotes, login, tmp_path):
    trace = tmp_path / "trace"
    with ThreadPoolExecutor(1) as pool, master(login, tmp_path / "control") as spec:
        run = pool.submit(remotes.run, spec, f"touch {trace}; sleep 1000", timeout=20)
        until(trace.exists)
        login.cut()
        with pytest.raises(Unfinished):
            run.result(timeout=20)


def test_refusals_are_not_to_be_tried_again_and_the_others_are():
    assert issubclass(HostRefused, CannotStart)
    assert not HostRefused.retryable
    assert HostAway.retryable
    assert Unfinished.retryable


def shell(command: str) -> None:
    """Do what a refusal tells the operator to do."""
    assert shlex.split(command)
    subprocess.run(["/bin/sh", "-c", command], check=True, timeout=20, capture_output=True)
