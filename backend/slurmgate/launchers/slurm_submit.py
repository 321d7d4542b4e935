"""The submission of a job: the shell text that asks sbatch, and what its answer means.

Pure. The environment of a job: everything the login host's shell exports, the ``env`` of the
service, and SLURMGATE_PORT, _SERVICE and _REPLICA. Where the arguments or the script say
``--export=NONE`` (or a list), the names of ``env`` and ours are put in that list instead, so that
only they come from the submitting side. Their values are taken from the environment and never
stand in an argument, so they may hold anything.

Variables of the login host that would make another submission out of this one are unset: SLURM_*
(Slurmgate may itself run in a job) and SBATCH_*, except those that name the cluster and the
defaults people set for account, partition, QOS, reservation and time limit.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from slurmgate.launchers import sbatch_args
from slurmgate.model import ServiceSpec

_MARK = "slurmgate-refusal:"
_SHOWN = 1000

# Kept: what says which cluster is meant, and the defaults of a person for the job itself.
_CLEAN = r"""for sg_name in $(env |
  sed -nE 's/^((SLURM|SBATCH|SQUEUE|SCANCEL|SCONTROL)_[A-Za-z0-9_]*)=.*/\1/p'); do
  case $sg_name in
    SLURM_CONF|SLURM_CONF_SERVER|SLURM_CLUSTERS|SLURM_JWT) ;;
    SBATCH_ACCOUNT|SBATCH_PARTITION|SBATCH_QOS|SBATCH_RESERVATION|SBATCH_TIMELIMIT) ;;
    *) unset "$sg_name" ;;
  esac
done
"""

_FIND = r"""sg_script={script}
cd "$HOME" || {{ echo "{mark} the home directory $HOME cannot be entered" >&2; exit 1; }}
if ! command -v sbatch >/dev/null; then
  echo "sbatch: command not found" >&2
  exit 127
fi
if [ ! -e "$sg_script" ]; then
  echo "{mark} bash_file $sg_script does not exist on the login host" >&2
  exit 1
elif [ ! -f "$sg_script" ] || [ ! -r "$sg_script" ]; then
  echo "{mark} bash_file $sg_script is not a file that can be read" >&2
  exit 1
fi
"""

# As sbatch reads them: up to the first line that is no comment.
_DIRECTIVES = r"""sg_lines=$(sed -n \
  -e '/^[[:space:]]*$/d' -e '/^[[:space:]]*#/!q' \
  -e 's/[[:space:]]#.*//' -e 's/^#SBATCH//p' "$sg_script")
"""

_OWN_OUTPUT = r"""sg_output=
if ! printf '%s\n' "$sg_lines" |
  grep -Eq '(^|[[:space:]])(--out(p|pu|put)?([=[:space:]]|$)|-o)'; then
  if (umask 077; mkdir -p "$HOME/.slurmgate/logs"); then
    sg_output="--output=$HOME/.slurmgate/logs/slurmgate-%j.log"
  fi
fi
"""

_OWN_EXPORT = r"""sg_export=$(printf '%s\n' "$sg_lines" | sed -n \
  -e 's/.*[[:space:]]--export[=[:space:]]*"\([^"]*\)".*/\1/p;t' \
  -e "s/.*[[:space:]]--export[=[:space:]]*'\([^']*\)'.*/\1/p;t" \
  -e 's/.*[[:space:]]--export[=[:space:]]\{1,\}\([^[:space:]]*\).*/\1/p' | tail -n 1)
"""

_EXPORT = r"""sg_ours={names}
case ",$sg_export," in
  ,,|*,[Aa][Ll][Ll],*) sg_export=${{sg_export:-ALL}} ;;
  ,[Nn][Oo][Nn][Ee],|,[Nn][Ii][Ll],) sg_export=$sg_ours ;;
  *) sg_export=$sg_export,$sg_ours ;;
