"""What the gate tells clients holds, also when they come at just that moment."""

from __future__ import annotations

import time

from tests.waiting import until


def test_a_client_that_comes_back_after_retry_after_is_not_refused_again(product):
    tries = product.folder / "tries"
    script = product.script("bad.sh", f'echo try >> "{tries}"; exit 1')
    product.service("bad", script)
    product.up()

    def count() -> int:
        return len(tries.read_text().splitlines()) if tries.exists() else 0

    for expected in (1, 2, 3):
        began = time.monotonic()
        answer = product.get("/bad/")
        assert answer.json()["type"].endswith("start-failed")
        assert count() == expected, "refused without a start"
        back_at = time.monotonic() + int(answer.headers["Retry-After"])
        # Others who ask meanwhile are told the time that is left, not the whole again.
        until(lambda began=began: time.monotonic() > began + 0.6)
        assert product.get("/bad/").json()["retry_after_s"] <= max(
            1, back_at - time.monotonic() + 0.3
        )
        until(lambda back_at=back_at: time.monotonic() >= back_at)
