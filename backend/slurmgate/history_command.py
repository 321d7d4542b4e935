"""``slurmgate history``: how long the last starts took and what became of them.

It reads the file in the state directory, so it works whether anything runs or not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from slurmgate import history
from slurmgate.errors import StateError
from slurmgate.observed import Start
from slurmgate.starts import durations, quantile
from slurmgate.state import StateDir

SHOWN = 50
_REASON_MAX = 160
_HEAD = ("WHEN", "SERVICE", "OUTCOME", "QUEUED", "STARTED", "WHERE", "REASON")


def run_history(args: argparse.Namespace) -> int:
    """``history``: a table for people, or every start that is kept as JSON."""
    path = StateDir.find(args.state_dir).history
    try:
        found = history.read(path)
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    if found.damaged:
        sys.stderr.write(f"slurmgate: {path}: {found.damaged} damaged lines passed over\n")
    starts = _of(found.starts, args.name)
    if args.n is not None or not args.json:
        most = SHOWN if args.n is None else args.n
        starts = starts[-most:] if most > 0 else ()
    if args.json:
        text = as_json(starts)
    elif args.name is not None and not starts:
        text = _nothing_of(args.name, found.starts)
    else:
        text = table(starts)
    sys.stdout.write(f"{text}\n")
    return 0


def as_json(starts: Sequence[Start]) -> str:
    """Give the starts as a JSON array, one line each."""
    lines = [json.dumps(history.entry(start)) for start in starts]
    return "[\n" + ",\n".join(lines) + "\n]" if lines else "[]"


def table(starts: Sequence[Start]) -> str:
    """Lay out starts for people, ``ended`` on the wall clock, in local time."""
    if not starts:
        return "no starts to show"
    rows = [_HEAD, *map(_row, starts)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([*lines, _summary(starts)])


def _of(starts: Sequence[Start], name: str | None) -> Sequence[Start]:
    return [start for start in starts if name is None or start.service == name]


def _nothing_of(name: str, starts: Sequence[Start]) -> str:
    """Say of which services there are starts: the name may be mistyped."""
    names = sorted({start.service for start in starts})
    listed = ", ".join(map(history.shown, names))
    others = f"; there are starts of {listed}" if names else ", nor of any other service"
    return f"no start of {history.shown(name)} is on record{others}"


def _row(start: Start) -> tuple[str, ...]:
    reason = start.reason or ""
    return (
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.ended)),
        history.shown(start.service),
        start.outcome.value,
        _seconds(start.queue_s),
        _seconds(start.start_s),
        _where(start),
        reason if len(reason) <= _REASON_MAX else f"{reason[: _REASON_MAX - 1]}…",
    )


def _where(start: Start) -> str:
    job = "" if start.job_id is None else f"job {start.job_id}"
    return (
        " on ".join(part for part in (job, start.node or "") if part) or f"replica {start.replica}"
    )


def _summary(starts: Sequence[Start]) -> str:
    """Say how long those that succeeded took together, queue and start."""
    took = durations(starts)
    count = "1 start" if len(starts) == 1 else f"{len(starts)} starts"
    if not took:
        return f"{count}, none that succeeded"
    return (
        f"{count}, queue + start of {len(took)} that succeeded:"
        f" p50 {_seconds(quantile(took, 0.5))}, p95 {_seconds(quantile(took, 0.95))}"
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
