"""Pure sums over the starts a service has behind it: how long its next one is likely to take.

Keeps no state. All durations are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from slurmgate.observed import Outcome, Start

_ROUNDING = 1e-9  # 0.07 * 100 is a little more than 7


def quantile(values: Sequence[float], share: float) -> float:
    """Give the smallest value that at least ``share`` (0 to 1) of the values do not exceed.

    ValueError when there are no values.
    """
    if not values:
        raise ValueError("no values")
    place = math.ceil(share * len(values) - _ROUNDING) - 1
    return sorted(values)[min(max(place, 0), len(values) - 1)]


def durations(recent: Iterable[Start]) -> list[float]:
    """Give queue and start time together of each start that succeeded, in the order given.

    One of which nobody knows when it began to run is left out; a process has no queue.
    """
    return [
        (start.queue_s or 0.0) + start.start_s
        for start in recent
        if start.outcome is Outcome.READY and start.start_s is not None
    ]


def cold_start_s(recent: Iterable[Start]) -> dict[str, float | int | None]:
    """Give ``cold_start_s`` of ``/info``: p50, p95, and of how many starts they are."""
    values = durations(recent)
    if not values:
        return {"p50": None, "p95": None, "n": 0}
    return {
        "p50": round(quantile(values, 0.5), 3),
        "p95": round(quantile(values, 0.95), 3),
        "n": len(values),
    }
