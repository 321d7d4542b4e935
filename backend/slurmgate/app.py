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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from flask import Flask
from waitress.server import create_server

from slurmgate import client, nginx
from slurmgate import config as configuration
from slurmgate.api import admin, gate, info, metrics, problem
from slurmgate.control import Control
from slurmgate.errors import ConfigError, SlurmgateError
from slurmgate.files import write_atomic
from slurmgate.launchers.process import ProcessLauncher
from slurmgate.model import Config, GateSpec, LauncherKind
from slurmgate.reload import Reloader
from slurmgate.state import StateDir

log = logging.getLogger(__name__)

CONTROL_THREADS = 4
API_THREADS = 4
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


def gate_spec(config: Config, listen: str | None) -> GateSpec:
    """The gate section with what the command line overrides."""
    return config.gate if listen is None else replace(config.gate, listen=listen)


def serve(options: BackendOptions) -> int:
    """Run the backend until SIGTERM or SIGINT; the process's exit code."""
    state = StateDir.open(options.state_dir)
    with state.lock("backend"):
        config, error = _initial_config(options, state)
        wishes: queue.SimpleQueue[int] = queue.SimpleQueue()
        _listen_for_signals(wishes)
        launcher = ProcessLauncher(state)
        control = Control(
            {LauncherKind.PROCESS: launcher},
            time.monotonic,
            epoch(),
            enabled=state.management_enabled,
        )
        control.start(config)
        reloader = Reloader(
            config,
            lambda fresh: _apply(control, state, fresh),
            lambda spec: _try_gate(spec, state, options),
            error=error,
        )
        reloader.start()
        instance = config.instance or state.instance
        _serve_sockets(state, _applications(state, control, reloader, instance))
        log.info("backend of instance %s serves %d services", instance, len(config.services))
        _wait(wishes, reloader)
        log.info("backend stops")
        reloader.close()
        control.close(
            stop_replicas={LauncherKind.PROCESS: True, LauncherKind.SLURM: options.stop_jobs}
        )
    return 0


def _initial_config(options: BackendOptions, state: StateDir) -> tuple[Config, str | None]:
    """Load the file; a supervised backend that was restarted falls back on the last good one."""
    saved = state.path / LAST_GOOD
    try:
        config = configuration.load(options.config)
    except ConfigError as error:
        if not options.supervised or not saved.exists():
            raise
        config = configuration.validate(json.loads(saved.read_bytes()), options.config)
        log.error("configuration refused, going on with the last good one:\n%s", error)
        return config, str(error)
    _remember(state, config)
    for warning in config.warnings:
        log.warning("%s", warning)
    return config, None


def _remember(state: StateDir, config: Config) -> None:
    try:
        write_atomic(state.path / LAST_GOOD, config.path.read_bytes())
        client.note_admin_token(state, config.admin_token_file)
    except OSError as error:
        log.warning("cannot keep a copy of the configuration: %s", error)


def _apply(control: Control, state: StateDir, config: Config) -> None:
    control.configure(config)
    _remember(state, config)


def _try_gate(spec: GateSpec, state: StateDir, options: BackendOptions) -> Callable[[], list[str]]:
    """Let nginx test the changed gate section; the result puts it in force by an nginx reload."""
    if not options.supervised:
        return lambda: ["gate: changed; restart the gate to put it in force"]
    if options.listen is not None:
        spec = replace(spec, listen=options.listen)
    conf = nginx.conf_of(state)
    candidate = conf.with_suffix(".new")
    nginx.write(nginx.render_for(spec, state), candidate)
    nginx.test(nginx.find_nginx(), candidate)

    def commit() -> list[str]:
        os.replace(candidate, conf)
        os.kill(int(state.nginx_pid.read_text()), signal.SIGHUP)
        return ["gate: nginx reloads with the changed section"]

    return commit


def _applications(
    state: StateDir, control: Control, reloader: Reloader, instance: str
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
    return application(gate.blueprint(control)), application(
        info.blueprint(control, reloader, time.monotonic, instance),
        metrics.blueprint(control, time.monotonic),
        admin.blueprint(control, reloader, token, state.set_management),
    )


def _serve_sockets(state: StateDir, applications: tuple[Flask, Flask]) -> None:
    places = (state.control_socket, state.api_socket)
    threads = (CONTROL_THREADS, API_THREADS)
    for app, path, count in zip(applications, places, threads, strict=True):
        server = create_server(
            app, unix_socket=str(path), unix_socket_perms="600", threads=count, ident=None
        )
        threading.Thread(target=server.run, name=path.stem, daemon=True).start()


def _listen_for_signals(wishes: queue.SimpleQueue[int]) -> None:
    def heard(number: int, _frame: FrameType | None) -> None:
        wishes.put(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, heard)


def _wait(wishes: queue.SimpleQueue[int], reloader: Reloader) -> None:
    """Reload on SIGHUP; return on SIGTERM or SIGINT. Main thread."""
    while wishes.get() == signal.SIGHUP:
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
