"""``check --connect``: log in to each host and ask whether Slurm would take each service's job.

Nothing is submitted and nothing is changed, here or there. No state; ``check`` runs the hosts side
by side in threads of its own and prints from the caller's thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from enum import StrEnum

from slurmgate.errors import SlurmgateError
from slurmgate.launchers.logs import clean
from slurmgate.launchers.partitions import Partition, doubts, parse_partitions
from slurmgate.launchers.slurm_format import JobName, list_script, parse_listing
from slurmgate.launchers.slurm_submit import clean_environment, refusal, trial_script
from slurmgate.model import Config, LauncherKind, ServiceSpec, SshSpec
from slurmgate.ssh import HostAway, HostRefused, Output, Remotes, Unfinished

_AT_ONCE = 8
_PATIENCE = 30.0
_PARTITION = re.compile(r" in partition (\S+)")
_ASK_PARTITIONS = clean_environment() + "scontrol show partition -o\n"
_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")
_MODULE_HINT = (
    '"remote_setup" is the place for what makes them known, such as ["module load slurm"] or '
    '["export PATH=/opt/slurm/bin:$PATH"]'
)
_HINTS = (
    (
        "does not exist",
        "copy it there, or correct the path: it begins in the home there, or with /",
    ),
    ("accounting/qos policy", "squeue -u ... and your limits show what counts: ask for less"),
    (
        "account",
        "name one of your accounts with --account=...: sacctmgr show associations user=...",
    ),
    ("qos", "name one that you may use with --qos=...: sacctmgr show associations user=..."),
    ("partition", "name one that you may use with --partition=...: sinfo -s lists them"),
    ("time limit", "give a --time=... within the limit of the partition: sinfo -o '%P %l'"),
    ("gres", "name what the nodes have: sinfo -o '%P %G'"),
    ("constraint", "name features that nodes have: sinfo -o '%P %f'"),
    ("feature", "name features that nodes have: sinfo -o '%P %f'"),
    ("memory", "ask for what a node has: sinfo -o '%P %m'"),
    ("node", "ask for what the nodes have, and see whether they are up: sinfo -N -l"),
    ("option", "sbatch --help lists those of this version"),
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose jobs are ours; None: not known, because Slurmgate was not started here yet."""

    instance: str | None
    owner: str | None


class Level(StrEnum):
    """What a finding asks of the reader; only problems make the command fail."""

    OK = "ok: "
    WARNING = "warning: "
    PROBLEM = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: where in the file, and what was found there."""

    path: str
    text: str
    level: Level = Level.PROBLEM

    def __str__(self) -> str:
        return f"{self.level}{self.path}: {self.text}"


@dataclass(frozen=True, slots=True)
class _Group:
    """Services with the same login and the same shell lines before each command."""

    ssh: SshSpec | None
    setup: tuple[str, ...]
    services: tuple[tuple[int, ServiceSpec], ...]

    @property
    def path(self) -> str:
        """Where the file says which host it is; the other services are named beside it."""
        first, *others = (f"Services[{index}]" for index, _ in self.services)
        field = "" if self.ssh is None else ".remote_host"
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        return first + field + (f" (and {shown})" if others else "")

    @property
    def host(self) -> str:
        return "this machine" if self.ssh is None else self.ssh.host


def check(
    config: Config, identity: Identity, remotes: Remotes, tell: Callable[[object], None]
) -> bool:
    """Check every Slurm service; tell each finding, host by host; False when one is a problem."""
    groups = _groups(config.services)
    good = True
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        started = [pool.submit(_check_group, group, identity, remotes) for group in groups]
        for done in as_completed(started):
            for finding in done.result():
                tell(finding)
                good = good and finding.level is not Level.PROBLEM
    return good


def _groups(services: Sequence[ServiceSpec]) -> list[_Group]:
    found: dict[tuple[SshSpec | None, tuple[str, ...]], list[tuple[int, ServiceSpec]]] = {}
    for index, spec in enumerate(services):
        if spec.launcher is LauncherKind.SLURM:
            found.setdefault((spec.ssh, spec.remote_setup), []).append((index, spec))
    return [_Group(ssh, setup, tuple(members)) for (ssh, setup), members in found.items()]


class _Host:
    """Runs scripts for one group; all calls come from one thread."""

    def __init__(self, group: _Group, remotes: Remotes) -> None:
        self._group = group
        self._remotes = remotes
        self.login_shell = False

    def run(self, script: str) -> Output:
        return self._remotes.run(
            self._group.ssh,
            script,
            setup=self._group.setup,
            timeout=_PATIENCE,
            login_shell=self.login_shell,
        )


def _check_group(group: _Group, identity: Identity, remotes: Remotes) -> list[Finding]:
    """Everything about one host; it ends early where the rest would only say the same again."""
    host = _Host(group, remotes)
    findings: list[Finding] = []
    try:
        findings += _commands(group, host)
        if _all_good(findings):
            findings += _queue(group, host, identity)
        if _all_good(findings):
            partitions = parse_partitions(host.run(_ASK_PARTITIONS).out)
            for index, spec in group.services:
                findings += _service(index, spec, host, partitions)
    except (HostAway, HostRefused, Unfinished) as error:
        findings.append(Finding(group.path, _trouble(group, error)))
    return findings


def _all_good(findings: Sequence[Finding]) -> bool:
    return all(finding.level is not Level.PROBLEM for finding in findings)


def _trouble(group: _Group, error: SlurmgateError) -> str:
    said = _shown(str(error))
    match error:
        case HostRefused():
            return said
        case HostAway():
            return f"{said}; is the host up, and are its name and port right?"
        case _:
            return (
                f"{said}: {group.host} did not finish a command within {_PATIENCE:.0f} s; "
                "try it there by hand"
            )


def _ask_commands() -> str:
    asked = " ".join(_COMMANDS)
    return clean_environment() + (
        f'id -un\nfor sg_name in {asked}; do\n  if command -v "$sg_name" >/dev/null; then\n'
        '    echo "$sg_name $("$sg_name" --version 2>&1 | head -n 1)"\n  fi\ndone\n'
    )


def _commands(group: _Group, host: _Host) -> Iterator[Finding]:
    """Log in; see which of Slurm's commands there are, if need be as in a login shell."""
    user, versions = _versions(host.run(_ask_commands()))
    where = "this machine" if group.ssh is None else f"{group.host} as {user}"
    yield Finding(group.path, f"commands run on {where}", Level.OK)
    if "sbatch" not in versions:
        host.login_shell = True
        _, versions = _versions(host.run(_ask_commands()))
    missing = [name for name in _COMMANDS if name not in versions]
    if missing:
        yield Finding(
            group.path, f"{', '.join(missing)}: not found on {group.host}; {_MODULE_HINT}"
        )
        return
    how = ", found in a login shell" if host.login_shell else ""
    numbers = ", ".join(dict.fromkeys(versions.values()))
    yield Finding(group.path, f"{', '.join(_COMMANDS)}: {numbers}{how}", Level.OK)


