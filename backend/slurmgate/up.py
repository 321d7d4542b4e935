"""``slurmgate up``: backend and gate in the foreground, supervised.

State: the file ``children.json`` in the state directory names the sessions that run, so that what a
killed ``up`` left behind is ended before anything is started. Everything here happens in the main
thread, the only one.
"""

from __future__ import annotations

import dataclasses
import http.client
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path

from slurmgate import config as configuration
from slurmgate import listening, nginx, privileges
from slurmgate.errors import ConfigError, StateError
from slurmgate.launchers.process import MARKS, end_process_replicas
from slurmgate.model import Config, GateSpec
from slurmgate.sessions import remember, remembered
from slurmgate.state import StateDir, default_path
from slurmgate.supervisor import ChildSpec, Supervisor

_LOG = logging.getLogger(__name__)

_BACKEND_STOP = ((signal.SIGTERM, 20.0),)
_GATE_STOP = ((signal.SIGQUIT, 3.0), (signal.SIGTERM, 1.0))
# A stopped process (SIGSTOP, Ctrl-Z) hears SIGTERM once it goes on. Replicas that a backend cannot
# end in this time are taken over by the next one.
_LEFTOVER_STOP = ((signal.SIGTERM, 0.0), (signal.SIGCONT, 3.0))
_REPLICA_STOP = 10.0
_PROBE_TIMEOUT = 1.0
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}
_READY_PATH = "/readyz"


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line says; None: not given. ``listen`` overrides the configuration's."""

    config: Path
    state_dir: Path
    listen: str | None = None
    user: str | None = None
    stop_jobs: bool = False


def run(options: UpOptions) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. SlurmgateError says why that is impossible.

    When it returns or raises, nothing it started runs any more.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    options = dataclasses.replace(options, config=options.config.absolute())
    for name in MARKS:  # started in a shell of a replica we are still no part of it
        os.environ.pop(name, None)
    if not options.state_dir.exists():  # nothing of an earlier start is there: complain first
        _check_address(_with_listen(configuration.load(options.config), options.listen).gate)
    state = _own_state(options)
    with (
        state.lock("up"),
        Supervisor(lambda running: remember(state.children, running)) as supervisor,
    ):
        config = _with_listen(configuration.load(options.config), options.listen)
        _end_leftovers(state, supervisor)
        state.lock("backend").release()  # a backend that somebody runs by hand: say so at once
        try:
            _check_address(config.gate)
            gate = _prepare_gate(config.gate, state)
            _serve(supervisor, (_backend(options, state), gate), config.gate)
        finally:
            supervisor.stop()
            _end_replicas(state, hurried=supervisor.hurried)
    return 0


def _end_replicas(state: StateDir, *, hurried: bool) -> None:
    """End what is left: a backend that was killed could not do it, one that stopped has."""
    if not state.exists():
        raise StateError(
            f"the state directory {state.path} was removed while running; replicas of a backend"
            " that was killed may still run"
        )
    end_process_replicas(state, kill_after=1.0 if hurried else _REPLICA_STOP)
    state.remove_run_dir()


def _serve(supervisor: Supervisor, specs: tuple[ChildSpec, ChildSpec], gate: GateSpec) -> None:
    for spec in specs:
        if not supervisor.wait_ready(supervisor.start(spec)):
            return
    scheme = "http" if gate.tls is None else "https"
    try:
        sys.stdout.write(f"ready {scheme}://{gate.listen}\n")
        sys.stdout.flush()
    except OSError as error:  # nobody reads it: no reason not to serve
        _LOG.warning("cannot say ready on standard output: %s", error.strerror)
    supervisor.watch()
    _LOG.info("stopping")


def _own_state(options: UpOptions) -> StateDir:
    """Become the right user, then open the state directory as that user."""
    path = options.state_dir.absolute()
    user = privileges.choose(options.user, path)
    if user is not None:
        if options.user is not None and options.state_dir == default_path(os.environ):
            path = _default_of(user)
        privileges.give_state(user, path)
        privileges.become(user)
    return StateDir.open(path)


