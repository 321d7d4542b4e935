"""What is said to Slurm about jobs that exist, and what its answers mean; names of jobs.

Pure: scripts are shell text for the login host's /bin/sh, every value quoted; answers are parsed
from text. ``slurm_submit`` has the submission, ``slurm_states`` the meaning of states and reasons.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from slurmgate.launchers.slurm_refusals import is_silence
from slurmgate.launchers.slurm_submit import clean_environment
from slurmgate.model import Exit

_MARK = "--slurmgate--"
_SHOWN = 1000
_TAIL_BYTES = 256 * 1024
_NOTHING = frozenset({"", "(null)", "N/A", "n/a", "None", "Unknown", "UNKNOWN", "INVALID"})

_NAME = re.compile(
    r"sg\.(?P<instance>[a-z0-9-]{1,32})\.(?P<owner>[a-z0-9]{1,32})\.(?P<replica>[A-Za-z0-9_-]+)"
    r"\.(?P<port>[1-9][0-9]{0,4})\.(?P<start_hash>[0-9a-f]+)\.(?P<route>[A-Za-z0-9._-]+)"
)


@dataclass(frozen=True, slots=True)
class JobName:
    """The name of a job of ours: ``sg.INSTANCE.OWNER.REPLICA.PORT.HASH.ROUTE``.

    Only the route may contain dots.
    """

    instance: str
    owner: str
    replica: str
    port: int
    start_hash: str
    route: str

    def __str__(self) -> str:
        head = f"sg.{self.instance}.{self.owner}.{self.replica}"
        return f"{head}.{self.port}.{self.start_hash}.{self.route}"

    @classmethod
    def parse(cls, text: str) -> JobName | None:
        """Read a job name; None when it is none of Slurmgate's."""
        match = _NAME.fullmatch(text)
        if match is None or int(match["port"]) > 65535:
            return None
        return cls(
            instance=match["instance"],
            owner=match["owner"],
            replica=match["replica"],
            port=int(match["port"]),
            start_hash=match["start_hash"],
            route=match["route"],
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One job of a listing. Times are seconds of the login host's clock since the epoch."""

    job_id: str
    state: str
    reason: str | None
    batch_host: str | None
    nodes: str | None
    starts_at: int | None
    ends_at: int | None
    left: int | None
    name: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The user's jobs, and how many lines were not understood."""

    rows: tuple[Row, ...]
    dropped: int


def list_script() -> str:
    """Shell text that lists all jobs of the user, each a line for ``parse_listing``."""
    # The number, not the name: names of some sites contain spaces and backslashes.
    return clean_environment() + (
        'SLURM_TIME_FORMAT=%s squeue --noheader --states=all --user "$(id -u)" '
        "-o '%i|%T|%r|%B|%N|%S|%e|%L|%j'\n"
    )


def parse_listing(text: str) -> Listing:
    """Read a listing; a line that is none (a message, half a name) is left out and counted."""
    lines = [line for line in text.split("\n") if line.strip()]
    rows = [row for row in map(_row, lines) if row is not None]
    return Listing(tuple(rows), len(lines) - len(rows))


def _row(line: str) -> Row | None:
    fields = line.split("|", 8)
    if len(fields) != 9 or not re.match(r"[0-9]+(?:[_+]|$)", fields[0]) or not fields[1].strip():
        return None
    job_id, state, reason, batch_host, nodes, start, end, left, name = fields
    return Row(
        job_id=job_id,
        state=state.strip(),
        reason=_given(reason),
        batch_host=_given(batch_host),
        nodes=_given(nodes),
        starts_at=_epoch(start),
        ends_at=_epoch(end),
        left=duration(left),
        name=name,
    )


def _given(text: str) -> str | None:
    text = text.strip()[:_SHOWN]
    return None if text in _NOTHING else text


def _epoch(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[1-9][0-9]{0,11}", text.strip(), re.ASCII) else None


_DURATION = re.compile(r"(?:([0-9]+)-)?(?:([0-9]+):)?([0-9]+):([0-9]+)", re.ASCII)


def duration(text: str) -> int | None:
    """Seconds of ``D-HH:MM:SS``, ``HH:MM:SS`` or ``MM:SS``; None for words such as UNLIMITED."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def cancel_script(name: str, job_id: str) -> str:
    """Shell text that cancels the job only if both its name and its id are these."""
    return clean_environment() + shlex.join(["scancel", f"--name={name}", job_id]) + "\n"


@dataclass(frozen=True, slots=True)
class Detail:
    """What scontrol knows of a job, and the last lines it printed.

    ``gone``: Slurm does not know the job, or no more; all else is empty then. ``exit`` is that of
    the job script, ``derived`` the highest of its steps.
    """

    gone: bool = False
    name: str | None = None
    state: str | None = None
    reason: str | None = None
    exit: Exit | None = None
    derived: Exit | None = None
    output: str | None = None
    time_limit: int | None = None
    nodes: str | None = None
    batch_host: str | None = None
    lines: tuple[str, ...] = ()


# Older versions leave %N (short host name), %n and %t (both 0 for a batch script) in the path.
_DETAIL = r"""sg_text=$(scontrol show job -o {job} 2>&1)
sg_code=$?
printf '%s\n' "$sg_text"
echo "{mark} $sg_code"
[ "$sg_code" -eq 0 ] || exit 0
sg_host=$(printf '%s\n' "$sg_text" | sed -n '1s/.* BatchHost=\([^ .]*\).*/\1/p')
sg_file=$(printf '%s\n' "$sg_text" | sed -n \
  -e '1s/.* StdOut=//' -e '1s/ [A-Z][A-Za-z:_]*=.*//' -e '1p' |
  sed -e "s/%N/$sg_host/g" -e 's/%[nt]/0/g')
"""
_TAIL = r"""if [ -f "$sg_file" ]; then
  tail -n {lines} -- "$sg_file" | tail -c {most}
fi
"""


def detail_script(job_id: str, lines: int) -> str:
    """Shell text that shows one job and the end of its output, for ``parse_detail``."""
    return (
        clean_environment()
        + _DETAIL.format(job=shlex.quote(job_id), mark=_MARK)
        + _TAIL.format(lines=int(lines), most=_TAIL_BYTES)
    )


# What Slurm writes to a node on which it could not launch a job: it drains the node as well.
_UNFIT = r"""SLURM_TIME_FORMAT=%s scontrol show job -o {job} 2>&1
echo "{mark} $?"
SLURM_TIME_FORMAT=%s sinfo --noheader --Node --list-reasons -o '%N|%H|%E' |
  grep -E '\|(Prolog error|batch job complete failure)'
"""


def unfit_script(job_id: str) -> str:
    """Shell text that asks where a job could not be launched, for ``parse_unfit``."""
    return clean_environment() + _UNFIT.format(job=shlex.quote(job_id), mark=_MARK)


def parse_unfit(name: str, text: str) -> str | None:
    """Name the node on which the job of this name could not be launched.

    The job has forgotten it; it is the one that failed first since Slurm last chose nodes for the
    job. None when Slurm does not say.
    """
    shown, code, rest = _section(text)
    line = shown.split("\n", 1)[0] if code == 0 else ""
    chosen = _epoch(_field(line, "LastSchedEval") or "")
    if chosen is None or _field(line, "JobName") != name:
        return None
    failed = []
    for fields in (row.split("|", 2) for row in rest.split("\n")):
        at = _epoch(fields[1]) if len(fields) == 3 else None
        if at is not None and at >= chosen:
            failed.append((at, fields[0].strip()))
    return min(failed)[1] if failed else None


def tail_script(path: str, lines: int) -> str:
    """Shell text that prints the end of a file; nothing when there is none."""
    return f"sg_file={shlex.quote(path)}\n" + _TAIL.format(lines=int(lines), most=_TAIL_BYTES)


def parse_detail(text: str) -> Detail | None:
    """Read what ``detail_script`` printed; None: Slurm gave no answer, nothing is known."""
    shown, code, rest = _section(text)
    if code is None:
        return None
    if code != 0:
        return Detail(gone=True) if "Invalid job id specified" in shown else None
    line = shown.split("\n", 1)[0]
    return Detail(
        name=_field(line, "JobName"),
        state=_field(line, "JobState"),
        reason=_field(line, "Reason"),
        exit=_exit(_field(line, "ExitCode")),
        derived=_exit(_field(line, "DerivedExitCode")),
        output=_field(line, "StdOut"),
        time_limit=duration(_field(line, "TimeLimit") or ""),
        nodes=_field(line, "NodeList"),
        batch_host=_field(line, "BatchHost"),
        lines=tuple(rest.removesuffix("\n").split("\n")) if rest else (),
    )


def _section(text: str) -> tuple[str, int | None, str]:
    """What stands before the first mark, the exit code on it, what stands behind."""
    match = re.search(rf"^{_MARK} ([0-9]+)\n", text, re.MULTILINE)
    if match is None:
        return text, None, ""
    return text[: match.start()], int(match[1]), text[match.end() :]


def _field(line: str, name: str) -> str | None:
    """Value of a field of ``scontrol -o``; it ends where the next ``Name=`` begins."""
    match = re.search(rf"(?:^| ){name}=(.*?)(?= [A-Z][A-Za-z:_/]*=|$)", line)
    return None if match is None else _given(match[1])


def _exit(text: str | None) -> Exit | None:
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text or "", re.ASCII)
    if match is None:
        return None
    return Exit(int(match[1]), int(match[2]) or None)


@dataclass(frozen=True, slots=True)
class NodePlace:
    """How the login host reaches a node; ``address`` None: Slurm does not say, use the name.

    ``is_login_host``: the node is the login host itself. ``uid``: the user there.
    """

    address: str | None
    is_login_host: bool
    uid: int | None


def node_script(node: str) -> str:
    """Shell text that asks where a node is and what the login host is called itself."""
    return clean_environment() + (
        f"scontrol show node {shlex.quote(node)} -o 2>&1\n"
        f'echo "{_MARK} $?"\n'
        "id -u\nhostname\nhostname -s\nhostname -I\n"
    )


def parse_node(node: str, text: str) -> NodePlace | None:
    """Read what ``node_script`` printed; None when it did not come to its end, or Slurm did not
    answer: a name instead of the address would be a guess then.
    """
    shown, code, rest = _section(text)
    line = shown.split("\n", 1)[0] if code == 0 else ""
    if code is None or (is_silence(shown) if code else _field(line, "NodeName") is None):
        return None
    lines = [line.strip() for line in rest.split("\n")]
    uid = int(lines[0]) if lines[0].isascii() and lines[0].isdecimal() else None
    own = {word.lower() for line in lines[1:] for word in line.split()} - {"localhost"}
    address = _address(line)
    host = _field(line, "NodeHostName") or node
    if address is not None and re.match(r"127\.|::1$|localhost$", address):
        # A cluster on one machine: its nodes may have loopback addresses of their own.
        return NodePlace(address, address in ("127.0.0.1", "::1", "localhost"), uid)
    named = {host.lower(), (address or node).lower()}
    return NodePlace(address, bool(named & own), uid)


def _address(line: str) -> str | None:
    address = _field(line, "NodeAddr")
    if address is None or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:%-]*", address):
        return None
    return address
