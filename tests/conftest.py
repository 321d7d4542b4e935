"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# Busy machines are slow: a test says what happens, not how long it takes.
settings.register_profile("slurmgate", deadline=None)
settings.load_profile("slurmgate")
