"""How long tests wait for what must come. Who comes late does not fail: that may be the computer's business, as when it does much else."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 300.0
"""Seconds after which something will not come any more. No test that passes waits so long."""


def until(holds: Callable[[], object], what: str | Callable[[], str] = "it") -> None:
    """Wait until it holds. AssertionError, with `what` was waited for, if it never does."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"waited for {what if isinstance(what, str) else what()}"
        time.sleep(0.005)
