"""Tunnels through a real sshd to a real HTTP server: opened, broken in every way, taken over."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slurmgate import openssh, procfs
from slurmgate.errors import CannotStart, SlurmgateError
from slurmgate.model import SshSpec
from slurmgate.tunnels import Route, Tunnels, link, tellers
from slurmgate.tunnels.routes import MARK
from tests.slurm.sshd import HOST, Sshd, free_port
from tests.waiting import until

OWNER = "o1"
KEY = "k3f9.1"


class Observer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, str | None]] = []

    def opened(self, key: str) -> None:
        self.told.append(("opened", key, None))

    def lost(self, key: str, reason: str) -> None:
        self.told.append(("lost", key, reason))

    def hopeless(self, key: str, reason: str) -> None:
        self.told.append(("hopeless", key, reason))

    def notice(self, key: str, text: str | None) -> None:
        self.told.append(("notice", key, text))

    def of(self, what: str, key: str = KEY) -> list[str]:
        return [text or "" for kind, name, text in self.told if (kind, name) == (what, key)]


@dataclass
class Output:
    code: int
    out: str
    err: str


class LocalRemotes:
    """Runs commands on this machine: it is the login host here too."""

    def __init__(self, error: SlurmgateError | None = None) -> None:
        self.ran: list[str] = []
        self.error = error

    def run(self, ssh: SshSpec | None, script: str, *, timeout: float) -> Output:
        self.ran.append(script)
        if self.error is not None:
            raise self.error
        command = ["/bin/sh", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        return Output(done.returncode, done.stdout, done.stderr)


class Service(BaseHTTPRequestHandler):
    """Answers at once, or drips bytes for as long as it is listened to."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        while self.path == "/drip":
            self.wfile.write(b"x")
            time.sleep(0.02)
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A cut stream is no news."""


class UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("tunnel", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Bench:
    """One instance's folders and the backends that use them one after the other."""

    def __init__(self, folder: Path) -> None:
        self.sockets, self.pins = folder / "t", folder / "pins"
        self.remotes = LocalRemotes()
        self._backends: list[Tunnels] = []

    def backend(self) -> tuple[Tunnels, Observer]:
        observer = Observer()
        tunnels = Tunnels(OWNER, self.sockets, self.pins, self.remotes, observer)
        self._backends.append(tunnels)
        return tunnels, observer

    def children(self, key: str = KEY, kind: str = "unix") -> list[int]:
        """Every ssh of a tunnel, proxy commands left out."""
        found = procfs.find_marked({MARK: f"{OWNER}.{key}.{kind}"})
        return [p.pid for p in found if p.session == p.pid and p.comm == "ssh"]

    def processes(self) -> list[procfs.Process]:
        return [p for p, mark in procfs.find_variable(MARK) if mark.startswith(f"{OWNER}.")]

    def end(self) -> None:
        for tunnels in self._backends:
            tunnels.shutdown()
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def bench() -> Iterator[Bench]:
    folder = Path(tempfile.mkdtemp(prefix="sg-tun-"))  # pytest's own paths are too long
    made = Bench(folder)
    yield made
    made.end()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shared_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd")) as sshd:
        yield sshd


