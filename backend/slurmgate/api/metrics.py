"""``GET /metrics``: the control loop's view in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from slurmgate import __version__, scaling, snapshot
from slurmgate.control import Control
from slurmgate.keyring import Keyring, KeyUse
from slurmgate.model import Phase
from slurmgate.observed import COLD_START_BOUNDS, Service
from slurmgate.ports import Clock

STATES = ("cold", "waking", "ready", "draining", "failed", "disabled", "unknown")


def blueprint(control: Control, keyring: Keyring, clock: Clock) -> Blueprint:
    """The one route; the gate lets only private networks reach it."""
    routes = Blueprint("metrics", __name__)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_ViewCollector(control, keyring, clock))

    @routes.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)

    return routes


class _ViewCollector(Collector):
    """Makes the metrics anew for each scrape; holds no numbers of its own."""

    def __init__(self, control: Control, keyring: Keyring, clock: Clock) -> None:
        self._control = control
        self._keyring = keyring
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        view, now = self._control.view, self._clock()
        services = [s for s in view.services if not s.retired]
        build = GaugeMetricFamily("slurmgate_build", "The version running.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        enabled = GaugeMetricFamily("slurmgate_management_enabled", "1: services are started.")
        enabled.add_metric([], view.enabled)
        yield enabled
        yield from _demand(services)
        yield from _states(services, now)
        yield from _starts(services)
        yield from _keys(self._keyring)


def _demand(services: list[Service]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "slurmgate_requests", "Requests that came for a service.", labels=["service"]
    )
    waiting = GaugeMetricFamily("slurmgate_waiting", "Requests held.", labels=["service"])
    in_flight = GaugeMetricFamily(
        "slurmgate_in_flight", "Requests at a replica.", labels=["service"]
    )
    for service in services:
        requests.add_metric([service.spec.name], service.demand.requests)
        waiting.add_metric([service.spec.name], service.demand.waiting)
        in_flight.add_metric([service.spec.name], service.demand.in_flight)
    yield from (requests, waiting, in_flight)


def _states(services: list[Service], now: float) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "slurmgate_service_state", "1 for the state it is in.", labels=["service", "state"]
    )
    replicas = GaugeMetricFamily(
        "slurmgate_replicas", "Replicas by phase.", labels=["service", "phase"]
    )
    wanted = GaugeMetricFamily(
        "slurmgate_replicas_wanted", "How many its load wants at present.", labels=["service"]
    )
    for service in services:
        wanted.add_metric([service.spec.name], scaling.wanted(service, now))
        current = snapshot.state(service, now)
        for state in STATES:
            states.add_metric([service.spec.name, state], state == current)
        for phase in Phase:
            count = sum(r.phase is phase for r in service.replicas)
            if count:
                replicas.add_metric([service.spec.name, phase.value], count)
    yield from (states, replicas, wanted)


def _starts(services: list[Service]) -> Iterator[Metric]:
    starts = CounterMetricFamily(
        "slurmgate_starts", "Starts by outcome.", labels=["service", "outcome"]
    )
    lost = CounterMetricFamily(
        "slurmgate_replicas_lost", "Replicas that ended while ready.", labels=["service"]
    )
    durations = HistogramMetricFamily(
        "slurmgate_cold_start_seconds", "From submission to ready.", labels=["service"]
    )
    for service in services:
        name = service.spec.name
        for outcome, count in service.starts.items():
            starts.add_metric([name, outcome], count)
        lost.add_metric([name], service.lost)
        buckets, below = [], 0
        histogram = service.cold_start_histogram
        for bound, count in zip((*COLD_START_BOUNDS, None), histogram.counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound is None else str(bound), below))
        durations.add_metric([name], buckets, histogram.total)
    yield from (starts, lost, durations)


def _keys(keyring: Keyring) -> Iterator[Metric]:
    """Count for every key in force, and for one revoked while the gate still speaks of it."""
    requests = CounterMetricFamily(
        "slurmgate_key_requests", "Requests that came with a key.", labels=["key"]
    )
    refused = CounterMetricFamily(
        "slurmgate_key_refused",
        "Requests with the key that were refused for its limits or rights.",
        labels=["key"],
    )
    in_flight = GaugeMetricFamily(
        "slurmgate_key_in_flight", "Requests under way that came with a key.", labels=["key"]
    )
    unused = {key.name: KeyUse() for key in keyring.current.keys}
    for name, use in (unused | dict(keyring.use)).items():
        requests.add_metric([name], use.requests)
        refused.add_metric([name], use.refused)
        in_flight.add_metric([name], use.in_flight)
    yield from (requests, refused, in_flight)
