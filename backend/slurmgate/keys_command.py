"""``slurmgate keys``: make, show and revoke the keys of clients.

It works on the file alone, so it needs no running Slurmgate; one that runs follows within two
seconds. The secret goes to standard output, by itself and once; words go to standard error. What
needs the schema is imported where it is used, so that other commands start quickly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from slurmgate import keys, keys_file
from slurmgate.errors import ConfigError, KeysError, KeysMissing
from slurmgate.keys import Key
from slurmgate.model import Config

_HEAD = ("NAME", "SERVICES", "A MINUTE", "IN FLIGHT", "EXPIRES", "CREATED")
_HOW_MANY_NAMED = 20


def run_add(args: argparse.Namespace) -> int:
    """``keys add``: the secret alone on standard output."""
    known = _config(args)
    path = _keys_file(known)
    now = int(time.time())
    secret = keys.new_secret()
    key = Key(
        name=_good_name(args.name),
        sha256=keys.digest(secret),
        services=None if args.services is None else _services(args.services, known),
        rpm=args.rpm,
        in_flight=args.in_flight,
        expires=None if args.expires is None else _expiry(args.expires, now),
        created=now,
    )
    keys_file.change(path, _adding(key, path))
    sys.stdout.write(f"{secret}\n")
    sys.stdout.flush()
    sys.stderr.write(
        f"{path}: key {key.name} added; {_limits(key)}.\n"
        "The line on standard output is the secret: it is not kept and cannot be shown again.\n"
        'Clients send it as "Authorization: Bearer ..." or "x-api-key: ..." (OPENAI_API_KEY,'
        " ANTHROPIC_API_KEY);\n"
        f"a gate that runs takes it within 2 seconds. slurmgate keys revoke {key.name} ends it.\n"
    )
    return 0


def run_list(args: argparse.Namespace) -> int:
    """``keys list``: a table for people, or JSON."""
    path = _keys_file_anyway(args)
    found: tuple[Key, ...] = ()
    with contextlib.suppress(KeysMissing):  # before the first
        found = keys.load(path)
    now = int(time.time())
    text = as_json(found, now) if args.json else table(found, now)
    sys.stdout.write(f"{text}\n")
    return 0


def run_revoke(args: argparse.Namespace) -> int:
    """``keys revoke``."""
    path = _keys_file_anyway(args)
    keys_file.change(path, _revoking(args.name, path))
    sys.stdout.write(f"{args.name}: revoked; a gate that runs refuses it within 2 seconds\n")
    return 0


def table(found: Sequence[Key], now: int) -> str:
    """Lay out keys for people, times in local time."""
    if not found:
        return "no keys; slurmgate keys add NAME makes one"
    rows = [_HEAD, *(_row(key, now) for key in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join(lines)


def as_json(found: Sequence[Key], now: int) -> str:
    """Give the keys as a JSON array without their hashes."""
    entries = []
    for key in found:
        entry = keys.entry(key)
        del entry["sha256"]
        entries.append(entry | {"expired": _expired(key, now)})
    return json.dumps(entries, indent=1)


def _config(args: argparse.Namespace) -> Config:
    from slurmgate import config

    return config.load(args.config)


def _keys_file_anyway(args: argparse.Namespace) -> Path:
    """Name the file though the configuration has mistakes elsewhere: while somebody mends them a
    key can be revoked.
    """
    from slurmgate.config.specs import resolve

    try:
        return _keys_file(_config(args))
    except ConfigError:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            match json.loads(args.config.read_bytes()):
                case {"keys_file": str(name)} if name and name.isprintable():
                    return resolve(name, args.config.absolute().parent)
        raise


def _nearest(word: str, known: Iterable[str]) -> str | None:
    from slurmgate.config.report import nearest

    return nearest(word, known)


def _keys_file(known: Config) -> Path:
    if known.keys_file is None:
        raise KeysError(
            [
                f'{known.path}: names no keys_file, so nobody needs a key; write "keys_file":'
                ' "keys.json" beside "Services" there, then try again'
            ]
        )
    return known.keys_file


def _good_name(name: str) -> str:
    if not keys.is_name(name):
        raise KeysError([f"{name!r} cannot be the name of a key; give {keys.NAME_IS}"])
    return name


def _services(text: str, known: Config) -> tuple[str, ...]:
    """Find the services by name or route; KeysError for those there are not."""
    names = {spec.route_name: spec.name for spec in known.services}
    names |= {spec.name: spec.name for spec in known.services}
    asked = [part.strip() for part in text.split(",")]
    wrong = [_no_service(name, names) for name in asked if name not in names]
    if wrong:
        raise KeysError(wrong)
    return tuple(dict.fromkeys(names[name] for name in asked))


def _no_service(name: str, known: dict[str, str]) -> str:
    close = _nearest(name, known)
    if close is not None:
        return f"--services: no service is called {name!r}; did you mean {close!r}?"
    names = sorted(set(known.values()))
    more = ", ..." if len(names) > _HOW_MANY_NAMED else ""
    listed = ", ".join(names[:_HOW_MANY_NAMED]) + more
    return f"--services: no service is called {name!r}; there are: {listed or 'none'}"


def _expiry(text: str, now: int) -> int:
    try:
        moment = keys.parse_expiry(text)
    except ValueError as error:
        raise KeysError([f"--expires: {error}"]) from error
    if moment <= now:
        raise KeysError([f"--expires: {text} has passed; give a day or time to come"])
    return moment


def _adding(key: Key, path: Path) -> Callable[[tuple[Key, ...]], tuple[Key, ...]]:
    def fold(found: tuple[Key, ...]) -> tuple[Key, ...]:
        if any(other.name == key.name for other in found):
            raise KeysError(
                [
                    f"{path}: a key called {key.name} is there already; choose another name, or"
                    f" end that one first: slurmgate keys revoke {key.name}"
                ]
            )
        return (*found, key)

    return fold


def _revoking(name: str, path: Path) -> Callable[[tuple[Key, ...]], tuple[Key, ...]]:
    def fold(found: tuple[Key, ...]) -> tuple[Key, ...]:
        left = tuple(key for key in found if key.name != name)
        if left == found:
            close = _nearest(name, (key.name for key in found))
            hint = f"did you mean {close!r}?" if close else "slurmgate keys list shows all"
            raise KeysError([f"{path}: no key is called {name!r}; {hint}"])
        return left

    return fold


def _limits(key: Key) -> str:
    """Say in words what it is for."""
    parts = [f"for {'all services' if key.services is None else ', '.join(key.services)}"]
    if key.rpm:
        parts.append(f"{key.rpm} requests a minute")
    if key.in_flight:
        parts.append(f"{key.in_flight} in flight")
    if key.expires is not None:
        parts.append(f"until {_local(key.expires)}")
    return "; ".join(parts)


def _row(key: Key, now: int) -> tuple[str, ...]:
    expires = "-" if key.expires is None else _local(key.expires)
    return (
        key.name,
        "all" if key.services is None else ", ".join(map(_printable, key.services)),
        str(key.rpm or "-"),
        str(key.in_flight or "-"),
        f"{expires} (expired)" if _expired(key, now) else expires,
        "-" if key.created is None else _local(key.created),
    )


def _expired(key: Key, now: int) -> bool:
    return key.expires is not None and key.expires <= now


def _local(moment: int) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def _printable(text: str) -> str:
    """A name out of a file that somebody may have edited, safe for a terminal."""
    return text if text.isprintable() else ascii(text)
