"""The key of a replica: what its service demands of everybody, and only the gate knows. No state.

It is in the replica's record, in the environment of its job, and in what the gate is told. It
stands in no argument of a command, and nothing that is shown or logged may hold it: neither a
service that prints its environment nor a shell that prints what it runs is to give it away.
"""

from __future__ import annotations

import secrets

from slurmgate.model import ServiceSpec

VARIABLE = "SLURMGATE_API_KEY"
"""The variable in which a job finds its key."""

HIDDEN = b"[upstream key]"

_BYTES = 32


def make(spec: ServiceSpec) -> str | None:
    """Make the key of a new replica; None when its service demands none."""
    return secrets.token_urlsafe(_BYTES) if spec.upstream_key else None


def hide(output: bytes, key: str | None) -> bytes:
    """Give what somebody printed without the key."""
    return output if key is None else output.replace(key.encode(), HIDDEN)
