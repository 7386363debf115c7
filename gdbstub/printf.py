"""printf as agent expressions have it: integers, characters and strings of the inferior (no floating point, no `*`, no %n)."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gdbstub.target import TargetError

__all__ = ["Format"]

LONGEST_STRING = 4096
"""Of a %s without a precision, in bytes."""
_WIDEST = 1 << 10

_CONVERSION = re.compile(r"%([-+ #0]*)(\d*)(?:\.(\d*))?(hh|h|ll|l|z|j|t)?(.)", re.DOTALL)
_ESCAPE = re.compile(r"\\([0-7]{1,3}|.|$)", re.DOTALL)
_ESCAPES = {"\\": "\\", '"': '"', "a": "\a", "b": "\b", "e": "\33", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_BITS = {"hh": 8, "h": 16, None: 32}


class _Conversion(NamedTuple):
    text: str
    """For Python's % operator: its rules are C's."""
    kind: str
    bits: int
    precision: int | None


class Format:
    """A format, taken apart once.  `count` is the number of its arguments.  TargetError if it asks for what is not offered."""

    def __init__(self, text: str) -> None:
        text = _ESCAPE.sub(_escape, text)
        self._parts: list[str | _Conversion] = []
        end = 0
        while (start := text.find("%", end)) >= 0:
            self._parts.append(text[end:start])
            found = _CONVERSION.match(text, start)
            if found is None:
                raise TargetError(f"the format {text!r} ends in the middle of a conversion: write %% for a percent sign")
            self._parts.append("%" if found[0] == "%%" else _conversion(found))
            end = found.end()
        self._parts.append(text[end:])
        self.count = sum(isinstance(part, _Conversion) for part in self._parts)

    def __call__(self, arguments: Sequence[int], memory: Callable[[int, int], bytes]) -> str:
        """The text for 64-bit values; `memory` gives the readable prefix of a range, for strings."""
        values = iter(arguments)
        return "".join(p if isinstance(p, str) else _convert(p, next(values), memory) for p in self._parts)


def _escape(found: re.Match[str]) -> str:
    """GDB sends the format as it was typed."""
    if found[1].isdecimal():
        return chr(int(found[1], 8) & 0xFF)
    if found[1] not in _ESCAPES:
        raise TargetError(f"{found[0]!r} is no escape: use \\\\ for a backslash")
    return _ESCAPES[found[1]]


def _conversion(found: re.Match[str]) -> _Conversion:
    flags, width, precision, length, kind = found.groups()
    if kind not in "diouxXcsp" or (kind in "cs" and length) or (kind == "o" and "#" in flags):
        raise TargetError(f"the conversion {found[0]!r} is not offered: use d i u o x X c s p, and %% for a percent sign")
    if any(int(number or 0) > _WIDEST for number in (width, precision)):
        raise TargetError(f"the conversion {found[0]!r} is wider than {_WIDEST}: make it narrower")
    limit = None if precision is None else int(precision or 0)
    own = {"i": "d", "u": "d", "p": "x"}.get(kind, kind)
    point = "" if precision is None else f".{limit}"
    mark = "#" if kind == "p" else ""
    return _Conversion(f"%{flags}{mark}{width}{point}{own}", kind, 64 if kind == "p" else _BITS.get(length, 64), limit)


def _convert(part: _Conversion, value: int, memory: Callable[[int, int], bytes]) -> str:
    if part.kind == "s":
        size = LONGEST_STRING if part.precision is None else part.precision
        return part.text % _string(value, size, memory)
    if part.kind == "c":
        return part.text % chr(value & 0xFF)
    value &= (1 << part.bits) - 1
    if part.kind in "di" and value >> part.bits - 1:
        value -= 1 << part.bits
    return part.text % value


def _string(address: int, size: int, memory: Callable[[int, int], bytes]) -> str:
    """Up to its NUL; read a page at a time, since it may end where memory does."""
    found = b""
    while len(found) < size and b"\0" not in found:
        here = address + len(found)
        more = memory(here, min(size - len(found), 4096 - here % 4096))
        if not more:
            raise TargetError(f"the string at {address:#x} runs into {here:#x}, where no memory is readable")
        found += more
    return found.partition(b"\0")[0].decode("utf-8", "replace")
