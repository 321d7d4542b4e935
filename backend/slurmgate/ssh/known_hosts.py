"""Files of known host keys, read as OpenSSH reads them, and what to do about a key not in them.

Keeps no state: the files are read for each connection, so that a line added counts at once.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurmgate.ssh.outcome import HostRefused

_SCAN_TYPES = {"ssh-ed25519": "ed25519", "ssh-rsa": "rsa"}


@dataclass(frozen=True, slots=True)
class HostKey:
    """A public key: its type as SSH names it, and the bytes that are the key."""

    kind: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """The fingerprint as ``ssh-keygen -l`` shows it."""
        digest = base64.b64encode(hashlib.sha256(self.blob).digest()).decode()
        return "SHA256:" + digest.rstrip("=")

    def __str__(self) -> str:
        return f"{self.kind} {self.fingerprint}"


@dataclass(frozen=True, slots=True)
class _Line:
    file: Path
    marker: str
    patterns: tuple[str, ...]
    key: HostKey


@dataclass(frozen=True, slots=True)
class KnownHost:
    """What the files say of one host; ``direct``: this machine can reach it without a jump."""

    host: str
    port: int
    add_to: Path
    direct: bool
    lines: tuple[_Line, ...]
    unported: tuple[_Line, ...]

    @property
    def kinds(self) -> list[str]:
        """Types of the keys it is known by: the ones to ask it for."""
        return [line.key.kind for line in self.lines or self.unported if not line.marker]

    def check(self, shown: HostKey) -> None:
        """Return when ``shown`` is the host's key; HostRefused with the way out when not."""
        for line in (*self.lines, *self.unported):
            if line.marker == "@revoked" and line.key == shown:
                raise HostRefused(
                    f"{self._name} shows the key {shown}, which {line.file} has as @revoked"
                )
        trusted = [line for line in self.lines if not line.marker]
        # Like OpenSSH: a host not filed under [host]:port may be the one filed under its name only.
        candidates = trusted or [line for line in self.unported if not line.marker]
        if any(line.key == shown for line in candidates):
            return
        if trusted:
            raise HostRefused(self._changed(trusted, shown))
        raise HostRefused(
            f"{self._name} is not a known host: it shows the key {shown}. Compare this with what"
            f" its administrators say, then add it: {self._add(shown)}"
        )

    @property
    def _name(self) -> str:
        return f"{self.host} port {self.port}"

    def _changed(self, trusted: Sequence[_Line], shown: HostKey) -> str:
        expected = ", ".join(dict.fromkeys(str(line.key) for line in trusted))
        files = dict.fromkeys(line.file for line in trusted)
        entry = _entry(self.host, self.port)
        forget = "; ".join(shlex.join(["ssh-keygen", "-R", entry, "-f", str(f)]) for f in files)
        return (
            f"the host key of {self._name} has changed, or somebody is in between: expected"
            f" {expected}, it shows {shown}. If its administrators say that this is right, forget"
            f" the old key: {forget}; then add the new one: {self._add(shown)}"
        )

    def _add(self, shown: HostKey) -> str:
        file = shlex.quote(str(self.add_to))
        if not self.direct:
            line = f"{_entry(self.host, self.port)} {shown.kind} "
            line += base64.b64encode(shown.blob).decode()
            return f"echo {shlex.quote(line)} >> {file}"
        kind = _SCAN_TYPES.get(shown.kind, "ecdsa")
        scan = ["ssh-keyscan", "-t", kind, "-p", str(self.port), self.host]
        return f"{shlex.join(scan)} >> {file}"


def look_up(host: str, port: int, files: Sequence[Path], *, direct: bool) -> KnownHost:
    """Find all lines of ``files`` about a host; the first file is the one to add to.

    HostRefused when a file is there and cannot be read.
    """
    name = host.lower()
    entries = [line for file in files for line in _read(file)]
    filed = _entry(name, port)
    lines = tuple(line for line in entries if _matches(line.patterns, filed))
    unported = () if filed == name else tuple(e for e in entries if _matches(e.patterns, name))
    return KnownHost(host, port, files[0], direct, lines, unported)


def _entry(host: str, port: int) -> str:
    return host if port == 22 else f"[{host}]:{port}"


def _read(file: Path) -> Iterator[_Line]:
    try:
        text = file.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise HostRefused(f"the known hosts in {file} cannot be read: {error.strerror}") from error
    for line in text.splitlines():
        words = line.split()
        marker = words.pop(0) if line.startswith("@") else ""
        if len(words) < 3 or words[0].startswith("#"):
            continue
        try:
            key = HostKey(words[1], base64.b64decode(words[2], validate=True))
        except binascii.Error:
            continue
        yield _Line(file, marker, tuple(words[0].split(",")), key)


def _matches(patterns: Sequence[str], name: str) -> bool:
    found = False
    for pattern in patterns:
        negated = pattern.startswith("!")
        if _matches_one(pattern.removeprefix("!"), name):
            if negated:
                return False
            found = True
    return found


def _matches_one(pattern: str, name: str) -> bool:
    if pattern.startswith("|1|"):
        return _matches_hash(pattern, name)
    # Only * and ? mean something to OpenSSH; the brackets of [host]:port do not.
    return fnmatch.fnmatchcase(name, pattern.lower().replace("[", "[[]"))


def _matches_hash(pattern: str, name: str) -> bool:
    try:
        salt, digest = (base64.b64decode(part, validate=True) for part in pattern.split("|")[2:4])
    except ValueError:
        return False
    return hmac.compare_digest(hmac.digest(salt, name.encode(), "sha1"), digest)
