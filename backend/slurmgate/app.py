"""The backend's composition root: builds every part, serves the two sockets, waits for signals."""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from flask import Flask
from waitress.server import create_server

from slurmgate import client, listening, nginx, procfs
from slurmgate import config as configuration
from slurmgate.api import admin, gate, info, metrics, problem
from slurmgate.control import Control
from slurmgate.errors import ConfigError, SlurmgateError, StateError
from slurmgate.files import write_atomic
from slurmgate.history import History
from slurmgate.keyring import Keyring
from slurmgate.launchers.process import ProcessLauncher
from slurmgate.launchers.slurm import SlurmLauncher
from slurmgate.model import Config, GateSpec, LauncherKind
from slurmgate.reload import RESTART_THE_GATE, Reloader
from slurmgate.sessions import remembered
from slurmgate.ssh import Remotes
from slurmgate.state import StateDir

log = logging.getLogger(__name__)

CONTROL_THREADS = 4
API_THREADS = 8
GATE_PATIENCE = 2.0
HISTORY_PATIENCE = 2.0
LOOK_EVERY = 2.0
LAST_GOOD = "config.last-good.json"


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What the command line says. ``supervised``: ``up`` runs the gate beside this backend, so
    a changed gate section can be put in force; ``listen`` overrides the configuration's.
    """

    config: Path
    state_dir: Path
    listen: str | None = None
    supervised: bool = False
    stop_jobs: bool = False


def epoch() -> str:
    """Make a boot id; that of a later start on this machine compares greater."""
    return f"{time.monotonic_ns():020d}-{secrets.token_hex(4)}"


def serve(options: BackendOptions) -> int:
    """Run the backend until SIGTERM or SIGINT; the process's exit code."""
    state = StateDir.open(options.state_dir)
    with state.lock("backend"):
        config, error = _initial_config(options, state)
        wishes: queue.SimpleQueue[int] = queue.SimpleQueue()
        _listen_for_signals(wishes)
        instance = config.instance or state.instance
        remotes = Remotes()
        history = History(state.history)
        keyring = Keyring(config.keys_file)
        control = Control(
            {
                LauncherKind.PROCESS: ProcessLauncher(state),
                LauncherKind.SLURM: SlurmLauncher(state, instance, remotes),
            },
            time.monotonic,
            epoch(),
            history,
            enabled=state.management_enabled,
        )
        control.start(config)
        reloader = Reloader(
            config,
            lambda fresh, content: _apply(control, keyring, state, fresh, content),
            lambda fresh, running: _guarded(
                _try_gate(fresh.gate, running.gate, state, options),
                control,
                keyring,
                (fresh, running),
            ),
            admit=lambda fresh: _check_token(state, fresh),
            serving=lambda: None if options.supervised else control.view.gate,
            error=error,
        )
        reloader.start()
        keyring.start()
        sockets = _serve_sockets(state, _applications(state, control, reloader, keyring, instance))
        if options.supervised:
            refused = _catch_up(config, control, keyring, state, options)
            reloader.error = reloader.error or refused
        log.info("backend of instance %s serves %d services", instance, len(config.services))
        heard = _wait(wishes, reloader, lambda: state.exists() and not _in_place(sockets))
        log.info("backend stops")
        reloader.close()
        keyring.close()
        control.close(
            stop_replicas={LauncherKind.PROCESS: heard, LauncherKind.SLURM: options.stop_jobs},
            keep_ways=not (heard and options.supervised),
        )
        remotes.close()
        history.close(HISTORY_PATIENCE)
    if not heard:
        raise StateError(
            "the sockets were removed while running, so that no gate could reach this backend;"
            " replicas go on, and the next backend takes them over"
        )
    return 0


def _initial_config(options: BackendOptions, state: StateDir) -> tuple[Config, str | None]:
    """Load the file; a supervised backend that was restarted falls back on the last good one."""
    try:
        config, content = configuration.load_with_content(options.config)
    except ConfigError as error:
        last = _last_good(options, state) if options.supervised else None
        if last is None:
            raise
        log.error("configuration refused, going on with the last good one:\n%s", error)
        return last, str(error)
    _keep(state, config, content)
    for warning in config.warnings:
        log.warning("%s", warning)
    return config, None


