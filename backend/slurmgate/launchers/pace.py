"""How often the jobs of a login host are listed, whatever the number of services. Pure.

Every second for 5 s after something was asked of Slurm, every 2 s until 30 s, then a twentieth of
the time that it takes, at most 30 s; 15 s at rest. A job that runs and is connected is at rest
unless connections to it are refused: then it still loads, or has ended.
"""

from __future__ import annotations

from slurmgate.launchers.job import Job, Stage
from slurmgate.launchers.jobs import GONE_APART, UNSENT_APART

REST = 15.0


def due(job: Job, last: float, now: float, jitter: float) -> float:
    """Say when the next listing is due for the sake of this job; ``last`` is when one began."""
    since = job.cancelled_at if job.stopping and job.job_id is not None else job.waiting_since
    if job.stage is Stage.RUNNING and not job.stopping:
        since = last
    return max(last, since) + _pace(job, last, now) * jitter


def _pace(job: Job, last: float, now: float) -> float:
    if job.absent_since is not None:
        return UNSENT_APART if job.job_id is None else GONE_APART
    since = job.waiting_since
    if job.stopping:
        since = job.waiting_since if job.job_id is None else job.cancelled_at
    elif job.completing_since is not None:
        since = job.completing_since
    elif job.stage is Stage.RUNNING and job.endpoint is not None:
        if job.doubted_at > last:
            return min(REST, _waiting(now - job.doubted_since))
        return REST if now - since >= 5.0 else 1.0
    elif job.running_at is not None:
        since = job.running_at
    return _waiting(now - since)


def _waiting(age: float) -> float:
    if age < 5.0:
        return 1.0
    return 2.0 if age < 30.0 else min(30.0, max(2.0, age / 20.0))
