"""slurmctld hangs or dies: traffic flows on, no job is lost or doubled, who waits is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tests.slurm.product import ClusterProduct, ask
from tests.waiting import until

OUTAGE_S = 30.0


class Traffic(threading.Thread):
    """Asks a ready service again and again until ``end``; keeps what came."""

    def __init__(self, product: ClusterProduct) -> None:
        super().__init__(daemon=True)
        self._product = product
        self._ended = threading.Event()
        self.statuses: list[int] = []
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            self.statuses.append(self._product.get("/probe/pid").status_code)

    def end(self) -> None:
        self._ended.set()
        self.join(30)
        assert set(self.statuses) == {200}
        assert len(self.statuses) > 10


def outage(product: ClusterProduct, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Both a ready service and a cold one live through it."""
    product.job()
    product.job("other")
    product.up()
    product.get("/probe/pid")
    (job,) = product.live()
    saved = product.lab.folder / "slurmctld" / "job_state"
    until(lambda: saved.exists() and job.name.encode() in saved.read_bytes())
    traffic = Traffic(product)
    begin()
    began = time.monotonic()
    waiting = ask(product, "/other/pid")
    until(lambda: time.monotonic() - began > OUTAGE_S, OUTAGE_S + 5)
    assert not waiting.done
    end()
    assert waiting.answer(100).status_code == 200
    traffic.end()
    until(lambda: len(product.live("other")) == 1)
    assert [j.id for j in product.live()] == [job.id]
    assert product.replica()["job_id"] == job.id
    assert product.replica("other")["job_id"] == product.live("other")[0].id


def test_slurmctld_hangs(own_product: ClusterProduct):
    outage(own_product, own_product.lab.slurmctld.pause, own_product.lab.slurmctld.resume)


def test_slurmctld_is_killed_and_restarted(own_product: ClusterProduct):
    outage(own_product, own_product.lab.slurmctld.kill, own_product.lab.slurmctld.start)


def test_slurmctld_hangs_in_the_moment_of_a_submission(own_product: ClusterProduct):
    own_product.job()
    own_product.up()
    own_product.lab.slurmctld.pause()
    waiting = ask(own_product)
    until(lambda: own_product.info()["reason"], 30)
    until(lambda: "submi" in (own_product.info()["reason"] or ""), 60)
    own_product.lab.slurmctld.resume()
    assert waiting.answer(100).status_code == 200
    until(lambda: len(own_product.live()) == 1)
    assert own_product.replica()["job_id"] == own_product.live()[0].id


def test_the_backend_is_killed_while_slurmctld_hangs(own_product: ClusterProduct):
    own_product.job()
    own_product.up()
    own_product.get("/probe/pid")
    (job,) = own_product.live()
    own_product.lab.slurmctld.pause()
    own_product.kill_backend()
    assert own_product.get("/probe/pid").status_code == 200
    own_product.lab.slurmctld.resume()
    until(lambda: own_product.info()["state"] == "ready", 60)
    assert [j.id for j in own_product.live()] == [job.id]
    assert own_product.get("/probe/pid").status_code == 200
