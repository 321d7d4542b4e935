"""Plain values shared by all layers: service specifications and what is known of each replica.

Durations are seconds. Points in time are seconds of the monotonic clock of this machine, unless a
name says otherwise. Everything here is immutable; whoever changes something makes a new value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path


class LauncherKind(StrEnum):
    """Who runs the replicas of a service."""

    SLURM = "slurm"
    PROCESS = "process"


class TunnelMode(StrEnum):
    """How the gate reaches a replica of a Slurm service."""

    AUTO = "auto"
    NODE_LOOPBACK = "node-loopback"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class HealthSpec:
    """Pace and patience of the health polls."""

    interval: float = 5.0
    start_interval: tuple[float, float] = (0.05, 1.0)
    timeout: float = 10.0
    failures: int = 3


@dataclass(frozen=True, slots=True)
class ReplicaBounds:
    """How many replicas a service may have and how much one may carry (0: no bound)."""

    min: int = 0
    max: int = 1
    target_in_flight: int = 8
    max_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class SshSpec:
    """How to log in to the login host of a service."""

    host: str
    username: str | None = None
    key_file: Path | None = None
    port: int = 22
    known_hosts: Path | None = None
    jump: str | None = None
    control_path: Path | None = None


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One entry of ``Services``, validated and with every default filled in.

    ``remote_port`` is None for ``auto``. ``folder`` is the directory of the configuration file;
    the process launcher resolves ``bash_file`` against it and runs the service there. ``affinity``
    is the name of a header. ``renew_before`` is None when recent starts decide, 0 for never.
    ``models`` are the names under ``/v1``, ``upstream_model`` what the service itself calls it.
    ``cors`` lists origins, None for the gate's.
    """

    name: str
    route_name: str
    api_paths: tuple[str, ...]
    bash_file: str
    check_health_path: str
    timeout: float
    folder: Path
    launcher: LauncherKind = LauncherKind.SLURM
    description: str = ""
    models: tuple[str, ...] = ()
    remote_port: int | None = None
    port_range: tuple[int, int] = (20000, 29999)
    env: tuple[tuple[str, str], ...] = ()
    ssh: SshSpec | None = None
    remote_setup: tuple[str, ...] = ()
    tunnel: TunnelMode = TunnelMode.AUTO
    sbatch_args: tuple[str, ...] = ()
    local_host: str | None = None
    local_port: int | None = None
    replicas: ReplicaBounds = field(default_factory=ReplicaBounds)
    scale_up_after: float = 5.0
    affinity: str | None = None
    prefix_affinity: bool = False
    upstream_model: str | None = None
    upstream_key: bool = False
    public: bool = False
    heartbeat: float = 15.0
    max_idle_connection: float = 0.0
    cors: tuple[str, ...] | None = None
    renew_before: float | None = None
    max_starts_per_hour: int = 30
    max_pending: int = 3
    hold_timeout: float = 3600.0
    start_timeout: float = 1800.0
    queue_timeout: float = 0.0
    abandon_timeout: float = 60.0
    drain_timeout: float = 0.0
    max_waiting: int = 1000
    health: HealthSpec = field(default_factory=HealthSpec)
    replace_after: float = 120.0
    no_wake: tuple[str, ...] = ()
    replay: int = 1
    read_timeout: float = 600.0

    _start_hash: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_start_hash", _digest(self))

    def start_hash(self) -> str:
        """Digest of the parameters a running replica cannot take over: a change means a new one."""
        return self._start_hash


