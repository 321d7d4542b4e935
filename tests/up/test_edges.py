"""What a machine and its people do to a running product: files removed, addresses taken."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests.up.product import alive, free_port
from tests.waiting import until


def listening() -> tuple[socket.socket, str]:
    """Somebody else's listener and its address."""
    taken = socket.create_server(("127.0.0.1", 0))
    return taken, f"127.0.0.1:{taken.getsockname()[1]}"


def without_listen(product) -> str:
    """Start it with the address in the file alone; that address."""
    address = f"127.0.0.1:{product.port}"
    product.top.setdefault("gate", {})["listen"] = address
    return address


@pytest.fixture
def followed(product):
    """A product whose address is the file's, as ``up`` without ``--listen`` runs it."""
    without_listen(product)
    product.probe()
    return product.up(listen=False)


# a changed gate section


def test_a_gate_section_changed_while_nginx_is_down_is_a_note_and_in_force_later(product):
    product.expected += ["gate was killed", "control.sock|context: ngx.timer"]
    # It does not look at the file by itself, or that may have been read before the reload.
    product.top.update({"gate": {"workers": 1}, "watch": False})
    product.probe()
    product.up()
    assert product.process is not None
    product.process.send_signal(signal.SIGSTOP)  # so that nothing starts nginx again
    killed = product.nginx_master()
    os.kill(killed, signal.SIGKILL)
    (product.run_dir / "nginx.pid").write_text("no number\n")
    product.top["gate"] = {"workers": 2}
    product.write_config()
    note = product.run("reload").stdout
    product.process.send_signal(signal.SIGCONT)
    assert "nginx is restarting and will read the new file" in note
    until(lambda: product.serves_again(killed))
    until(lambda: len(product.nginx_workers()) == 2)
    assert product.get("/probe/").status_code == 200


def test_a_gate_section_changed_by_hangup_with_a_stale_pid_file_ends_nothing(product):
    product.top["gate"] = {"workers": 1}
    product.probe()
    product.up()
    master, backend = product.nginx_master(), product.backend()
    stranger = subprocess.Popen(["sleep", "1000"])
    (product.run_dir / "nginx.pid").write_text(f"{stranger.pid}\n")
    product.top["gate"] = {"workers": 2}
    product.top["watch"] = False
    product.write_config()
    assert product.process is not None
    before = product.loaded()
    product.process.send_signal(signal.SIGHUP)
    until(lambda: product.loaded() > before)
    (product.run_dir / "nginx.pid").write_text(f"{master}\n")
    until(lambda: len(product.nginx_workers()) == 2)
    assert product.backend() == backend
    assert alive(stranger.pid)
    stranger.kill()
    stranger.wait()


def test_a_taken_address_is_refused_and_the_old_one_stays(followed):
    followed.expected.append("configuration refused")
    taken, address = listening()
    with taken:
        followed.top["gate"]["listen"] = address
        followed.top["watch"] = False
        followed.write_config()
        done = followed.run("reload", check=False)
    assert done.returncode == 1
    assert "gate.listen" in done.stderr
    assert "taken by" in done.stderr
    assert followed.get("/probe/").status_code == 200


def test_a_free_address_is_taken_by_a_reload(followed):
    followed.port = free_port()
    followed.url = f"http://127.0.0.1:{followed.port}"
    without_listen(followed)
    followed.write_config()
    followed.run("reload")
    until(lambda: accepts(followed.port))
    assert followed.get("/probe/").status_code == 200


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_changed_address_under_a_given_one_is_said_to_have_no_effect(product):
    product.top["watch"] = False  # else the file may be read before the reload
    product.probe()
    product.up()
    product.top["gate"] = {"listen": "127.0.0.1:1"}
    product.write_config()
    notes = product.run("reload").stdout
    assert "--listen" in notes
    assert "nginx reloads" not in notes
    assert product.get("/probe/").status_code == 200


# certificates


def test_up_says_at_once_that_a_certificate_is_missing(product, certificate):
    product.top["gate"] = {"tls": {**certificate, "certificate": "none.pem"}}
    product.write_config()
    done = start_in_vain(product)
    assert "gate.tls.certificate" in done.stderr


def test_a_reload_with_a_wrong_key_is_refused_and_the_gate_serves_on(product, certificate):
    product.expected.append("configuration refused")
    product.top["gate"] = {"tls": certificate}
    product.probe()
    product.up()
    product.top["gate"] = {"tls": {**certificate, "key": certificate["certificate"]}}
    product.write_config()
    done = product.run("reload", check=False)
    assert done.returncode == 1
    assert "gate.tls.key" in done.stderr
    assert product.get("/probe/", verify=False).status_code == 200


def start_in_vain(product) -> subprocess.CompletedProcess[str]:
    argv = product.command("up", "--config", str(product.config))
    argv += ["--state-dir", str(product.state_dir), "--listen", f"127.0.0.1:{product.port}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done


# removed files


def test_a_removed_folder_of_sockets_is_noticed_and_made_again(product):
    product.expected += ["control.sock|context: ngx.timer|sockets were removed"]
    product.expected += ["nginx.pid|inner.sock"]
    product.probe()
    product.up()
    pid = product.get("/probe/").json()["pid"]
    before = product.run_dir
    shutil.rmtree(before)
    until(lambda: (before / "api.sock").exists() and product.api_answers())
    assert product.run_dir == before
    product.until_state("ready")
    assert product.get("/probe/").json()["pid"] == pid
    product.run("stop", "probe")
    product.until_state("cold")


def test_a_removed_state_directory_is_said_in_a_sentence(product):
    product.expected += ["."]
    product.probe()
    product.up()
    product.get("/probe/")
    probes = product.replicas()
    shutil.rmtree(product.state_dir)
    assert product.down() == 1
    assert "was removed while running" in product.tail()
    assert "Traceback" not in product.tail()
    until(lambda: not any(alive(pid) for pid in probes))
    product.process = None


def test_a_start_in_vain_leaves_no_state_directory(product):
    product.write_config('{"Services": 1}')
    start_in_vain(product)
    product.write_config()
    with socket.create_server(("127.0.0.1", product.port)):
        assert "taken by" in start_in_vain(product).stderr
    assert not product.state_dir.exists()


def test_a_frozen_backend_of_a_killed_up_does_not_hold_up_the_next_one(product):
    product.probe()
    product.up()
    pid = product.get("/probe/").json()["pid"]
    frozen = product.backend()
    assert frozen is not None
    os.kill(frozen, signal.SIGSTOP)
    assert product.process is not None
    product.process.kill()
    product.process.wait()
    product.process.stdout.close()
    product.log.clear()
    product.up()
    assert not alive(frozen)
    assert "does not end by itself" not in product.tail()
    assert product.get("/probe/").json()["pid"] != pid


def test_a_damaged_copy_of_the_configuration_is_as_good_as_none(product):
    product.write_config("{")
    product.state_dir.mkdir(mode=0o700)
    (product.state_dir / "config.last-good.json").write_text("{")
    argv = [sys.executable, "-m", "slurmgate", "backend", "--supervised"]
    argv += ["--config", str(product.config), "--state-dir", str(product.state_dir)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "services.json: line 1" in done.stderr
    assert "Traceback" not in done.stderr