def _last_good(options: BackendOptions, state: StateDir) -> Config | None:
    """Give the last configuration that was in force; None when there is no usable copy."""
    saved = state.path / LAST_GOOD
    try:
        return configuration.validate(json.loads(saved.read_bytes()), options.config)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        log.warning("%s cannot be used: %s", saved, error)
        return None


def _keep(state: StateDir, config: Config, content: bytes) -> None:
    """Save the configuration in force, just as it was read, for a later backend."""
    try:
        write_atomic(state.path / LAST_GOOD, content)
        client.note_admin_token(state, config.admin_token_file)
    except OSError as error:
        log.warning("cannot keep a copy of the configuration: %s", error)


def _apply(
    control: Control, keyring: Keyring, state: StateDir, config: Config, content: bytes
) -> None:
    """Put a configuration in force; no gate may learn of a service before its keys."""
    if config.keys_file is not None:
        keyring.follow(config.keys_file)
    control.configure(config)
    keyring.follow(config.keys_file)
    _keep(state, config, content)


def _check_token(state: StateDir, config: Config) -> None:
    """Refuse a configuration under which no admin call could be made any more."""
    try:
        state.admin_token(config.admin_token_file)
    except StateError as error:
        raise ConfigError([f"admin_token_file: {error}"]) from error


def _guarded(
    commit: Callable[[], list[str]],
    control: Control,
    keyring: Keyring,
    change: tuple[Config, Config],
) -> Callable[[], list[str]]:
    """Have the gate know who may come before it opens anywhere else; ``change``: fresh, running."""
    fresh, running = change
    if fresh.keys_file in (None, running.keys_file):
        return commit

    def commit_behind_keys() -> list[str]:
        keyring.follow(fresh.keys_file)
        try:
            _await_keys(control, keyring)
            return commit()
        except (ConfigError, OSError):
            keyring.follow(running.keys_file)
            raise

    return commit_behind_keys


def _await_keys(control: Control, keyring: Keyring) -> None:
    if not keyring.await_gate() and control.hears_gate():
        raise ConfigError(["keys_file: the gate did not take the keys in time; try again"])


def _try_gate(
    fresh: GateSpec, running: GateSpec, state: StateDir, options: BackendOptions
) -> Callable[[], list[str]]:
    """Try a changed gate section; the result puts it in force by an nginx reload."""
    if not options.supervised:
        text = nginx.render_for(fresh, state)
        return lambda: _render_again(text, state)
    notes = []
    if options.listen is not None and fresh.listen != running.listen:
        notes.append(f"gate.listen: changed, but up --listen {options.listen} stays in force")
    before, spec = (gate.listening_on(options.listen) for gate in (running, fresh))
    if spec == before:
        return lambda: notes
    _check_gate(spec, before)
    return _tried(nginx.render_for(spec, state), state, notes)


def _tried(text: str, state: StateDir, notes: list[str]) -> Callable[[], list[str]]:
    """Let nginx test a configuration; the result puts it in force."""
    conf = nginx.conf_of(state)
    candidate = conf.with_suffix(".new")
    nginx.write(text, candidate)
    nginx.test(nginx.find_nginx(), candidate)

    def commit() -> list[str]:
        os.replace(candidate, conf)
        if _reload_nginx(state):
            return [*notes, "gate: nginx reloads with the changed section"]
        return [*notes, "gate: nginx is restarting and will read the new file"]

    return commit


def _catch_up(
    config: Config, control: Control, keyring: Keyring, state: StateDir, options: BackendOptions
) -> str | None:
    """Put a gate section in force that was changed while no backend ran; what is wrong with it."""
    spec = config.gate.listening_on(options.listen)
    try:
        text = nginx.render_for(spec, state)
        if nginx.conf_of(state).read_text(encoding="utf-8") == text:
            return None
        _check_gate(spec, spec)
        commit = _tried(text, state, [])
        if config.keys_file is not None:
            _await_keys(control, keyring)
        for note in commit():
            log.warning("%s", note)
    except (ConfigError, OSError) as error:
        log.error("the changed gate section is refused, the running one stays:\n%s", error)
        return str(error)
    return None


