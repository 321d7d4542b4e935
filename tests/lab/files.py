"""The files of a lab: keys, configuration, scripts. No state but what is on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.lab.place import Place

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LONGEST_FOLDER = 70  # Slurm's unix sockets below it must stay within 107 bytes
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "sshd", "ssh-keygen")
SLURM_COMMANDS = frozenset(
    "sacct sacctmgr salloc sattach sbatch sbcast scancel scontrol scrontab sdiag sh5util sinfo"
    " sprio squeue sreport srun sshare sstat strigger sview".split()
)


class LabError(Exception):
    """The lab cannot be started; the text says why, with the last log lines of a daemon."""


def find(program: str) -> str:
    """Absolute path of a program; sshd wants to be called by it."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    if path is None:
        raise LabError(f"{program} is not installed; `scripts/setup dev` installs it")
    return path


def lay_out(place: Place) -> None:
    """Make the folders and the keys."""
    if len(str(place.folder)) > LONGEST_FOLDER:
        raise LabError(f"{place.folder}: longer than {LONGEST_FOLDER} bytes, too long for sockets")
    for program in NEEDED:
        find(program)
    for name in ("munge", "slurmctld", "log", "ssh", "jobs", "bin", *place.nodes):
        (place.folder / name).mkdir(parents=True, mode=0o700, exist_ok=True)
    place.home.mkdir(parents=True, mode=0o700, exist_ok=True)
    munge_key = place.folder / "munge" / "key"
    munge_key.touch(0o600)
    munge_key.write_bytes(hashlib.sha512(place.secret.encode()).digest() * 2)
    keys = place.folder / "ssh"
    own = make_key(keys / "id_ed25519")
    (keys / "authorized_keys").write_text(f"{own}{place.authorized}\n")
    for role in ("login", *place.nodes):
        make_key(keys / f"host_{role}")
    host = (keys / "host_login.pub").read_text()
    (keys / "known_hosts").write_text(
        f"[{place.login}]:{place.ssh_port} {host}{place.login} {host}"
    )


def make_key(path: Path) -> str:
    """The public line of a key pair; made when it is not there."""
    if not path.exists():
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(path)]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, timeout=30)
    return path.with_suffix(".pub").read_text()


def write_script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def write_address_script(place: Place) -> Path:
    """A command for jobs: the address of the node that they run on."""
    cases = "\n".join(f"    {name}) echo {address} ;;" for name, address in place.nodes.items())
    return write_script(
        place.folder / "bin" / "lab-address",
        f'case "$SLURMD_NODENAME" in\n{cases}\n    *) echo {place.login} ;;\nesac',
    )


def make_bare_path(folder: Path, paths: Sequence[str] = ("/usr/bin", "/bin")) -> Path:
    """A folder with every command of the system but Slurm's."""
    if not folder.exists():
        folder.mkdir()
        for entry in (entry for path in paths for entry in Path(path).iterdir()):
            if entry.name not in SLURM_COMMANDS:
                with contextlib.suppress(FileExistsError):
                    (folder / entry.name).symlink_to(entry)
    return folder


def is_locked(user: str) -> bool:
    """Whether the account's password is locked: sshd lets such a user in through PAM only."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/etc/shadow").read_text().splitlines()
    return any(line.startswith(f"{user}:!") for line in lines)
