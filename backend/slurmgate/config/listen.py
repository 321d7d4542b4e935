"""Addresses to listen on, as ``HOST:PORT``."""

from __future__ import annotations

import ipaddress
import re

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


def parse_listen(listen: str) -> tuple[str, int] | None:
    """Split ``HOST:PORT`` or ``[IPv6]:PORT``; None when it is neither. Brackets are taken off."""
    host, colon, port = listen.rpartition(":")
    if not colon or not _PORT.fullmatch(port) or int(port) > 65535:
        return None
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        return (host, int(port)) if _is_ipv6(host) else None
    return (host, int(port)) if _HOST_NAME.fullmatch(host) else None


def listen_problem(listen: str, *, is_open: bool) -> str | None:
    """Say why the gate must not listen there; None when it may.

    ``is_open``: on purpose, or because clients have to show a key.
    Also for ``slurmgate up --listen``, which must not open what the file keeps closed.
    """
    parsed = parse_listen(listen)
    if parsed is None:
        return 'is not HOST:PORT; it should be like "127.0.0.1:8080" or "[::1]:8080"'
    if is_open or _is_loopback(parsed[0]):
        return None
    return (
        "is not a loopback address, so anybody who reaches it could start jobs; "
        'a "keys_file" beside "Services" lets in only who has a key; set "open": true in "gate" '
        "if everybody should"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_ipv6(host: str) -> bool:
    try:
        return "%" not in host and ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
