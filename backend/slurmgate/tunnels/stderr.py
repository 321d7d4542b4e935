"""What ssh says on its standard error, told apart by meaning. Pure: text in, findings out.

A child of ours runs with LANG=C and LogLevel=INFO. Its own connections are channels from 1 on
(channel 0 is the listener); a line about channel 0 comes from a proxy command, which reaches the
host to log in to through another one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

_CHANNEL = re.compile(r"channel (\d+): open failed: ([^:]+)(?:: (.*))?")
_PROHIBITED = ("administratively prohibited", "unknown channel type")
_NO_RESOLVER = "Temporary failure in name resolution"
_UNKNOWN_NAME = (
    "Name or service not known",
    "No address associated with hostname",
    "Non-recoverable failure in name resolution",
    "nodename nor servname provided",
)
_NO_ROUTE = ("No route to host", "Network is unreachable")

_CHANGED = "REMOTE HOST IDENTIFICATION HAS CHANGED"
_CHANGED_HOST = re.compile(r"Host key for (\S+) has changed")
_FINGERPRINT = re.compile(r"^SHA256:[A-Za-z0-9+/]+", re.MULTILINE)
_OFFENDING = re.compile(r"^Offending \S+ key in (.+):\d+$", re.MULTILINE)
_UNKNOWN_KEY = re.compile(r"No (\S+) host key is known for (\S+)")
_DENIED = re.compile(r"^(?:\S+@)?(\S+): Permission denied \([^)]*\)\.?$", re.MULTILINE)
_TOO_MANY = re.compile(
    r"^.*(?:from (\S+) port \d+:\d+: )Too many authentication failures$", re.MULTILINE
)
_BIND = re.compile(r"^bind \[[^\]]*\]:\d+: (.+)$", re.MULTILINE)
_ADDRESS = re.compile(r"getaddrinfo\((.+)\): (.+)$", re.MULTILINE)
_CONNECT = re.compile(r"^ssh: (?:connect to host|Could not resolve hostname) .+$", re.MULTILINE)
_SAYS_LITTLE = re.compile(
    r"UNKNOWN port 65535|Could not request local forwarding|stdio forwarding failed"
    r"|^muxclient: master|^\s*$|^@+$"
)


class Meaning(StrEnum):
    """What one failed connection through a tunnel, or the end of its ssh, means."""

    REFUSED = "refused"  # nobody listens there yet
    HOPELESS = "hopeless"  # will not change by waiting
    DOUBTFUL = "doubtful"  # hopeless if it does not pass soon
    LOCAL = "local"  # the local address cannot be listened on
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Place:
    """Names for people: what a tunnel leads to, as ``host:port``, and through which host.

    ``pins`` is the file with the pinned host keys of a compute node that is logged in to.
    """

    target: str
    via: str
    pins: str | None = None

    @property
    def host(self) -> str:
        """The host part of the target."""
        return self.target.rpartition(":")[0]


@dataclass(frozen=True, slots=True)
class Finding:
    """A meaning with a clause that says it to people."""

    meaning: Meaning
    text: str


def connection_failed(line: str, place: Place) -> Finding | None:
    """Read what a running ssh says of one connection through it; None for any other line."""
    match = _CHANNEL.search(line)
    if match is None:
        return None
    words = f"{match[2]}: {match[3]}" if match[3] else match[2]
    proxied = match[1] == "0"
    target = f"sshd of {place.via}" if proxied else place.target
    via = "the host before it" if proxied else place.via
    if any(text in words for text in _PROHIBITED):
        text = f"{via} does not forward to {target}: {words}; its sshd_config must allow it"
        return Finding(Meaning.HOPELESS, f"{text} (AllowTcpForwarding yes, PermitOpen)")
    unknown = any(text in words for text in _UNKNOWN_NAME)
    if unknown or _NO_RESOLVER in words:
        host = place.via if proxied else place.host
        text = f"{via} cannot find the address of {host}: {words}; its resolver must know that name"
        meaning = Meaning.HOPELESS if unknown else Meaning.DOUBTFUL
        return Finding(meaning, f"{text} (or NodeAddr in slurm.conf be an address)")
    if any(text in words for text in _NO_ROUTE):
        text = f"{via} cannot reach {target}: {words}; open the port in the firewall between them"
        advice = "" if proxied or place.pins else ' or use "tunnel": "node-loopback"'
        return Finding(Meaning.HOPELESS, text + advice)
    if "Connection refused" in words:
        return Finding(Meaning.REFUSED, words)
    return Finding(Meaning.OTHER, f"{via} could not connect to {target}: {words}")


def ended(lines: Sequence[str], place: Place, exit_words: str) -> Finding:
    """Say why an ssh has ended, by what it printed last and how it exited, in words."""
    text = "\n".join(lines)
    return (
        _host_key(text, place)
        or _denied(text)
        or _cannot_listen(text)
        or _connect(text, lines, place)
        or Finding(Meaning.OTHER, _last_words(lines) or f"ssh {exit_words}")
    )


def _host_key(text: str, place: Place) -> Finding | None:
    if "Host key verification failed" not in text:
        return None
    if _CHANGED in text:
        host, shown = _CHANGED_HOST.search(text), _FINGERPRINT.search(text)
        file = _OFFENDING.search(text)
        name = host[1] if host else place.via
        key = shown[0] if shown else "another one"
        where = file[1] if file else place.pins or "known_hosts"
        what = f"remove {where}" if place.pins == where else f"correct {where}"
        return Finding(
            Meaning.HOPELESS,
            f"the host key of {name} has changed, it is now {key}; if that is right, {what}",
        )
    unknown = _UNKNOWN_KEY.search(text)
    name, kind = (unknown[2], unknown[1]) if unknown else (place.via, "")
    pinned = place.pins is not None and name == place.via
    what = f"remove {place.pins}" if pinned else "add its key to ssh_known_hosts"
    kind = f"{kind} " if kind else ""
    return Finding(
        Meaning.HOPELESS, f"the {kind}host key of {name} is not known; if it is right, {what}"
    )


def _denied(text: str) -> Finding | None:
    match = _DENIED.search(text) or _TOO_MANY.search(text)
    if match is None:
        return None
    return Finding(Meaning.HOPELESS, f"{match[1]} refused the login: {match[0].strip()}")


def _cannot_listen(text: str) -> Finding | None:
    match = _BIND.search(text)
    if match is not None:
        return Finding(Meaning.LOCAL, match[1])
    match = _ADDRESS.search(text)
    return None if match is None else Finding(Meaning.LOCAL, match[2])


def _connect(text: str, lines: Sequence[str], place: Place) -> Finding | None:
    for line in lines:
        found = connection_failed(line, place) if "channel 0:" in line else None
        if found is not None:
            meaning = Meaning.HOPELESS if found.meaning is Meaning.HOPELESS else Meaning.OTHER
            return Finding(meaning, found.text)
    match = _CONNECT.search(text)
    return None if match is None else Finding(Meaning.OTHER, match[0].removeprefix("ssh: "))


def _last_words(lines: Sequence[str]) -> str | None:
    telling = [line.strip() for line in lines if not _SAYS_LITTLE.search(line)]
    return telling[-1] if telling else None
