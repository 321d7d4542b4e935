"""The ``slurmgate`` command. Results go to standard output, complaints to standard error."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from slurmgate import __version__, client, procfs
from slurmgate.errors import BackendAway, SlurmgateError, StateError
from slurmgate.model import GateSpec
from slurmgate.state import StateDir, default_path, network_filesystem, safe_name

EXAMPLES = """\
examples:
  slurmgate check config/services.json     find every mistake before it matters
  slurmgate up --config config/services.json --listen 127.0.0.1:8080
  slurmgate status                         what runs, who waits
  slurmgate start LLM                      wake a service before the first request
  slurmgate disable                        start nothing any more; what runs goes on
"""

LOOK_EVERY = 0.2
GATE_PROGRAMS = ("nginx", "openresty")

Command = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 1 refused or failed, 2 wrong usage."""
    args = build_parser().parse_args(argv)
    try:
        command: Command = args.run
        return command(args)
    except SlurmgateError as error:
        sys.stderr.write(f"slurmgate: {error}\n")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def say(text: object) -> None:
    """Print one line of the result."""
    sys.stdout.write(f"{text}\n")


def build_parser() -> argparse.ArgumentParser:
    """Describe every command and option."""
    parser = argparse.ArgumentParser(
        prog="slurmgate",
        description="An HTTP gate that starts services when a request needs them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"slurmgate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_servers(commands)
    _add_files(commands)
    _add_queries(commands)
    _add_changes(commands)
    return parser


def _command(
    commands: Any, name: str, run: Command, text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  slurmgate {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _takes_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=default_path(os.environ),
        metavar="DIR",
        help="where the instance keeps its state (default: $SLURMGATE_STATE_DIR,"
        " then ~/.local/state/slurmgate)",
    )


def _takes_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        default=default_config(),
        metavar="FILE",
        help="the configuration (default: $SLURMGATE_CONFIG, then config/services.json)",
    )


def default_config() -> Path:
    """Give the configuration file of whoever names none."""
    return Path(os.environ.get("SLURMGATE_CONFIG") or "config/services.json")


def _add_servers(commands: Any) -> None:
    up = _command(
        commands,
        "up",
        run_up,
        "run backend and gate in the foreground, supervised, until SIGTERM or Ctrl-C",
        "up --config services.json --listen 127.0.0.1:8080",
    )
    _takes_config(up)
    _takes_state(up)
    up.add_argument("--listen", metavar="HOST:PORT", help="instead of gate.listen")
    up.add_argument("--user", metavar="NAME", help="as root: run as this user")
    up.add_argument(
        "--stop-jobs", action="store_true", help="cancel Slurm jobs at the end, not leave them"
    )
    backend = _command(
        commands, "backend", run_backend, "run the backend alone", "backend --config services.json"
    )
    _takes_config(backend)
    _takes_state(backend)
    backend.add_argument("--listen", metavar="HOST:PORT", help=argparse.SUPPRESS)
    backend.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    backend.add_argument("--stop-jobs", action="store_true", help=argparse.SUPPRESS)


def _add_files(commands: Any) -> None:
    render = _command(
        commands, "render", run_render, "write the nginx configuration to DIR", "render build/nginx"
    )
    render.add_argument("dir", type=Path, metavar="DIR")
    _takes_config(render)
    _takes_state(render)
    check = _command(
        commands, "check", run_check, "validate a configuration", "check services.json"
    )
    check.add_argument("file", type=Path, nargs="?", metavar="FILE")
    check.add_argument(
        "--connect", action="store_true", help="also log in to each host and look at Slurm"
    )
    _takes_config(check)
    _takes_state(check)


def _add_queries(commands: Any) -> None:
    status = _command(commands, "status", run_status, "show every service", "status")
    status.add_argument("--json", action="store_true", help="the answer of /info")
    _takes_state(status)
    logs = _command(
        commands, "logs", run_logs, "show what a service's newest replica printed", "logs LLM -n 50"
    )
    logs.add_argument("name", metavar="NAME")
    logs.add_argument("-n", type=int, default=50, metavar="N", help="last lines (default 50)")
    logs.add_argument("-f", action="store_true", help="follow until Ctrl-C")
    _takes_state(logs)


def _add_changes(commands: Any) -> None:
    for name, text in (
        ("start", "start a service without a request to it"),
        ("stop", "stop a service; requests in flight get a minute to end"),
    ):
        parser = _command(commands, name, run_service, text, f"{name} LLM")
        parser.add_argument("name", metavar="NAME")
        _takes_state(parser)
    adopt = _command(
        commands,
        "adopt",
        run_adopt,
        "take over jobs of this instance that another state directory submitted",
        "adopt k3f9x2",
    )
    adopt.add_argument("owner", metavar="OWNER")
    _takes_state(adopt)
    _takes_state(_command(commands, "reload", run_reload, "read the configuration again", "reload"))
    _takes_state(
        _command(commands, "enable", run_manage, "start services again on demand", "enable")
    )
    disable = _command(
        commands, "disable", run_manage, "start nothing; what runs goes on", "disable --kill"
    )
    disable.add_argument("--kill", action="store_true", help="also stop every replica")
    _takes_state(disable)
    _takes_state(
        _command(
            commands,
            "reopen-logs",
            run_reopen,
            "let nginx open its logs anew, after they were rotated",
            "reopen-logs",
        )
    )


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
    nginx.write(nginx.render_for(spec, state), target)
    say(target)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """``check``: one line per problem, one per warning."""
    from slurmgate import config
    from slurmgate.model import LauncherKind

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
    services = found.config.services
    slurm = [s.name for s in services if s.launcher is LauncherKind.SLURM]
    if args.connect and slurm:
        say(f"cannot connect for {', '.join(slurm)}: this version has no Slurm launcher")
        return 1
    say(f"{path}: {len(services)} services, no errors")
    return 0


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
        replicas = [f"{r['id']} {r['state']}" for r in service["replicas"]]
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
    if not info["management_enabled"]:
        lines.append("management is disabled: nothing is started (slurmgate enable)")
    if info["config"]["error"]:
        lines.append(f"configuration refused:\n{info['config']['error']}")
    return "\n".join(lines)


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
    _admin(args, f"/admin/adopt/{quote(args.owner, safe='')}")
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


def run_logs(args: argparse.Namespace) -> int:
    """``logs``: with ``-f`` also those of replicas that are started later."""
    state = StateDir.find(args.state_dir)
    name, known = _service_of(state, args.name)
    folder = state.logs / safe_name(name)
    seen = _logs(folder)
    if not seen:
        if known:
            raise StateError(f"{name} has no logs yet: it was never started")
        raise StateError(
            f"no service {args.name}, or it has no logs yet; slurmgate status lists the services"
        )
    newest = seen[-1]
    with newest.open("rb") as file:
        lines = file.read().splitlines(keepends=True)
        _show(b"".join(lines[-args.n :] if args.n > 0 else []))
        if args.f:
            _follow(file, folder, set(seen))
    return 0


def _service_of(state: StateDir, name: str) -> tuple[str, bool]:
    """Give the name of a service named by name or route, and whether the backend knows it."""
    try:
        return str(client.call(state, "GET", f"/info/{quote(name, safe='')}")["name"]), True
    except SlurmgateError:  # nothing runs, or the service is no longer configured
        return name, False


def _logs(folder: Path) -> list[Path]:
    """List the logs of a service, the one last written to last."""

    def written(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except FileNotFoundError:  # a start of the service removed it
            return 0.0

    return sorted(folder.glob("*.log"), key=written)


def _follow(file: BinaryIO, folder: Path, seen: set[Path]) -> None:
    """Show what is added, then the logs of newer replicas; until Ctrl-C."""
    with contextlib.ExitStack() as stack:
        while True:
            fresh = [path for path in _logs(folder) if path not in seen]
            _show(file.read())  # after the look for newer ones: this one may just have ended
            for path in fresh:
                seen.add(path)
                sys.stderr.write(f"slurmgate: replica {path.stem}\n")
                stack.close()
                file = stack.enter_context(path.open("rb"))
                _show(file.read())
            time.sleep(LOOK_EVERY)


def _show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()
