"""What Slurm's words mean: job states, the ends of jobs, reasons for waiting, ports that are taken.

Pure tables and lookups. A word that is in no table is unknown, and the caller changes nothing for
it: new versions of Slurm have new words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from slurmgate.model import Exit, Fault

_SHOWN = 300  # characters of Slurm's own text that are passed on


class Kind(StrEnum):
    """What a job state means for a replica."""

    QUEUED = "queued"  # waits for nodes, or for its nodes to boot
    HELD = "held"  # waits for a person
    RUNNING = "running"
    PAUSED = "paused"
    ENDING = "ending"  # its processes end; what comes then is not known yet
    ENDED = "ended"


_KINDS = {
    "PENDING": Kind.QUEUED,
    "CONFIGURING": Kind.QUEUED,
    "POWER_UP_NODE": Kind.QUEUED,
    "REQUEUED": Kind.QUEUED,
    "REQUEUE_FED": Kind.QUEUED,
    "EXPEDITING": Kind.QUEUED,
    "REQUEUE_HOLD": Kind.HELD,
    "RESV_DEL_HOLD": Kind.HELD,
    "SPECIAL_EXIT": Kind.HELD,
    "RUNNING": Kind.RUNNING,
    "RESIZING": Kind.RUNNING,
    "SIGNALING": Kind.RUNNING,
    "SUSPENDED": Kind.PAUSED,
    "STOPPED": Kind.PAUSED,
    "COMPLETING": Kind.ENDING,
    "STAGE_OUT": Kind.ENDING,
    "LAUNCH_FAILED": Kind.ENDING,
    "RECONFIG_FAIL": Kind.ENDING,
    "BOOT_FAIL": Kind.ENDED,
    "CANCELLED": Kind.ENDED,
    "COMPLETED": Kind.ENDED,
    "DEADLINE": Kind.ENDED,
    "FAILED": Kind.ENDED,
    "NODE_FAIL": Kind.ENDED,
    "OUT_OF_MEMORY": Kind.ENDED,
    "PREEMPTED": Kind.ENDED,
    "REVOKED": Kind.ENDED,
    "TIMEOUT": Kind.ENDED,
}


@dataclass(frozen=True, slots=True)
class _Ended:
    """``words`` is a clause with the fields job, node and exit; the fault before and after ready.

    A service that cannot even start within its limits would fail so again: its fault. Once it has
    served, a limit that was reached is nobody's fault, and the next request may start it at once.
    """

    words: str
    starting: Fault
    serving: Fault
    by_node: bool = False


_NO_OUTPUT = 53  # shown as ExitCode 0:53, and no signal at all

_ENDS = {
    "COMPLETED": _Ended("the service {exit}", Fault.SERVICE, Fault.SERVICE),
    "FAILED": _Ended("the service {exit}", Fault.SERVICE, Fault.SERVICE),
    "OUT_OF_MEMORY": _Ended("{job} ran out of memory", Fault.SERVICE, Fault.SERVICE),
    "TIMEOUT": _Ended("{job} ran into its time limit", Fault.SERVICE, Fault.NOBODY),
    "DEADLINE": _Ended("{job} could not end by its deadline", Fault.SERVICE, Fault.NOBODY),
    "CANCELLED": _Ended("{job} was cancelled", Fault.NOBODY, Fault.NOBODY),
    "PREEMPTED": _Ended("{job} was preempted by another job", Fault.NOBODY, Fault.NOBODY),
    "REVOKED": _Ended("{job} was started by another cluster", Fault.NOBODY, Fault.NOBODY),
    "NODE_FAIL": _Ended("{node} failed", Fault.NOBODY, Fault.NOBODY, by_node=True),
    "BOOT_FAIL": _Ended("{node} did not boot", Fault.NOBODY, Fault.NOBODY, by_node=True),
}


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a job ended, a clause with its subject ("job 4711 was cancelled"), and whose fault.

    ``by_node``: its node failed.
    """

    words: str
    fault: Fault
    by_node: bool = False


def kind_of(state: str) -> Kind | None:
    """Meaning of a state as squeue and scontrol print it; None: not listed, so not known."""
    return _KINDS.get(_first_word(state))


def end_of(
    state: str, *, ready: bool, job_id: str, node: str | None = None, exit: Exit | None = None
) -> Ended | None:
    """Say how a job in an ended state came to it; None when the state is no end.

    ``ready``: whether the replica had answered a health check. ``exit``: code and signal of the
    job script, where they are known.
    """
    how = _ENDS.get(_first_word(state))
    if how is None:
        return None
    words = how.words.format(
        job=f"job {job_id}",
        node="its node" if node is None else f"node {node}",
        exit=_exit_words(state, exit),
    )
    return Ended(words, how.serving if ready else how.starting, how.by_node)


def _exit_words(state: str, exit: Exit | None) -> str:
    if exit is None or (exit.code is None and exit.signal is None):
        return "exited with code 0" if _first_word(state) == "COMPLETED" else "failed"
    if _first_word(state) == "FAILED" and exit.code == 0 and exit.signal is None:
        return "could not be run"  # Slurm failed it before its first line
    if exit.signal == _NO_OUTPUT:
        return (
            "could not be run: Slurm could not open its output file on the node, or enter its"
            " directory; are they on a file system that the node has?"
        )
    return exit.describe()


