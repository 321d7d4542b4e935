"""Work that is handed to threads: what is dropped, and what never is."""

from __future__ import annotations

import threading

from slurmgate.launchers.workers import Workers
from tests.waiting import until


def test_work_of_a_key_that_waits_or_runs_is_not_done_twice_and_work_without_one_always_is() -> (
    None
):
    workers = Workers("test", 1)
    running, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def first() -> None:
        running.set()
        go_on.wait(20)
        done.append("first")

    assert workers.do("key", first)
    assert running.wait(20)
    assert not workers.do("key", lambda: done.append("dropped"))
    assert workers.do(None, lambda: done.append("one"))
    assert workers.do(None, lambda: done.append("two"))
    go_on.set()
    until(lambda: done == ["first", "one", "two"])
    until(lambda: workers.do("key", lambda: done.append("again")))
    until(lambda: done[3:] == ["again"])
