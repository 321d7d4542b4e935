"""Takes turns logging in to one host: sshd drops those above its MaxStartups, 10 by default.

A ``Turns`` belongs to the loop's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_AT_ONCE = 6  # the connection for commands, and people, want to log in too


class Turn:
    """One caller's place; it is waiting for its turn, has it, or neither."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._work: Callable[[], None] | None = None
        self._has_it = False

    def take(self, work: Callable[[], None]) -> None:
        """Call ``work`` when it is our turn, maybe at once; the last one asked for counts."""
        waiting = self._work is not None
        self._work = work
        if self._has_it:
            self.begin()
        elif not waiting:
            self._turns.enter(self)

    def begin(self) -> None:
        """It is our turn."""
        work, self._work = self._work, None
        self._has_it = True
        if work is not None:
            work()

    def leave(self) -> None:
        """Give the turn back, or stop waiting for it; harmless when there is none."""
        had_it, self._has_it, self._work = self._has_it, False, None
        self._turns.left(self, had_it=had_it)


class Turns:
    """Lets a few log in at a time, in the order they came."""

    def __init__(self) -> None:
        self._busy = 0
        self._waiting: deque[Turn] = deque()

    def enter(self, turn: Turn) -> None:
        """Begin, or wait in line."""
        if self._busy < _AT_ONCE:
            self._busy += 1
            turn.begin()
        else:
            self._waiting.append(turn)

    def left(self, turn: Turn, *, had_it: bool) -> None:
        """Let the next one begin."""
        if not had_it:
            if turn in self._waiting:
                self._waiting.remove(turn)
            return
        self._busy -= 1
        if self._waiting:
            self.enter(self._waiting.popleft())
