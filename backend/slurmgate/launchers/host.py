"""What is asked of Slurm on one login host, and what its answers mean for replicas.

State: whether Slurm's commands are found only by a login shell there, what words of Slurm were not
understood, and where nodes are. Callable from any thread; every method blocks until the host has
answered, at most for its time limit and the few seconds that SSH takes to give up.
"""

from __future__ import annotations

import functools
import logging
import re
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slurmgate.errors import CannotStart, SlurmgateError
from slurmgate.launchers import logs, slurm_format, slurm_states, slurm_submit, taken_port
from slurmgate.launchers.job import Answer, Row, Standing
from slurmgate.launchers.slurm_format import JobName, NodePlace
from slurmgate.launchers.slurm_states import Kind
from slurmgate.launchers.slurm_submit import NotInstalled, Refusal, Submitted
from slurmgate.model import End, Fault, ServiceSpec, SshSpec
from slurmgate.ssh import Output, Remotes

log = logging.getLogger(__name__)

SUBMIT = 30.0
LIST = 20.0
CANCEL = 20.0
ASK = 5.0
NODE = 10.0
NODES_KEPT = 600.0
LOG_LINES = 100
_SHOWN = 300

_STANDINGS = {
    Kind.QUEUED: Standing.QUEUED,
    Kind.HELD: Standing.QUEUED,
    Kind.RUNNING: Standing.RUNNING,
    Kind.PAUSED: Standing.SUSPENDED,
    Kind.ENDING: Standing.COMPLETING,
    Kind.ENDED: Standing.ENDED,
}


class SlurmSilent(SlurmgateError):
    """The login host answers and Slurm does not: nothing is known, and it will pass."""

    reason = "slurm-silent"
    retryable = True
    http_status = 503


@dataclass(frozen=True, slots=True)
class Doubt:
    """``sbatch`` has ended without saying whether there is a job."""

    reason: str


@dataclass(frozen=True, slots=True)
class Listed:
    """A job of some Slurmgate in a good listing."""

    name: JobName
    state: str
    row: Row


