"""The state directory: where it is, who may use it, and the small values kept in it.

On disk, all of it 0700 / 0600 and owned by the user Slurmgate runs as:

    owner, instance, admin-token    made on first start, then kept
    management                      "disabled" while service management is off
    children.json                   the backend and the gate that ``up`` runs
    history.jsonl                   the last starts and what became of them
    run-directory                   name of the directory that holds the sockets
    up.lock, backend.lock           held by whoever runs; the kernel frees them with their process
    replicas/  logs/  nginx/        records, output of processes, the rendered configuration
    nodes/                          host keys of compute nodes that were met

``StateDir.open`` makes what is missing and is for ``up`` and the backend; ``StateDir.find`` only
reads and is for commands that talk to them. Several threads may use one StateDir.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from slurmgate.errors import StateError
from slurmgate.files import write_atomic, write_new

_LOG = logging.getLogger(__name__)

_MOUNTS = Path("/proc/self/mountinfo")
_SOCKET_DIR_MAX = 60  # a unix socket path ends at 107 bytes, and ours have names of their own
_LOWER = string.ascii_lowercase + string.digits
_NETWORK_TYPES = frozenset(
    "9p acfs afs beegfs ceph cifs davfs fhgfs gfs gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2"
    " orangefs panfs pvfs2 smb3 smbfs virtiofs wekafs".split()
)
_NETWORK_FUSE = tuple(
    f"fuse.{name}" for name in "sshfs glusterfs ceph s3fs rclone moosefs juicefs".split()
)


class Lock:
    """A file locked by this process until ``release``, the end of a ``with`` or its death."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        """Give the lock back; further calls do nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class StateDir:
    """One state directory; make it with ``open`` or ``find``."""

    path: Path
    writable: bool

    @classmethod
    def open(cls, path: Path) -> StateDir:
        """Make the directory if need be and claim it; StateError when it cannot be ours alone."""
        path = _absolute(path)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_private(path)
            state = cls(path, writable=True)
            for folder in (state.replicas, state.logs, state.nginx):
                folder.mkdir(mode=0o700, exist_ok=True)
            _ = state.owner, state.instance
            state.run_dir()
        except OSError as error:
            raise StateError(f"cannot use the state directory {path}: {error}") from error
        return state

    @classmethod
    def find(cls, path: Path) -> StateDir:
        """Read a directory somebody else opened; StateError when there is none."""
        path = _absolute(path)
        state = cls(path, writable=False)
        try:
            known = (path / "owner").exists()
        except PermissionError as error:
            raise StateError(f"the state directory {path} belongs to another user") from error
        if not known:
            raise StateError(f"{path} is no state directory of Slurmgate; give --state-dir")
        return state

    def exists(self) -> bool:
        """Whether it is still there: a cleaner, or a person, may remove it at any time."""
        return (self.path / "owner").exists()

    @property
    def replicas(self) -> Path:
        """Folder of the replica records."""
        return self.path / "replicas"

    @property
    def logs(self) -> Path:
        """Folder of the logs, one folder per service in it."""
        return self.path / "logs"

    @property
    def nginx(self) -> Path:
        """Folder of the rendered nginx configuration and nginx's temporary files."""
        return self.path / "nginx"

    @property
    def access_log(self) -> Path:
        """The gate's access log."""
        return self.path / "access.log"

    @property
    def children(self) -> Path:
        """Where ``up`` keeps which backend and which gate run."""
        return self.path / "children.json"

    @property
    def history(self) -> Path:
        """The last starts and what became of them."""
        return self.path / "history.jsonl"

    @property
    def control_socket(self) -> Path:
        """Socket of the exchange between gate and backend."""
        return self.run_dir() / "control.sock"

    @property
    def api_socket(self) -> Path:
        """Socket of the backend's HTTP interface."""
        return self.run_dir() / "api.sock"

    @property
    def inner_socket(self) -> Path:
        """Socket on which the gate asks itself."""
        return self.run_dir() / "inner.sock"

    @property
    def tunnel_sockets(self) -> Path:
        """Folder of the sockets of tunnels, and of nothing else."""
        return self.run_dir() / "t"

    @property
    def node_keys(self) -> Path:
        """Folder of the pinned host keys of compute nodes."""
        return self.path / "nodes"

    @property
    def nginx_pid(self) -> Path:
        """Where nginx writes the pid of its master."""
        return self.run_dir() / "nginx.pid"

    @property
    def owner(self) -> str:
        """Random id of this state directory, in the name or environment of all that is started."""
        return self._kept("owner", lambda: secrets.token_hex(5), r"[a-z0-9]{1,32}")

    @property
    def instance(self) -> str:
        """Name of this instance for people, unless the configuration gives another."""
        return self._kept("instance", _instance_name, r"[a-z0-9-]{1,32}")

    def admin_token(self, file: Path | None = None) -> str:
        """Give the token of admin calls, out of ``file`` if the configuration names one."""
        if file is None:
            return self._kept("admin-token", lambda: secrets.token_urlsafe(32), r"[\x21-\x7e]+")
        token = _read_text(file, "the admin token")
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise StateError(
                f"{file} holds no admin token: one line of printable characters is needed"
            )
        if file.stat().st_mode & 0o077:
            _LOG.warning("other users of this machine can read the admin token in %s", file)
        return token

    @property
    def management_enabled(self) -> bool:
        """Whether services may be started; kept over restarts."""
        try:
            return (self.path / "management").read_text().strip() != "disabled"
        except FileNotFoundError:
            return True

    def set_management(self, enabled: bool) -> None:
        """Switch service management on or off for this and every later start."""
        write_atomic(self.path / "management", b"enabled\n" if enabled else b"disabled\n")

    def log_file(self, service: str, replica: str) -> Path:
        """Name the log of a replica; distinct replicas never share one."""
        return self.logs / safe_name(service) / f"{replica}.log"

    def find_log(self, replica: str) -> Path | None:
        """Find the log of a replica of whatever service, also when it has ended long ago."""
        return next(iter(self.logs.glob(f"*/{replica}.log")), None)

    def run_dir(self) -> Path:
        """Give the directory of the sockets, as short a path as a unix socket needs.

        It is ``run`` in the state directory unless that path is too long or on a network file
        system; then it is a directory of ours in ``$XDG_RUNTIME_DIR`` or ``/tmp``, recorded here.
        """
        recorded = self.path / "run-directory"
        try:
            known = Path(recorded.read_text().strip())
        except FileNotFoundError:
            known = None
        if not self.writable:
            if known is None:
                raise StateError(f"nothing runs with the state directory {self.path}")
            return known
        if known is not None and (_is_private(known) or _made_again(known)):
            return known
        fresh = _make_run_dir(self.path)
        write_atomic(recorded, os.fsencode(fresh) + b"\n")
        return fresh

    def remove_run_dir(self) -> None:
        """Remove the sockets' directory if it is not in here; a later start makes another one.

        Called when nothing listens there any more.
        """
        recorded = self.path / "run-directory"
        path = self.run_dir()
        if self.path not in path.parents:
            shutil.rmtree(path, ignore_errors=True)
            recorded.unlink(missing_ok=True)

    def lock(self, name: str) -> Lock:
        """Take the lock ``name``; StateError says who has it when it is taken."""
        path = self.path / f"{name}.lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StateError(f"cannot lock {path}: {error.strerror}") from error
            raise StateError(
                f"another slurmgate ({holder or 'pid unknown'}) uses the state directory"
                f" {self.path}; stop it or give another one with --state-dir"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return Lock(fd)

    def _kept(self, name: str, make: Callable[[], str], pattern: str) -> str:
        """Read a value made on first use; whoever makes it first wins."""
        path = self.path / name
        if self.writable and not path.exists():
            with contextlib.suppress(FileExistsError):  # somebody made it just now: keep theirs
                write_new(path, make().encode() + b"\n")
        value = _read_text(path, f"the {name}")
        if not re.fullmatch(pattern, value):
            raise StateError(f"{path} is damaged; remove it and a new one is made")
        return value


def default_path(environ: Mapping[str, str]) -> Path:
    """Give the state directory of whoever names none."""
    given = environ.get("SLURMGATE_STATE_DIR")
    if given:
        return Path(given)
    return Path(environ.get("HOME") or os.path.expanduser("~")) / ".local/state/slurmgate"


def safe_name(name: str) -> str:
    """Turn a service's name into a file name: ``[A-Za-z0-9._-]``, never a leading dot.

    A name that has to be changed for that gets a hash, so that no two names share a file.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]|^\.", "_", name)[:100]
    if safe == name and name:
        return safe
    return f"{safe}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def network_filesystem(path: Path) -> str | None:
    """Name the type of the network file system ``path`` is on; None for a local one."""
    target = os.path.realpath(path)
    best, kind = "", ""
    for line in _MOUNTS.read_text(errors="replace").splitlines():
        fields = line.split()
        mount = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):  # of two mounts on one place the later one shows
            best, kind = mount, fields[fields.index("-") + 1]
    return kind if kind in _NETWORK_TYPES or kind.startswith(_NETWORK_FUSE) else None


def _absolute(path: Path) -> Path:
    return Path(os.path.realpath(path.expanduser()))


def _make_private(path: Path) -> None:
    """Make sure nobody else can enter; only an empty directory or one of ours is changed."""
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise StateError(
            f"the state directory {path} belongs to uid {found.st_uid}, not to uid"
            f" {os.geteuid()} that runs Slurmgate; give another one with --state-dir"
        )
    if not found.st_mode & 0o077:
        return
    ours = (path / "owner").exists() or not any(path.iterdir())
    try:
        if ours:
            path.chmod(0o700)
            return
    except OSError as error:
        _LOG.debug("chmod of %s: %s", path, error)
    raise StateError(
        f"other users can enter the state directory {path} (mode"
        f" {stat.S_IMODE(found.st_mode):o}); chmod 700 it or give another one with --state-dir"
    )


def _is_private(path: Path) -> bool:
    """Say whether a directory is real, ours and closed to others."""
    try:
        found = path.lstat()
    except OSError:
        return False
    closed = not found.st_mode & 0o077
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and closed


def _made_again(path: Path) -> bool:
    """Make a directory that a cleaner removed: who uses its sockets knows no other path."""
    try:
        path.mkdir(mode=0o700)  # fails if somebody made it meanwhile: it would not be ours
    except OSError:
        return False
    return _is_private(path)


def _make_run_dir(state: Path) -> Path:
    inside = state / "run"
    if len(os.fsencode(inside)) <= _SOCKET_DIR_MAX and network_filesystem(state) is None:
        inside.mkdir(mode=0o700, exist_ok=True)
        inside.chmod(0o700)
        return inside
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/")
    short = len(os.fsencode(runtime)) <= _SOCKET_DIR_MAX - len("/sg-01234567")
    if short and runtime != Path("/") and _is_private(runtime):
        path = runtime / f"sg-{secrets.token_hex(4)}"
    else:
        path = Path(f"/tmp/sg-{os.geteuid()}-{secrets.token_hex(4)}")
    path.mkdir(mode=0o700)  # fails if somebody made it before: never use what we did not make
    return path


def _instance_name() -> str:
    host = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")
    return f"{host[:27] or 'gate'}-{''.join(secrets.choice(_LOWER) for _ in range(4))}"


def _read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        detail = error.strerror if isinstance(error, OSError) else "not a text file"
        raise StateError(f"cannot read {what} in {path}: {detail}") from error
