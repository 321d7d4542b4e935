"""What is concluded from the starts a service has behind it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurmgate.observed import Outcome, Start
from slurmgate.starts import cold_start_s, durations, quantile


def start(**changes: Any) -> Start:
    base: dict[str, Any] = {"service": "LLM", "replica": "r1", "ended": 5.0}
    return Start(**(base | {"outcome": Outcome.READY, "queue_s": 1.0, "start_s": 2.0} | changes))


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (20, 0.95, 19), (21, 0.95, 20), (100, 0.07, 7)],
)
def test_a_quantile_is_the_smallest_value_that_the_share_does_not_exceed(count, share, expected):
    assert quantile(list(range(count, 0, -1)), share) == expected


def test_the_ends_of_a_quantile_are_the_least_and_the_greatest_value():
    assert quantile([3.0, 1.0, 2.0], 0.0) == 1.0
    assert quantile([3.0, 1.0, 2.0], 1.0) == 3.0


def test_no_values_have_no_quantile():
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(0, 100))
def test_a_quantile_keeps_its_promise_for_any_values(values, percent):
    found = quantile(values, percent / 100)
    assert sum(v <= found for v in values) * 100 >= percent * len(values)
    assert sum(v < found for v in values) * 100 < max(percent, 1) * len(values)


def test_a_duration_is_the_time_in_the_queue_and_that_from_there_to_ready():
    assert durations([start(), start(queue_s=10.0)]) == [3.0, 12.0]


def test_a_start_without_a_queue_counts_and_one_of_unknown_length_does_not():
    assert durations([start(queue_s=None), start(start_s=None)]) == [2.0]


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.LOST, Outcome.CANCELLED])
def test_only_starts_that_succeeded_have_a_duration(outcome):
    assert durations([start(outcome=outcome)]) == []


def test_a_service_that_was_never_ready_has_no_usual_start():
    failed = start(outcome=Outcome.FAILED)
    assert cold_start_s([failed]) == {"p50": None, "p95": None, "n": 0}


def test_the_usual_start_of_a_service_is_shown_in_milliseconds():
    recent = [start(queue_s=0.0, start_s=n + 0.00049) for n in range(1, 21)]
    assert cold_start_s(iter(recent)) == {"p50": 10.0, "p95": 19.0, "n": 20}
