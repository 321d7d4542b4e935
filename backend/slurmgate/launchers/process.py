"""Runs replicas as processes of this machine, each in a session of its own.

State: which replicas run, with their ports, under one lock, and the keys that no log may show; how
they end is the watcher's. On disk
a record for each, written before the start, so that a later backend finds what this one started: by
pid and start time, or by marks in the environment if this one died in between.

A replica's processes are those of its session and those that carry its marks. One that leaves both
behind, with ``setsid`` and an empty environment, is out of reach: it outlives the replica.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurmgate import procfs, upstream_keys
from slurmgate.errors import StartRefused
from slurmgate.launchers import local_port, logs, spawn, taken_port
from slurmgate.launchers.log_keeper import LogKeeper
from slurmgate.launchers.watcher import Watcher
from slurmgate.model import End, Exit, Fault, LauncherKind, Phase, ServiceSpec, Sighting, Stranger
from slurmgate.ports import Adoption, Observer
from slurmgate.records import Record, Records
from slurmgate.state import StateDir

_LOG = logging.getLogger(__name__)

MARKS = ("SLURMGATE_OWNER", "SLURMGATE_REPLICA")
"""Variables in the environment of all processes of a replica: by them it is found again."""

_KILL_AFTER = 10.0
_KILL_PATIENCE = 5.0  # how long processes may take to vanish after SIGKILL
_LOGS_KEPT = 20
_LAST_LINES = 50  # where a service says that its port is taken


@dataclass(slots=True)
class _Replica:
    """A replica from the choice of its port to its end; ``told`` is who learns of that."""

    service: str
    port: int
    told: Observer | None
    record: Record | None = None
    stopping: bool = False
    chosen: bool = False  # the port: another one may do better


class ProcessLauncher:
    """The launcher ``process``; see ``ports.Launcher`` for what its methods promise.

    ``kill_after`` is how many seconds a replica has between SIGTERM and SIGKILL.
    """

    def __init__(self, state: StateDir, *, kill_after: float = _KILL_AFTER) -> None:
        self._state = state
        self._records = Records(state.replicas)
        self._owner = state.owner
        self._boot = procfs.boot_id()
        self._kill_after = kill_after
        self._observer: Observer | None = None
        self._changed = threading.Condition()
        self._replicas: dict[str, _Replica] = {}
        self._keys: dict[str, str] = {}
        self._closing = False
        self._watcher = Watcher(self._ended)
        self._log_keeper = LogKeeper(self._written_logs)

    def launch(self, spec: ServiceSpec, replica: str, avoid: Sequence[str] = ()) -> Sighting:
        """Start one replica; StartRefused, with nothing left behind, when that is impossible.

        There is one node, this machine: ``avoid`` changes nothing.
        """
        argv = spawn.command(spec)
        port = self._reserve(spec, replica)
        try:
            return self._start(spec, replica, port, argv)
        except (StartRefused, OSError) as error:
            with self._changed:
                del self._replicas[replica]
                self._changed.notify_all()
            if isinstance(error, OSError):
                raise StartRefused(f"cannot start {argv[0]}: {error}") from error
            raise

    def stop(self, replica: str) -> None:
        """Ask the replica's processes to end and see to it that they do; returns at once."""
        with self._changed:
            entry = self._replicas.get(replica)
            if entry is None or entry.stopping:
                return
            entry.stopping = True
            if entry.record is not None:  # else it is being started, which stops it when done
                self._begin_stop(entry.record)

    def reconnect(self, replica: str) -> None:
        """Nothing lies between the gate and a process of this machine."""

    def adopt(self, specs: Sequence[ServiceSpec], observer: Observer | None) -> Adoption:
        """Take over what runs of the recorded replicas, and end whatever else is left of them.

        Whatever is configured (``specs``) changes nothing; without ``observer`` nobody is told.
        """
        self._observer = observer
        adopted = []
        recorded = set()
        for record in self._records.read_all():
            if record.launcher is not LauncherKind.PROCESS:
                continue
            recorded.add(record.replica)
            running = self._adopt(record)
            if running is not None:
                adopted.append(running)
        self._end_unrecorded(recorded)
        return Adoption(tuple(adopted))

    def log_tail(self, replica: str, lines: int) -> list[str]:
        """Give the last lines a replica printed, also after its end, safe to show."""
        path = self._state.find_log(replica)
        return [] if path is None else logs.tail(path, lines, self._keys.get(replica))

    def explain(self, replica: str) -> str | None:
        """A process is reached or not: there is nothing to add."""
        return None

    def take_over(self, owner: str) -> int:
        """Processes of another owner are never taken over."""
        return 0

    def strangers(self) -> tuple[Stranger, ...]:
        """Processes of other owners are not looked for."""
        return ()

    def close(self, *, stop_replicas: bool, keep_ways: bool = True) -> None:
        """Stop watching; with ``stop_replicas`` every replica is ended before this returns."""
        with self._changed:
            self._closing = True
            running = list(self._replicas)
            self._changed.notify_all()
        if stop_replicas:
            for replica in running:
                self.stop(replica)
            with self._changed:
                patience = self._kill_after + _KILL_PATIENCE
                if not self._changed.wait_for(lambda: not self._replicas, patience):
                    _LOG.warning("still running: replicas %s", ", ".join(self._replicas))
        self._watcher.close()
        self._log_keeper.close()

    def _reserve(self, spec: ServiceSpec, replica: str) -> int:
        """Choose a port that nothing listens on and no other replica has, and keep it."""
        with self._changed:
            if replica in self._replicas:
                raise ValueError(f"replica {replica} was started before")
            self._await_fixed_port(spec)
            if self._closing:
                raise StartRefused("the backend is stopping")
            held = {entry.port for entry in self._replicas.values()}
            port = local_port.choose(spec, held)
            chosen = spec.remote_port is None
            self._replicas[replica] = _Replica(spec.name, port, self._observer, chosen=chosen)
            return port

    def _await_fixed_port(self, spec: ServiceSpec) -> None:
        """A replica that is being stopped is about to free its port: the next one waits for that.

        Only a service with a single replica: one with several counts upward.
        """
        if spec.remote_port is None or spec.replicas.max > 1:
            return

        def leaving() -> bool:
            entries = self._replicas.values()
            return any(e.stopping and e.port == spec.remote_port for e in entries)

        patience = self._kill_after + _KILL_PATIENCE
        self._changed.wait_for(lambda: self._closing or not leaving(), patience)

    def _start(self, spec: ServiceSpec, replica: str, port: int, argv: list[str]) -> Sighting:
        log = self._state.log_file(spec.name, replica)
        record = Record(
            replica=replica,
            service=spec.name,
            launcher=LauncherKind.PROCESS,
            start_hash=spec.start_hash(),
            port=port,
            created=time.time(),
            log=str(log),
            boot=self._boot,
            api_key=upstream_keys.make(spec),
        )
        command = [*argv, str(port)]
        self._records.write(record)
        try:
            environ = self._environment(spec, record)
            pid, started, pidfd = _open(spawn.start(command, spec.folder, environ, log))
        except (StartRefused, OSError):
            self._records.remove(replica)
            raise
        record = dataclasses.replace(record, pid=pid, pid_start=started)
        self._complete(record)
        self._follow(record, pid, pidfd)
        _LOG.info("service %s: replica %s is process %d, port %d", spec.name, replica, pid, port)
        self._prune_logs(spec, log.parent)
        return _running(record, pid, time.monotonic())

    def _written_logs(self) -> list[Path]:
        with self._changed:
            entries = list(self._replicas.values())
        return [Path(e.record.log) for e in entries if e.record is not None and e.record.log]

    def _prune_logs(self, spec: ServiceSpec, folder: Path) -> None:
        with self._changed:
            spare = set(self._replicas)
        try:
            logs.prune(folder, _LOGS_KEPT, spare)
        except OSError as error:  # no reason to fail a good start
            _LOG.warning("service %s: cannot remove old logs: %s", spec.name, error)
        with self._changed:
            self._keys = {r: k for r, k in self._keys.items() if self._state.find_log(r)}

    def _environment(self, spec: ServiceSpec, record: Record) -> dict[str, str]:
        environ = {
            **os.environ,
            **dict(spec.env),
            "SLURMGATE_PORT": str(record.port),
            "SLURMGATE_SERVICE": spec.name,
            **self._marks(record.replica),
        }
        environ.pop(upstream_keys.VARIABLE, None)  # ours, when we are somebody's service ourselves
        if record.api_key is not None:
            environ[upstream_keys.VARIABLE] = record.api_key
        return environ

    def _marks(self, replica: str) -> dict[str, str]:
        return dict(zip(MARKS, (self._owner, replica), strict=True))

    def _complete(self, record: Record) -> None:
        """Write what is known by now; if that fails, marks and pid find the processes as well."""
        try:
            self._records.write(record)
        except StartRefused as error:
            _LOG.warning("replica %s: %s", record.replica, error)

    def _follow(self, record: Record, pid: int, pidfd: int) -> None:
        with self._changed:
            entry = self._replicas[record.replica]
            entry.record = record
            if record.api_key is not None:
                self._keys[record.replica] = record.api_key
            self._watcher.follow(record.replica, pid, pidfd, self._marks(record.replica))
            if entry.stopping:
                self._begin_stop(record)

    def _begin_stop(self, record: Record) -> None:
        """Called with the lock held, so that no record is written after its removal."""
        self._complete(dataclasses.replace(record, stopping=True))
        self._watcher.stop(record.replica, self._kill_after)

    def _ended(self, replica: str, end: Exit) -> None:
        """Called by the watcher's thread when nothing is left of a replica."""
        with self._changed:
            self._records.remove(replica)
            entry = self._replicas.pop(replica)
            self._changed.notify_all()
        if entry.told is not None:
            entry.told.ended(replica, self._end(replica, entry, end))

    def _end(self, replica: str, entry: _Replica, end: Exit) -> End:
        """Between the choice of a port and its use somebody else may have taken it."""
        if entry.chosen and end.code:
            lines = self.log_tail(replica, _LAST_LINES)
            if taken_port.is_told(lines, entry.port):
                return End(f"port {entry.port} is taken", Fault.PORT)
        return End(f"the service {end.describe()}")

    def _adopt(self, record: Record) -> Sighting | None:
        found = self._find(record)
        pidfd = None if found is None else procfs.open_process(found.pid, found.start)
        if found is None or pidfd is None:
            _LOG.info("service %s: replica %s has ended", record.service, record.replica)
            self._end_marked(record.replica)
            self._records.remove(record.replica)
            return None
        if record.pid is None:
            record = dataclasses.replace(record, pid=found.pid, pid_start=found.start)
            self._complete(record)
        told = None if record.stopping else self._observer  # nobody knows of one that was stopped
        entry = _Replica(record.service, record.port, told, stopping=record.stopping)
        with self._changed:
            self._replicas[record.replica] = entry
        self._follow(record, found.pid, pidfd)
        if record.stopping:
            return None
        _LOG.info("service %s: adopted replica %s", record.service, record.replica)
        return _running(record, found.pid, procfs.monotonic(found.start))

    def _find(self, record: Record) -> procfs.Process | None:
        """Find the process a record is about; None when it has ended."""
        if record.boot != self._boot:
            return None
        if record.pid is None:  # the backend died right after the start
            marked = procfs.find_marked(self._marks(record.replica))
            leaders = (process for process in marked if process.pid == process.session)
            return min(leaders, key=lambda process: process.start, default=None)
        found = procfs.read(record.pid)
        if found is None or found.start != record.pid_start or found.ended:
            return None
        return found

    def _end_marked(self, replica: str) -> None:
        _kill(procfs.find_marked(self._marks(replica)))

    def _end_unrecorded(self, recorded: Collection[str]) -> None:
        """End replicas of ours whose record was lost, not the shell of one that runs us."""
        ours = procfs.ancestors(os.getpid())
        for process in procfs.find_marked({"SLURMGATE_OWNER": self._owner}):
            replica = procfs.environment(process.pid).get("SLURMGATE_REPLICA")
            if replica is not None and replica not in recorded and process.pid not in ours:
                _LOG.warning(
                    "end process %d (%s) of replica %s, which has no record",
                    process.pid, process.comm, replica,
                )  # fmt: skip
                _kill([process])


def end_process_replicas(state: StateDir, *, kill_after: float = _KILL_AFTER) -> None:
    """End every process replica of a state directory whose backend is gone for good."""
    launcher = ProcessLauncher(state, kill_after=kill_after)
    launcher.adopt((), None)
    launcher.close(stop_replicas=True)


def _open(pid: int) -> tuple[int, int | None, int]:
    """Give pid, start time and a pidfd of a process just started; if that fails it is ended.

    It leads a session and is not reaped, so that its pid still names its group.
    """
    try:
        return pid, procfs.start_time(pid), os.pidfd_open(pid)
    except OSError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _running(record: Record, pid: int, started_at: float) -> Sighting:
    return Sighting(
        replica=record.replica,
        service=record.service,
        start_hash=record.start_hash,
        phase=Phase.STARTING,
        created_at=started_at,
        port=record.port,
        endpoint=f"127.0.0.1:{record.port}",
        job_id=str(pid),
        node="localhost",
        running_at=started_at,
        api_key=record.api_key,
    )


def _kill(processes: Iterable[procfs.Process]) -> None:
    for process in processes:
        pidfd = procfs.open_process(process.pid, process.start)
        if pidfd is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