def _first_word(state: str) -> str:
    """``CANCELLED by 1000`` and ``CANCELLED+`` are CANCELLED."""
    return re.split(r"[\s+,]", state.strip(), maxsplit=1)[0].upper()


_FOREVER = {
    "AccountNotAllowed": "the account may not use this partition",
    "AssocMaxWallDurationPerJobLimit": "the time limit is above that of the account",
    "BadConstraints": "no node has the features and resources asked for",
    "DeadLine": "it cannot end by its deadline",
    "DependencyNeverSatisfied": "what it depends on will never come about",
    "InvalidAccount": "the account is not valid",
    "InvalidQOS": "the QOS is not valid",
    "JobHeldAdmin": "an administrator holds the job",
    "JobHeldUser": "the job is held; scontrol release lets it go",
    "JobHoldMaxRequeue": "it was requeued too often and is held",
    "MaxMemPerLimit": "it asks for more memory than is allowed",
    "PartitionNodeLimit": "the number of nodes is outside the limits of the partition",
    "PartitionTimeLimit": "the time limit is above that of the partition",
    "QOSMaxWallDurationPerJobLimit": "the time limit is above that of the QOS",
    "QOSNotAllowed": "the QOS may not be used here",
    "ReservationDeleted": "its reservation was deleted",
}
_FOR_NOW = {
    "AssociationJobLimit": "the account has as many jobs as it may",
    "AssociationResourceLimit": "the account uses as much as it may",
    "AssociationTimeLimit": "the account has used the time it may",
    "BeginTime": "its earliest start time is still to come",
    "BurstBufferOperation": "its burst buffer is not ready",
    "BurstBufferResources": "it waits for burst buffer space",
    "BurstBufferStageIn": "its data is copied in",
    "Cleaning": "its last run is still cleaned up",
    "Dependency": "it waits for another job",
    "FrontEndDown": "no front end is up",
    "JobArrayTaskLimit": "its array runs as many tasks as it may",
    "JobLaunchFailure": "it could not be launched and is tried again",
    "Licenses": "it waits for a licence",
    "NodeDown": "a node it needs is down",
    "PartitionConfig": "the partition does not have what it asks for now",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is not active",
    "Priority": "jobs with a higher priority are first",
    "Prolog": "its node is prepared",
    "QOSJobLimit": "the QOS has as many jobs as it may",
    "QOSResourceLimit": "the QOS uses as much as it may",
    "QOSTimeLimit": "the QOS has used the time it may",
    "QOSUsageThreshold": "the account has used too much for this QOS lately",
    "ReqNodeNotAvail": "a node it needs is down, drained or reserved",
    "Reservation": "its reservation has not begun",
    "Resources": "it waits for nodes to become free",
    "SchedDefer": "it is looked at in the next round of the scheduler",
    "SystemFailure": "Slurm had a failure and tries again",
    "WaitingForScheduling": "the scheduler has not looked at it yet",
}
# Limits on what one job asks for, so that no other job's end can help, and on what many jobs use.
_PER_JOB = re.compile(r"(?:Assoc|QOS)Max\w*Per(?:Job|Node)(?:Limit)?")
_MINIMUM = re.compile(r"QOSMin\w+")
_SHARED = re.compile(r"(?:Assoc|QOS)Grp\w+|(?:Assoc|QOS)?Max\w+")
_BARRED = re.compile(r"not permitted to use this partition|can't use this partition")
_NOT_LAUNCHED = re.compile(r"launch[ _]failed[ _]requeued[ _]held", re.IGNORECASE)
_HELD = re.compile(r"requeued[ _]held|requeued[ _]in[ _]held", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a job waits: Slurm's word with what it means, and whether waiting cannot help.

    ``not_launched``: a node could not run it, so Slurm holds it; another job may fare better.
    """

    text: str
    forever: bool
    not_launched: bool = False


def waiting_for(reason: str | None) -> Waiting | None:
    """Explain the reason of a pending job; None when Slurm gives none yet.

    A reason that is not known is taken for one that passes.
    """
    shown = " ".join((reason or "").split())[:_SHOWN]
    if shown in ("", "None", "(null)", "N/A"):
        return None
    word = re.split(r"[,\s]", shown, maxsplit=1)[0]
    if _NOT_LAUNCHED.search(shown):
        return Waiting(f"{shown} (its node could not run it)", forever=True, not_launched=True)
    if _HELD.search(shown):
        return Waiting(f"{shown} (it is back in the queue, and held)", forever=True)
    if _BARRED.search(shown):
        return Waiting(shown, forever=True)
    if word in _FOREVER:
        return Waiting(f"{shown} ({_FOREVER[word]})", forever=True)
    if word in _FOR_NOW:
        return Waiting(f"{shown} ({_FOR_NOW[word]})", forever=False)
    if _PER_JOB.fullmatch(word):
        return Waiting(f"{shown} (it asks for more than one job may have)", forever=True)
    if _MINIMUM.fullmatch(word):
        return Waiting(f"{shown} (it asks for less than this QOS wants)", forever=True)
    if _SHARED.fullmatch(word):
        return Waiting(f"{shown} (running jobs use as much as is allowed)", forever=False)
    return Waiting(shown, forever=False)