def _versions(output: Output) -> tuple[str, dict[str, str]]:
    user, *lines = output.out.splitlines() or [""]
    found = (line.partition(" ") for line in lines)
    return _shown(user), {name: _shown(version) for name, _, version in found if name in _COMMANDS}


def _queue(group: _Group, host: _Host, identity: Identity) -> Iterator[Finding]:
    """See that the scheduler answers, and whether jobs of another Slurmgate are about."""
    output = host.run(list_script())
    if output.code != 0:
        said = _said(output)
        yield Finding(group.path, f"squeue failed: {said}; it must work there by hand first")
        return
    rows = parse_listing(output.out).rows
    yield Finding(group.path, f"squeue lists {len(rows)} jobs of yours", Level.OK)
    for row in rows:
        name = JobName.parse(row.name)
        if name is None or name.instance != identity.instance or name.owner == identity.owner:
            continue
        state = f"job {row.job_id} ({name.route}, {_shown(row.state).lower()})"
        yield Finding(
            group.path,
            f"{state} is of this instance, {name.instance}, but of another state directory: "
            f"slurmgate adopt {name.owner} takes it over, scancel {row.job_id} ends it, "
            'another "instance" keeps the two apart',
            Level.WARNING,
        )


def _service(
    index: int, spec: ServiceSpec, host: _Host, partitions: Mapping[str, Partition]
) -> Iterator[Finding]:
    """Ask about one service: its script, then whether Slurm would take the job."""
    path = f"Services[{index}]"
    output = host.run(trial_script(spec))
    if output.code == 0:
        yield from _accepted(path, spec, output, partitions)
        return
    refused = refusal(output.err)
    if refused is not None and refused.is_ours:
        said = _shown(refused.reason).removeprefix("bash_file ")
        yield Finding(f"{path}.bash_file", said + _hint(said))
        output = host.run(trial_script(spec, real=False))
        if output.code == 0:
            return
        refused = refusal(output.err)
    said = _said(output) if refused is None else _shown(refused.reason)
    if refused is not None and re.search(r"batch script|open file", said, re.IGNORECASE):
        yield Finding(f"{path}.bash_file", f"{said}; sbatch takes scripts that begin with #!")
        return
    yield Finding(f"{path}.sbatch_args", f"Slurm would refuse the job: {said}{_hint(said)}")


def _accepted(
    path: str, spec: ServiceSpec, output: Output, partitions: Mapping[str, Partition]
) -> Iterator[Finding]:
    """Slurm would take the job; whether it could ever start is another question."""
    said = _said(output)
    named = _PARTITION.search(said)
    partition = None if named is None else partitions.get(named[1])
    found = (
        [] if partition is None else doubts(partition, output.out.splitlines(), spec.sbatch_args)
    )
    for doubt in found:
        level = Level.PROBLEM if doubt.sure else Level.WARNING
        yield Finding(f"{path}.sbatch_args", f"the job may wait for ever: {doubt.text}", level)
    if not found:
        yield Finding(path, f"Slurm would take the job: {said}", Level.OK)


def _hint(said: str) -> str:
    folded = said.lower()
    return next((f"; {hint}" for word, hint in _HINTS if word in folded), "")


def _said(output: Output) -> str:
    """What a command complained about, in one line."""
    text = output.err.strip() or output.out.strip()
    if not text:
        return f"exit code {output.code} without a word"
    return "; ".join(_shown(line) for line in text.splitlines()[-3:])


def _shown(text: str) -> str:
    return clean(text.strip().encode())
