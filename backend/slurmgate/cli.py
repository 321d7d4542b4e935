"""The ``slurmgate`` command: its options and help; what each one does is in ``commands``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurmgate import __version__, commands, history_command, keys, keys_command, log_command
from slurmgate.errors import SlurmgateError
from slurmgate.state import default_path

EXAMPLES = """\
examples:
  slurmgate check config/services.json     find every mistake before it matters
  slurmgate up --config config/services.json --listen 127.0.0.1:8080
  slurmgate status                         what runs, who waits
  slurmgate start LLM                      wake a service before the first request
  slurmgate disable                        start nothing any more; what runs goes on
  slurmgate keys add alice                 let one more client in
"""

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


def build_parser() -> argparse.ArgumentParser:
    """Describe every command and option."""
    parser = argparse.ArgumentParser(
        prog="slurmgate",
        description="An HTTP gate that starts services when a request needs them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"slurmgate {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_servers(subparsers)
    _add_files(subparsers)
    _add_queries(subparsers)
    _add_changes(subparsers)
    _add_keys(subparsers)
    return parser


def _command(
    subparsers: Any, name: str, run: Command, text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
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


def _add_servers(subparsers: Any) -> None:
    up = _command(
        subparsers,
        "up",
        commands.run_up,
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
        subparsers,
        "backend",
        commands.run_backend,
        "run the backend alone",
        "backend --config services.json",
    )
    _takes_config(backend)
    _takes_state(backend)
    backend.add_argument("--listen", metavar="HOST:PORT", help=argparse.SUPPRESS)
    backend.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    backend.add_argument("--stop-jobs", action="store_true", help=argparse.SUPPRESS)


def _add_files(subparsers: Any) -> None:
    render = _command(
        subparsers,
        "render",
        commands.run_render,
        "write the nginx configuration to DIR",
        "render build/nginx",
    )
    render.add_argument("dir", type=Path, metavar="DIR")
    _takes_config(render)
    _takes_state(render)
    check = _command(
        subparsers, "check", commands.run_check, "validate a configuration", "check services.json"
    )
    check.add_argument("file", type=Path, nargs="?", metavar="FILE")
    check.add_argument(
        "--connect", action="store_true", help="also log in to each host and look at Slurm"
    )
    _takes_config(check)
    _takes_state(check)


def _add_queries(subparsers: Any) -> None:
    status = _command(subparsers, "status", commands.run_status, "show every service", "status")
    status.add_argument("--json", action="store_true", help="the answer of /info")
    _takes_state(status)
    logs = _command(
        subparsers,
        "logs",
        log_command.run_logs,
        "show what a service's newest replica printed",
        "logs LLM -n 50",
    )
    logs.add_argument("name", metavar="NAME")
    logs.add_argument("-n", type=_some, default=50, metavar="N", help="last lines (default 50)")
    logs.add_argument("-f", action="store_true", help="follow until Ctrl-C")
    _takes_state(logs)
    history = _command(
        subparsers,
        "history",
        history_command.run_history,
        "show the last starts: how long each took and what became of it",
        "history LLM -n 20",
    )
    history.add_argument("name", nargs="?", metavar="NAME", help="only this service's")
    history.add_argument(
        "-n",
        type=_some,
        metavar="N",
        help=f"last starts (default {history_command.SHOWN}, with --json all)",
    )
    history.add_argument("--json", action="store_true", help="a JSON array")
    _takes_state(history)


def _some(text: str) -> int:
    """A number of lines, 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} should be a number, 1 or more")
    return int(text)


def _add_changes(subparsers: Any) -> None:
    for name, text in (
        ("start", "start a service without a request to it"),
        ("stop", "stop a service; requests in flight get a minute to end"),
    ):
        parser = _command(subparsers, name, commands.run_service, text, f"{name} LLM")
        parser.add_argument("name", metavar="NAME")
        _takes_state(parser)
    adopt = _command(
        subparsers,
        "adopt",
        commands.run_adopt,
        "take over jobs of this instance that another state directory submitted",
        "adopt k3f9x2",
    )
    adopt.add_argument("owner", metavar="OWNER")
    _takes_state(adopt)
    _takes_state(
        _command(
            subparsers, "reload", commands.run_reload, "read the configuration again", "reload"
        )
    )
    _takes_state(
        _command(
            subparsers, "enable", commands.run_manage, "start services again on demand", "enable"
        )
    )
    disable = _command(
        subparsers,
        "disable",
        commands.run_manage,
        "start nothing; what runs goes on",
        "disable --kill",
    )
    disable.add_argument("--kill", action="store_true", help="also stop every replica")
    _takes_state(disable)
    _takes_state(
        _command(
            subparsers,
            "reopen-logs",
            commands.run_reopen,
            "let nginx open its logs anew, after they were rotated",
            "reopen-logs",
        )
    )


def _add_keys(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "keys",
        help="make, show and revoke the keys of clients",
        description="Make, show and revoke the keys of clients, in the configuration's keys_file.",
        epilog="example:\n  slurmgate keys add alice --services LLM --rpm 60",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = _command(
        actions,
        "add",
        keys_command.run_add,
        "make a key and print its secret, once",
        "keys add alice --services LLM,Whisper --rpm 60 --in-flight 4 --expires 2027-03-31",
    )
    add.add_argument("name", metavar="NAME", help="of the client: for logs, metrics and services")
    add.add_argument("--services", metavar="A,B", help="only for these (default: all)")
    add.add_argument("--rpm", type=_limit, default=0, metavar="N", help="requests a minute")
    add.add_argument("--in-flight", type=_limit, default=0, metavar="N", help="requests at once")
    add.add_argument(
        "--expires",
        metavar="DATE",
        help="the last day, 2027-03-31, or a time, 2027-03-31T18:00:00+02:00",
    )
    _takes_config(add)
    shown = _command(actions, "list", keys_command.run_list, "show every key", "keys list")
    shown.add_argument("--json", action="store_true", help="a JSON array")
    _takes_config(shown)
    revoke = _command(
        actions,
        "revoke",
        keys_command.run_revoke,
        "end a key; requests under way go on to their end",
        "keys revoke alice",
    )
    revoke.add_argument("name", metavar="NAME")
    _takes_config(revoke)


def _limit(text: str) -> int:
    """A number of requests, 0 for no limit."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= keys.MOST):
        raise argparse.ArgumentTypeError(
            f"{text!r} should be a number from 1 to {keys.MOST}, or 0 for no limit"
        )
    return int(text)
