"""A measured figure against its bound, and the table of all of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from slurmgate.starts import quantile

HEADINGS = ("what", "measured", "must reach", "spread", "rounds", "")


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that must stay on its side of a bound; without a bound it only informs.

    ``digits`` is how exactly it is shown; ``ok`` looks at the whole number. ``spread`` says in
    words how far the rounds lay apart.
    """

    name: str
    measured: float
    bound: float | None
    unit: str = ""
    at_least: bool = False
    digits: int = 2
    spread: str = ""
    rounds: int = 1

    @property
    def ok(self) -> bool:
        if self.bound is None:
            return True
        if math.isnan(self.measured):
            return False
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def row(self) -> tuple[str, ...]:
        bound = ""
        if self.bound is not None:
            bound = f"{'≥' if self.at_least else '≤'} {self._shown(self.bound)}"
        verdict = "" if self.bound is None else "ok" if self.ok else "MISSED"
        return (
            self.name,
            self._shown(self.measured),
            bound,
            self.spread,
            str(self.rounds),
            verdict,
        )

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "measured": None if math.isnan(self.measured) else self.measured,
            "bound": self.bound,
            "at_least": self.at_least,
            "unit": self.unit,
            "spread": self.spread,
            "rounds": self.rounds,
            "ok": self.ok,
        }

    def _shown(self, number: float) -> str:
        return f"{number:,.{self.digits}f} {self.unit}".rstrip()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one benchmark found: its figures, what was compared, and every raw number."""

    figures: list[Figure]
    notes: list[str]
    raw: dict[str, object]


def quartiles(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Say between which values the middle half lies."""
    low, high = quantile(values, 0.25), quantile(values, 0.75)
    return f"half in {low:,.{digits}f}…{high:,.{digits}f} {unit}".rstrip()


def span(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Say between which values all lie."""
    return f"all in {min(values):,.{digits}f}…{max(values):,.{digits}f} {unit}".rstrip()


def paired(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Give the quotient of each round: both of its sides met the same noise."""
    return [a / b for a, b in zip(above, below, strict=True)]


def middle(values: Sequence[float]) -> float:
    return float(median(values))


def table(figures: Sequence[Figure]) -> str:
    """Lay the figures out as one table of text."""
    rows = [HEADINGS, *(figure.row() for figure in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    numeric = {1, 2, 4}
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
