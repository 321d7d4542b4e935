"""Data of coverage in subprocesses. Tests kill processes while they write theirs; coverage warns of
most of what they leave, but some of it ends the whole run when it is combined.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path


def remove_broken(folder: Path) -> list[Path]:
    """Remove data that cannot be combined; what was removed."""
    broken = [path for path in folder.glob(".coverage.*") if not _is_whole(path)]
    for path in broken:
        path.unlink(missing_ok=True)
    return broken


def _is_whole(path: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as data:
            tables = data.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            return bool(tables and data.execute("PRAGMA integrity_check").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False
