"""Run the benchmarks: ``python -m tests.bench [--quick] [NAME ...]``.

Prints one table and writes ``build/bench.json``. Exit code 1 if a figure was missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from math import nan
from pathlib import Path

import httpx

from tests.bench import (
    cold,
    crowd,
    handover,
    killed,
    large_body,
    openai,
    prefixes,
    replicas,
    rest,
    slot,
    slurm_cold,
    slurm_crowd,
    slurm_rest,
    slurm_tunnel,
    streams,
    warm,
)
from tests.bench.figures import Figure, Outcome, table
from tests.bench.machine import allow_open_files, facts
from tests.lab.lab import LabError

RESULTS = Path(__file__).resolve().parents[2] / "build" / "bench.json"
OPEN_FILES = 12000
BENCHMARKS: dict[str, Callable[[bool], Outcome]] = {
    "throughput": warm.throughput,
    "latency": warm.latency,
    "openai": openai.openai,
    "model_20mb": large_body.model_20mb,
    "streams": streams.streams,
    "affinity": prefixes.affinity,
    "release": cold.release,
    "cold": cold.cold,
    "crowd": crowd.crowd,
    "rest": rest.rest,
    "replicas": replicas.replicas,
    "slot": slot.slot,
    "killed": killed.killed,
    "slurm_cold": slurm_cold.slurm_cold,
    "slurm_tunnel": slurm_tunnel.slurm_tunnel,
    "slurm_crowd": slurm_crowd.slurm_crowd,
    "slurm_rest": slurm_rest.slurm_rest,
    "handover": handover.handover,
}


def measure(name: str, quick: bool) -> Outcome:
    """Run one benchmark; one that breaks is a missed figure, and the others still run."""
    sys.stderr.write(f"{name} …\n")
    try:
        return BENCHMARKS[name](quick)
    except (
        AssertionError,
        OSError,
        httpx.HTTPError,
        LabError,
        subprocess.SubprocessError,
    ) as error:
        traceback.print_exc()
        broken = Figure(f"{name}: could not be measured", nan, 0.0)
        return Outcome([broken], [f"{type(error).__name__}: {error}"], {})


def report(outcomes: dict[str, Outcome]) -> None:
    figures = [figure for outcome in outcomes.values() for figure in outcome.figures]
    sys.stdout.write(table(figures) + "\n\n")
    for name, outcome in outcomes.items():
        for note in outcome.notes:
            sys.stdout.write(f"{name}: {note}\n")


def write(outcomes: dict[str, Outcome], quick: bool, machine: dict[str, object]) -> None:
    document = {
        "machine": machine,
        "quick": quick,
        "benchmarks": {
            name: {
                "figures": [figure.as_json() for figure in outcome.figures],
                "raw": outcome.raw,
            }
            for name, outcome in outcomes.items()
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="few rounds: for development only")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    allow_open_files(OPEN_FILES)
    machine = facts()
    began = time.monotonic()
    outcomes = {name: measure(name, options.quick) for name in options.names or BENCHMARKS}
    machine["seconds"] = round(time.monotonic() - began)
    write(outcomes, options.quick, machine)
    report(outcomes)
    missed = [f for outcome in outcomes.values() for f in outcome.figures if not f.ok]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
