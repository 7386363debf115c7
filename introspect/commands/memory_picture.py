"""A picture of guest-physical memory as SVG: what maps where, with which rights, in pages of which sizes.

Two bars, of guest-physical and system-physical addresses, and a band between them for each range. Heights grow with the logarithm
of sizes, and what is not mapped is a gap of fixed height: else a page beside a gigabyte would not be seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from html import escape
from itertools import pairwise

import numpy as np

from introspect.commands.render import amount_text, size_text
from introspect.paging import ENTRY
from introspect.runs import Runs, Spans, covered, inside
from introspect.tables import Listing

__all__ = ["picture"]

_MOST = 64
"""Blocks that are drawn at most; ranges beyond are drawn together with their neighbours."""
_LEFT, _RIGHT, _BAR, _WIDTH = 200, 630, 112, 1000
_TOP, _GAP, _LABEL = 116, 18, 12
_COLOURS = {"rwx": "#e07b39", "rw-": "#3b7dd8", "r-x": "#3f9d5a", "r--": "#9aa3ad", "mixed": "#8d64c4", "none": "#d0d4d9"}
_MEANINGS = {
    "rwx": "read, write, execute", "rw-": "read, write", "r-x": "read, execute", "r--": "read", "none": "no access (U is clear)",
    "mixed": "several kinds, too fine to draw",
}  # fmt: skip
_SHADES = {1 << 12: "#c9d6e8", 1 << 21: "#7d97bd", 1 << 22: "#7d97bd", 1 << 30: "#2f4a75"}


@dataclass(slots=True)
class _Block:
    """What is drawn as one: a range, or several."""

    start: int
    end: int
    target: int
    target_end: int
    rights: str
    sizes: tuple[int, ...]
    ranges: int = 1
    mapped: int = 0

    def title(self) -> str:
        words = [f"gpa {self.start:#x}-{self.end - 1:#x}"]
        words.append(f"{'to' if self.ranges == 1 else 'scattered over'} spa {self.target:#x}-{self.target_end - 1:#x}")
        words.append(f"{self.rights}: {_MEANINGS[self.rights]}")
        words.append(f"{amount_text(self.mapped)} in pages of {', '.join(map(size_text, self.sizes))}")
        if self.ranges > 1:
            words.append(f"{self.ranges} ranges")
        return "\n".join(words)


def _blocks(runs: Runs) -> list[_Block]:
    """Few enough of them to draw: the widest pieces of memory with several ranges are split until there are enough."""
    found: list[tuple[int, int]] = []
    waiting = [(0, 0, len(runs.start))] if len(runs.start) else []
    while waiting:
        _, first, end = heappop(waiting)
        low, high = int(runs.start[first]), int(runs.start[end - 1])
        pieces = runs.start[first:end] >> max(12, (low ^ high).bit_length() - 3)
        cuts = np.flatnonzero(pieces[1:] != pieces[:-1]) + 1 + first
        if end - first == 1 or len(found) + len(waiting) + len(cuts) + 1 > _MOST:
            found.append((first, end))
            continue
        for start, stop in pairwise([first, *cuts.tolist(), end]):
            width = int(runs.start[stop - 1] + runs.length[stop - 1] - runs.start[start])
            heappush(waiting, (-width if stop - start > 1 else 0, start, stop))
    return [_block(runs.take(slice(first, end))) for first, end in sorted(found)]


def _block(runs: Runs) -> _Block:
    flags = int(runs.attributes[0])
    alike = bool(((runs.attributes ^ flags) & (ENTRY.W | ENTRY.U | ENTRY.NX) == 0).all())
    rights = f"r{'w' if flags & ENTRY.W else '-'}{'-' if flags & ENTRY.NX else 'x'}" if flags & ENTRY.U else "none"
    every = int(np.bitwise_or.reduce(runs.attributes))
    return _Block(
        int(runs.start[0]), int(runs.end[-1]), int(runs.target.min()), int((runs.target + runs.length).max()),
        rights if alike else "mixed", tuple(size for size in _SHADES if every & size), len(runs.start), int(runs.length.sum()),
    )  # fmt: skip


def _height(size: int) -> float:
    return 8 + 4.5 * max(0, (size >> 12).bit_length())


class _Axis:
    """Addresses from top to bottom. `pieces` are (start, end), in order, none overlapping."""

    def __init__(self, pieces: Iterable[tuple[int, int]]) -> None:
        self.pieces: list[tuple[int, int, float, float]] = []
        self.gaps: list[tuple[int, int, float]] = []
        y, last = float(_TOP), None
        for start, end in pieces:
            if last is not None and start > last:
                self.gaps.append((last, start, y))
                y += _GAP
            height = _height(end - start)
            self.pieces.append((start, end, y, y + height))
            y, last = y + height, end
        self.bottom = y

    def place(self, address: int, *, end: bool = False) -> float:
        """Where an address is; as the `end` of something, where what is before it ends."""
        for start, stop, top, bottom in self.pieces:
            if (start < address <= stop) if end else (start <= address < stop):
                return top + (bottom - top) * (address - start) / (stop - start)
        return self.bottom

    def labels(self) -> Iterator[tuple[float, int]]:
        """Addresses to write beside it, none too near the one before."""
        last = 0.0
        for start, _, top, _ in self.pieces:
            if top - last >= _LABEL:
                yield top, start
                last = top


def _targets(blocks: Sequence[_Block]) -> list[tuple[int, int]]:
    """System-physical stretches, cut where a range begins or ends, so that each has a height of its own. Those over which
    several ranges are scattered are cut nowhere."""
    starts, ends = (np.array([getattr(block, name) for block in blocks], np.uint64) for name in ("target", "target_end"))
    everything = covered(starts, ends)
    single = np.array([block.ranges == 1 for block in blocks], np.bool_)
    cuts = np.unique(np.concatenate((starts[single], ends[single], everything.start, everything.end)))
    pieces = Spans(cuts[:-1], cuts[1:])
    return list(pieces.take(inside(pieces.start, everything)).rows()) if len(blocks) else []


def picture(listing: Listing, title: str, *, html: bool = False) -> str:
    """The guest-physical memory that nested tables map, as SVG, or as HTML with that in it. It needs no other file."""
    blocks = _blocks(listing.runs)
    gpas, spas = _Axis((block.start, block.end) for block in blocks), _Axis(_targets(blocks))
    height = max(gpas.bottom, spas.bottom, _TOP + 40) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        f'<text x="20" y="28" font-size="17" font-weight="bold">{escape(title)}</text>',
        f'<text x="20" y="46" fill="#555">{escape(_summary(listing, blocks))}</text>',
        *_legend(blocks),
        f'<text x="{_LEFT}" y="{_TOP - 8}" font-weight="bold">guest-physical</text>',
        f'<text x="{_RIGHT}" y="{_TOP - 8}" font-weight="bold">system-physical</text>',
        *_bands(blocks, gpas, spas), *_left(blocks, gpas), *_right(spas),
    ]  # fmt: skip
    if not blocks:
        parts.append(f'<text x="{_LEFT}" y="{_TOP + 20}">nothing is mapped</text>')
    parts.append("</svg>")
    svg = "\n".join(parts)
    if not html:
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{svg}\n'
    head = f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>'
    return f"{head}\n<body>\n{svg}\n</body>\n</html>\n"


def _summary(listing: Listing, blocks: Sequence[_Block]) -> str:
    ranges, tables = sum(block.ranges for block in blocks), sum(listing.tables)
    words = f"{listing.mode} paging: {amount_text(listing.bytes_mapped)} mapped in {ranges:,} linear ranges by {tables:,} tables"
    return words + ("; the tables describe more than was looked at" if len(listing.unknown.start) else "")


def _legend(blocks: Sequence[_Block]) -> Iterator[str]:
    x = 20.0
    present = {block.rights for block in blocks}
    for rights, colour in _COLOURS.items():
        if rights in present:
            words = f"{rights}: {_MEANINGS[rights]}"
            yield f'<rect x="{x:.0f}" y="56" width="12" height="12" fill="{colour}"/><text x="{x + 16:.0f}" y="66">{words}</text>'
            x += 34 + 6.2 * len(words)
    x = 20.0
    for size in sorted({size for block in blocks for size in block.sizes}):
        words = f"{size_text(size)} pages"
        yield f'<rect x="{x:.0f}" y="74" width="6" height="12" fill="{_SHADES[size]}"/>'
        yield f'<text x="{x + 10:.0f}" y="84">{words}</text>'
        x += 28 + 6.2 * len(words)


def _bands(blocks: Sequence[_Block], gpas: _Axis, spas: _Axis) -> Iterator[str]:
    left, right = _LEFT + _BAR + 2, _RIGHT - 2
    bend = (left + right) / 2
    for block, (_, _, top, bottom) in zip(blocks, gpas.pieces, strict=True):
        first, last = spas.place(block.target), spas.place(block.target_end, end=True)
        density = block.mapped / (block.target_end - block.target)  # of what it is scattered over
        yield (
            f'<path d="M{left} {top:.1f}C{bend} {top:.1f} {bend} {first:.1f} {right} {first:.1f}V{last:.1f}'
            f'C{bend} {last:.1f} {bend} {bottom:.1f} {left} {bottom:.1f}Z" fill="{_COLOURS[block.rights]}" '
            f'fill-opacity="{min(0.35, max(0.05, 0.35 * density)):.2f}"><title>{escape(block.title())}</title></path>'
        )


def _left(blocks: Sequence[_Block], axis: _Axis) -> Iterator[str]:
    for block, (_, _, top, bottom) in zip(blocks, axis.pieces, strict=True):
        box = f'y="{top:.1f}" height="{bottom - top:.1f}"'
        yield (
            f'<rect x="{_LEFT}" width="{_BAR}" {box} fill="{_COLOURS[block.rights]}" stroke="#ffffff" stroke-width="0.6">'
            f"<title>{escape(block.title())}</title></rect>"
        )
        wide = 10 / len(block.sizes)
        for number, size in enumerate(block.sizes):
            yield f'<rect x="{_LEFT - 14 + number * wide:.1f}" width="{wide:.1f}" {box} fill="{_SHADES[size]}"/>'
        if bottom - top >= 14:
            words = f"{block.rights}{f' in {block.ranges}' if block.ranges > 1 else ''}, {amount_text(block.mapped)}"
            yield (
                f'<text x="{_LEFT + _BAR / 2}" y="{(top + bottom) / 2 + 3.5:.1f}" text-anchor="middle" fill="#ffffff" '
                f'font-size="10">{words}</text>'
            )
    for y, address in axis.labels():
        yield f'<text x="{_LEFT - 20}" y="{y + 9:.1f}" text-anchor="end" font-family="monospace">{address:#x}</text>'
    yield from _gap_lines(axis, _LEFT)


def _right(axis: _Axis) -> Iterator[str]:
    for start, end, top, bottom in axis.pieces:
        yield (
            f'<rect x="{_RIGHT}" width="{_BAR}" y="{top:.1f}" height="{bottom - top:.1f}" fill="#eef0f3" stroke="#8a929c" '
            f'stroke-width="0.6"><title>spa {start:#x}-{end - 1:#x}</title></rect>'
        )
    for y, address in axis.labels():
        yield f'<text x="{_RIGHT + _BAR + 8}" y="{y + 9:.1f}" font-family="monospace">{address:#x}</text>'
    yield from _gap_lines(axis, _RIGHT)


def _gap_lines(axis: _Axis, x: int) -> Iterator[str]:
    for start, end, y in axis.gaps:
        yield (
            f'<text x="{x + _BAR / 2}" y="{y + _GAP / 2 + 3:.1f}" text-anchor="middle" fill="#777" font-size="9">'
            f"... {amount_text(end - start)} ...<title>nothing maps {start:#x}-{end - 1:#x}</title></text>"
        )
