"""The table of packets: each handler is registered under the name of its packet."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from gdbstub.target import TargetError, ThreadId

if TYPE_CHECKING:
    from gdbstub.session import Session

__all__ = ["COMMANDS", "Handler", "address_length", "command", "number", "thread_id"]

# Takes what follows the packet's name; gives the reply, b"" for "not supported", None for no reply (yet).
Handler = Callable[["Session", bytes], bytes | None]

COMMANDS: dict[bytes, Handler] = {}


def command(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for packets of these names."""

    def register(handler: Handler) -> Handler:
        for name in names:
            COMMANDS[name.encode()] = handler
        return handler

    return register


def number(text: bytes) -> int:
    """A number of up to 64 bits in hex, as the protocol writes all of them. Raises TargetError."""
    # int() alone would take signs, spaces and underscores.
    if text.isalnum() and len(text) <= 16:
        try:
            return int(text, 16)
        except ValueError:
            pass
    raise TargetError(f"{text[:20]!r} is not a number: send 1 to 16 hex digits")


def address_length(text: bytes) -> tuple[int, int]:
    """`ADDRESS,LENGTH`. Raises TargetError."""
    address, _, length = text.partition(b",")
    return number(address), number(length)


@lru_cache(256)
def thread_id(text: bytes) -> ThreadId:
    """`TID`, `pPID` or `pPID.TID`: -1 for all, 0 for any. Without `p` the pid is 0: the current one.

    Raises TargetError.
    """
    if text[:1] == b"p":
        pid, dot, tid = text[1:].partition(b".")
        return ThreadId(_wild(pid), _wild(tid) if dot else -1)
    return ThreadId(0, _wild(text))


def _wild(text: bytes) -> int:
    return -1 if text == b"-1" else number(text)
