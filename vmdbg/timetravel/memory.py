# SPDX-License-Identifier: GPL-2.0-or-later
"""RAM in snapshots: what was ever touched and is not zero, in pieces that snapshots of one machine share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vmdbg.engine.memory import PAGE, Ram

PIECE = 64 << 10
"""Bytes: of an unchanged piece two snapshots have one copy."""


def pieces(ram: Ram, former: Mapping[int, bytes]) -> dict[int, bytes]:
    """Contents of the pieces that are not all zero, by address; the copies of `former` where they are equal."""
    found = {}
    for start, end in touched(ram):
        data = bytes(ram.view[start:end])
        known = former.get(start)
        if data == known:
            found[start] = known
        elif data.count(0) != len(data):
            found[start] = data
    return found


def touched(ram: Ram) -> Iterator[tuple[int, int]]:
    """(first, end) of the pieces that may hold something."""
    for low, high in ram.ranges:
        last = -1
        for first, end in ram.data(low, high):
            for start in range(max(first & -PIECE, last), end, PIECE):
                last = start + PIECE
                yield max(start, low), min(last, high)


def put_back(ram: Ram, kept: Mapping[int, bytes]) -> None:
    """Make RAM what it was; nobody is told."""
    for start, end in touched(ram):
        if start not in kept and any_data(ram, start, end):
            ram.view[start:end] = bytes(end - start)
    for start, data in kept.items():
        if ram.view[start : start + len(data)].tobytes() != data:
            ram.view[start : start + len(data)] = data


def any_data(ram: Ram, start: int, end: int) -> bool:
    return bool(np.frombuffer(ram.view[start:end], np.uint64).any())


def runs(kept: Mapping[int, bytes], most: int = 1 << 20) -> Iterator[tuple[int, bytes]]:
    """(address, data) of pages that are not zero, together where they follow each other, up to `most` bytes."""
    at, parts, length = 0, list[bytes](), 0
    for start, data in sorted(kept.items()):
        words = np.frombuffer(data, np.uint64).reshape(-1, PAGE // 8)
        for number in np.flatnonzero(words.any(axis=1)).tolist():
            address = start + number * PAGE
            if parts and (address != at + length or length >= most):
                yield at, b"".join(parts)
                parts, length = [], 0
            if not parts:
                at = address
            parts.append(data[number * PAGE : (number + 1) * PAGE])
            length += PAGE
    if parts:
        yield at, b"".join(parts)
