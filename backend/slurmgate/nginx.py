"""The gate's nginx configuration: rendered from a GateSpec, written, and tried with nginx itself.

Rendering is pure. Every value is quoted for the place it stands in, and refused where nginx has no
way to quote it, so that no path or name can become a directive.
"""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jinja2

from slurmgate.errors import ConfigError, StateError
from slurmgate.files import write_atomic
from slurmgate.model import GateSpec
from slurmgate.share import lua_dir, nginx_template
from slurmgate.state import StateDir

_UNQUOTABLE = re.compile(r"[\x00-\x1f\x7f$]")
_LISTEN = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+|\*):([0-9]{1,5})")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\$?( [A-Za-z_][A-Za-z0-9_.-]*\$?)?")
_CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
)
_CONNECTIONS = 16384
_MOST_FILES = 65536
_TEST_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class NginxPaths:
    """Every file and directory the configuration names; ``error_log`` may be ``stderr``."""

    run_dir: Path
    state_dir: Path
    lua_dir: Path
    access_log: Path
    pid: Path
    temp_dir: Path
    error_log: str = "stderr"


def render(
    gate: GateSpec, paths: NginxPaths, *, user: str | None = None, open_files: int = 20000
) -> str:
    """Give the text of nginx.conf; raise ConfigError for a value that cannot be quoted.

    ``user`` ("NAME" or "NAME GROUP") is whom the workers run as, for a master started by root.
    ``open_files`` is the hard limit of open files, which bounds the connections of each worker.
    """
    if user is not None and not _USER.fullmatch(user):
        raise ConfigError([f"user: {user!r} is no user name"])
    lua_path = f"{paths.lua_dir}/?.lua;;"
    if any(mark in str(paths.lua_dir) for mark in "?;"):
        raise ConfigError([f"{paths.lua_dir}: Lua's search path cannot have '?' or ';' in it"])
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    environment.filters["q"] = _quote_word
    environment.filters["lua"] = _quote_lua
    try:
        source = nginx_template().read_text(encoding="utf-8")
    except OSError as error:
        raise StateError(f"the gate's files are missing, install again: {error}") from error
    template = environment.from_string(source)
    return template.render(
        gate=_checked(gate),
        paths=paths,
        lua_path=lua_path,
        user=user,
        open_files=open_files,
        tls_ciphers=":".join(_CIPHERS),
        worker_connections=min(_CONNECTIONS, open_files),
    )


def paths_of(state: StateDir) -> NginxPaths:
    """Give the places of the gate's files for one state directory."""
    return NginxPaths(
        run_dir=state.run_dir(),
        state_dir=state.path,
        lua_dir=lua_dir(),
        access_log=state.access_log,
        pid=state.nginx_pid,
        temp_dir=state.nginx,
    )


def conf_of(state: StateDir) -> Path:
    """Give the place of the configuration that ``up`` runs nginx with."""
    return state.nginx / "nginx.conf"


def render_for(gate: GateSpec, state: StateDir) -> str:
    """Render for this machine and user: as root the workers stay root, like everything else."""
    user = None
    if os.geteuid() == 0:
        user = f"{pwd.getpwuid(0).pw_name} {grp.getgrgid(os.getegid()).gr_name}"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    return render(gate, paths_of(state), user=user, open_files=limit)


def write(text: str, conf: Path) -> None:
    """Write the configuration for its owner only, replacing an older one in one step."""
    conf.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(conf, text.encode())


def find_nginx() -> str:
    """Give the path of the nginx program: Debian's, or OpenResty's."""
    for name in ("nginx", "/usr/sbin/nginx", "openresty"):
        found = shutil.which(name)
        if found:
            return found
    raise StateError("nginx is not installed: apt install nginx-light libnginx-mod-http-lua")


def test(nginx_binary: str, conf: Path) -> None:
    """Let nginx check a configuration; raise ConfigError with nginx's own words. Blocks."""
    argv = [nginx_binary, "-t", "-q", "-e", "stderr", "-c", str(conf)]
    try:
        result = subprocess.run(
            argv, capture_output=True, text=True, timeout=_TEST_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError([f"nginx -t: {error}"]) from error
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise ConfigError(lines or [f"nginx -t ended with code {result.returncode}"])


def _checked(gate: GateSpec) -> GateSpec:
    match = _LISTEN.fullmatch(gate.listen)
    if match is None or not 0 < int(match.group(2)) < 65536:
        raise ConfigError([f"gate.listen: {gate.listen!r} is no HOST:PORT"])
    for field, networks in (
        ("private", gate.private),
        ("trusted_proxies", gate.trusted_proxies),
    ):
        for network in networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigError([f"gate.{field}: {error}"]) from error
    return gate


def _quote_word(value: object) -> str:
    text = str(value)
    if _UNQUOTABLE.search(text):
        raise ConfigError([f"{text!r}: nginx cannot have '$' or a control character here"])
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _quote_lua(value: object) -> str:
    text = str(value)
    if _UNQUOTABLE.search(text):
        raise ConfigError([f"{text!r}: nginx cannot have '$' or a control character here"])
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
