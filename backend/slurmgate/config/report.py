"""What validation found: problems and warnings, one line each, beginning with a JSON path."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from slurmgate.model import Config

Step = str | int
JsonPath = tuple[Step, ...]

_IDENTIFIER = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")
_SHOWN_LENGTH = 60
_MOST_PROBLEMS = 1000


@dataclass(frozen=True, slots=True)
class Findings:
    """The result for a whole file; ``config`` is None when there are problems."""

    config: Config | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(slots=True)
class Report:
    """Collects findings while a document is validated; belongs to one validation."""

    _problems: list[tuple[JsonPath, str]] = field(default_factory=list)
    _warnings: list[tuple[JsonPath, str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many problems there are."""
        return len(self._problems)

    @property
    def full(self) -> bool:
        """No more problems are taken: a file of garbage would have one for each of its bytes."""
        return self.count >= _MOST_PROBLEMS

    def has_problem(self, path: JsonPath) -> bool:
        """Say whether something is wrong at just this place."""
        return any(where == path for where, _ in self._problems)

    def problem(self, path: JsonPath, text: str) -> None:
        """Note something that makes the file unusable."""
        if not self.full:
            self._problems.append((path, text))

    def warn(self, path: JsonPath, text: str) -> None:
        """Note something the user should know although the file can be used."""
        self._warnings.append((path, text))

    def findings(self, config: Config | None) -> Findings:
        """Give the result, in the order of paths; ``config`` None when there are problems."""
        problems = _lines(self._problems)
        if self.full:
            problems += ("$: there may be more problems than these",)
        return Findings(config, problems, self.warning_lines())

    def warning_lines(self) -> tuple[str, ...]:
        """Give the warnings alone, as a configuration keeps them."""
        return _lines(self._warnings)


def show_path(path: JsonPath) -> str:
    """Write a path as people would: ``Services[1].timeout``; the whole document is ``$``."""
    shown = ""
    for step in path:
        if isinstance(step, int):
            shown += f"[{step}]"
        elif _IDENTIFIER.fullmatch(step):
            shown += f".{step}" if shown else step
        else:
            shown += f"[{_shorten(json.dumps(step))}]"
    return shown or "$"


def show_value(value: object) -> str:
    """Write a JSON value short enough for one line; containers are only named."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return _shorten(json.dumps(value))


def nearest(word: str, known: Iterable[str], *, alike: float = 0.6) -> str | None:
    """The known word most like this one, whatever its case; None when none is alike.

    ``alike`` is the least likeness, between 0 and 1 for the same word.
    """
    by_folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(word.casefold()[:_SHOWN_LENGTH], by_folded, n=1, cutoff=alike)
    return by_folded[close[0]] if close else None


def _lines(found: list[tuple[JsonPath, str]]) -> tuple[str, ...]:
    return tuple(f"{show_path(path)}: {text}" for path, text in sorted(found, key=_place))


def _place(finding: tuple[JsonPath, str]) -> list[tuple[int, str]]:
    return [(step, "") if isinstance(step, int) else (0, step) for step in finding[0]]


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 3] + "..."
