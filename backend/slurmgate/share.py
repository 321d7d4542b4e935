"""Where the files that are not Python lie: the gate's Lua code, the nginx template, the schema."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shared(name: str) -> Path:
    """Path of a shared file or folder, such as ``lua/gate`` or ``config/services.schema.json``.

    An installed package carries them under ``share``; in a checkout they lie at its top.
    """
    packaged = _PACKAGE / "share" / name
    return packaged if packaged.exists() else _PACKAGE.parents[1] / name
