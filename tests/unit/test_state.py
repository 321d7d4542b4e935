"""The state directory: private, kept values, short socket paths, one user at a time."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from slurmgate.errors import StateError
from slurmgate.state import StateDir, default_path, network_filesystem, safe_name


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_state_directory_is_closed_to_others_with_all_that_is_in_it(tmp_path):
    state = StateDir.open(tmp_path / "a" / "b")
    state.admin_token()
    state.set_management(False)
    assert mode(state.path) == 0o700
    for path in state.path.iterdir():
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path


def test_values_made_on_first_start_are_kept(tmp_path):
    first, second = StateDir.open(tmp_path / "s"), StateDir.open(tmp_path / "s")
    assert first.owner == second.owner
    assert first.instance == second.instance
    assert first.admin_token() == second.admin_token()
    assert first.run_dir() == second.run_dir()
    assert StateDir.open(tmp_path / "other").owner != first.owner


def test_the_default_instance_name_fits_the_rule_for_names(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Login_07.very-long-cluster-name" + "x" * 60)
    assert re.fullmatch(r"login-07-[a-z0-9]{4}", StateDir.open(tmp_path / "s").instance)


def test_an_empty_directory_open_to_others_is_closed(tmp_path):
    tmp_path.chmod(0o755)
    StateDir.open(tmp_path)
    assert mode(tmp_path) == 0o700


def test_a_directory_others_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "somebody's").touch()
    tmp_path.chmod(0o755)
    with pytest.raises(StateError, match=r"mode 755.*chmod 700"):
        StateDir.open(tmp_path)
    assert mode(tmp_path) == 0o755


def test_a_directory_of_another_user_is_refused(as_ordinary_user):
    def claim() -> None:
        with pytest.raises(StateError, match="belongs to uid 0"):
            StateDir.open(Path("/usr"))

    as_ordinary_user(claim)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_root_does_not_use_the_directory_of_another_user(tmp_path):
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(StateError, match="belongs to uid 65534"):
        StateDir.open(tmp_path)


def test_a_file_in_the_place_of_the_directory_is_an_error_in_words(tmp_path):
    (tmp_path / "s").touch()
    with pytest.raises(StateError, match="cannot use the state directory"):
        StateDir.open(tmp_path / "s")


def test_a_token_file_of_the_configuration_wins(tmp_path):
    state = StateDir.open(tmp_path / "s")
    token = tmp_path / "token"
    token.write_text("from-a-secret-store\n")
    token.chmod(0o600)
    assert state.admin_token(token) == "from-a-secret-store"


@pytest.mark.parametrize("content", [b"", b"\n", b"two words\n", b"\xff\xfe\n"])
def test_a_token_file_without_a_token_is_refused(tmp_path, content):
    token = tmp_path / "token"
    token.write_bytes(content)
    with pytest.raises(StateError, match="token"):
        StateDir.open(tmp_path / "s").admin_token(token)


def test_a_missing_token_file_is_named(tmp_path):
    with pytest.raises(StateError, match="nowhere: No such file"):
        StateDir.open(tmp_path / "s").admin_token(tmp_path / "nowhere")


def test_management_stays_off_over_restarts(tmp_path):
    state = StateDir.open(tmp_path / "s")
    assert state.management_enabled
    state.set_management(False)
    assert not StateDir.open(tmp_path / "s").management_enabled
    state.set_management(True)
    assert StateDir.open(tmp_path / "s").management_enabled


def test_sockets_lie_in_the_state_directory_when_the_path_is_short(runtime_directory):
    short = runtime_directory
    state = StateDir.open(short / "s")
    assert state.run_dir() == short / "s" / "run"
    assert state.control_socket == short / "s" / "run" / "control.sock"


def test_sockets_of_a_long_path_lie_in_the_runtime_directory(tmp_path, runtime_directory):
    state = StateDir.open(tmp_path / ("x" * 100))
    assert state.run_dir().parent == runtime_directory
    assert mode(state.run_dir()) == 0o700
    assert len(str(state.control_socket)) < 80


def test_sockets_of_a_long_path_lie_in_tmp_without_a_runtime_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    state = StateDir.open(tmp_path / ("x" * 100))
    first = state.run_dir()
    assert str(first).startswith(f"/tmp/sg-{os.getuid()}-")
    first.rmdir()
    second = StateDir.open(state.path).run_dir()
    assert second.is_dir()
    assert second == first
    assert StateDir.find(state.path).run_dir() == second
    second.rmdir()


def test_a_runtime_directory_that_others_may_enter_is_not_used(tmp_path, runtime_directory):
    runtime_directory.chmod(0o755)
    state = StateDir.open(tmp_path / ("x" * 100))
    assert state.run_dir().parent == Path("/tmp")
    state.run_dir().rmdir()


def test_a_recorded_run_directory_replaced_by_a_link_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    state = StateDir.open(tmp_path / ("x" * 100))
    trap = state.run_dir()
    trap.rmdir()
    trap.symlink_to(tmp_path)
    assert StateDir.open(state.path).run_dir() != trap
    trap.unlink()
    state.run_dir().rmdir()


def test_readers_never_make_a_state_directory(tmp_path):
    with pytest.raises(StateError, match="no state directory"):
        StateDir.find(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_readers_never_make_a_token(tmp_path):
    path = StateDir.open(tmp_path / "s").path
    with pytest.raises(StateError, match="cannot read the admin-token"):
        StateDir.find(path).admin_token()


def test_a_taken_lock_says_who_has_it(tmp_path):
    state = StateDir.open(tmp_path / "s")
    with state.lock("up"):
        with pytest.raises(StateError, match=rf"pid {os.getpid()}.*--state-dir"):
            state.lock("up")
        state.lock("backend").release()
    state.lock("up").release()


def test_a_lock_ends_with_its_process_and_is_not_inherited(tmp_path):
    state = StateDir.open(tmp_path / "s")
    script = (
        "import pathlib, subprocess, sys, time; from slurmgate.state import StateDir\n"
        "lock = StateDir.open(pathlib.Path(sys.argv[1])).lock('up')\n"
        "subprocess.Popen(['sleep', '60'], stdin=0, stdout=2, close_fds=False)\n"
        "print('held', flush=True); sys.stdin.read(1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(state.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StateError, match=f"pid {holder.pid}"):
            state.lock("up")
        holder.kill()
        holder.wait()
        state.lock("up").release()
        os.killpg(holder.pid, 9)


@pytest.mark.parametrize("name", ["LLM", "a.b-c_d", "x" * 100])
def test_a_service_name_that_is_a_file_name_stays_as_it_is(name):
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("a/b c", "a_b_c-"),
        ("..", "_.-"),
        (".hidden", "_hidden-"),
        ("Größe", "Gr__e-"),
        ("", "-"),
        ("x" * 300, "x" * 100 + "-"),
    ],
)
def test_other_service_names_become_file_names_with_a_hash(name, begin):
    assert re.fullmatch(re.escape(begin) + "[0-9a-f]{8}", safe_name(name))


def test_no_two_services_share_a_file_name():
    names = ["模型", "説明", "__", "a/b", "a_b", "a b", "x" * 100, "x" * 101, "x" * 102]
    assert len({safe_name(name) for name in names}) == len(names)


def test_a_sockets_folder_that_a_cleaner_removed_is_made_again_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    monkeypatch.setattr("slurmgate.state.network_filesystem", lambda _: "nfs")
    state = StateDir.open(tmp_path / "s")
    before = state.run_dir()
    before.rmdir()
    assert state.run_dir() == before
    assert before.stat().st_mode & 0o777 == 0o700
    before.rmdir()
    before.write_text("somebody else's")
    other = state.run_dir()
    before.unlink()
    assert other != before
    other.rmdir()


def test_logs_are_found_without_the_name_of_the_service(tmp_path):
    state = StateDir.open(tmp_path / "s")
    log = state.log_file("../x", "k3f9")
    assert log.parent.parent == state.logs
    assert state.find_log("k3f9") is None
    log.parent.mkdir()
    log.touch()
    assert state.find_log("k3f9") == log


def test_the_default_directory_can_be_given_by_the_environment():
    assert default_path({"HOME": "/home/somebody"}) == Path("/home/somebody/.local/state/slurmgate")
    assert default_path({"SLURMGATE_STATE_DIR": "/srv/sg"}) == Path("/srv/sg")


@pytest.mark.parametrize(
    ("kind", "path", "found"),
    [
        ("nfs4", "/home/user/x", "nfs4"),
        ("lustre", "/home/user/x", "lustre"),
        ("fuse.sshfs", "/home/user/x", "fuse.sshfs"),
        ("fuse.lxcfs", "/home/user/x", None),
        ("ext4", "/home/user/x", None),
        ("nfs4", "/homework", None),
        ("nfs4", "/home/user/with space/x", None),
    ],
)
def test_network_file_systems_are_recognised(tmp_path, monkeypatch, kind, path, found):
    table = tmp_path / "mountinfo"
    table.write_text(
        "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"30 21 0:9 / /home rw,relatime shared:1 - {kind} server:/home rw\n"
        "31 30 0:9 / /home/user/with\\040space rw - tmpfs tmpfs rw\n"
    )
    monkeypatch.setattr("slurmgate.state._MOUNTS", table)
    assert network_filesystem(Path(path)) == found
