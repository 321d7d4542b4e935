"""Slurmgate's backend: jobs, tunnels, timeouts and configuration behind the nginx gate."""

__version__ = "0.1.0"