@pytest.fixture(scope="module")
def service() -> Iterator[int]:
    server = QuietServer((HOST, 0), Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def get(endpoint: str, path: str = "/") -> bytes:
    connection = UnixConnection(endpoint.removeprefix("unix:"))
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def poke(endpoint: str) -> None:
    """Connect and ask, and do not mind what becomes of it, as a health poll does."""
    try:
        get(endpoint)
    except OSError:
        return


def works(endpoint: str) -> Callable[[], bool]:
    def asked() -> bool:
        """an answer through the tunnel"""
        try:
            return get(endpoint) == b"hello"
        except OSError:
            return False

    return asked


def test_an_open_tunnel_carries_http_and_leaves_nothing_when_closed(bench, shared_sshd, service):
    tunnels, observer = bench.backend()
    endpoint = tunnels.open(KEY, Route(shared_sshd.ssh, HOST, service))
    until(lambda: tunnels.is_open(KEY))
    assert get(endpoint) == b"hello"
    assert endpoint == f"unix:{bench.sockets}/{KEY}.sock"
    assert Path(endpoint.removeprefix("unix:")).stat().st_mode & 0o777 == 0o600
    assert tunnels.refusals(KEY) == (0, None)
    tunnels.close(KEY)
    tunnels.close(KEY)
    until(lambda: not bench.processes() and not list(bench.sockets.iterdir()))
    assert not tunnels.is_open(KEY)
    assert observer.told == [("opened", KEY, None)]


def test_opening_an_open_tunnel_once_more_tells_that_it_is_open(bench, shared_sshd, service):
    tunnels, observer = bench.backend()
    route = Route(shared_sshd.ssh, HOST, service)
    tunnels.open(KEY, route)
    until(lambda: tunnels.is_open(KEY))
    (child,) = bench.children()
    tunnels.open(KEY, route)
    until(lambda: observer.of("opened") == ["", ""])
    assert bench.children() == [child]


def test_a_child_starts_with_nothing_of_the_backend(bench, shared_sshd, service, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    inherited = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    tunnels, _ = bench.backend()
    tunnels.open(KEY, Route(shared_sshd.ssh, HOST, service))
    until(lambda: tunnels.is_open(KEY))
    os.close(inherited)
    (pid,) = bench.children()
    assert set(procfs.environment(pid)) <= {"HOME", "PATH", "SSH_AUTH_SOCK", "LANG", MARK}
    assert not os.path.exists(f"/proc/{pid}/fd/{inherited}") or "/dev/null" not in os.readlink(
        f"/proc/{pid}/fd/{inherited}"
    )
    process = procfs.read(pid)
    assert process is not None
    assert process.session == pid


def test_a_killed_child_is_replaced_at_once(bench, shared_sshd, service):
    tunnels, observer = bench.backend()
    endpoint = tunnels.open(KEY, Route(shared_sshd.ssh, HOST, service))
    until(lambda: tunnels.is_open(KEY))
    (pid,) = bench.children()
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(observer.of("opened")) == 2)
    assert get(endpoint) == b"hello"
    (reason,) = observer.of("lost")
    assert reason == f"the tunnel to {HOST}:{service} is down: ssh was killed by signal 9"
    assert bench.children() != [pid]


def test_a_tunnel_comes_back_with_its_login_host(bench, tmp_path, service):
    with Sshd(tmp_path / "sshd") as sshd:
        tunnels, observer = bench.backend()
        endpoint = tunnels.open(KEY, Route(sshd.ssh, HOST, service))
        until(lambda: tunnels.is_open(KEY))
        sshd.stop()
        until(lambda: any("Connection refused" in text for text in observer.of("lost")))
        assert not tunnels.is_open(KEY)
        assert not observer.of("hopeless")
        sshd.start()
        until(works(endpoint))
        assert tunnels.is_open(KEY)


def test_a_tunnel_that_is_reopened_replaces_a_frozen_child(bench, shared_sshd, service):
    tunnels, observer = bench.backend()
    endpoint = tunnels.open(KEY, Route(shared_sshd.ssh, HOST, service))
    until(lambda: tunnels.is_open(KEY))
    (pid,) = bench.children()
    os.kill(pid, signal.SIGSTOP)
    tunnels.reopen(KEY)
    until(lambda: len(observer.of("opened")) == 2)
    assert get(endpoint) == b"hello"
    until(lambda: pid not in bench.children())
    assert not observer.of("lost")


def test_the_next_backend_takes_over_child_and_stream(bench, shared_sshd, service):
    route = Route(shared_sshd.ssh, HOST, service)
    before, _ = bench.backend()
    endpoint = before.open(KEY, route)
    until(lambda: before.is_open(KEY))
    (pid,) = bench.children()
    stream = UnixConnection(endpoint.removeprefix("unix:"))
    stream.request("GET", "/drip")
    answer = stream.getresponse()
    assert answer.read(1) == b"x"
    before.shutdown()
    after, observer = bench.backend()
    assert after.open(KEY, route) == endpoint
    after.sweep([KEY])
    until(lambda: after.is_open(KEY))
    assert bench.children() == [pid]
    assert answer.read(3) == b"xxx"
    assert observer.told == [("opened", KEY, None)]
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(observer.of("opened")) == 2)
    stream.close()
    after.close(KEY)
    until(lambda: not bench.processes() and not list(bench.sockets.iterdir()))


