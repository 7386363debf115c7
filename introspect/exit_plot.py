"""A picture of exits: when which guest left for what, how much time the host took, and what was most frequent.

SVG without scripts, alone or in a page: it opens anywhere, also years later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from introspect.exitlog import ExitRecord, Group, group
from introspect.exits import exit_name

__all__ = ["page", "svg"]

WIDTH, MARGIN, LABELS = 1100, 20, 150
BINS = 240
LANE, STRIP, GAP, ROW = 90, 10, 34, 22
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#9c6b4e")
"""One for each of the most frequent exit codes; the others share the last."""
OTHER = "#9498a0"
MOST_ROWS = 30
_STYLE = """\
svg{font:12px system-ui,sans-serif;background:#fff}text{fill:#222}.small{font-size:11px;fill:#666}.head{font-size:15px;\
font-weight:600}.axis{stroke:#999;stroke-width:1}.host{fill:#555}.back{fill:#eee}
@media (prefers-color-scheme:dark){svg{background:#16181d}text{fill:#e4e6eb}.small{fill:#9aa0aa}.axis{stroke:#666}\
.host{fill:#c8ccd4}.back{fill:#2a2e36}}"""


def _text(x: float, y: float, words: str, name: str = "", anchor: str = "start") -> str:
    look = f' class="{name}"' if name else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{look}>{escape(words)}</text>'


def _rect(x: float, y: float, width: float, height: float, look: str, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{max(height, 0):.2f}" {look}>{inner}</rect>'


def _time(value: float, per_second: int) -> str:
    seconds = value / per_second
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


class _Picture:
    """Lanes of time above, bars below."""

    def __init__(self, records: Sequence[ExitRecord], names: Mapping[int, str], per_second: int) -> None:
        self.records, self.names, self.per_second = records, names, per_second
        self.first = min(record.time - record.in_guest for record in records)
        self.last = max(max(record.time, record.resumed) for record in records)
        self.span = max(self.last - self.first, 1)
        self.wide = WIDTH - LABELS - 2 * MARGIN
        self.left = LABELS + MARGIN
        frequent = [name for name, _ in Counter(exit_name(record.code) for record in records).most_common(len(COLOURS))]
        self.colours = dict(zip(frequent, COLOURS, strict=False))
        self.y = 40.0

    def colour(self, name: str) -> str:
        return self.colours.get(name, OTHER)

    def bin(self, time: int) -> int:
        return min(max(time - self.first, 0) * BINS // self.span, BINS - 1)

    def parts(self) -> Iterator[str]:
        guests = sorted({record.guest for record in self.records})
        yield _text(MARGIN, 24, f"{len(self.records)} #VMEXITs in {_time(self.span, self.per_second)} of guest time", "head")
        yield from self.legend()
        for guest in guests:
            yield from self.lane([record for record in self.records if record.guest == guest], guest)
        yield from self.axis()
        yield from self.bars("by exit code", group(self.records, "code"))

    def legend(self) -> Iterator[str]:
        x = float(self.left)
        names = [*self.colours, *(["others"] if len({r.code for r in self.records}) > len(COLOURS) else [])]
        for name in names:
            if x + 24 + 8 * len(name) > WIDTH - MARGIN:
                x, self.y = float(self.left), self.y + 18
            yield _rect(x, self.y, 10, 10, f'fill="{self.colour(name)}"')
            yield _text(x + 14, self.y + 9, name, "small")
            x += 24 + 8 * len(name)
        self.y += 26

    def lane(self, records: Sequence[ExitRecord], guest: int) -> Iterator[str]:
        """Exits stacked by code over time; below it how much of the time the host took for this guest's exits."""
        bins = [Counter[str]() for _ in range(BINS)]
        host = [0.0] * BINS
        for record in records:
            bins[self.bin(record.time)][exit_name(record.code)] += 1
            self.spread(host, record.time, record.time + (record.in_host or 0))
        top = max(found.total() for found in bins)
        width = self.wide / BINS
        yield _text(MARGIN, self.y + 14, self.names.get(guest, f"guest {guest}"))
        yield _text(MARGIN, self.y + 30, f"{len(records)} exits", "small")
        yield _text(self.left - 6, self.y + 9, str(top), "small", "end")
        yield _rect(self.left, self.y + LANE, self.wide, STRIP, 'class="back"')
        for number, found in enumerate(bins):
            base = self.y + LANE
            for name in (*self.colours, "others"):
                amount = found[name] if name in self.colours else sum(n for code, n in found.items() if code not in self.colours)
                if amount:
                    height = amount / top * (LANE - 4)
                    base -= height
                    look = f'fill="{self.colour(name)}"'
                    yield _rect(self.left + number * width, base, width, height, look, f"{amount} {name}")
            share = min(host[number] / (self.span / BINS), 1.0)
            if share > 0:
                look = f'class="host" fill-opacity="{share:.2f}"'
                yield _rect(self.left + number * width, self.y + LANE, width, STRIP, look, f"host {share:.0%}")
        yield _text(self.left - 6, self.y + LANE + STRIP, "host's share", "small", "end")
        self.y += LANE + GAP

    def spread(self, bins: list[float], start: int, end: int) -> None:
        """Divide a stretch of time among the bins that it touches."""
        size = self.span / BINS
        for number in range(self.bin(start), self.bin(end) + 1):
            low = self.first + number * size
            bins[number] += max(min(end, low + size) - max(start, low), 0)

    def axis(self) -> Iterator[str]:
        y = self.y - GAP + STRIP + 6
        yield f'<line class="axis" x1="{self.left}" x2="{self.left + self.wide}" y1="{y:g}" y2="{y:g}"/>'
        for tenth in range(0, 11, 2):
            x = self.left + self.wide * tenth / 10
            yield f'<line class="axis" x1="{x:g}" x2="{x:g}" y1="{y:g}" y2="{y + 4:g}"/>'
            anchor = "start" if tenth == 0 else "end" if tenth == 10 else "middle"
            yield _text(x, y + 17, _time(self.first + self.span * tenth / 10, self.per_second), "small", anchor)
        self.y = y + 44

    def bars(self, title: str, groups: Sequence[Group]) -> Iterator[str]:
        """How many, and in grey how much time they took in the host."""
        yield _text(MARGIN, self.y, f"{title}: how many, and time in the host", "head")
        self.y += 14
        half = self.wide / 2 - 160
        most, longest = max(one.count for one in groups), max(max(one.in_host for one in groups), 1)
        for one in groups[:MOST_ROWS]:
            yield _text(self.left - 6, self.y + 14, one.label, "", "end")
            yield _rect(self.left, self.y + 3, half * one.count / most, ROW - 8, f'fill="{self.colour(one.label)}"')
            yield _text(self.left + half * one.count / most + 5, self.y + 14, str(one.count), "small")
            right = self.left + self.wide / 2
            yield _rect(right, self.y + 3, half * one.in_host / longest, ROW - 8, 'class="host"')
            mean = f"{_time(one.in_host, self.per_second)}, {_time(one.mean_in_host, self.per_second)} each"
            yield _text(right + half * one.in_host / longest + 5, self.y + 14, mean, "small")
            self.y += ROW
        if len(groups) > MOST_ROWS:
            yield _text(self.left, self.y + 14, f"and {len(groups) - MOST_ROWS} more", "small")
            self.y += ROW


def svg(records: Sequence[ExitRecord], names: Mapping[int, str], per_second: int) -> str:
    """The picture as one SVG image.  `names` by guest; `per_second`: units of time in a second."""
    if not records:
        parts, height = [_text(MARGIN, 24, "No #VMEXIT is recorded.", "head")], 40.0
    else:
        picture = _Picture(records, names, per_second)
        parts = list(picture.parts())
        height = picture.y + MARGIN
    box = f'width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">', f"<style>{_STYLE}</style>", *parts, "</svg>\n"]
    )


def page(records: Sequence[ExitRecord], names: Mapping[int, str], per_second: int) -> str:
    """The picture in a page."""
    image = svg(records, names, per_second)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<title>#VMEXITs</title><style>body{{margin:0}}</style></head><body>\n{image}</body></html>\n"
    )
