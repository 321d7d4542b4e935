"""How often the jobs of a login host are listed, whatever the number of services. Pure.

About every second for 5 s after something was asked of Slurm, every 2 s until 30 s, then a
twentieth of the time that it takes, at most 30 s; 15 s at rest. A job that runs and is connected is
at rest unless connections to it are refused: then it still loads, or has ended. One that is
suspended is looked at more often, so that it serves again soon after it goes on.
"""

from __future__ import annotations

from slurmgate.launchers.job import Job, Stage
from slurmgate.launchers.jobs import GONE_APART, UNSENT_APART

REST = 15.0
SOON = 0.5


def due(job: Job, last: float, jitter: float) -> float:
    """Say when the next listing is due for the sake of this job; ``last`` is when one began."""
    since = job.cancelled_at if job.stopping and job.job_id is not None else job.waiting_since
    if job.stage is Stage.RUNNING and not job.stopping:
        since = last
    return max(last, since) + _pause(job, last) * jitter


def _pause(job: Job, last: float) -> float:
    """Give the seconds that lie between a listing and the next."""
    if job.absent_since is not None:
        return UNSENT_APART if job.job_id is None else GONE_APART
    since = job.waiting_since
    if job.stopping:
        since = job.waiting_since if job.job_id is None else job.cancelled_at
    elif job.completing_since is not None:
        since = job.completing_since
    elif job.suspended_since is not None:
        return min(REST, _growing(last - job.suspended_since))
    elif job.stage is Stage.RUNNING and job.endpoint is not None:
        if job.doubted_at > last:
            return min(REST, _growing(job.doubted_at - job.doubted_since))
        return REST if last - since >= 5.0 else 1.0
    elif job.running_at is not None:
        since = job.running_at
    return _growing(last - since)


def _growing(age: float) -> float:
    """Many jobs start, or end, in the first second: there is one more listing in its middle."""
    if age < 0.7:
        return SOON
    if age < 5.0:
        return 1.0
    return 2.0 if age < 30.0 else min(30.0, max(2.0, age / 20.0))
