"""What services print when somebody else listens on their port. Pure: lines in, an answer out."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TAKEN = re.compile(
    r"address (?:is )?already in use|EADDRINUSE|AddrInUse|\berrno:? ?98\b|\bos error 98\b"
    r"|port is already allocated|only one usage of each socket address"
    r"|error while attempting to bind on address|connection in use: \("
    r"|\bport:? ?[0-9]+ is (?:already )?in use|already in use"
    r"|couldn'?t bind (?:http )?server socket|cannot find empty port in range",
    re.IGNORECASE,
)
_NAMED_PORT = re.compile(
    r"(?:\bport[ :=]{0,2}|[0-9]\.[0-9]{1,3}:|\]:|:::|\blocalhost:|\*:|[ (]:|['\"], ?|range: )"
    r"([0-9]{2,5})\b",
    re.IGNORECASE,
)


def is_told(lines: Iterable[str], port: int) -> bool:
    """Whether the service says that somebody else listens on its port.

    A line that names another port is about that one (a port for metrics, say).
    """
    for line in lines:
        if _TAKEN.search(line):
            ports = {int(number) for number in _NAMED_PORT.findall(line)}
            if not ports or port in ports:
                return True
    return False
