"""What becomes of one replica's Slurm job: a value and an event in, a new value and effects out.

Pure; time is an argument. ``site`` owns the values, feeds in what Slurm and SSH said, saves what
must survive before it does what the effects say.

Three rules stand behind all of it. A job exists from the moment its submission was sent until Slurm
itself says that it does not. What nobody knows changes nothing. Of two live jobs of one name the
older one stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from slurmgate.launchers.job import (
    LIVE,
    Answer,
    Cancel,
    Connect,
    Disconnect,
    Effect,
    FindNode,
    Finish,
    GiveUp,
    Inquire,
    Job,
    Row,
    Stage,
    Standing,
    Step,
    Submit,
    age_of,
)
from slurmgate.model import End, Fault

MAX_SUBMISSIONS = 3
RESUBMIT_PAUSES = (0.0, 2.0, 10.0, 30.0)
GONE_APART = 5.0  # two good listings this far apart that lack a job: it is gone
UNSENT_APART = 2.0  # the same of one that perhaps was never submitted
CANCEL_AGAIN = 2.0
DOUBT_FORGOTTEN = 30.0
SAME_START = 1.0  # a start time that moved by more than this is another start


# -- the submission --------------------------------------------------------------------------


def accepted(job: Job, job_id: str, now: float) -> Step:
    """``sbatch`` gave an id."""
    if job.stage is Stage.ENDED:
        return job, (Cancel(job_id),)
    if job.job_id is not None and job.job_id != job_id:  # a listing showed an earlier submission
        kept, other = sorted((job.job_id, job_id), key=age_of)
        if kept == job.job_id:
            return job, (Cancel(other),)
        moved, effects = _confirmed(replace(job, job_id=None), kept, now)
        return moved, (Cancel(other), *effects)
    if job.job_id == job_id:
        return replace(job, known_since=min(job.known_since, now)), ()
    return _confirmed(job, job_id, now)


def unanswered(job: Job, overdue_at: float, reason: str, *, refused: bool = False) -> Job:
    """Nobody knows whether the submission reached Slurm; ``refused``: ``sbatch`` itself failed."""
    if job.stage is not Stage.SENDING:
        return job
    return replace(
        job,
        stage=Stage.UNSURE,
        overdue_at=overdue_at,
        resubmit_at=overdue_at + RESUBMIT_PAUSES[min(job.submissions, MAX_SUBMISSIONS)],
        refused=refused,
        absent_since=None,
        reason=reason,
    )


def unsent(job: Job, now: float, reason: str) -> Job:
    """The submission was not sent at all, so it does not count."""
    if job.stage is not Stage.SENDING:
        return job
    return replace(unanswered(job, now, reason), submissions=job.submissions - 1, resubmit_at=now)


def refused(job: Job, words: str) -> Step:
    """Slurm refused to take it again, in words it is known by."""
    if job.stage is not Stage.SENDING:
        return job, ()
    fault = Fault.NOBODY if job.stopping else Fault.SERVICE
    return _finished(job, End(words, fault, "cannot-start"))


def _confirmed(job: Job, job_id: str, now: float) -> Step:
    job = replace(
        job,
        stage=Stage.QUEUED,
        job_id=job_id,
        known_since=now,
        absent_since=None,
        was_at=None,
        unlaunched=None,
        unseen=False,
        reason=None,
    )
    return _cancelled(job, now) if job.stopping else (job, ())


# -- the wish to end it ----------------------------------------------------------------------


def stopped(job: Job, now: float) -> Step:
    """Nobody wants it any more. One whose submission is in doubt is waited for."""
    if job.stage is Stage.ENDED:
        return job, ()
    effects: tuple[Effect, ...] = () if job.gen == 0 else (Disconnect(job.gen),)
    job = replace(job, stopping=True, endpoint=None)
    if job.job_id is None:
        return job, effects
    job, cancel = _cancelled(job, now)
    return job, (*effects, *cancel)


def _cancelled(job: Job, now: float) -> Step:
    if job.job_id is None or now - job.cancelled_at < CANCEL_AGAIN:
        return job, ()
    return replace(job, cancelled_at=now), (Cancel(job.job_id),)


# -- what Slurm shows ------------------------------------------------------------------------


def listed(job: Job, rows: Iterable[Row], began: float, now: float) -> Step:
    """A good listing that was begun at ``began`` showed these jobs of its name."""
    if job.stage is Stage.ENDED:
        return job, ()
    found = sorted(rows, key=lambda row: age_of(row.job_id))
    live = [row for row in found if row.standing in LIVE]
    mine = next((row for row in found if row.job_id == job.job_id), None)
    if live and (mine is None or mine in live):
        mine = live[0]
    elif mine is None and job.job_id is None:
        mine = next(iter(found), None)
    surplus = tuple(Cancel(row.job_id) for row in live if row is not mine)
    if mine is None:
        job, effects = _missing(job, began, now)
        return job, (*surplus, *effects)
    job, effects = _taken(job, mine, began)
    job, more = _shown(job, mine, now)
    return job, (*surplus, *effects, *more)


def _taken(job: Job, row: Row, began: float) -> Step:
    """From now on its job is the one in this row; mostly it has been so before."""
    if job.job_id == row.job_id:
        since = min(job.known_since, began)
        return replace(job, known_since=since, absent_since=None), ()
    effects: tuple[Effect, ...] = () if job.gen == 0 else (Disconnect(job.gen),)
    return replace(
        job,
        stage=Stage.QUEUED,
        job_id=row.job_id,
        known_since=began,
        absent_since=None,
        endpoint=None,
        started=None,
        running_at=None,
        cancelled_at=float("-inf"),
        final=None,
        completing_since=None,
        was_at=None,
        unlaunched=None,
        reason=None,
    ), effects


def _shown(job: Job, row: Row, now: float) -> Step:
    if row.standing is Standing.UNKNOWN:
        return job, ()
    if row.standing is Standing.COMPLETING:
        since = now if job.completing_since is None else job.completing_since
        return replace(job, completing_since=since, was_at=row.node or job.was_at), ()
    if row.standing is Standing.ENDED:
        return _over(replace(job, final=row.end or _vanished(job)), row)
    job = _suspension(replace(job, completing_since=None, final=None), row, now)
    if row.standing is Standing.QUEUED:
        job, effects = _queued(job, row, now)
    else:
        job, effects = _running(job, row, now)
    if job.stopping:
        job, cancel = _cancelled(job, now)
        kept = tuple(e for e in effects if isinstance(e, Disconnect))
        return job, (*kept, *cancel)
    return job, effects


def _suspension(job: Job, row: Row, now: float) -> Job:
    """Note since when Slurm keeps it stopped. That time is none in which it could have started."""
    since, seen = job.suspended_since, job.suspended_seen
    if row.standing is Standing.SUSPENDED:
        return replace(job, suspended_since=now if since is None else since, suspended_seen=now)
    if since is None or seen is None:
        return job
    ran = None if job.running_at is None else job.running_at + seen - since
    return replace(job, running_at=ran, suspended_since=None, suspended_seen=None)


def _queued(job: Job, row: Row, now: float) -> Step:
    effects: tuple[Effect, ...] = ()
    if job.stage is Stage.RUNNING:  # Slurm put it back into the queue
        effects = (Disconnect(job.gen),)
        job = replace(job, waiting_since=now)
    job = replace(
        job,
        stage=Stage.QUEUED,
        reason=row.reason,
        starts_at=row.starts_at,
        node=None,
        endpoint=None,
        started=None,
        running_at=None,
        ends_at=None,
        unseen=False,
    )
    if row.not_launched:
        job, more = _not_launched(job, row)
        return job, (*effects, *more)
    job = replace(job, was_at=None, unlaunched=None)
    if row.permanent and not job.hopeless:
        job = replace(job, hopeless=True)
        effects = (*effects, GiveUp(f"job {row.job_id} cannot start: {row.reason or 'held'}"))
    return job, effects


def _not_launched(job: Job, row: Row) -> Step:
    """Slurm would not try again, and nobody is at fault: another job may fare better.

    Which node it was is told by its end, and Slurm forgets it with the job.
    """
    why = f"job {row.job_id}: {row.reason}"
    if job.was_at is not None:
        return replace(job, stopping=True, given_up=why, blamed=job.was_at), ()
    if job.unlaunched is not None:
        return job, ()
    return replace(job, unlaunched=why), (FindNode(row.job_id),)


def node_found(job: Job, job_id: str, node: str | None, now: float) -> Step:
    """This node could not run it; None when that could not be found out."""
    if job.stage is Stage.ENDED or job.job_id != job_id or job.unlaunched is None:
        return job, ()
    return _cancelled(
        replace(job, stopping=True, given_up=job.unlaunched, unlaunched=None, blamed=node), now
    )


def _running(job: Job, row: Row, now: float) -> Step:
    job = replace(job, ends_at=row.ends_at, starts_at=None, unlaunched=None)
    if row.node is None:  # Slurm has not said where yet
        return job, ()
    job = replace(job, was_at=row.node)
    if job.stage is Stage.RUNNING and not _restarted(job, row):
        if job.started is None:
            job = replace(job, started=row.began)
        job = replace(job, unseen=False)
        return job, () if job.endpoint is not None else (Connect(job.gen, row.node),)
    effects: tuple[Effect, ...] = (Disconnect(job.gen),) if job.stage is Stage.RUNNING else ()
    job = replace(
        job,
        stage=Stage.RUNNING,
        gen=job.gen + 1,
        node=row.node,
        started=row.began,
        running_at=_ran_at(job, row, now),
        endpoint=None,
        unseen=False,
        suspended_since=job.suspended_seen,
        reason=None,
        notice=None,
    )
    return job, (*effects, Connect(job.gen, row.node))


def _ran_at(job: Job, row: Row, now: float) -> float:
    """Say when it began to run: now, unless that was before anybody looked; Slurm knows it then."""
    if not job.unseen or row.ran_at is None:
        return now
    return min(max(row.ran_at, job.waiting_since), now)


def _restarted(job: Job, row: Row) -> bool:
    """Was it put back into the queue and started again between two listings?"""
    if job.node != row.node:
        return True
    if job.started is None or row.began is None:
        return False
    return abs(job.started - row.began) > SAME_START


def _missing(job: Job, began: float, now: float) -> Step:
    if job.job_id is None:
        return _not_there(job, began, now)
    if began <= job.known_since:
        return job, ()
    if job.absent_since is not None and began - job.absent_since >= GONE_APART:
        return _finished(job, _vanished(job))
    job = replace(job, absent_since=began if job.absent_since is None else job.absent_since)
    if job.inquiring:
        return job, ()
    return replace(job, inquiring=True), (Inquire(job.job_id or ""),)


def _not_there(job: Job, began: float, now: float) -> Step:
    """A listing lacks the job of a submission in doubt."""
    if job.stage is Stage.SENDING or began <= job.overdue_at:
        return job, ()
    if job.absent_since is None and job.submissions > 0:
        return replace(job, absent_since=began), ()
    if job.absent_since is not None and began - job.absent_since < UNSENT_APART:
        return job, ()
    if job.stopping:
        return _finished(job, End("its submission never reached Slurm", Fault.NOBODY))
    why = job.reason or "no answer"
    if job.submissions >= MAX_SUBMISSIONS or not job.renewable:
        fault = Fault.SERVICE if job.refused else Fault.NOBODY
        return _finished(job, End(f"sbatch failed ({why})", fault, "cannot-start"))
    if now < job.resubmit_at:
        return job, ()
    return replace(job, stage=Stage.SENDING, submissions=job.submissions + 1), (Submit(),)


# -- its end ---------------------------------------------------------------------------------


def _over(job: Job, row: Row) -> Step:
    """A listing shows it as ended: find out how, unless we wanted that anyway."""
    if job.stopping:
        return _finished(job, _cancellation(job))
    if job.inquiring:
        return job, ()
    return replace(job, inquiring=True), (Inquire(row.job_id),)


def answered(job: Job, answer: Answer) -> Step:
    """What was found out about a job that a listing showed as ended, or no longer showed."""
    if job.stage is Stage.ENDED:
        return job, ()
    job = replace(job, inquiring=False)
    if answer.job_id != job.job_id:  # it has moved to another job meanwhile
        return job, ()
    if answer.gone or (answer.standing is Standing.ENDED and answer.end is not None):
        return _finished(job, answer.end or _vanished(job))
    if answer.standing in LIVE or answer.standing is Standing.COMPLETING:
        since = max(job.known_since, answer.began)
        return replace(job, known_since=since, absent_since=None, final=None), ()
    if job.final is not None:  # the listing was clear enough
        return _finished(job, _vanished(job))
    return job, ()


def _cancellation(job: Job) -> End:
    if job.given_up is not None:
        return End(job.given_up, Fault.NOBODY, bad_node=job.blamed)
    return End(f"job {job.job_id} was cancelled", Fault.NOBODY)


def _vanished(job: Job) -> End:
    if job.stopping:
        return _cancellation(job)
    return job.final or End(f"job {job.job_id} is gone from Slurm's list", Fault.NOBODY)


def _finished(job: Job, end: End) -> Step:
    end = replace(end, began=job.job_id is not None, unseen=job.unseen)
    if job.stopping:
        end = replace(end, fault=Fault.NOBODY)
    effects: tuple[Effect, ...] = () if job.gen == 0 else (Disconnect(job.gen),)
    return replace(job, stage=Stage.ENDED, endpoint=None), (*effects, Finish(end))


# -- the tunnel ------------------------------------------------------------------------------


def connected(job: Job, gen: int, endpoint: str) -> Job:
    """The gate can reach it there."""
    if job.gen != gen or job.stage is not Stage.RUNNING or job.stopping:
        return job
    return replace(job, endpoint=endpoint, reason=None)


def troubled(job: Job, gen: int, reason: str, now: float) -> Job:
    """The way to it is broken for now; the endpoint stays, the tunnel opens again behind it."""
    if job.gen != gen or job.stage is not Stage.RUNNING or job.stopping:
        return job
    return doubted(replace(job, reason=reason), now)


def doubted(job: Job, now: float) -> Job:
    """It could not be reached just now: it still loads, or it has ended and nobody looked yet."""
    fresh = now - job.doubted_at > DOUBT_FORGOTTEN
    return replace(job, doubted_at=now, doubted_since=now if fresh else job.doubted_since)


def wants_way(job: Job) -> bool:
    """Whether a tunnel to it should be there."""
    return job.stage is Stage.RUNNING and not job.stopping
