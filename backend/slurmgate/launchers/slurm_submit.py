"""The submission of a job: the shell text that asks sbatch, and what its answer means.

Pure. The environment of a job: everything the login host's shell exports, the ``env`` of the
service, and SLURMGATE_PORT, _SERVICE, _REPLICA and, where its service demands one, _API_KEY. Where
the arguments or the script say ``--export=NONE`` (or a list), the names of ``env`` and ours are put
in that list instead, so that only they come from the submitting side. Their values are taken from
the environment and never stand in an argument, so they may hold anything.

Variables of the login host that would make another submission out of this one are unset: SLURM_*
(Slurmgate may itself run in a job) and SBATCH_*, except those that name the cluster and the
defaults people set for account, partition, QOS, reservation and time limit.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from slurmgate import upstream_keys
from slurmgate.launchers import avoiding, sbatch_args
from slurmgate.launchers.slurm_refusals import MARK, Refusal, refusal
from slurmgate.model import ServiceSpec

__all__ = [
    "NotInstalled",
    "Refusal",
    "Submitted",
    "clean_environment",
    "job_id",
    "read_submission",
    "refusal",
    "script_path",
    "submit_script",
    "trial_script",
]

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
sg_sbatch=$(command -v sbatch) || {{ echo "sbatch: command not found" >&2; exit 127; }}
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
sg_wrong=$(printf '%s\n' "$sg_lines" | grep -Eo \
  '(^|[[:space:]])(--(array|wait|clusters?|test-only)([=[:space:]]|$)|-[aMW]|(het|pack)job)' |
  head -n 1 | tr -d '=[:space:]')
if [ -n "$sg_wrong" ]; then
  echo "{mark} bash_file $sg_script has #SBATCH $sg_wrong: Slurmgate needs one ordinary" \
    "job of the host's own cluster; take it out" >&2
  exit 1
fi
"""

_OWN_OUTPUT = r"""sg_output=
if ! printf '%s\n' "$sg_lines" |
  grep -Eq '(^|[[:space:]])(--out(p|pu|put)?([=[:space:]]|$)|-o)'; then
  if (umask 077; mkdir -p "$HOME/.slurmgate/logs"); then
    sg_output="--output=$HOME/.slurmgate/logs/slurmgate-%j.log"
    find "$HOME/.slurmgate/logs" -maxdepth 1 -type f -name 'slurmgate-*.log' -mtime +30 \
      -exec rm -f {} + 2>/dev/null
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


def submit_script(
    spec: ServiceSpec,
    name: str,
    replica: str,
    port: int,
    avoid: Sequence[str] = (),
    api_key: str | None = None,
) -> str:
    """Shell text that submits one job; what it prints is for ``read_submission``.

    ``name`` is the job name of this replica. The script is looked at where it is: without an
    output file of its own or in ``sbatch_args`` the job writes to ``~/.slurmgate/logs``, where
    files that nothing was written to for 30 days are removed. Nodes in ``avoid`` are excluded
    beside those that the user excludes.
    """
    variables = [
        *spec.env,
        ("SLURMGATE_PORT", str(port)),
        ("SLURMGATE_SERVICE", spec.name),
        ("SLURMGATE_REPLICA", replica),
    ]
    if api_key is not None:
        variables.append((upstream_keys.VARIABLE, api_key))
    given_export = sbatch_args.last_value(spec.sbatch_args, "export")
    has_output = sbatch_args.last_value(spec.sbatch_args, "output") is not None
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables)
    # Ours come last: of an option given twice, sbatch takes the last.
    own = [*spec.sbatch_args, "--parsable", f"--job-name={name}"]
    return "".join(
        (
            _CLEAN,
            _FIND.format(script=script_path(spec.bash_file), mark=MARK),
            _DIRECTIVES.format(mark=MARK),
            "sg_output=\n" if has_output else _OWN_OUTPUT,
            _OWN_EXPORT if given_export is None else f"sg_export={shlex.quote(given_export)}\n",
            _EXPORT.format(names=",".join(name for name, _ in variables)),
            avoiding.text(spec.sbatch_args, port, avoid),
            f'set -- "$sg_sbatch" {shlex.join(own)} "--export=$sg_export" '
            '${sg_exclude:+"--exclude=$sg_exclude"} '
            f'${{sg_output:+"$sg_output"}} "$sg_script" {port}\n',
            # The shell must not print these, nor pass on a key that is not of this replica.
            f"{{ set +xv; }} 2>/dev/null\nunset {upstream_keys.VARIABLE}\n",
            # From here on nothing but "$@" is read: these may be called anything, PATH as well.
            exports,
            '"$@"\n',
        )
    )


def trial_script(spec: ServiceSpec, *, real: bool = True) -> str:
    """Shell text that asks Slurm whether it would take the job, and submits nothing.

    ``real``: with the script of the service; else with an empty one, to see about the arguments
    alone. What it prints to standard error is for ``refusal``; to standard output goes what the
    script's ``#SBATCH`` lines say.
    """
    # First of all the arguments, where none of the others can take it for a value.
    asked = shlex.join(["sbatch", "--test-only", *spec.sbatch_args, "--job-name=slurmgate-check"])
    if not real:
        return f"{_CLEAN}cd\nprintf '#!/bin/sh\\n' | {asked}\n"
    return (
        _CLEAN
        + _FIND.format(script=script_path(spec.bash_file), mark=MARK)
        + _DIRECTIVES.format(mark=MARK)
        + f'printf "%s\\n" "$sg_lines"\n{asked} "$sg_script" 1\n'
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