@dataclass(frozen=True, slots=True)
class Listing:
    """A good listing, begun at ``began``; not ``whole``: a line of ours was not understood."""

    jobs: tuple[Listed, ...]
    began: float
    whole: bool


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What was found out about one job, with the last lines it printed."""

    answer: Answer
    lines: tuple[str, ...] = ()


class Host:
    """Slurm's commands on one login host, with the ``remote_setup`` of a service."""

    def __init__(
        self,
        ssh: SshSpec | None,
        setup: tuple[str, ...],
        remotes: Remotes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = "this machine" if ssh is None else ssh.host
        self._ssh = ssh
        self._setup = setup
        self._remotes = remotes
        self._clock = clock
        self._lock = threading.Lock()
        self._login_shell = False
        self._nodes: dict[str, tuple[float, NodePlace]] = {}
        self._unknown: set[str] = set()

    def submit(
        self,
        spec: ServiceSpec,
        name: JobName,
        avoid: Sequence[str] = (),
        key: str | None = None,
    ) -> Submitted | Refusal | Doubt:
        """Submit a job. CannotStart, HostAway: it was not sent; Unfinished: nobody knows."""
        script = slurm_submit.submit_script(spec, str(name), name.replica, name.port, avoid, key)
        output = self._run(script, SUBMIT, key)
        found = slurm_submit.read_submission(output.code, output.out, output.err)
        if isinstance(found, NotInstalled):
            raise self._not_installed("sbatch")
        if found is None:
            return Doubt(_words(output) or f"sbatch ended with code {output.code}")
        return found

    def listing(self, instance: str) -> Listing:
        """List the jobs of this instance, of whatever owner.

        SlurmSilent when Slurm gives no good listing; CannotStart when it is not installed.
        """
        output = self._run(slurm_format.list_script(), LIST)
        if output.code == 127:
            raise self._not_installed("squeue")
        if output.code != 0:
            words = _words(output) or f"squeue ended with code {output.code}"
            raise SlurmSilent(f"Slurm on {self.name} does not answer: {words}")
        now, wall = self._clock(), time.time()
        found = []
        for row in slurm_format.parse_listing(output.out).rows:
            name = JobName.parse(row.name)
            if name is not None and name.instance == instance:
                found.append(Listed(name, row.state, self._read(row, output.began, now, wall)))
        mentioned = output.out.count(f"|sg.{instance}.")
        return Listing(tuple(found), output.began, mentioned <= len(found))

    def cancel(self, name: str, job_id: str) -> None:
        """Cancel the job of this name and id; SlurmSilent when that was not accepted."""
        output = self._run(slurm_format.cancel_script(name, job_id), CANCEL)
        if output.code != 0 and "Invalid job id" not in output.err:
            words = _words(output) or f"scancel ended with code {output.code}"
            raise SlurmSilent(f"job {job_id} is not cancelled yet: {words}")

    def inquire(
        self, name: JobName, job_id: str, *, fixed: bool, early: bool, key: str | None = None
    ) -> Inquiry:
        """Ask what became of a job. ``early``: a taken port may have been the reason.

        A job of another name is another one: Slurm begins its numbers anew when it lost its state.
        """
        began = self._clock()
        try:
            output = self._run(slurm_format.detail_script(job_id, LOG_LINES), ASK, key)
        except SlurmgateError as error:
            log.info("nothing was found out about job %s: %s", job_id, error)
            return Inquiry(Answer(job_id, began))
        detail = slurm_format.parse_detail(output.out)
        if detail is None or detail.gone or detail.state is None:
            gone = detail is not None and detail.gone
            return Inquiry(Answer(job_id, began, gone=gone))
        if detail.name not in (None, str(name)):
            return Inquiry(Answer(job_id, began, gone=True))
        lines = _clean(detail.lines)
        kind = slurm_states.kind_of(detail.state)
        standing = Standing.UNKNOWN if kind is None else _STANDINGS[kind]
        if standing is not Standing.ENDED:
            return Inquiry(Answer(job_id, began, standing), lines)
        node = detail.batch_host or detail.nodes
        ended = slurm_states.end_of(
            detail.state, ready=False, job_id=job_id, node=node, exit=detail.exit
        )
        end = End(detail.state) if ended is None else _end(ended, detail.nodes, node)
        if early and end.fault is Fault.SERVICE and taken_port.is_told(lines, name.port):
            fault = Fault.SERVICE if fixed else Fault.PORT
            end = End(f"port {name.port} is taken on node {node}", fault, node=node)
        return Inquiry(Answer(job_id, began, standing, end=end), lines)

    def unfit_node(self, name: JobName, job_id: str) -> str | None:
        """Find out which node could not run a job; None when Slurm does not say."""
        try:
            output = self._run(slurm_format.unfit_script(job_id), ASK)
        except SlurmgateError as error:
            log.info("where job %s could not be run is not found out: %s", job_id, error)
            return None
        return slurm_format.parse_unfit(str(name), output.out)

    def tail(self, job_id: str, lines: int, key: str | None = None) -> list[str]:
        """Give the last lines a job has printed, without ``key``; none when the host says none."""
        try:
            output = self._run(slurm_format.detail_script(job_id, lines), ASK, key)
        except SlurmgateError as error:
            log.info("cannot read the output of job %s: %s", job_id, error)
            return []
        detail = slurm_format.parse_detail(output.out)
        return [] if detail is None else list(_clean(detail.lines)[-lines:])

    def node(self, node: str) -> NodePlace:
        """Find out where a node is; asked again after ten minutes. SlurmSilent: not now."""
        known = self._nodes.get(node)
        if known is not None and self._clock() - known[0] < NODES_KEPT:
            return known[1]
        output = self._run(slurm_format.node_script(node), NODE)
        place = slurm_format.parse_node(node, output.out)
        if place is None:
            raise SlurmSilent(f"{self.name} does not say where node {node} is")
        with self._lock:
            self._nodes[node] = (self._clock(), place)
        return place

    def rename(self, job_id: str, name: str) -> bool:
        """Give a job another name."""
        command = ["scontrol", "update", f"JobId={job_id}", f"JobName={name}"]
        script = slurm_submit.clean_environment() + shlex.join(command) + "\n"
        output = self._run(script, CANCEL)
        if output.code != 0:
            log.warning("job %s cannot be taken over: %s", job_id, _words(output))
        return output.code == 0

    def _run(self, script: str, timeout: float, key: str | None = None) -> Output:
        """Run a script; once more by a login shell if a command is not found.

        Whatever is printed there, nobody is told the ``key``.
        """
        login = self._login_shell
        run = functools.partial(
            self._remotes.run, self._ssh, script, setup=self._setup, timeout=timeout, secret=key
        )
        output = run(login_shell=login)
        if output.code != 127 or login:
            return output
        again = run(login_shell=True)
        if again.code != 127:
            log.info("%s finds Slurm's commands with a login shell only", self.name)
            with self._lock:
                self._login_shell = True
        return again

    def _not_installed(self, command: str) -> CannotStart:
        return CannotStart(
            f"{command} is not found on {self.name}, by a login shell neither; give the lines that"
            ' make it known as remote_setup, for example ["module load slurm"]'
        )

    def _read(self, row: slurm_format.Row, began: float, now: float, wall: float) -> Row:
        """Say what a row means for a replica, with times of our monotonic clock."""
        kind = slurm_states.kind_of(row.state)
        if kind is None:
            self._note_unknown(row.state)
            return Row(row.job_id, Standing.UNKNOWN)
        waiting = slurm_states.waiting_for(row.reason) if kind in (Kind.QUEUED, Kind.HELD) else None
        ended = slurm_states.end_of(
            row.state, ready=False, job_id=row.job_id, node=row.batch_host or row.nodes
        )
        queued = _STANDINGS[kind] is Standing.QUEUED
        starts_at = row.starts_at if queued else None
        ran_at = None if queued or row.starts_at is None else now + row.starts_at - wall
        return Row(
            job_id=row.job_id,
            standing=_STANDINGS[kind],
            end=None if ended is None else _end(ended, row.nodes, row.batch_host),
            node=None if queued else row.batch_host or row.nodes,
            reason=_reason(row, waiting),
            permanent=kind is Kind.HELD or (waiting is not None and waiting.forever),
            not_launched=waiting is not None and waiting.not_launched,
            began=None if queued or row.starts_at is None else float(row.starts_at),
            ran_at=ran_at,
            starts_at=None if starts_at is None else max(now, now + starts_at - wall),
            ends_at=None if queued else _ends_at(row, began, now - wall),
        )

    def _note_unknown(self, state: str) -> None:
        with self._lock:
            if state in self._unknown:
                return
            self._unknown.add(state)
        log.warning("%s shows a job state that is not known: %s", self.name, state)


def _reason(row: slurm_format.Row, waiting: slurm_states.Waiting | None) -> str | None:
    if waiting is not None:
        return waiting.text
    return None if row.state in ("PENDING", "RUNNING") else row.state.lower().replace("_", " ")


def _end(ended: slurm_states.Ended, nodes: str | None, node: str | None) -> End:
    """Name the node that failed where it was the only one: of several, Slurm does not say which.

    ``node`` is the one that ran the script.
    """
    nodes = nodes or node
    blamed = nodes if ended.by_node and nodes and not re.search(r"[\[,]", nodes) else None
    return End(ended.words, ended.fault, bad_node=blamed, node=node)


def _ends_at(row: slurm_format.Row, began: float, offset: float) -> float | None:
    """Say when its time limit ends it, rather too early than too late.

    The seconds that are left need no clock, but Slurm does not give them where somebody changed the
    end instead of the limit.
    """
    if row.left is not None:
        return began + row.left
    return None if row.ends_at is None else row.ends_at + offset


def _words(output: Output) -> str:
    """Give what a command complained about, on one line."""
    text = output.err.strip() or output.out.strip()
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[:_SHOWN]


def _clean(lines: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(logs.clean(line.encode(errors="surrogateescape")) for line in lines)
