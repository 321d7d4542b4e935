"""What stands beside a replica's job: its record, its name, what it was started from. Pure.

A ``Post`` is owned by a site and changed with its lock held. Times of records are the wall clock,
those of jobs the monotonic clock; a post knows one moment on both, and ``Moment`` is the present.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slurmgate.launchers.job import Job, Stage
from slurmgate.launchers.slurm_format import JobName
from slurmgate.model import LauncherKind, Phase, ServiceSpec, Sighting
from slurmgate.records import JobRecord, Record

SUSPENDED = "suspended by Slurm"


@dataclass(frozen=True, slots=True)
class Moment:
    """The same moment on the monotonic and on the wall clock."""

    now: float
    wall: float


@dataclass(slots=True)
class Post:
    """``spec`` is there when it can be submitted again. ``created`` is the monotonic clock when
    the record says it was. ``address`` is that of the node of one start. Not ``told``: nobody
    knows of the replica, it was being stopped when the backend before this one ended. ``avoid``
    names nodes where the job shall not run, however often it is submitted.
    """

    record: Record
    name: JobName
    created: float
    spec: ServiceSpec | None = None
    fixed: bool = False
    address: tuple[int, str] | None = None
    told: bool = True
    avoid: tuple[str, ...] = ()

    @property
    def replica(self) -> str:
        """The replica it is of."""
        return self.record.replica

    @property
    def key(self) -> str | None:
        """What its service demands of the gate."""
        return self.record.api_key

    @property
    def job(self) -> JobRecord:
        """The part of the record that is about the job."""
        assert self.record.job is not None
        return self.record.job


def new(
    spec: ServiceSpec,
    name: JobName,
    boot: str,
    at: Moment,
    avoid: tuple[str, ...] = (),
    api_key: str | None = None,
) -> Post:
    """Make the post of a replica that is about to be submitted, or was found without a record."""
    local = None
    if spec.local_port is not None:
        local = (spec.local_host or "127.0.0.1", spec.local_port)
    record = Record(
        replica=name.replica,
        service=spec.name,
        launcher=LauncherKind.SLURM,
        start_hash=name.start_hash,
        port=name.port,
        created=at.wall,
        log="",
        boot=boot,
        job=JobRecord(
            name=str(name),
            ssh=spec.ssh,
            setup=spec.remote_setup,
            tunnel=spec.tunnel,
            submitted=at.wall,
            local=local,
        ),
        api_key=api_key,
    )
    return Post(record, name, at.now, spec, fixed=_is_fixed(spec, name.port), avoid=avoid)


def _is_fixed(spec: ServiceSpec, port: int) -> bool:
    """Whether it has to be this port: one that was counted upward may be another one next time."""
    return port == spec.remote_port and spec.replicas.max <= 1


def recorded(record: Record, spec: ServiceSpec | None, at: Moment) -> Post | None:
    """Make the post of a replica of an earlier backend; None when its record is none of ours.

    ``spec`` is that of its service now; only an unchanged one can be submitted again.
    """
    job = record.job
    name = None if job is None else JobName.parse(job.name)
    if job is None or name is None:
        return None
    same = spec is not None and spec.start_hash() == record.start_hash
    if spec is not None and spec.upstream_key and record.api_key is None:
        same = False  # without its key it would be open to everybody
    return Post(
        record,
        name,
        created=at.now - max(0.0, at.wall - record.created),
        spec=spec if same else None,
        fixed=spec is not None and _is_fixed(spec, name.port),
        address=None if job.address is None else (job.gen, job.address),
        told=not record.stopping,
    )


def job_of(post: Post, at: Moment, submission_max: float) -> Job:
    """Say what an earlier backend knew of a job. A submission of its may still be on its way."""
    now = at.now
    known = post.job
    running_at = None if known.running is None else _monotonic(post, known.running)
    job = Job(
        post.replica,
        Stage.QUEUED,
        waiting_since=now if known.gen and known.node is None else post.created,
        job_id=known.job_id,
        known_since=now,
        renewable=post.spec is not None,
        stopping=post.record.stopping,
        unseen=True,
        gen=known.gen,
        started=known.started,
    )
    if known.job_id is None:
        sent = min(submission_max, max(0.0, submission_max - (at.wall - known.submitted)))
        reason = "submission not confirmed: the backend was restarted"
        return replace(job, stage=Stage.UNSURE, overdue_at=now + sent, reason=reason)
    if known.node is None:
        return job
    return replace(job, stage=Stage.RUNNING, node=known.node, running_at=running_at)


def submitting(record: Record, wall: float) -> Record:
    """Note that a submission is sent now."""
    assert record.job is not None
    return replace(record, job=replace(record.job, submitted=wall))


def updated(post: Post, job: Job) -> Record:
    """Give the record as it has to be for a later backend."""
    at_node = post.address if post.address is not None and post.address[0] == job.gen else None
    known = replace(
        post.job,
        job_id=job.job_id,
        gen=job.gen,
        node=job.node,
        address=None if at_node is None or job.node is None else at_node[1],
        started=job.started,
        running=None if job.running_at is None else _wall(post, job.running_at),
        endpoint=job.endpoint,
    )
    return replace(post.record, job=known, stopping=job.stopping)


def sighting(post: Post, job: Job) -> Sighting:
    """Say what the core should know."""
    phase = Phase.SUBMITTED
    if job.stage is Stage.QUEUED:
        phase = Phase.PENDING
    elif job.stage is Stage.RUNNING:
        phase = Phase.RUNNING if job.endpoint is None else Phase.STARTING
    suspended_s = None
    if job.suspended_since is not None and job.suspended_seen is not None:
        suspended_s = job.suspended_seen - job.suspended_since
    return Sighting(
        replica=job.replica,
        service=post.record.service,
        start_hash=post.record.start_hash,
        phase=phase,
        created_at=post.created,
        port=post.record.port,
        endpoint=job.endpoint,
        gen=max(1, job.gen),
        job_id=job.job_id,
        node=job.node,
        reason=job.reason if suspended_s is None else SUSPENDED,
        notice=job.notice,
        queued_at=job.waiting_since,
        running_at=job.running_at,
        starts_at=job.starts_at,
        ends_at=job.ends_at,
        suspended_s=suspended_s,
        api_key=post.record.api_key,
    )


def _monotonic(post: Post, wall: float) -> float:
    return post.created + (wall - post.record.created)


def _wall(post: Post, moment: float) -> float:
    return round(post.record.created + (moment - post.created), 3)
