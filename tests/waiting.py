"""Waiting for conditions in tests: a deadline instead of a fixed sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T | None], seconds: float = 20.0) -> T:
    """Return the first true value of ``condition``; AssertionError when none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        # Looked at before, so that a machine which stands still does not cost the last look.
        over = time.monotonic() > deadline
        value = condition()
        if value:
            return value
        if over:
            raise AssertionError(f"not within {seconds} s: {getattr(condition, '__doc__', '')}")
        time.sleep(0.01)
