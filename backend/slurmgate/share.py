"""Where the files beside the Python code are: the nginx template, the Lua modules, the schema.

In a checkout they lie at its root; an installed package carries them in ``slurmgate/share``.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def share_dir() -> Path:
    """Give the directory that holds ``openresty/``, ``lua/`` and ``config/``."""
    installed = _PACKAGE / "share"
    return installed if installed.is_dir() else _PACKAGE.parent.parent


def nginx_template() -> Path:
    """Give the path of the template of the nginx configuration."""
    return share_dir() / "openresty" / "nginx.conf.j2"


def lua_dir() -> Path:
    """Give the directory that goes into nginx's Lua search path."""
    return share_dir() / "lua"


def schema_file() -> Path:
    """Give the path of the configuration's JSON schema."""
    return share_dir() / "config" / "services.schema.json"