def _default_of(user: privileges.User) -> Path:
    """Give the default state directory of the user we are to become, not of root."""
    if user.home is None or not user.home.is_dir():
        raise StateError(f"{user.name} has no home directory; give --state-dir")
    path = default_path({**os.environ, "HOME": str(user.home)})
    return path


def _with_listen(config: Config, listen: str | None) -> Config:
    if listen is None:
        return config
    problem = configuration.listen_problem(
        listen, is_open=config.gate.open or config.keys_file is not None
    )
    if problem is not None:
        raise ConfigError([f"--listen {listen}: {problem}"])
    return dataclasses.replace(config, gate=config.gate.listening_on(listen))


def _check_address(gate: GateSpec) -> None:
    host, port = _address(gate.listen)
    problem = listening.problem(host, port)
    if problem is not None:
        raise StateError(f"cannot listen on {gate.listen}: {problem}")


def _prepare_gate(gate: GateSpec, state: StateDir) -> ChildSpec:
    """Render the nginx configuration, let nginx test it and say how to run it."""
    binary = nginx.find_nginx()
    unusable = None if gate.tls is None else configuration.tls_problem(gate.tls)
    if unusable is not None:
        raise ConfigError([unusable])
    conf = nginx.conf_of(state)
    try:
        nginx.write(nginx.render_for(gate, state), conf)
    except OSError as error:  # a full disk, above all
        raise StateError(f"cannot write {conf}: {error.strerror}") from error
    try:
        nginx.test(binary, conf)
    except ConfigError as error:
        if any("unknown directive" in line and "lua" in line for line in error.problems):
            raise StateError(
                f"{binary} has no Lua module: apt install libnginx-mod-http-lua"
            ) from error
        raise
    return ChildSpec(
        name="gate",
        argv=(binary, "-e", "stderr", "-c", str(conf)),
        ready=lambda: _gate_is_ready(gate),
        stop=_GATE_STOP,
        prepare=lambda: _remove_leftovers(state),
    )


def _remove_leftovers(state: StateDir) -> None:
    """Remove what a killed nginx left: its socket, which it could not bind again, and the bodies
    of its requests. It makes the folders anew.
    """
    state.inner_socket.unlink(missing_ok=True)
    for folder in state.nginx.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _backend(options: UpOptions, state: StateDir) -> ChildSpec:
    # -P: a module in the current directory must not take the place of one of ours.
    argv = [sys.executable, "-P", "-m", "slurmgate", "backend", "--supervised"]
    argv += ["--config", str(options.config), "--state-dir", str(state.path)]
    if options.listen is not None:
        argv += ["--listen", options.listen]
    if options.stop_jobs:
        argv.append("--stop-jobs")
    return ChildSpec(
        name="backend",
        argv=tuple(argv),
        ready=lambda: _accepts(state.control_socket),
        stop=_BACKEND_STOP,
        reload=signal.SIGHUP,
        held=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    )


def _accepts(path: Path) -> bool:
    """Say whether somebody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _gate_is_ready(gate: GateSpec) -> bool:
    """Ask the gate itself. Its certificate is for other names than the one we use: not checked."""
    host, port = _address(gate.listen)
    host = _EVERY_ADDRESS.get(host, host)
    if gate.tls is None:
        connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(
            host, port, timeout=_PROBE_TIMEOUT, context=context
        )
    try:
        connection.request("GET", _READY_PATH)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _address(listen: str) -> tuple[str, int]:
    parsed = configuration.parse_listen(listen)
    if parsed is None:
        raise ConfigError([f"gate.listen: {listen!r} is not HOST:PORT"])
    return parsed


def _end_leftovers(state: StateDir, supervisor: Supervisor) -> None:
    """End what a killed ``up`` left: it holds the port, the sockets and the backend's lock."""
    for name, session in remembered(state.children).items():
        if session.members():
            _LOG.warning("ending the %s that an earlier slurmgate left behind", name)
            supervisor.end(name, session, _LEFTOVER_STOP)
