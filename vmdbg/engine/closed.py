"""Engines that are closed and still there: their parts refer to each other, so that only Python's collector frees them.

It comes when many objects were made, and knows nothing of the two gibibytes of address space that each of them holds.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["closed", "keep_at_most", "make_room"]

BESIDES = 2 << 30
"""Bytes of address space besides RAM, nearly: what Unicorn reserves for translated code, and our own tables."""
_held: WeakKeyDictionary[Engine, int] = WeakKeyDictionary()
_most = 64 << 30
_needed = 0
"""What somebody still referred to when it was collected last: to collect again frees none of that."""


def keep_at_most(size: int) -> None:
    """So many bytes may be held by closed engines when another one is made; it is a process's own."""
    global _most
    _most = size


def closed(engine: Engine) -> None:
    """Nobody uses it any more."""
    _held[engine] = engine.ram.end + BESIDES


def make_room() -> None:
    """Before another engine is made."""
    global _needed
    _needed = min(_needed, sum(_held.values()))
    if sum(_held.values()) - _needed > _most:
        gc.collect()
        _needed = sum(_held.values())
