"""When sbatch says no: the texts by which a refusal is known, and its reason in Slurm's words.

Pure. A text that is not listed is no refusal: the job may exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MARK = "slurmgate-refusal:"
"""Begins the lines with which our own part of the script refuses, before sbatch is asked."""

_SHOWN = 1000


@dataclass(frozen=True, slots=True)
class Refusal:
    """There is no job, and why, in Slurm's words; ``for_good``: trying again cannot help.

    ``is_ours``: our part of the script found ``bash_file`` wrong and did not ask sbatch.
    """

    reason: str
    for_good: bool
    is_ours: bool = False


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
    "is not a valid",
    "is not valid.",
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
# Said of a controller that did not answer in time, or broke off: the job may exist all the same.
_SILENT = (
    "timed out",
    "unable to contact",
    "zero bytes were transmitted",
    "connection refused",
    "connection reset",
    "communication connection failure",
    "communication shutdown failure",
)
_ERROR_LINE = re.compile(r"(?:(?:\S*/)?sbatch: (?:error: |fatal: )?|allocation failure: )(.*)")
_FAILED = "Batch job submission failed: "


def refusal(text: str) -> Refusal | None:
    """Recognise a refusal in what sbatch, or our own part of the script, complained about.

    Only known texts are refusals. Everything else is None: unknown, the job may exist.
    """
    errors = []
    for line in text.splitlines():
        if line.startswith(MARK):
            return Refusal(line.removeprefix(MARK).strip()[:_SHOWN], for_good=True, is_ours=True)
        match = _ERROR_LINE.fullmatch(line.strip())
        if match:
            errors.append(match[1])
    # What the controller answered counts alone; without it, sbatch itself gave up before it asked.
    answers = [line for line in errors if line.startswith(_FAILED)]
    folded = "\n".join(answers or errors).lower()
    if is_silence("\n".join(errors)):
        return None
    if _mentions(folded, _FOR_GOOD):
        return Refusal(_reason(errors), for_good=True)
    if _mentions(folded, _FOR_NOW):
        return Refusal(_reason(errors), for_good=False)
    return None


def is_silence(text: str) -> bool:
    """Whether Slurm's controller did not answer: nothing is known then, and it will pass."""
    return _mentions(text.lower(), _SILENT)


def _mentions(folded: str, texts: Iterable[str]) -> bool:
    return any(text in folded for text in texts)


def _reason(errors: Iterable[str]) -> str:
    """The lines of sbatch without their prefixes, each once, bounded."""
    said = (line.removeprefix(_FAILED).strip() for line in errors)
    return "; ".join(dict.fromkeys(line for line in said if line))[:_SHOWN]
