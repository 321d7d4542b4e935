"""Which nodes a service's next job keeps away from: those where several replicas failed lately.

Pure. A failure of the node itself counts against it, whatever else fails. One of the service on a
node counts only as long as it fails nowhere else: what fails on two nodes in a row is the service.
"""

from __future__ import annotations

from collections import Counter

from slurmgate.model import LauncherKind
from slurmgate.observed import Service, Strike

SEVERAL = 2
FORGOTTEN_AFTER = 3600.0
MOST = 8


def struck(service: Service, node: str, now: float, *, own: bool) -> tuple[Strike, ...]:
    """Count a failure there; ``own``: it was the node's doing."""
    kept = _fresh(service, now)
    if not own and any(not strike.own and strike.node != node for strike in kept):
        kept = tuple(strike for strike in kept if strike.own)
    return (*kept, Strike(node, now, own))


def worked(service: Service, node: str | None) -> tuple[Strike, ...]:
    """A replica became ready there: what the service failed at before is forgiven. A node that
    fails itself mostly does so later.
    """
    return tuple(s for s in service.strikes if s.own or s.node != node)


def avoided(service: Service, now: float) -> tuple[str, ...]:
    """Nodes where the next job shall not run, those that failed most first."""
    if service.spec.launcher is not LauncherKind.SLURM:
        return ()
    counts = Counter(strike.node for strike in _fresh(service, now))
    return tuple(node for node, count in counts.most_common(MOST) if count >= SEVERAL)


def _fresh(service: Service, now: float) -> tuple[Strike, ...]:
    return tuple(strike for strike in service.strikes if now - strike.at < FORGOTTEN_AFTER)
