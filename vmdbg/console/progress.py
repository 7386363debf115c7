"""Long commands: a bar for what takes more than a second, and ^C that ends it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from introspect.commands import Cancelled

__all__ = ["Progress"]

SECONDS, BETWEEN = 1.0, 0.1
_CELLS = 24
_PATIENCE = 1.0
"""So long ^C waits for the command to look whether it is cancelled."""


class Progress:
    """Called as `Context.progress`."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show = show
        self._cancelled = self._defers = False
        self._began = self._shown = self._looked = 0.0

    @contextmanager
    def command(self) -> Iterator[None]:
        """While a command runs, in the thread that takes signals: ^C raises KeyboardInterrupt, or where it looks, `Cancelled`."""
        self._cancelled, self._began, self._shown, self._looked = False, time.monotonic(), 0.0, 0.0
        try:
            before = signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:  # not the main thread: nobody can press it
            before = None
        try:
            yield
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
            self.show("")

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """While the machine runs ^C raises nothing, for it could come amid an instruction: `take` tells of it."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False

    def take(self) -> bool:
        """Whether ^C has come since it was asked last."""
        came, self._cancelled = self._cancelled, False
        return came

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._defers:
            self._cancelled = True
            return
        if not self._cancelled and time.monotonic() - self._looked < _PATIENCE:
            self._cancelled = True
            return
        raise KeyboardInterrupt

    def __call__(self, part: float, what: str) -> None:
        now = self._looked = time.monotonic()
        if self._cancelled:
            raise Cancelled
        if now - self._began >= SECONDS and now - self._shown >= BETWEEN:
            self._shown = now
            done = min(max(part, 0.0), 1.0)
            bar = ("#" * int(done * _CELLS)).ljust(_CELLS, ".")
            self.show(f"[{bar}] {done:4.0%}  {what}  (^C cancels)")
