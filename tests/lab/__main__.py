"""A Slurm cluster for people and for containers.

    python -m tests.lab up [--listen HOST:PORT]

starts a lab, writes and prints a services.json that uses it, and runs ``slurmgate up``; Ctrl-C
ends all. ``make lab`` does this.

    python -m tests.lab serve FOLDER [--login ADDRESS] [--node NAME=ADDRESS]... [--role ROLE]...
                              [--listen ADDRESS] [--ssh-port N] [--control-port N] [--home DIR]
                              [--secret TEXT] [--authorized-key FILE]

runs a cluster in the foreground until SIGTERM: in a container image, which needs Debian's
slurmctld, slurmd, slurm-client, munge, openssh-server and python3, and of this repository
tests/lab and tests/waiting.py. It prints ``host-key LINE`` (the login host's, for known_hosts),
then ``ready`` once every node is idle (a node: once its daemons answer).

Everything in one container:

    python3 -m tests.lab serve /lab --login "$(hostname -i)" --authorized-key /keys/id.pub

A container for each host, all with the same arguments but for the role, on one network where the
names resolve, with the home directory and nothing else shared:

    python3 -m tests.lab serve /lab --secret S --home /shared --login login \\
        --node n1=node1 --node n2=node2 --authorized-key /keys/id.pub --role login
    (the same with --role n1 and with --role n2)

FOLDER is made and removed; it must have the same path everywhere. ssh logins are for the user that
runs it, and its home directory is ``--home`` (FOLDER/home). Ports: ssh as given (22), slurmctld
as --control-port says (6817), slurmd the ones after that, and an sshd on port 22 of each node that
has a container of its own.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from tests.lab.lab import ROOT, Lab, LabError
from tests.lab.place import Place

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> None:
    """Run one of the two commands; exit code 1 with a text when the lab does not start."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description="a Slurm cluster")
    commands = parser.add_subparsers(required=True)
    up = commands.add_parser("up", help="a lab and slurmgate on this machine")
    up.add_argument("--listen", default="127.0.0.1:8080", metavar="HOST:PORT")
    up.set_defaults(command=run_up)
    serve = commands.add_parser("serve", help="a cluster in the foreground, for containers")
    serve.add_argument("folder", type=Path)
    serve.add_argument("--login", default="127.0.0.1", metavar="ADDRESS")
    serve.add_argument("--node", action="append", default=[], metavar="NAME=ADDRESS")
    serve.add_argument("--role", action="append", metavar="login|NAME")
    serve.add_argument("--listen", default="0.0.0.0", metavar="ADDRESS")
    serve.add_argument("--ssh-port", type=int, default=22)
    serve.add_argument("--control-port", type=int, default=6817)
    serve.add_argument("--home", type=Path)
    serve.add_argument("--secret", default="lab")
    serve.add_argument("--authorized-key", type=Path)
    serve.set_defaults(command=run_serve)
    args = parser.parse_args()
    for number in ENDING:
        signal.signal(number, leave)
    try:
        args.command(args)
    except LabError as error:
        sys.exit(f"lab: {error}")


def leave(_number: int, _frame: FrameType | None) -> None:
    """The first signal to end ends us, cleaning up; the next ones cannot disturb that."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


# -- up ------------------------------------------------------------------------------------


def run_up(args: argparse.Namespace) -> None:
    """A lab in a temporary folder, and slurmgate on it."""
    with tempfile.TemporaryDirectory(prefix="slurmgate-lab-") as folder:
        with Lab(Path(folder) / "lab") as lab:
            config = Path(folder) / "services.json"
            config.write_text(json.dumps(services(lab), indent=2) + "\n")
            say(config.read_text())
            say(f"# The file: {config}")
            say(f"# Slurm: export SLURM_CONF={lab.slurm_conf}; squeue; sinfo")
            say(f"# Try: curl http://{args.listen}/echo/echo   Ctrl-C ends all.")
            run_slurmgate(
                *("up", "--config", str(config), "--listen", args.listen),
                *("--state-dir", str(Path(folder) / "state")),
            )


def services(lab: Lab) -> dict[str, Any]:
    """The services of config/services.json, as jobs of the lab."""
    model = ROOT / "config" / "demo" / "serve.sh"
    script = lab.script(
        "serve.sh",
        f'DEMO_HOST="$({lab.address_script})"\nexport DEMO_HOST\nexec "{model}" "$1"',
    )
    examples = json.loads((ROOT / "config" / "services.json").read_text())["Services"]
    return {
        "Services": [
            {**example, "launcher": "slurm", "bash_file": script, **lab.ssh_fields()}
            for example in examples
        ]
    }


def run_slurmgate(*args: str) -> None:
    """Run it until it ends; when we are to end, let it end first."""
    argv = [sys.executable, "-m", "slurmgate", *args]
    # A process group of its own: Ctrl-C is for us, and a second signal would hurry slurmgate.
    with subprocess.Popen(argv, process_group=0) as process:
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
    if code:
        sys.exit(code)


# -- serve ---------------------------------------------------------------------------------


def run_serve(args: argparse.Namespace) -> None:
    """The roles of a cluster that this machine plays, until SIGTERM."""
    with Lab(args.folder, place=containers(args)) as lab:
        say(f"host-key {(lab.folder / 'ssh' / 'host_login.pub').read_text().strip()}")
        say("ready")
        while True:
            signal.pause()


def containers(args: argparse.Namespace) -> Place:
    """The place that the command line describes. Without nodes: two beside the login host."""
    folder = args.folder.resolve()
    nodes = dict(node.split("=", 1) for node in args.node)
    nodes = nodes or {"n1": args.login, "n2": args.login}
    roles = frozenset(args.role or ["login", *nodes])
    alone = "login" not in roles and len(roles) == 1
    return Place(
        folder=folder,
        home=args.home or folder / "home",
        login=args.login,
        nodes=nodes,
        listen=dict.fromkeys(["login", *nodes], args.listen),
        ssh_port=args.ssh_port,
        control_port=args.control_port,
        node_ports={name: args.control_port + 1 + index for index, name in enumerate(nodes)},
        secret=args.secret,
        roles=roles,
        port_22_problem=None if alone else "the nodes share one machine",
        authorized=args.authorized_key.read_text() if args.authorized_key else "",
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
