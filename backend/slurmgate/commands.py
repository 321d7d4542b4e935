"""What each command does. Results go to standard output, complaints to standard error.

Every ``run_`` function takes the parsed arguments and gives the exit code. Modules that only one
command needs are imported there, so that the others start quickly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slurmgate import client, procfs
from slurmgate.errors import BackendAway, StateError
from slurmgate.model import Config, GateSpec
from slurmgate.state import StateDir, network_filesystem

GATE_PROGRAMS = ("nginx", "openresty")


def say(text: object) -> None:
    """Print one line of the result."""
    sys.stdout.write(f"{text}\n")


def run_up(args: argparse.Namespace) -> int:
    """``up``."""
    from slurmgate import up

    return up.run(
        up.UpOptions(
            config=args.config,
            state_dir=args.state_dir,
            listen=args.listen,
            user=args.user,
            stop_jobs=args.stop_jobs,
        )
    )


def run_backend(args: argparse.Namespace) -> int:
    """``backend``."""
    from slurmgate import app

    app.configure_logging()
    return app.serve(
        app.BackendOptions(
            config=args.config,
            state_dir=args.state_dir,
            listen=args.listen,
            supervised=args.supervised,
            stop_jobs=args.stop_jobs,
        )
    )


def run_render(args: argparse.Namespace) -> int:
    """``render``."""
    from slurmgate import config, nginx

    spec = config.load(args.config).gate
    state = StateDir.open(args.state_dir)
    target = args.dir / "nginx.conf"
    try:
        nginx.write(nginx.render_for(spec, state), target)
    except OSError as error:
        raise StateError(f"cannot write {target}: {error.strerror}") from error
    say(target)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """``check``: one line per problem, one per warning."""
    from slurmgate import config

    path = args.file or args.config
    found = config.examine(path)
    for line in found.problems:
        say(line)
    for line in found.warnings:
        say(f"warning: {line}")
    kind = network_filesystem(args.state_dir)
    if kind is not None:
        say(f"warning: {args.state_dir} is on a network file system ({kind}); use a local disk")
    if found.config is None or not _tls_is_good(found.config.gate):
        return 1
    if args.connect and not _hosts_are_good(found.config, args.state_dir):
        return 1
    say(f"{path}: {len(found.config.services)} services, no errors")
    return 0


def _hosts_are_good(config: Config, state_dir: Path) -> bool:
    """``check --connect``: log in to each host and ask about each service."""
    from slurmgate import connect
    from slurmgate.ssh import Remotes

    identity = connect.Identity(config.instance, None)
    with contextlib.suppress(StateError):  # never started here, or not ours to read
        state = StateDir.find(state_dir)
        identity = connect.Identity(config.instance or state.instance, state.owner)
    logging.getLogger("slurmgate").addHandler(logging.NullHandler())  # the findings say it better
    remotes = Remotes()
    try:
        return connect.check(config, identity, remotes, tell=_say_now)
    finally:
        remotes.close()


def _say_now(text: object) -> None:
    """Print a line of something that takes its time."""
    say(text)
    sys.stdout.flush()


def _tls_is_good(gate: GateSpec) -> bool:
    """Say what is wrong with the certificate; files that are not for us to read are no error."""
    from slurmgate import config

    problem = None if gate.tls is None else config.tls_problem(gate.tls)
    if gate.tls is None or problem is None:
        return True
    files = (gate.tls.certificate, gate.tls.key)
    if all(os.access(file, os.R_OK) for file in files):
        say(problem)
        return False
    if all(file.is_file() for file in files):  # one that is missing has its warning already
        say(f"warning: {problem}")
    return True


def run_status(args: argparse.Namespace) -> int:
    """``status``: a table for people, or the JSON of /info."""
    found = client.call(StateDir.find(args.state_dir), "GET", "/info")
    if args.json:
        say(json.dumps(found, indent=2))
        return 0
    say(status_table(found))
    return 0


def status_table(info: dict[str, Any]) -> str:
    """Lay out the answer of /info for people."""
    rows = [
        ("SERVICE", "ROUTE", "STATE", "WAITING", "IN FLIGHT", "REQUESTS", "STOPS IN", "REPLICA")
    ]
    for service in info["services"]:
        stops = service["stops_in_s"]
        replicas = [_replica(r) for r in service["replicas"]]
        rows.append(
            (
                service["name"],
                f"/{service['route_name']}/",
                service["state"],
                str(service["waiting"]),
                str(service["in_flight"]),
                str(service["requests"]),
                "-" if stops is None else f"{stops:.0f} s",
                ", ".join(replicas) or "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    for service in info["services"]:
        if service["reason"]:
            lines.append(f"{service['name']}: {service['reason']}")
        notices = [r["notice"] for r in service["replicas"] if r["notice"]]
        lines += [f"{service['name']}: {notice}" for notice in notices]
        if service["excluded_nodes"]:
            nodes = ", ".join(service["excluded_nodes"])
            lines.append(f"{service['name']}: keeps away from {nodes}: it failed there repeatedly")
    for job in info["strangers"]:
        lines.append(
            f"job {job['job_id']} on {job['host']} ({job['service']}, {job['state']}) belongs to"
            f" another state directory: slurmgate adopt {job['owner']} takes it over"
        )
    if not info["management_enabled"]:
        lines.append("management is disabled: nothing is started (slurmgate enable)")
    if info["config"]["error"]:
        lines.append(f"configuration refused:\n{info['config']['error']}")
    if info["config"]["keys_error"]:
        lines.append(f"keys of clients: {info['config']['keys_error']}")
    if info["config"]["gate_note"]:
        lines.append(info["config"]["gate_note"])
    return "\n".join(lines)


def _replica(replica: dict[str, Any]) -> str:
    """Name a replica, and of a Slurm job where it is or when Slurm expects to start it."""
    name = f"{replica['id']} {replica['state']}"
    if replica["job_id"] is None:
        return name
    starts = replica["starts_in_s"]
    where = f" on {replica['node']}" if replica["node"] else ""
    when = "" if starts is None else f", expected to start in {starts:.0f} s"
    return f"{name} (job {replica['job_id']}{where}{when})"


def _admin(args: argparse.Namespace, path: str) -> dict[str, Any]:
    state = StateDir.find(args.state_dir)
    answer: dict[str, Any] = client.call(state, "POST", path, client.admin_token(state))
    return answer


def run_service(args: argparse.Namespace) -> int:
    """``start`` and ``stop``."""
    _admin(args, f"/admin/services/{quote(args.name, safe='')}/{args.command}")
    say(f"{args.name}: {args.command} requested; slurmgate status shows it")
    return 0


def run_adopt(args: argparse.Namespace) -> int:
    """``adopt``."""
    found = _admin(args, f"/admin/adopt/{quote(args.owner, safe='')}")
    adopted = found["adopted"]
    jobs = "1 job" if adopted == 1 else f"{adopted} jobs"
    say(f"{jobs} taken over from {args.owner}; slurmgate status shows what runs")
    return 0


def run_reload(args: argparse.Namespace) -> int:
    """``reload``."""
    for note in _admin(args, "/admin/reload")["notes"]:
        say(note)
    say("configuration loaded")
    return 0


def run_manage(args: argparse.Namespace) -> int:
    """``enable`` and ``disable``."""
    kill = args.command == "disable" and args.kill
    _admin(args, f"/admin/management/{'kill' if kill else args.command}")
    say("management enabled" if args.command == "enable" else "management disabled")
    return 0


def run_reopen(args: argparse.Namespace) -> int:
    """``reopen-logs``: nginx reopens on SIGUSR1."""
    path = StateDir.find(args.state_dir).nginx_pid
    try:
        gate = procfs.read(int(path.read_text()))
        if gate is None or gate.comm not in GATE_PROGRAMS:  # the pid is somebody else's by now
            raise BackendAway(f"no gate runs here ({path} names no nginx)")
        os.kill(gate.pid, signal.SIGUSR1)
    except (OSError, ValueError) as error:
        raise BackendAway(f"no gate runs here ({path}: {error})") from error
    say("logs reopened")
    return 0