def _render_again(text: str, state: StateDir) -> list[str]:
    """Renew what ``render`` wrote for a gate beside this backend: its next start reads it."""
    conf = nginx.conf_of(state)
    if conf.exists():
        nginx.write(text, conf)
    return [RESTART_THE_GATE]


def _check_gate(spec: GateSpec, before: GateSpec) -> None:
    """Find what ``nginx -t`` does not: a taken address, a certificate that cannot be used."""
    problems = []
    address = configuration.parse_listen(spec.listen)
    if spec.listen != before.listen and address is not None:
        taken = listening.problem(*address)
        if taken is not None:
            problems.append(f"gate.listen: cannot listen on {spec.listen}: {taken}")
    unusable = None if spec.tls is None else configuration.tls_problem(spec.tls)
    if unusable is not None:
        problems.append(unusable)
    if problems:
        raise ConfigError(problems)


def _reload_nginx(state: StateDir) -> bool:
    """Have the gate that ``up`` runs read its file again; False when there is none just now.

    One that is only starting does not know the signal yet, and may have read the older file.
    """
    deadline = time.monotonic() + GATE_PATIENCE
    while True:
        gate = remembered(state.children).get("gate")
        if gate is not None and gate.leader_runs() and procfs.catches(gate.pid, signal.SIGHUP):
            gate.signal_leader(signal.SIGHUP)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def _applications(
    state: StateDir, control: Control, reloader: Reloader, keyring: Keyring, instance: str
) -> tuple[Flask, Flask]:
    def application(*blueprints: Any) -> Flask:
        app = Flask("slurmgate", static_folder=None)
        problem.register(app)
        for blueprint in blueprints:
            app.register_blueprint(blueprint)
        return app

    def token() -> str:
        return state.admin_token(reloader.config.admin_token_file)

    token()
    return application(gate.blueprint(control, keyring)), application(
        info.blueprint(control, reloader, keyring, time.monotonic, instance),
        metrics.blueprint(control, keyring, time.monotonic),
        admin.blueprint(control, reloader, keyring, token, state.set_management),
    )


def _serve_sockets(state: StateDir, applications: tuple[Flask, Flask]) -> dict[Path, int]:
    """Serve in threads of their own; give the sockets with their inodes."""
    places = (state.control_socket, state.api_socket)
    threads = (CONTROL_THREADS, API_THREADS)
    for app, path, count in zip(applications, places, threads, strict=True):
        server = create_server(
            app, unix_socket=str(path), unix_socket_perms="600", threads=count, ident=None
        )
        threading.Thread(target=server.run, name=path.stem, daemon=True).start()
    return {path: path.stat().st_ino for path in places}


def _in_place(sockets: Mapping[Path, int]) -> bool:
    """Say whether who connects to these paths still reaches us."""
    try:
        return all(path.stat().st_ino == inode for path, inode in sockets.items())
    except OSError:
        return False


def _listen_for_signals(wishes: queue.SimpleQueue[int]) -> None:
    def heard(number: int, _frame: FrameType | None) -> None:
        wishes.put(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in numbers:
        signal.signal(number, heard)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # ``up`` has them wait until here


def _wait(
    wishes: queue.SimpleQueue[int], reloader: Reloader, unreachable: Callable[[], bool]
) -> bool:
    """Reload on SIGHUP; True after SIGTERM or SIGINT, False when nobody can reach us any more.

    Main thread.
    """
    while True:
        try:
            number = wishes.get(timeout=LOOK_EVERY)
        except queue.Empty:
            if unreachable():
                return False
            continue
        if number != signal.SIGHUP:
            return True
        try:
            reloader.reload()
        except SlurmgateError:
            log.info("reload refused; mend the file and try again")


def configure_logging() -> None:
    """One line per message on standard error."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
