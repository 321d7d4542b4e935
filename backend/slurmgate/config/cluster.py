"""Rules for services of the launcher ``slurm``: what sbatch and ssh would misunderstand.

The fields passed the schema; no state.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurmgate import openssh
from slurmgate.config.report import JsonPath, Report, show_value
from slurmgate.config.specs import resolve
from slurmgate.launchers.sbatch_args import Option, read_options
from slurmgate.model import SshSpec

ONLY_SSH = (
    "ssh_username",
    "ssh_key_file",
    "ssh_port",
    "ssh_known_hosts",
    "ssh_jump",
    "ssh_control_path",
)

_OTHER_CLUSTER = (
    "chooses a cluster for sbatch alone, and the job would not be found again; "
    '"remote_setup": ["export SLURM_CLUSTERS=..."] chooses it for all commands'
)
_PRINTS = "makes sbatch print something and submit nothing; leave it out"
_OTHER_USER = "the job belongs to the user who logs in; leave it out"
_REFUSED = {
    "array": "a replica is one job, not an array; leave it out",
    "clusters": _OTHER_CLUSTER,
    "cluster": _OTHER_CLUSTER,
    "gid": _OTHER_USER,
    "help": _PRINTS,
    "job-name": "Slurmgate knows its jobs by their names and gives them itself; leave it out",
    "parsable": "is passed by Slurmgate itself; leave it out",
    "quiet": "keeps sbatch from telling the id of the job; leave it out",
    "test-only": _PRINTS,
    "uid": _OTHER_USER,
    "usage": _PRINTS,
    "version": _PRINTS,
    "wait": "makes sbatch wait until the job has ended; leave it out",
    "wrap": 'the job is "bash_file"; leave it out',
}
# Read-only in a shell that may be the login host's /bin/sh: setting them ends the shell.
_READ_ONLY = frozenset({"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"})
_WHICH_CLUSTER = frozenset({"SLURM_CLUSTERS", "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"})


def check_cluster(entry: dict[str, Any], path: JsonPath, folder: Path, report: Report) -> None:
    """Check the fields of one service; those that were wrong by themselves are not there."""
    _arguments(entry.get("sbatch_args", []), (*path, "sbatch_args"), report)
    _environment(entry.get("env", {}), (*path, "env"), report)
    _bash_file(entry.get("bash_file", ""), (*path, "bash_file"), report)
    if "remote_host" in entry:
        _ssh(entry, path, folder, report)
    elif not report.has_problem((*path, "remote_host")):
        _without_host(entry, path, report)


def _arguments(words: list[str | None], path: JsonPath, report: Report) -> None:
    known = [word for word in words if word is not None]
    if len(known) < len(words):
        return  # what stands beside a wrong word is not known
    for option in read_options(known):
        for text in _argument_problems(option, known[option.index]):
            report.problem((*path, option.index), f"{show_value(known[option.index])} {text}")
    for index, word in enumerate(known):
        if word.startswith("-") and " -" in word and not report.has_problem((*path, index)):
            report.warn((*path, index), "is one argument; did you mean several elements?")


def _argument_problems(option: Option, word: str) -> Iterator[str]:
    if word == ":":
        yield "makes a job of several parts; a replica is one job"
    elif not option.name:
        yield "would be run as the script; an argument begins with '-' or follows its option"
    elif option.name in _REFUSED:
        yield _REFUSED[option.name]
    elif option.missing:
        yield "needs a value, as --option=value or in the next element"
    elif _is_joined(option, word):
        yield "is one argument; write the option and its value as two elements of the list"


def _is_joined(option: Option, word: str) -> bool:
    """Whether option and value stand in one element with a space between, as in a shell."""
    if word.startswith("--"):
        return any(mark.isspace() for mark in option.name)
    return option.value is not None and option.value[:1].isspace()


def _environment(env: dict[str, Any], path: JsonPath, report: Report) -> None:
    for name in env:
        if name.startswith("SBATCH_"):
            text = 'is read by sbatch itself; "sbatch_args" is the place for its options'
        elif name in _WHICH_CLUSTER:
            text = (
                "says which cluster is meant, for sbatch alone; it should be set for all commands: "
                f'"remote_setup": ["export {name}=..."]'
            )
        elif name in _READ_ONLY:
            text = "is read-only in the shell; leave it out"
        else:
            continue
        report.problem((*path, name), text)


def _bash_file(script: str, path: JsonPath, report: Report) -> None:
    if script.startswith("~") and script != "~" and not script.startswith("~/"):
        report.warn(path, 'only "~/" means a home directory; this is a name in the remote home')


def _ssh(entry: dict[str, Any], path: JsonPath, folder: Path, report: Report) -> None:
    if "ssh_jump" in entry:
        try:
            openssh.jump(SshSpec(host=entry["remote_host"], jump=entry["ssh_jump"]))
        except ValueError:
            report.problem(
                (*path, "ssh_jump"),
                f"{show_value(entry['ssh_jump'])} is not right; it should be one host, "
                "as [user@]host[:port]",
            )
    if "ssh_key_file" in entry:
        _key(resolve(entry["ssh_key_file"], folder), (*path, "ssh_key_file"), report)


def _key(file: Path, path: JsonPath, report: Report) -> None:
    """Warn of a key that ssh would not use; that it is missing is said elsewhere."""
    try:
        found = file.stat()
    except OSError:
        return
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISREG(found.st_mode) and mode & 0o077:
        report.warn(
            path, f"{file} is open to others (mode {mode:04o}), so ssh refuses it; chmod 600 helps"
        )


def _without_host(entry: dict[str, Any], path: JsonPath, report: Report) -> None:
    for key in ONLY_SSH:
        if key in entry:
            report.problem(
                (*path, key),
                'is of no use without "remote_host": sbatch runs on this machine then; '
                "name the login host, or leave it out",
            )
    if entry.get("tunnel") == "node-loopback":
        report.problem(
            (*path, "tunnel"),
            '"node-loopback" needs "remote_host", whose login it uses for the node; '
            'without it "auto" dials the node',
        )
