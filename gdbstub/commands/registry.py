"""The table of packets: each handler is registered under the name of its packet."""

from __future__ import annotations

from binascii import Error, unhexlify
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from gdbstub.agent import Program, parse
from gdbstub.target import TargetError, ThreadId

if TYPE_CHECKING:
    from gdbstub.session import Session

__all__ = ["COMMANDS", "Handler", "address_length", "command", "expression", "number", "text", "thread_id"]

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


def expression(arguments: bytes) -> tuple[Program, bytes]:
    """An agent expression, `XLENGTH,BYTES`, and what follows it. Raises TargetError."""
    length, _, rest = arguments[1:].partition(b",")
    if arguments[:1] != b"X":
        raise TargetError(f"{arguments[:20]!r} is no expression: send X, its length, a comma and its bytes in hex")
    end = 2 * number(length)
    try:
        code = unhexlify(rest[:end])
    except Error:
        raise TargetError("the bytes of an expression are not hex digits in pairs") from None
    if len(code) != end // 2:
        raise TargetError(f"the expression has {len(code)} bytes, not {end // 2}")
    return parse(code), rest[end:]


def text(digits: bytes) -> str:
    """UTF-8 in hex. Raises TargetError."""
    try:
        return unhexlify(digits).decode()
    except (Error, UnicodeDecodeError):
        raise TargetError(f"{digits[:20]!r} is not UTF-8 in hex") from None
