"""Following a log of which only the last lines can be asked for."""

from __future__ import annotations

from slurmgate.log_command import added


def test_only_what_was_added_is_shown():
    assert added(["a", "b"], ["a", "b", "c"]) == ["c"]
    assert added(["a", "b"], ["a", "b"]) == []


def test_lines_that_have_left_the_window_are_no_reason_to_show_any_twice():
    assert added(["a", "b", "c"], ["b", "c", "d"]) == ["d"]


def test_a_window_that_has_moved_on_altogether_is_shown_whole():
    assert added(["a", "b"], ["x", "y"]) == ["x", "y"]
    assert added([], ["x"]) == ["x"]
