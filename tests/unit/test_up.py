"""``slurmgate up`` as users run it: a real backend, a real nginx, real kills."""

from __future__ import annotations

import datetime
import http.client
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from slurmgate import procfs
from slurmgate.state import StateDir
from tests.ports import free_port, service_ports
from tests.waiting import until

SERVER = """\
#!/bin/bash
exec {python} -c '
import http.server, os, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = str(os.getpid()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
' "$1"
"""


def runs(pid: int) -> bool:
    process = procfs.read(pid)
    return process is not None and not process.ended


class Instance:
    """One state directory with its configuration, and the processes of every ``up`` on it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.state = folder / "state"
        self.port = free_port()
        self.config = folder / "services.json"
        self.write_config("echo")
        script = folder / "serve.sh"
        script.write_text(SERVER.format(python=sys.executable))
        script.chmod(0o755)
        self.processes: list[subprocess.Popen[str]] = []

    def write_config(self, *routes: str) -> None:
        services = [
            {
                "name": f"Service {route}",
                "route_name": route,
                "api_paths": ["/"],
                "bash_file": "serve.sh",
                "check_health_path": "/",
                "timeout": 1000,
                "launcher": "process",
                "remote_port": "auto",
                "port_range": service_ports(),
            }
            for route in routes
        ]
        gate = {"listen": f"127.0.0.1:{self.port}", "workers": 2}
        self.config.write_text(json.dumps({"Services": services, "gate": gate, "watch": False}))

    def up(self, *options: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start an ``up``; what it prints as standard error goes to the file ``log``."""
        argv = [sys.executable, "-m", "slurmgate", "up", "--config", str(self.config)]
        argv += ["--state-dir", str(self.state), *options]
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(
                argv,
                env={**os.environ, "UP_IN": str(self.folder), **(env or {})},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.processes.append(process)
        return process

    def ready(self, *options: str) -> subprocess.Popen[str]:
        process = self.up(*options)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"ready http://127.0.0.1:{self.port}\n", self.log
        return process

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def serves(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            return self.get("/readyz")[0] == 200
        return False

    def child(self, name: str) -> int:
        """The pid of a running child of ``up``, as recorded for a later one."""
        entry = json.loads((self.state / "children.json").read_text()).get(name)
        return 0 if entry is None else int(entry["pid"])

    def workers(self) -> set[int]:
        master = self.child("gate")
        return {p.pid for p in procfs.session_members(master) if p.pid != master}

    def left(self) -> list[procfs.Process]:
        """Everything of this instance that runs: nginx overwrites its environment."""
        found = procfs.find_marked({"UP_IN": str(self.folder)})
        conf = str(self.state / "nginx" / "nginx.conf").encode()
        for process in procfs.processes():
            with suppress(FileNotFoundError, ProcessLookupError):
                if conf in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                    found.append(process)
        return found

    def clean(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        gate = self.child("gate") if (self.state / "children.json").exists() else 0
        members = procfs.session_members(gate) if gate else []
        for left in [*self.left(), *(m for m in members if m.comm == "nginx")]:
            with suppress(ProcessLookupError):
                os.kill(left.pid, signal.SIGKILL)


@pytest.fixture
def instance(tmp_path):
    instance = Instance(tmp_path)
    yield instance
    instance.clean()


def end(process: subprocess.Popen[str]) -> int:
    process.terminate()
    return process.wait(60)


def test_up_says_ready_once_serves_and_ends_without_a_trace(instance):
    up = instance.ready()
    status, service = instance.get("/echo/")
    assert status == 200
    assert runs(int(service))
    assert end(up) == 0
    assert up.stdout is not None
    assert up.stdout.read() == ""
    assert instance.left() == []
    assert list((instance.state / "replicas").iterdir()) == []
    for line in instance.log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ", line), line


def test_up_works_below_a_long_path(tmp_path):
    folder = tmp_path / ("long name " * 12) / ("é" * 60)
    folder.mkdir(parents=True)
    instance = Instance(folder)
    try:
        up = instance.ready()
        assert instance.get("/echo/")[0] == 200
        assert not (instance.state / "run").exists()
        sockets = StateDir.find(instance.state).run_dir()
        assert sockets.is_dir()
        assert end(up) == 0
        assert instance.left() == []
        assert not sockets.exists()
    finally:
        instance.clean()


def test_a_second_up_on_the_same_state_directory_is_refused(instance):
    first = instance.ready()
    log = instance.folder / "log"
    log.rename(instance.folder / "first")
    second = instance.up("--listen", f"127.0.0.1:{free_port()}")
    assert second.wait(60) == 1
    assert f"another slurmgate (pid {first.pid} on" in instance.log
    assert len(instance.log.splitlines()) == 1
    assert instance.serves()


def test_a_backend_run_by_hand_keeps_its_state_directory(instance):
    argv = [sys.executable, "-m", "slurmgate", "backend", "--config", str(instance.config)]
    with subprocess.Popen(
        [*argv, "--state-dir", str(instance.state)],
        env={**os.environ, "UP_IN": str(instance.folder)},
        stderr=subprocess.DEVNULL,
    ) as backend:
        try:
            until((instance.state / "backend.lock").exists, 60)
            until(lambda: (instance.state / "backend.lock").read_text())
            assert instance.up().wait(60) == 1
            assert f"another slurmgate (pid {backend.pid} on" in instance.log
        finally:
            backend.terminate()


def test_a_taken_port_is_said_with_whoever_has_it(instance):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", instance.port))
        other.listen()
        assert instance.up().wait(60) == 1
        me = procfs.read(os.getpid())
        assert me is not None
        taken = f"port {instance.port} is taken by {me.comm} (pid {me.pid})"
        assert taken in instance.log.splitlines()[-1]
    assert instance.left() == []


def test_an_unusable_configuration_is_said_and_nothing_starts(instance):
    instance.config.write_text('{"Services": [{"name": 3}]}')
    assert instance.up().wait(60) == 1
    assert "Services[0].name" in instance.log
    assert "Traceback" not in instance.log
    assert instance.left() == []


def test_a_configuration_of_nginx_that_cannot_be_written_is_said(instance):
    instance.state.mkdir(mode=0o700)
    (instance.state / "nginx" / "nginx.conf").mkdir(parents=True)
    assert instance.up().wait(60) == 1
    conf = f"{instance.state}/nginx/nginx.conf"
    assert f"slurmgate: cannot write {conf}: Is a directory" in instance.log
    assert "Traceback" not in instance.log


def test_the_command_line_cannot_open_what_the_file_keeps_closed(instance):
    assert instance.up("--listen", f"0.0.0.0:{instance.port}").wait(60) == 1
    assert "not a loopback address" in instance.log


def test_an_nginx_without_the_lua_module_is_said(instance):
    fake = instance.folder / "bin" / "nginx"
    fake.parent.mkdir()
    words = 'nginx: [emerg] unknown directive "lua_package_path" in nginx.conf:20'
    fake.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")
    fake.chmod(0o755)
    up = instance.up(env={"PATH": f"{fake.parent}:{os.environ['PATH']}"})
    assert up.wait(60) == 1
    assert "has no Lua module" in instance.log.splitlines()[-1]
    assert instance.left() == []


def test_a_killed_backend_comes_back_and_the_gate_stays(instance):
    up = instance.ready()
    service = instance.get("/echo/")
    gate, backend = instance.child("gate"), instance.child("backend")
    os.kill(backend, signal.SIGKILL)
    assert instance.get("/echo/") == service
    until(lambda: instance.child("backend") not in (0, backend))
    until(lambda: instance.get("/info")[0] == 200, 60)
    assert instance.get("/echo/") == service
    assert instance.child("gate") == gate
    assert end(up) == 0
    assert instance.left() == []


def test_a_killed_nginx_master_comes_back_with_one_set_of_workers(instance):
    up = instance.ready()
    service = instance.get("/echo/")
    gate, workers = instance.child("gate"), instance.workers()
    os.kill(gate, signal.SIGKILL)
    until(lambda: instance.child("gate") not in (0, gate))
    until(instance.serves)
    assert instance.get("/echo/") == service
    assert not any(runs(pid) for pid in workers)
    until(lambda: len(instance.workers()) == 2)
    assert end(up) == 0


def test_a_killed_up_takes_everything_along(instance):
    up = instance.ready()
    instance.get("/echo/")
    up.kill()
    until(lambda: instance.left() == [])
    assert list((instance.state / "replicas").iterdir()) == []


def test_what_outlived_a_killed_up_is_ended_before_the_next_one_starts(instance):
    up = instance.ready()
    service = int(instance.get("/echo/")[1])
    workers = instance.workers()
    for pid in (up.pid, instance.child("gate"), instance.child("backend")):
        os.kill(pid, signal.SIGSTOP)  # so that none of them sees another one's end
    for pid in (instance.child("gate"), instance.child("backend"), up.pid):
        os.kill(pid, signal.SIGKILL)
    up.wait(20)
    assert any(runs(pid) for pid in workers)
    assert runs(service)
    up = instance.ready()
    assert not any(runs(pid) for pid in workers)
    assert "ending the gate that an earlier slurmgate left behind" in instance.log
    assert instance.get("/echo/") == (200, str(service))  # adopted, not started twice
    assert end(up) == 0
    assert instance.left() == []


def test_replicas_end_with_up_even_when_the_backend_was_killed(instance):
    up = instance.ready()
    instance.get("/echo/")
    os.kill(instance.child("backend"), signal.SIGSTOP)
    up.terminate()
    until(lambda: instance.child("gate") == 0)
    os.kill(instance.child("backend"), signal.SIGKILL)
    assert up.wait(60) == 0
    assert instance.left() == []


def test_a_second_signal_does_not_wait_for_a_replica_that_will_not_end(instance):
    script = instance.folder / "serve.sh"
    script.write_text(script.read_text().replace("exec ", "trap 'touch asked' TERM\n"))
    script.write_text(script.read_text() + "while :; do sleep 0.1; done\n")
    up = instance.ready()
    instance.get("/echo/")
    up.terminate()
    until((instance.folder / "asked").exists)
    up.terminate()
    assert up.wait(60) == 0
    assert instance.left() == []


def test_hangup_reloads_the_configuration(instance):
    up = instance.ready()
    assert instance.get("/other/")[0] == 404
    instance.write_config("echo", "other")
    up.send_signal(signal.SIGHUP)
    until(lambda: instance.get("/other/")[0] == 200)


def test_up_says_https_where_it_speaks_tls(instance):
    certificate, key = make_certificate(instance.folder)
    document = json.loads(instance.config.read_text())
    document["gate"]["tls"] = {"certificate": certificate.name, "key": key.name}
    instance.config.write_text(json.dumps(document))
    up = instance.up()
    assert up.stdout is not None
    assert up.stdout.readline() == f"ready https://127.0.0.1:{instance.port}\n", instance.log
    assert end(up) == 0


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate nobody trusts, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gate")])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "gate.pem", folder / "gate.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


def test_a_stop_while_starting_is_clean(instance):
    up = instance.up()
    until(lambda: (instance.state / "children.json").exists(), 60)
    assert end(up) == 0
    assert instance.left() == []


def test_an_unknown_user_is_said(instance):
    assert instance.up("--user", "no-such-user").wait(60) == 1
    assert "--user no-such-user: this machine has no such user" in instance.log


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_root_does_not_take_its_own_default_state_directory_for_another_user(instance):
    nobody = pwd.getpwnam("nobody")
    if Path(nobody.pw_dir).is_dir():
        pytest.skip("nobody has a home directory here")
    instance.state = instance.folder / ".local/state/slurmgate"
    env = {"HOME": str(instance.folder), "SLURMGATE_STATE_DIR": ""}
    assert instance.up("--user", "nobody", env=env).wait(60) == 1
    assert "nobody has no home directory; give --state-dir" in instance.log


def test_only_root_becomes_another_user():
    argv = [sys.executable, "-m", "slurmgate", "up", "--user", "root", "--state-dir", "/tmp/none"]
    done = subprocess.run(
        argv,
        user=65534 if os.getuid() == 0 else None,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "only root can become another user" in done.stderr


@pytest.fixture
def open_folder(tmp_path):
    """A folder that other users can enter."""
    folder = Path(tempfile.mkdtemp(prefix="sgt-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("how", ["by name", "by the owner of the state directory"])
def test_root_becomes_the_user_before_anything_starts(open_folder, how):
    nobody = pwd.getpwnam("nobody")
    instance = Instance(open_folder)
    instance.config.chmod(0o644)
    try:
        if how == "by name":
            up = instance.ready("--user", "nobody")
        else:
            instance.state.mkdir(mode=0o700)
            os.chown(instance.state, nobody.pw_uid, nobody.pw_gid)
            up = instance.ready()
        service = int(instance.get("/echo/")[1])
        pids = {up.pid, service, instance.child("gate"), instance.child("backend")}
        for pid in pids | instance.workers():
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.search(rf"^Uid:(\s+{nobody.pw_uid}){{4}}$", status, re.M)
            assert re.search(r"^Groups:\s*(65534)?\s*$", status, re.M)
        assert instance.state.stat().st_uid == nobody.pw_uid
        assert end(up) == 0
    finally:
        instance.clean()
