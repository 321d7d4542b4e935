"""Tunnels to replicas on a cluster: OpenSSH processes, supervised by one thread.

Each listens on a unix socket that nginx dials, runs in a session of its own and outlives the
backend: the next one finds it by its mark and takes it over with every connection through it.
"""

from slurmgate.tunnels.observer import TunnelObserver
from slurmgate.tunnels.routes import Route
from slurmgate.tunnels.supervisor import Tunnels

__all__ = ["Route", "TunnelObserver", "Tunnels"]
