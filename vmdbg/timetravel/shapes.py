# SPDX-License-Identifier: GPL-2.0-or-later
"""What values look like: small functions that say of a value from a file in what way it is none that a machine comes to.

A shape is given the value, and the one that the machine has which was just made, where there is one.  It says nothing ("") of
what fits it, or what is wrong, as words that go on where the value's name ends: " is 9, not a number from 0 to 7".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

Shape: TypeAlias = Callable[[Any, Any], str]

MOST_TEXT = 1 << 16
"""Characters of words for people."""


def shown(value: object, most: int = 60) -> str:
    """A value in a line: as much of it as there is room for, and nothing that a terminal would obey."""
    try:
        text = hex(value) if type(value) is int and abs(value) >= 1 << 20 else repr(value)
    except (ValueError, RecursionError):  # in it a number of more digits than Python writes, or a nest
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str, most: int = 1000) -> str:
    """A text in a line, without what a terminal would obey; of a long one beginning and end."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return text if text.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _no(value: object, what: str) -> str:
    return f" is {shown(value)}, not {what}"


def same(value: Any, old: Any) -> str:
    """What the machine is made of."""
    return "" if type(value) is type(old) and value == old else _no(value, f"{shown(old)}, as the machine is made")


def flag(value: Any, old: Any) -> str:
    """True or False."""
    return "" if type(value) is bool else _no(value, "yes or no")


def _is_number(value: object) -> bool:
    """Also one with a class of its own, as a requester's ID or a member of an enumeration is."""
    return isinstance(value, int) and type(value) is not bool


def number(low: int, high: int) -> Shape:
    """From `low` to `high`."""

    def shape(value: Any, old: Any) -> str:
        if _is_number(value) and low <= value <= high:
            return ""
        return _no(value, f"a number from {low} to {high}" if high < 1 << 20 else f"a number from {low:#x} to {high:#x}")

    return shape


def bits(count: int) -> Shape:
    """A register."""
    return number(0, (1 << count) - 1)


def within(mask: int) -> Shape:
    """A register that has no other bits than these."""

    def shape(value: Any, old: Any) -> str:
        fits = _is_number(value) and value >= 0 and not value & ~mask
        return "" if fits else _no(value, f"a number with no bits but {mask:#x}")

    return shape


def choice(*values: Any) -> Shape:
    """One of these."""

    def shape(value: Any, old: Any) -> str:
        fits = any(type(value) is type(one) and value == one for one in values)
        return "" if fits else _no(value, f"one of {', '.join(map(repr, values))}")

    return shape


def text(value: Any, old: Any) -> str:
    """Words for people, on one line."""
    if type(value) is str and len(value) <= MOST_TEXT and value.isprintable():
        return ""
    return _no(value, f"a line of at most {MOST_TEXT} printable characters")


def data(low: int, high: int | None = None) -> Shape:
    """So many bytes, or at least and at most so many."""
    return partial(_bytes, bytes, low, low if high is None else high)


def buffer(low: int, high: int | None = None) -> Shape:
    """Likewise, that change."""
    return partial(_bytes, bytearray, low, low if high is None else high)


def _bytes(kind: Any, low: int, high: int, value: Any, old: Any) -> str:
    if type(value) is kind and low <= len(value) <= high:
        return ""
    return _no(value, f"{low} bytes" if low == high else f"{low} to {high} bytes")


def maybe(shape: Shape) -> Shape:
    """That, or None."""
    return lambda value, old: "" if value is None else shape(value, old)


def one(*classes: type) -> Shape:
    """An object of one of these classes."""

    def shape(value: Any, old: Any) -> str:
        return "" if type(value) in classes else _no(value, f"a {' or '.join(cls.__name__ for cls in classes)}")

    return shape


def several(kind: Any, shape: Shape, low: int = 0, high: int = 1 << 24) -> Shape:
    """A container of one kind, of things of one shape."""

    def of(value: Any, old: Any) -> str:
        if type(value) is not kind:
            return _no(value, f"a {kind.__name__}")
        if not low <= len(value) <= high:
            return f" has {len(value)} members, not {low if low == high else f'{low} to {high}'}"
        return next((f" [{at}]{wrong}" for at, each in enumerate(value) if (wrong := shape(each, None))), "")

    return of


def like(shape: Shape) -> Shape:
    """A list or dictionary with as many members, or the same keys, as the new machine's."""

    def of(value: Any, old: Any) -> str:
        if type(value) is not type(old):
            return _no(value, f"a {type(old).__name__}")
        if isinstance(old, dict):
            if {(type(key), key) for key in value} != {(type(key), key) for key in old}:
                return f" has other keys: {shown(sorted(value.keys() ^ old.keys(), key=repr))}"
            pairs = [(key, value[key], old[key]) for key in old]
        else:
            if len(value) != len(old):
                return f" has {len(value)} members, not {len(old)}"
            pairs = [(at, value[at], old[at]) for at in range(len(old))]
        return next((f" [{key!r}]{wrong}" for key, each, mine in pairs if (wrong := shape(each, mine))), "")

    return of


def members(*shapes: Shape) -> Shape:
    """A tuple of just these."""

    def of(value: Any, old: Any) -> str:
        if type(value) is not tuple or len(value) != len(shapes):
            return _no(value, f"a group of {len(shapes)}")
        return next((f" [{at}]{wrong}" for at, each in enumerate(value) if (wrong := shapes[at](each, None))), "")

    return of


def row(*shapes: Shape) -> Shape:
    """A list of just these, as JSON has it."""
    group = members(*shapes)
    return lambda value, old: group(tuple(value), None) if type(value) is list else _no(value, f"a list of {len(shapes)}")


def digits(low: int, high: int) -> Shape:
    """Bytes in hexadecimal, so many digits."""

    def shape(value: Any, old: Any) -> str:
        fits = type(value) is str and low <= len(value) <= high and not len(value) % 2 and not set(value) - _DIGITS
        return "" if fits else _no(value, f"{low} hexadecimal digits" if low == high else f"up to {high} hexadecimal digits")

    return shape


_DIGITS = frozenset("0123456789abcdef")


def mapping(key: Shape, shape: Shape, most: int = 1 << 24) -> Shape:
    """A dictionary."""

    def of(value: Any, old: Any) -> str:
        if type(value) is not dict:
            return _no(value, "a dictionary")
        if len(value) > most:
            return f" has {len(value)} keys, not at most {most}"
        for name, each in value.items():
            wrong = key(name, None)
            if wrong:
                return f" has the key {shown(name)}, which{wrong}"
            wrong = shape(each, None)
            if wrong:
                return f" [{shown(name)}]{wrong}"
        return ""

    return of


def either(*shapes: Shape) -> Shape:
    """Any of these; what is wrong is the last one's."""

    def of(value: Any, old: Any) -> str:
        wrong = ""
        for shape in shapes:
            wrong = shape(value, old)
            if not wrong:
                break
        return wrong

    return of


def both(shape: Shape, *rules: Callable[[Any], str]) -> Shape:
    """That, and then what rules say of it, as shapes do."""

    def of(value: Any, old: Any) -> str:
        return shape(value, old) or next((wrong for rule in rules if (wrong := rule(value))), "")

    return of
