"""Finding bytes in memory, in bounded pieces: what lies between is skipped as a whole."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from introspect.paging import Access, Fault, Nested, NestedTranslation, PagingState, Step, nested_translate, walk
from introspect.sources import Memory, Unreadable
from introspect.sources.memory import Sparse, memory_ranges

__all__ = [
    "MAX_PATTERN", "Pattern", "Piece", "hex_pattern", "linear_pieces", "nested_pieces", "pattern", "physical_pieces", "scan",
]  # fmt: skip

MAX_PATTERN = 4096
MAX_WILD = 256
"""Bytes of a pattern with wildcards."""
_CHUNK = 1 << 20
_PAGE = 4096
_PROBES = 1 << 16
"""Pages without memory one behind the other, from where on nothing more is expected."""


class Pattern(NamedTuple):
    """Bytes to look for: a compiled expression over bytes, and how many it matches."""

    regex: "re.Pattern[bytes]"
    size: int
    literal: bytes
    """The longest part of it without wildcards, which is what memory is searched for."""
    at: int
    """Where that part begins."""


class Piece(NamedTuple):
    """A stretch that is linear in memory: `size` bytes at `address`, found at system-physical `spa`; None for a hole."""

    address: int
    size: int
    spa: int | None


def pattern(data: bytes) -> Pattern:
    """Just these bytes."""
    return Pattern(re.compile(re.escape(data), re.DOTALL), len(data), data, 0)


def hex_pattern(text: str) -> Pattern | None:
    """Pairs of hexadecimal digits, `?` for any digit, spaces between them as you like; None if it is none."""
    digits = "".join(text.split())
    if not 0 < len(digits) <= 2 * MAX_WILD or len(digits) % 2 or not all(one in "0123456789abcdefABCDEF?" for one in digits):
        return None
    parts: list[bytes] = []
    runs: list[bytearray] = [bytearray()]
    starts = [0]
    for at in range(0, len(digits), 2):
        high, low = digits[at], digits[at + 1]
        if "?" not in high + low:
            parts.append(re.escape(bytes([int(high + low, 16)])))
            runs[-1].append(int(high + low, 16))
            continue
        runs.append(bytearray())
        starts.append(at // 2 + 1)
        if high == low == "?":
            parts.append(b".")
        else:
            highs = range(16) if high == "?" else [int(high, 16)]
            lows = range(16) if low == "?" else [int(low, 16)]
            parts.append(b"[" + b"".join(b"\\x%02x" % (h << 4 | one) for h in highs for one in lows) + b"]")
    best = max(range(len(runs)), key=lambda n: len(runs[n]))
    return Pattern(re.compile(b"".join(parts), re.DOTALL), len(parts), bytes(runs[best]), starts[best])


def physical_pieces(memory: Memory, first: int, end: int, zeros: int | None = None) -> Iterator[Piece]:
    """System-physical addresses: stretches with memory, and holes as far as they are known or found by probing.

    `zeros`: stretches known to be nothing but zeros are passed over like holes, but for so many bytes beside what is not.
    """
    at = first
    for start, stop in _stretches(memory, first, end, zeros):
        if start > at:
            yield Piece(at, start - at, None)
        yield from _probed(memory, max(start, at), stop)
        at = max(stop, at)
    if at < end:
        yield Piece(at, end - at, None)


def _stretches(memory: Memory, first: int, end: int, zeros: int | None) -> Iterator[tuple[int, int]]:
    """Where memory may be, within first..end, ascending."""
    for start, stop in memory_ranges(memory):
        start, stop = max(start, first), min(stop, end)
        if start >= stop:
            continue
        if zeros is None or not isinstance(memory, Sparse):
            yield start, stop
            continue
        for begin, behind in memory.data(start, stop):
            yield max(begin - zeros, start), min(behind + zeros, stop)


def _probed(memory: Memory, at: int, end: int) -> Iterator[Piece]:
    probes = 0
    while at < end:
        size = min(_CHUNK - at % _CHUNK, end - at)
        try:
            memory.read(at, 1)
        except Unreadable:
            probes += 1
            if probes > _PROBES:
                yield Piece(at, end - at, None)
                return
            size = min(_PAGE - at % _PAGE, end - at)
            yield Piece(at, size, None)
        else:
            probes = 0
            yield Piece(at, size, at)
        at += size


def linear_pieces(memory: Memory, state: PagingState, nested: Nested | None, first: int, end: int) -> Iterator[Piece]:
    """Linear addresses, through page tables: mapped pages, and holes as large as the entry that makes them."""
    access, at = Access(), first
    state = state.privileged()
    while at < end:
        found = walk(memory, state, at, access, nested)
        if isinstance(found.verdict, Fault):
            last = next((step for step in reversed(found.steps) if not step.nested), None)
            size = min(_hole(found.verdict, last, state, at), end - at)
            yield Piece(at, size, None)
        else:
            page = found.verdict.page_size or _PAGE
            size = min(page - at % page, end - at, _CHUNK)
            yield Piece(at, size, int(found.verdict.spa))
        at += size


def _hole(fault: Fault, last: Step | None, state: PagingState, at: int) -> int:
    """Bytes from an address on that fault alike: those that the last entry read maps; without one, all there are."""
    if fault.kind == "GP":
        upper = (1 << 64) - (1 << (56 if state.mode == "5-level" else 47))
        return upper - at if at < upper else (1 << 64) - at
    if last is None:
        return (1 << 64) - at if state.format is not None else _PAGE
    if last.leaf and fault.kind == "NPF":  # the guest maps it; what the nested tables do is known of this page only
        return _PAGE - at % _PAGE
    return _span(last.level, state) - at % _span(last.level, state)


def _span(level: int, state: PagingState) -> int:
    """Bytes that an entry of a level maps."""
    return 1 << 12 + (10 if state.mode == "legacy" else 9) * (level - 1)


def nested_pieces(memory: Memory, nested: Nested, first: int, end: int) -> Iterator[Piece]:
    """Guest-physical addresses, through nested page tables. A hole is walked as a linear address of the same tables would be,
    which says how large it is."""
    state = PagingState(1 << 31 | 1, nested.ncr3, nested.host_cr4, nested.host_efer, maxphyaddr=nested.maxphyaddr)
    at = first
    while at < end:
        found = nested_translate(memory, nested, at, write=False, execute=False, set_ad=False)
        if isinstance(found, NestedTranslation):
            page = found.page_size or _PAGE
            size = min(page - at % page, end - at, _CHUNK)
            yield Piece(at, size, int(found.spa))
        else:
            whole = walk(memory, state, at, Access())
            last = whole.steps[-1] if whole.steps else None
            fault = whole.verdict if isinstance(whole.verdict, Fault) else Fault("NPF", 0, at)
            size = min(_hole(fault, last, state, at), end - at)
            yield Piece(at, size, None)
        at += size


def scan(
    memory: Memory, pieces: Iterator[Piece], wanted: Pattern, align: int, progress: Callable[[int], None] = lambda address: None
) -> Iterator[int]:
    """Addresses of all matches, overlapping ones too, ascending; also across pieces that adjoin."""
    carry, carry_at = b"", 0
    done = 0
    for piece in pieces:
        done += 1
        if piece.spa is None:
            carry = b""
            if not done % 256:
                progress(piece.address)
            continue
        progress(piece.address)
        at = 0
        while at < piece.size:
            count = min(_CHUNK, piece.size - at)
            try:
                data = memory.read(piece.spa + at, count)
            except Unreadable as error:
                data = error.readable_prefix
            here = piece.address + at
            if carry and carry_at + len(carry) == here:
                window, base = carry + data, carry_at
            else:
                window, base = data, here
            yield from _matches(window, base, wanted, align)
            keep = wanted.size - 1
            carry = window[len(window) - keep :] if keep else b""
            carry_at = base + len(window) - len(carry)
            if len(data) < count:
                carry = b""
            at += count


def _matches(window: bytes, base: int, wanted: Pattern, align: int) -> Iterator[int]:
    at = wanted.at
    while True:
        found = window.find(wanted.literal, at)
        if found < 0:
            return
        at = found + 1
        start = found - wanted.at
        if not (base + start) % align and wanted.regex.match(window, start) is not None:
            yield base + start
