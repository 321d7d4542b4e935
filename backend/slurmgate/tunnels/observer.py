"""What is told of tunnels, and to whom."""

from __future__ import annotations

from typing import Protocol


class TunnelObserver(Protocol):
    """Told by the supervisor's thread; must not block."""

    def opened(self, key: str) -> None:
        """Say that the tunnel's socket accepts connections from now on."""

    def lost(self, key: str, reason: str) -> None:
        """Say that the tunnel broke or could not be opened, and why; it is tried again."""

    def hopeless(self, key: str, reason: str) -> None:
        """Say that nothing can come through the tunnel, however long one waits."""

    def notice(self, key: str, text: str | None) -> None:
        """Say why a ``local_port`` is not listened on; None when it is."""