def killed_backend(bench: Bench, route: Route) -> None:
    """Open a tunnel in a process of its own and kill that without a warning."""
    program = textwrap.dedent(f"""
        import signal
        from pathlib import Path, PosixPath
        from slurmgate.model import SshSpec
        from slurmgate.tunnels import Route, Tunnels
        class Observer:
            def opened(self, key): print(key, flush=True)
            def lost(self, key, reason): pass
        tunnels = Tunnels({OWNER!r}, Path({str(bench.sockets)!r}), Path({str(bench.pins)!r}),
                          None, Observer())
        tunnels.open({KEY!r}, {route!r})
        signal.pause()
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as backend:
        assert backend.stdout is not None
        assert backend.stdout.readline().decode().strip() == KEY
        backend.kill()


def test_a_child_of_a_killed_backend_is_taken_over_and_looked_after(bench, shared_sshd, service):
    route = Route(shared_sshd.ssh, HOST, service)
    killed_backend(bench, route)
    (pid,) = bench.children()
    tunnels, observer = bench.backend()
    endpoint = tunnels.open(KEY, route)
    until(lambda: tunnels.is_open(KEY))
    assert get(endpoint) == b"hello"
    assert bench.children() == [pid]
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(observer.of("opened")) == 2)
    assert get(endpoint) == b"hello"
    assert observer.of("lost") == [f"the tunnel to {HOST}:{service} is down: ssh has ended"]


def test_a_child_of_a_killed_backend_that_froze_is_replaced(bench, shared_sshd, service):
    route = Route(shared_sshd.ssh, HOST, service)
    killed_backend(bench, route)
    (pid,) = bench.children()
    os.kill(pid, signal.SIGSTOP)
    tunnels, observer = bench.backend()
    endpoint = tunnels.open(KEY, route)
    until(lambda: tunnels.is_open(KEY))
    tunnels.reopen(KEY)
    until(lambda: len(observer.of("opened")) == 2)
    assert get(endpoint) == b"hello"
    until(lambda: pid not in bench.children())


def test_many_tunnels_open_at_once_and_none_is_dropped_by_sshd(bench, shared_sshd, service):
    tunnels, observer = bench.backend()
    keys = [f"many{n}.1" for n in range(24)]
    for key in keys:
        tunnels.open(key, Route(shared_sshd.ssh, HOST, service))
    until(lambda: all(tunnels.is_open(key) for key in keys), 60)
    assert {kind for kind, _, _ in observer.told} == {"opened"}
    for key in keys:
        tunnels.close(key)
    until(lambda: not bench.processes() and not list(bench.sockets.iterdir()))


def test_of_two_children_left_of_one_tunnel_the_newer_is_taken_over(bench, shared_sshd, service):
    """A backend that dies while it replaces a frozen ssh leaves both."""
    route = Route(shared_sshd.ssh, HOST, service)
    killed_backend(bench, route)
    (frozen,) = bench.children()
    os.kill(frozen, signal.SIGSTOP)
    (bench.sockets / f"{KEY}.sock").unlink()
    replacing = {**os.environ, MARK: f"{OWNER}.{KEY}.unix"}
    with subprocess.Popen(
        procfs.command_line(frozen),
        env=replacing,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as newer:
        until((bench.sockets / f"{KEY}.sock").is_socket)
        after, _ = bench.backend()
        endpoint = after.open(KEY, route)
        until(lambda: after.is_open(KEY))
        assert get(endpoint) == b"hello"
        until(lambda: bench.children() == [newer.pid])
        after.close(KEY)


def test_a_child_left_with_another_command_is_replaced(bench, shared_sshd, service):
    before, _ = bench.backend()
    before.open(KEY, Route(shared_sshd.ssh, HOST, free_port()))
    until(lambda: before.is_open(KEY))
    (pid,) = bench.children()
    before.shutdown()
    after, _ = bench.backend()
    endpoint = after.open(KEY, Route(shared_sshd.ssh, HOST, service))
    until(works(endpoint))
    until(lambda: pid not in bench.children())


def test_what_no_replica_wants_is_swept_away(bench, shared_sshd, service):
    route = Route(shared_sshd.ssh, HOST, service)
    before, _ = bench.backend()
    for key in (KEY, "gone.1", "gone.2"):
        before.open(key, route)
    before.listen("gone.1", route, (HOST, free_port()))
    until(lambda: all(before.is_open(key) for key in (KEY, "gone.1", "gone.2")))
    until(lambda: bench.children("gone.1", "local"))
    before.shutdown()
    after, _ = bench.backend()
    endpoint = after.open(KEY, route)
    after.sweep({KEY})
    until(lambda: {p.pid for p in bench.processes()} == set(bench.children()))
    until(lambda: {p.name for p in bench.sockets.iterdir()} == {f"{KEY}.sock", f"{KEY}.unix.log"})
    assert get(endpoint) == b"hello"


def test_connections_refused_by_the_node_are_counted_as_loading(bench, shared_sshd):
    port = free_port()
    tunnels, observer = bench.backend()
    endpoint = tunnels.open(KEY, Route(shared_sshd.ssh, HOST, port))
    until(lambda: tunnels.is_open(KEY))
    poke(endpoint)
    poke(endpoint)
    until(lambda: tunnels.refusals(KEY) == (2, None))
    assert tunnels.is_open(KEY)
    assert observer.told == [("opened", KEY, None)]
    tunnels.shutdown()
    after, _ = bench.backend()
    after.open(KEY, Route(shared_sshd.ssh, HOST, port))
    until(lambda: after.refusals(KEY)[0] >= 2)


def test_forwarding_prohibited_by_sshd_is_hopeless_and_says_the_remedy(bench, tmp_path, service):
    with Sshd(tmp_path / "sshd", config="AllowTcpForwarding no") as sshd:
        tunnels, observer = bench.backend()
        endpoint = tunnels.open(KEY, Route(sshd.ssh, HOST, service))
        until(lambda: tunnels.is_open(KEY))
        poke(endpoint)
        text, *_ = until(lambda: observer.of("hopeless"))
        poke(endpoint)
        assert "administratively prohibited" in text
        assert f"{HOST}:{service}" in text
        assert "AllowTcpForwarding" in text
        assert "PermitOpen" in text


def test_an_unknown_node_name_is_hopeless(bench, shared_sshd, monkeypatch):
    monkeypatch.setattr(tellers, "_DOUBTED", 0.1)  # without a network it is that a resolver is away
    tunnels, observer = bench.backend()
    endpoint = tunnels.open(KEY, Route(shared_sshd.ssh, "node.invalid", 80))
    until(lambda: tunnels.is_open(KEY))

    def told() -> list[str]:
        poke(endpoint)
        return observer.of("hopeless")

    text, *_ = until(told)
    assert "cannot find the address of node.invalid" in text


def test_a_wrong_key_is_hopeless(bench, shared_sshd, service):
    tunnels, observer = bench.backend()
    ssh = replace(shared_sshd.ssh, key_file=shared_sshd.host_keys[0])
    tunnels.open(KEY, Route(ssh, HOST, service))
    text, *_ = until(lambda: observer.of("hopeless"))
    assert "Permission denied (publickey)" in text


def test_a_changed_host_key_is_hopeless_and_shows_the_new_one(bench, tmp_path, service):
    with Sshd(tmp_path / "sshd") as sshd:
        sshd.stop()
        sshd.new_host_keys()
        sshd.start()
        tunnels, observer = bench.backend()
        tunnels.open(KEY, Route(sshd.ssh, HOST, service))
        text, *_ = until(lambda: observer.of("hopeless"))
        assert "has changed, it is now SHA256:" in text
        assert str(sshd.known_hosts) in text


def test_a_login_that_worked_before_may_be_refused_for_a_while(bench, tmp_path, service):
    with Sshd(tmp_path / "sshd") as sshd:
        tunnels, observer = bench.backend()
        endpoint = tunnels.open(KEY, Route(sshd.ssh, HOST, service))
        until(lambda: tunnels.is_open(KEY))
        good = sshd.authorized_keys.read_text()
        sshd.authorized_keys.write_text("")
        sshd.cut()
        until(lambda: any("Permission denied" in text for text in observer.of("lost")))
        assert not observer.of("hopeless")
        sshd.authorized_keys.write_text(good)
        until(works(endpoint))


def test_a_login_that_hangs_is_given_up_and_tried_again(bench, tmp_path, service, monkeypatch):
    monkeypatch.setattr(link, "_OPENING_MAX", 0.3)
    with Sshd(tmp_path / "sshd") as sshd:
        sshd.pause()
        tunnels, observer = bench.backend()
        endpoint = tunnels.open(KEY, Route(sshd.ssh, HOST, service))
        reason, *_ = until(lambda: observer.of("lost"))
        assert "127.0.0.1 did not let us in within" in reason
        monkeypatch.setattr(link, "_OPENING_MAX", 60.0)
        sshd.resume()
        until(works(endpoint))


def test_reopening_does_not_wait_for_the_next_try(bench, tmp_path, service, monkeypatch):
    monkeypatch.setattr(link, "backoff", lambda failures: 3600.0)
    with Sshd(tmp_path / "sshd") as sshd:
        sshd.stop()
        tunnels, observer = bench.backend()
        tunnels.open(KEY, Route(sshd.ssh, HOST, service))
        until(lambda: observer.of("lost"))
        sshd.start()
        tunnels.reopen(KEY)
        tunnels.reopen(KEY)
        until(lambda: tunnels.is_open(KEY))
        assert len(bench.children()) == 1


def test_a_machine_without_ssh_says_so(bench, shared_sshd, service, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    tunnels, observer = bench.backend()
    tunnels.open(KEY, Route(shared_sshd.ssh, HOST, service))
    reason, *_ = until(lambda: observer.of("lost"))
    assert "ssh cannot be started: [Errno 2]" in reason
    tunnels.close(KEY)
    until(lambda: not list(bench.sockets.iterdir()))


def test_a_host_that_ssh_would_read_as_an_option_is_refused(bench, shared_sshd):
    tunnels, _ = bench.backend()
    with pytest.raises(CannotStart):
        tunnels.open(KEY, Route(replace(shared_sshd.ssh, host="-oProxyCommand=x"), HOST, 80))


def test_a_local_port_leads_to_the_service(bench, shared_sshd, service):
    tunnels, observer = bench.backend()
    port = free_port()
    tunnels.listen(KEY, Route(shared_sshd.ssh, HOST, service), (HOST, port))
    until(lambda: answers(port))
    assert not observer.told
    tunnels.listen("next.1", Route(shared_sshd.ssh, HOST, service), (HOST, port))
    until(lambda: not bench.children(kind="local") and bench.children("next.1", "local"))
    until(lambda: answers(port))
    assert not observer.told
    tunnels.unlisten("next.1")
    until(lambda: not bench.processes() and not list(bench.sockets.iterdir()))


def test_a_local_port_that_is_taken_is_told_and_harms_nothing(
    bench, shared_sshd, service, monkeypatch
):
    monkeypatch.setattr(link, "LISTEN_AGAIN", 0.2)
    route = Route(shared_sshd.ssh, HOST, service)
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        tunnels, observer = bench.backend()
        endpoint = tunnels.open(KEY, route)
        tunnels.listen(KEY, route, (HOST, port))
        (text,) = until(lambda: observer.of("notice"))
        assert text == f"local_port {HOST}:{port}: Address already in use"
        until(works(endpoint))
    until(lambda: observer.of("notice") == [text, ""])
    until(lambda: answers(port))
    assert not observer.of("lost") + observer.of("hopeless")


def test_a_local_port_moves_to_another_key_after_a_restart(bench, shared_sshd, service):
    route = Route(shared_sshd.ssh, HOST, service)
    address = (HOST, free_port())
    before, _ = bench.backend()
    before.listen(KEY, route, address)
    until(lambda: answers(address[1]))
    before.shutdown()
    after, observer = bench.backend()
    after.listen("next.1", route, address)
    until(lambda: not bench.children(kind="local") and bench.children("next.1", "local"))
    until(lambda: answers(address[1]))
    assert not observer.told


def answers(port: int) -> bool:
    """an answer on the local port"""
    connection = HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read() == b"hello"
    except OSError:
        return False
    finally:
        connection.close()


def test_settings_of_the_user_change_nothing(bench, shared_sshd, service, tmp_path, monkeypatch):
    config = tmp_path / ".ssh" / "config"
    config.parent.mkdir()
    config.write_text(
        "Host *\n ProxyCommand false\n ClearAllForwardings yes\n Port 1\n"
        " ControlMaster yes\n ControlPath /nonexistent/x\n StrictHostKeyChecking no\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    tunnels, _ = bench.backend()
    endpoint = tunnels.open(KEY, Route(shared_sshd.ssh, HOST, service))
    until(works(endpoint))


def test_a_tunnel_through_a_jump_host_ends_with_its_proxy(bench, shared_sshd, tmp_path, service):
    with Sshd(tmp_path / "jump") as jump:
        # One pair of credentials serves both hosts.
        jump.authorized_keys.write_text(shared_sshd.authorized_keys.read_text())
        known = tmp_path / "both"
        known.write_text(shared_sshd.known_hosts.read_text() + jump.known_hosts.read_text())
        ssh = replace(shared_sshd.ssh, jump=f"{HOST}:{jump.port}", known_hosts=known)
        tunnels, _ = bench.backend()
        endpoint = tunnels.open(KEY, Route(ssh, HOST, service))
        until(works(endpoint))
        proxies = [p for p in bench.processes() if p.pid not in bench.children()]
        assert proxies
        (pid,) = bench.children()
        for process in [*proxies, *[p for p in bench.processes() if p.pid == pid]]:
            os.kill(process.pid, signal.SIGSTOP)
        tunnels.close(KEY)
        until(lambda: not bench.processes())


def test_the_keys_of_a_node_are_fetched_once_and_pinned(bench, tmp_path, service):
    with Sshd(tmp_path / "node") as node:
        route = Route(node.ssh, HOST, service, loopback=True, node_port=node.port)
        tunnels, observer = bench.backend()
        endpoint = tunnels.open(KEY, route)
        until(works(endpoint))
        (pin,) = bench.pins.iterdir()
        assert pin.stat().st_mode & 0o777 == 0o600
        assert node.host_line() in pin.read_text()
        tunnels.close(KEY)
        until(lambda: not bench.processes())
        assert len(bench.remotes.ran) == 1
        assert not observer.of("hopeless")


def test_a_node_with_other_keys_than_pinned_is_hopeless(bench, tmp_path, service):
    with Sshd(tmp_path / "login") as login, Sshd(tmp_path / "node") as node:
        node.authorized_keys.write_text(login.authorized_keys.read_text())
        route = Route(login.ssh, HOST, service, loopback=True, node_port=node.port)
        tunnels, observer = bench.backend()
        endpoint = tunnels.open(KEY, route)
        until(works(endpoint))
        tunnels.close(KEY)
        node.stop()
        node.new_host_keys()
        node.start()
        tunnels.open("next.1", route)
        text, *_ = until(lambda: observer.of("hopeless", "next.1"))
        (pin,) = bench.pins.iterdir()
        assert "has changed, it is now SHA256:" in text
        assert f"remove {pin}" in text
        assert len(bench.remotes.ran) == 1


def test_nodes_may_have_their_sshd_on_the_login_hosts_port(bench, tmp_path, service):
    with Sshd(tmp_path / "login") as login:
        route = Route(login.ssh, HOST, service, loopback=True)
        before, observer = bench.backend()
        endpoint = before.open(KEY, route)
        until(works(endpoint))
        children = bench.children()
        before.shutdown()
        after, observer = bench.backend()
        after.open(KEY, route)
        until(lambda: after.is_open(KEY))
        assert bench.children() == children
        assert len(bench.remotes.ran) == 1
        assert not observer.of("hopeless")


def test_a_node_without_keys_is_tried_again(bench, shared_sshd, service):
    route = Route(shared_sshd.ssh, HOST, service, loopback=True, node_port=free_port())
    tunnels, observer = bench.backend()
    tunnels.open(KEY, route)
    until(lambda: len(bench.remotes.ran) >= 3)
    assert "host keys of 127.0.0.1 cannot be fetched" in observer.of("lost")[0]
    assert not observer.of("hopeless")


@pytest.mark.parametrize("kind", ["hopeless", "lost"])
def test_node_keys_that_cannot_be_fetched_are_told(bench, shared_sshd, service, kind):
    errors = {"hopeless": CannotStart("the host key has changed"), "lost": SlurmgateError("away")}
    bench.remotes.error = errors[kind]
    tunnels, observer = bench.backend()
    tunnels.open(KEY, Route(shared_sshd.ssh, HOST, service, loopback=True))
    (text,) = until(lambda: observer.of(kind)[:1])
    assert f"cannot be fetched on {HOST}: {errors[kind]}" in text
    assert (kind == "hopeless") == bool(observer.of("hopeless"))


class Master:
    """An operator's running OpenSSH master."""

    def __init__(self, sshd: Sshd, path: Path) -> None:
        self.ssh = replace(sshd.ssh, control_path=path)
        # The first value counts: our own options say that there is no master.
        argv = ["ssh", "-M", "-S", str(path), *openssh.options(sshd.ssh), "-N"]
        self.process = subprocess.Popen([*argv, "--", openssh.destination(sshd.ssh)])
        until(path.exists)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(timeout=20)


def test_the_operators_master_forwards_without_a_child(bench, shared_sshd, service):
    path = bench.sockets.parent / "ctl"
    master = Master(shared_sshd, path)
    route = Route(master.ssh, HOST, service)
    before, _ = bench.backend()
    endpoint = before.open(KEY, route)
    until(works(endpoint))
    assert not bench.processes()
    before.shutdown()
    after, observer = bench.backend()
    after.open(KEY, route)
    until(lambda: after.is_open(KEY))
    assert get(endpoint) == b"hello"
    after.sweep({KEY})
    master.end()
    path.unlink(missing_ok=True)
    reason, *_ = until(lambda: observer.of("lost"))
    assert f"-M -S {path}" in reason
    master = Master(shared_sshd, path)
    until(works(endpoint))
    port = free_port()
    after.listen(KEY, route, (HOST, port))
    until(lambda: answers(port))
    after.close(KEY)
    until(lambda: not list(bench.sockets.iterdir()))
    until(lambda: not answers(port))
    master.end()