esac
"""


@dataclass(frozen=True, slots=True)
class Submitted:
    """Slurm took the job."""

    job_id: str
    cluster: str | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """There is no job, and why, in Slurm's words; ``for_good``: trying again cannot help."""

    reason: str
    for_good: bool


@dataclass(frozen=True, slots=True)
class NotInstalled:
    """The command is not in the search path of the login host; nothing happened."""


def clean_environment() -> str:
    """Shell text that unsets what would change the meaning of Slurm's commands."""
    return _CLEAN


def script_path(bash_file: str) -> str:
    """The path as a shell word: relative to the remote home, which ``~/`` means as well."""
    if bash_file == "~":
        return '"$HOME"'
    if bash_file.startswith("~/"):
        return '"$HOME"/' + shlex.quote(bash_file[2:].lstrip("/"))
    if bash_file.startswith("/"):
        return shlex.quote(bash_file)
    return '"$HOME"/' + shlex.quote(bash_file)


def submit_script(spec: ServiceSpec, name: str, replica: str, port: int) -> str:
    """Shell text that submits one job; what it prints is for ``read_submission``.

    ``name`` is the job name of this replica. The script is looked at where it is: without an
    output file of its own or in ``sbatch_args`` the job writes to ``~/.slurmgate/logs``.
    """
    variables = [
        *spec.env,
        ("SLURMGATE_PORT", str(port)),
        ("SLURMGATE_SERVICE", spec.name),
        ("SLURMGATE_REPLICA", replica),
    ]
    given_export = sbatch_args.last_value(spec.sbatch_args, "export")
    has_output = sbatch_args.last_value(spec.sbatch_args, "output") is not None
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables)
    # Ours come last: of an option given twice, sbatch takes the last.
    command = shlex.join(["sbatch", *spec.sbatch_args, "--parsable", f"--job-name={name}"])
    return "".join(
        (
            _CLEAN,
            _FIND.format(script=script_path(spec.bash_file), mark=_MARK),
            _DIRECTIVES,
            "sg_output=\n" if has_output else _OWN_OUTPUT,
            _OWN_EXPORT if given_export is None else f"sg_export={shlex.quote(given_export)}\n",
            _EXPORT.format(names=",".join(name for name, _ in variables)),
            exports,
            command,
            f' "--export=$sg_export" ${{sg_output:+"$sg_output"}} "$sg_script" {port}\n',
        )
    )


_PARSABLE = re.compile(r"([0-9]+)(?:;(\S+))?")
_VERBOSE = re.compile(r"Submitted batch job ([0-9]+)(?: on cluster (\S+))?")


def job_id(out: str) -> Submitted | None:
    """Find what sbatch answers on success in its output; other lines are ignored."""
    for line in reversed(out.splitlines()):
        match = _PARSABLE.fullmatch(line.strip()) or _VERBOSE.fullmatch(line.strip())
        if match:
            return Submitted(match[1], match[2])
    return None


def read_submission(code: int, out: str, err: str) -> Submitted | Refusal | NotInstalled | None:
    """Say what a submission that ran to its end led to; None: unknown, the job may exist."""
    if code == 0:
        return job_id(out)
    if code == 127 and ("not found" in err or not err.strip()):
        return NotInstalled()
    return refusal(err)


