"""Read the arguments of sbatch as sbatch itself will: options, their values, stray words.

Pure. Slurm's options differ a little between versions: an option that is not listed here may take
the word after it, or may not, and is given the benefit of the doubt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_SHORT_WITH_VALUE = frozenset("aAbBcCdDeFGiJLmMnNopqStwx")
_SHORT_WITHOUT = frozenset("hHIkKOQsuvVW")
_SHORT_NAMES = {
    "a": "array",
    "A": "account",
    "D": "chdir",
    "e": "error",
    "h": "help",
    "J": "job-name",
    "M": "clusters",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "Q": "quiet",
    "t": "time",
    "u": "usage",
    "V": "version",
    "w": "nodelist",
    "W": "wait",
    "x": "exclude",
}
_LONG_WITHOUT = frozenset(
    {
        "contiguous",
        "disable-stdout-job-summary",
        "exclusive",
        "get-user-env",
        "help",
        "hold",
        "ignore-pbs",
        "nice",
        "no-kill",
        "no-requeue",
        "overcommit",
        "oversubscribe",
        "parsable",
        "propagate",
        "quiet",
        "reboot",
        "requeue",
        "resv-ports",
        "spread-job",
        "test-only",
        "usage",
        "use-min-nodes",
        "verbose",
        "version",
        "wait",
    }
)
_LONG_WITH_VALUE = frozenset(
    {
        "account",
        "acctg-freq",
        "array",
        "batch",
        "bb",
        "bbf",
        "begin",
        "chdir",
        "cluster",
        "cluster-constraint",
        "clusters",
        "comment",
        "constraint",
        "container",
        "core-spec",
        "cores-per-socket",
        "cpu-freq",
        "cpus-per-gpu",
        "cpus-per-task",
        "deadline",
        "delay-boot",
        "dependency",
        "distribution",
        "error",
        "exclude",
        "export",
        "export-file",
        "extra-node-info",
        "gid",
        "gpu-bind",
        "gpu-freq",
        "gpus",
        "gpus-per-node",
        "gpus-per-socket",
        "gpus-per-task",
        "gres",
        "gres-flags",
        "hint",
        "input",
        "job-name",
        "kill-on-invalid-dep",
        "licenses",
        "mail-type",
        "mail-user",
        "mcs-label",
        "mem",
        "mem-bind",
        "mem-per-cpu",
        "mem-per-gpu",
        "mincpus",
        "network",
        "nodefile",
        "nodelist",
        "nodes",
        "ntasks",
        "ntasks-per-core",
        "ntasks-per-gpu",
        "ntasks-per-node",
        "ntasks-per-socket",
        "open-mode",
        "output",
        "partition",
        "power",
        "prefer",
        "priority",
        "profile",
        "qos",
        "reservation",
        "signal",
        "sockets-per-node",
        "switches",
        "thread-spec",
        "threads-per-core",
        "time",
        "time-min",
        "tmp",
        "tres-per-task",
        "uid",
        "wait-all-nodes",
        "wckey",
        "wrap",
    }
)


@dataclass(frozen=True, slots=True)
class Option:
    """One option as sbatch understands it.

    ``name`` is the long name, without dashes and abbreviations undone where they are known, or the
    letter; ``index`` where it stands in the list. ``missing`` says that a value had to follow.
    ``name`` is empty for a word that is neither option nor value: sbatch would run it as script.
    """

    name: str
    value: str | None
    index: int
    missing: bool = False


def read_options(words: Sequence[str]) -> tuple[Option, ...]:
    """Go through the words from left to right, as getopt does."""
    found: list[Option] = []
    index = 0
    while index < len(words):
        options, used = _read_word(words, index)
        found += options
        index += used
    return tuple(found)


def last_value(words: Sequence[str], name: str) -> str | None:
    """Value of an option by its long name, the last one where it is given twice; else None."""
    values = [option.value for option in read_options(words) if option.name == name]
    return values[-1] if values else None


def _read_word(words: Sequence[str], index: int) -> tuple[list[Option], int]:
    """Options in the word at this index, and how many words they take."""
    word = words[index]
    if word.startswith("--") and word != "--":
        option, used = _read_long(words, index)
        return [option], used
    if word.startswith("-") and word not in ("-", "--"):
        return _read_short(words, index)
    return [Option("", word, index)], 1


def _read_long(words: Sequence[str], index: int) -> tuple[Option, int]:
    name, separator, value = words[index][2:].partition("=")
    name = _unabbreviated(name)
    if separator:
        return Option(name, value, index), 1
    if name in _LONG_WITHOUT:
        return Option(name, None, index), 1
    if index + 1 < len(words) and (
        name in _LONG_WITH_VALUE or not words[index + 1].startswith("-")
    ):
        return Option(name, words[index + 1], index), 2
    return Option(name, None, index, missing=name in _LONG_WITH_VALUE), 1


def _read_short(words: Sequence[str], index: int) -> tuple[list[Option], int]:
    """Letters in a row; the first that takes a value takes the rest of the word, or the next."""
    found: list[Option] = []
    word = words[index]
    for position, letter in enumerate(word[1:], start=2):
        name = _SHORT_NAMES.get(letter, letter)
        rest = word[position:]
        if letter in _SHORT_WITHOUT:
            found.append(Option(name, None, index))
        elif rest:
            return [*found, Option(name, rest, index)], 1
        elif letter in _SHORT_WITH_VALUE or _follows_value(words, index):
            return [*found, *_from_next(name, words, index)], 2
        else:
            found.append(Option(name, None, index))
    return found, 1


def _follows_value(words: Sequence[str], index: int) -> bool:
    return index + 1 < len(words) and not words[index + 1].startswith("-")


def _from_next(name: str, words: Sequence[str], index: int) -> Iterator[Option]:
    if index + 1 < len(words):
        yield Option(name, words[index + 1], index)
    else:
        yield Option(name, None, index, missing=True)


def _unabbreviated(name: str) -> str:
    """The one option that this begins; sbatch refuses what begins several."""
    known = _LONG_WITH_VALUE | _LONG_WITHOUT
    if name in known or not name:
        return name
    meant = [candidate for candidate in known if candidate.startswith(name)]
    return meant[0] if len(meant) == 1 else name