def _digest(spec: ServiceSpec) -> str:
    parts: tuple[object, ...] = (
        spec.launcher,
        spec.bash_file,
        str(spec.folder) if spec.launcher is LauncherKind.PROCESS else None,
        spec.remote_port,
        spec.port_range,
        sorted(spec.env),
        None if spec.ssh is None else [str(v) for v in dataclasses.astuple(spec.ssh)],
        spec.remote_setup,
        spec.tunnel,
        spec.sbatch_args,
    )
    if spec.upstream_key:  # without one the digest is what it was before there were such keys
        parts += ("upstream_key",)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class TlsSpec:
    """Certificate chain and key of the public listener; both are read at every handshake."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class GateSpec:
    """The ``gate`` section: what nginx is rendered from. ``max_*`` are bytes.

    ``service_cors``: a service has a list of its own, so nginx writes the headers of CORS.
    """

    listen: str = "127.0.0.1:8080"
    private: tuple[str, ...] = ("127.0.0.0/8", "::1")
    workers: int = 2
    max_body: int = 1 << 30
    max_held_bytes: int = 10 << 30
    tls: TlsSpec | None = None
    open: bool = False
    trusted_proxies: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    service_cors: bool = False

    def listening_on(self, address: str | None) -> GateSpec:
        """Give the same gate at another address; None: at its own."""
        return self if address is None else replace(self, listen=address)


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration file that passed validation, with the warnings found on the way."""

    path: Path
    services: tuple[ServiceSpec, ...]
    gate: GateSpec
    instance: str | None = None
    watch: bool = True
    admin_token_file: Path | None = None
    keys_file: Path | None = None
    warnings: tuple[str, ...] = ()


class Phase(StrEnum):
    """Where a replica is in its life; ``gone`` and ``failed`` are ends."""

    SUBMITTED = "submitted"
    PENDING = "pending"
    RUNNING = "running"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    GONE = "gone"
    FAILED = "failed"


class Health(StrEnum):
    """What the gate's polls say of a replica."""

    UP = "up"
    DOWN = "down"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a job or process ended; both None: nobody could see it."""

    code: int | None = None
    signal: int | None = None

    def describe(self) -> str:
        """Say it in words: ``exited with code 3``, ``was killed by signal 9``."""
        if self.signal is not None:
            return f"was killed by signal {self.signal}"
        if self.code is not None:
            return f"exited with code {self.code}"
        return "ended, nobody could see how"


class Fault(StrEnum):
    """Whose fault it is that a replica ended; ``port``: its port was taken on the node."""

    SERVICE = "service"
    NOBODY = "nobody"
    PORT = "port"


@dataclass(frozen=True, slots=True)
class End:
    """How a replica ended, in a clause such as ``job 4711 was cancelled``, and whose fault it is.

    ``code`` is what requests held for it are refused with. ``node`` is where it ran: one that ends
    soon may never have been seen there. ``bad_node`` names the node that failed, when it was the
    node's doing. Not ``began``: its submission was in doubt, and there never was a job.
    ``unseen``: it ended before this backend looked for the first time.
    """

    reason: str
    fault: Fault = Fault.SERVICE
    code: str = "start-failed"
    bad_node: str | None = None
    node: str | None = None
    began: bool = True
    unseen: bool = False


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a launcher knows of a replica of its own at one moment.

    ``phase`` is SUBMITTED (nobody knows whether the job exists), PENDING, RUNNING (it runs and
    cannot be reached yet) or STARTING (``endpoint`` is known). ``gen`` counts the places it has
    been at. ``reason`` says why it is no further, ``notice`` what else people should know.
    ``queued_at`` is when it last came into the queue, where there is one; ``starts_at`` is the
    scheduler's estimate, ``ends_at`` the end by its time limit. ``suspended_s`` is for how long the
    scheduler has been seen to keep its processes stopped, None while they run. ``api_key`` is what
    the gate has to show the replica.
    """

    replica: str
    service: str
    start_hash: str
    phase: Phase
    created_at: float
    port: int | None = None
    endpoint: str | None = None
    gen: int = 1
    job_id: str | None = None
    node: str | None = None
    reason: str | None = None
    notice: str | None = None
    queued_at: float | None = None
    running_at: float | None = None
    starts_at: float | None = None
    ends_at: float | None = None
    suspended_s: float | None = None
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Stranger:
    """A job of our instance that belongs to another owner: shown, and left alone."""

    owner: str
    job_id: str
    service: str
    state: str
    host: str