# In lower case; they may stand anywhere in an error line. Slurm's own wording, versions 17 to 25.
_FOR_GOOD = (
    "invalid account or account/partition combination specified",
    "invalid qos specification",
    "invalid partition name specified",
    "no partition specified or system default partition",
    "requested node configuration is not available",
    "requested nodes not in this partition",
    "requested time limit is invalid",
    "time limit specification required",
    "invalid feature specification",
    "invalid preferred feature specification",
    "invalid constraint",
    "memory specification can not be satisfied",
    "memory required by task is not available",
    "access/permission denied",
    "user's group not permitted to use this partition",
    "invalid user id",
    "invalid group id",
    "access denied to requested reservation",
    "requested reservation is invalid",
    "invalid generic resource (gres) specification",
    "duplicate generic resource (gres) specification",
    "invalid gres specification",
    "requested gres option unsupported",
    "invalid trackable resource (tres) specification",
    "invalid license specification",
    "invalid wckey specification",
    "invalid node name specified",
    "invalid mcs_label specified",
    "invalid job array specification",
    "invalid time-min specification",
    "invalid cluster name",
    "invalid accounting frequency requested",
    "job --batch option is invalid",
    "job dependency problem",
    "job size specification needs to be provided",
    "node count specification invalid",
    "cpu count specification invalid",
    "task count specification invalid",
    "task distribution specification invalid",
    "more processors requested than permitted",
    "requested more tasks than available processors",
    "requested operation not supported on this system",
    "multiple partition job request not supported",
    "pathname of a file, directory or other parameter too long",
    "burst buffer request invalid",
    "burst buffer permission denied",
    # What sbatch finds wrong before it asks the controller
    "unable to open file",
    "this does not look like a batch script",
    "batch script is empty",
    "batch script contains only whitespace",
    "batch script contains dos line breaks",
    "does not allow scripts that",
    "invalid directive found in batch script",
    "script arguments not permitted with --wrap",
    "unrecognized option",
    "invalid option --",
    "option requires an argument",
    "requires an argument",
    "doesn't allow an argument",
    "is ambiguous",
    "invalid numeric value",
    "invalid number of",
    "invalid --",
    "invalid time limit specification",
)
_FOR_NOW = (
    "job violates accounting/qos policy",
    "requested account has breached requested qos usage threshold",
    "unable to create job record, try again",
    "requested partition configuration not available now",
    "required partition not available",
    "required node not available",
    "requested reservation not usable now",
    "requested operation is presently disabled",
    "system submissions disabled",
    "burst buffer resource limit exceeded",
    "i/o error writing script/environment to file",
    "batch job submission failed: unspecified error",  # what a site's submit plugin returns
    "could not establish a configuration source",
    "unable to process configuration file",
)
# Said by a controller that did not answer in time, or broke off: the job may exist all the same.
_DOUBTFUL = (
    "timed out",
    "unable to contact",
    "zero bytes were transmitted",
    "connection refused",
    "connection reset",
    "communication connection failure",
    "communication shutdown failure",
)
_ERROR_LINE = re.compile(r"(?:\S*/)?sbatch: (?:error: |fatal: )?(.*)")
_FAILED = "Batch job submission failed: "


def refusal(text: str) -> Refusal | None:
    """Recognise a refusal in what sbatch, or our own part of the script, complained about.

    Only known texts are refusals. Everything else is None: unknown, the job may exist.
    """
    errors = []
    for line in text.splitlines():
        if line.startswith(_MARK):
            return Refusal(line.removeprefix(_MARK).strip()[:_SHOWN], for_good=True)
        match = _ERROR_LINE.fullmatch(line.strip())
        if match:
            errors.append(match[1])
    # What the controller answered counts alone; without it, sbatch itself gave up before it asked.
    answers = [line for line in errors if line.startswith(_FAILED)]
    folded = "\n".join(answers or errors).lower()
    if _mentions("\n".join(errors).lower(), _DOUBTFUL):
        return None
    if _mentions(folded, _FOR_GOOD):
        return Refusal(_reason(errors), for_good=True)
    if _mentions(folded, _FOR_NOW):
        return Refusal(_reason(errors), for_good=False)
    return None


def _mentions(folded: str, texts: Iterable[str]) -> bool:
    return any(text in folded for text in texts)


def _reason(errors: Iterable[str]) -> str:
    """The lines of sbatch without their prefixes, each once, bounded."""
    said = (line.removeprefix(_FAILED).strip() for line in errors)
    return "; ".join(dict.fromkeys(line for line in said if line))[:_SHOWN]
