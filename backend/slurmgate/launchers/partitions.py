"""What a partition allows, compared with what a job asks for.

Pure. A cluster that does not enforce the limits of its partitions takes jobs that can never start;
``sbatch --test-only`` says nothing about them either.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slurmgate.launchers.sbatch_args import last_value

_ANY = ("ALL", "(null)", "")
_NO_LIMIT = re.compile(r"unlimited|infinite|-1|0", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Partition:
    """``max_time`` in seconds, None without a limit; ``accounts`` None: all may use it."""

    name: str
    is_up: bool
    max_time: int | None
    accounts: frozenset[str] | None
    denied: frozenset[str]


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a job would wait in vain; ``sure`` unless settings that are not seen could help."""

    text: str
    sure: bool


def parse_partitions(text: str) -> Mapping[str, Partition]:
    """Read ``scontrol show partition -o``; lines that are none are left out."""
    found = {}
    for line in text.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in fields:
            name = fields["PartitionName"]
            found[name] = Partition(
                name=name,
                is_up=fields.get("State", "UP") == "UP",
                max_time=seconds(fields.get("MaxTime", "UNLIMITED")),
                accounts=_names(fields.get("AllowAccounts", "ALL")),
                denied=_names(fields.get("DenyAccounts", "")) or frozenset(),
            )
    return found


def doubts(partition: Partition, directives: Iterable[str], words: Sequence[str]) -> list[Doubt]:
    """Compare a partition with the script's ``#SBATCH`` lines and the arguments, which win."""
    given = [*_words(directives), *words]
    found = []
    if not partition.is_up:
        found.append(Doubt(f"partition {partition.name} is not up", sure=False))
    asked = last_value(given, "time")
    time = None if asked is None else seconds(asked)
    if partition.max_time is not None and asked is not None:
        if time is None or time > partition.max_time:
            limit = f"partition {partition.name} allows at most {partition.max_time // 60} min"
            sure = last_value(given, "qos") is None  # a QOS may lift the limit
            found.append(Doubt(f"--time={asked} is too long: {limit}", sure))
    found += _account_doubts(partition, last_value(given, "account"))
    return found


def seconds(text: str) -> int | None:
    """Seconds of a time as sbatch reads it; None: without limit, or not a time."""
    if _NO_LIMIT.fullmatch(text):
        return None
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", text, re.ASCII)
    if match is None:
        return None
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:  # days-hours, with minutes and seconds or not
        return ((days * 24 + first) * 60 + second) * 60 + third
    if match[4] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def _account_doubts(partition: Partition, account: str | None) -> list[Doubt]:
    if account is None:
        if partition.accounts is None:
            return []
        names = ", ".join(sorted(partition.accounts))
        text = f"partition {partition.name} is for the accounts {names}: --account=... names yours"
        return [Doubt(text, sure=False)]
    barred = account.lower() in partition.denied or (
        partition.accounts is not None and account.lower() not in partition.accounts
    )
    text = f"the account {account} may not use partition {partition.name}"
    return [Doubt(text, sure=True)] if barred else []


def _names(text: str) -> frozenset[str] | None:
    return None if text in _ANY else frozenset(text.lower().split(","))


def _words(directives: Iterable[str]) -> list[str]:
    found: list[str] = []
    for line in directives:
        try:
            found += shlex.split(line)
        except ValueError:  # an open quote: sbatch has its own way with it
            continue
    return found
