"""Commands on login hosts, through SSH or on this machine; the only user of paramiko.

``Remotes`` is what others use; it owns every connection. The modules: ``remotes`` keeps one
connection per login host, ``dialing`` makes one, ``connection`` runs commands on it, ``children``
runs them in local processes, ``script`` frames them, ``known_hosts`` and ``keys`` say who is who.
"""

from slurmgate.ssh.outcome import HostAway, HostRefused, Output, Unfinished
from slurmgate.ssh.remotes import Remotes

__all__ = ["HostAway", "HostRefused", "Output", "Remotes", "Unfinished"]
