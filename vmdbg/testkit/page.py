# SPDX-License-Identifier: GPL-2.0-or-later
"""The results of a run as one HTML page: nothing is loaded from elsewhere, and all text is as a guest may have written it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from itertools import groupby

from vmdbg.testkit.junit import told_of
from vmdbg.testkit.outcome import Outcome, Report, Verdict, printable

__all__ = ["page"]

_FILES = resources.files("vmdbg.testkit")
STYLE, SCRIPT = (_FILES.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
_ORDER = (Verdict.FAILED, Verdict.ERROR, Verdict.NOT_RUN, Verdict.SKIPPED, Verdict.PASSED)
_OPEN = frozenset(("exits against the golden trace", "last exits", "serial port"))
"""Sections that are read at once."""
_ENDS = frozenset(("serial port", "output"))
"""Of which the end is what matters."""
_LONG = 24
"""Lines of a text that is shown at once."""


def page(report: Report) -> str:
    """The whole document. It works without JavaScript; with it, commands can be copied and tests be filtered."""
    bad = [one for one in report.outcomes if one.bad]
    parts = [*_head(report, bad), "<main>"]
    if bad:
        parts += [f"<h2>What failed<small>{len(bad)}</small></h2>", *(_failure(one, _anchor(n)) for n, one in enumerate(bad))]
    parts += _all(report, {id(one): _anchor(n) for n, one in enumerate(bad)})
    parts += ["</main>", f"<footer>vmdbg {_text(report.version)} · <code>{_text(report.command)}</code></footer>"]
    parts += [f"<script>{SCRIPT}</script>", "</body></html>"]
    return "\n".join(parts) + "\n"


def _text(text: str) -> str:
    return escape(printable(text))


def _hash(text: str) -> str:
    """By which a browser knows that a script or style is ours."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _anchor(number: int) -> str:
    return f"failure-{number + 1}"


def _class(verdict: Verdict) -> str:
    return verdict.replace(" ", "")


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _headline(report: Report, bad: Sequence[Outcome]) -> str:
    total = len(report.outcomes)
    if bad:
        return f"{len(bad)} of {_plural(total, 'test')} failed"
    if report.interrupted:
        return "The run did not come to its end"
    return f"All {total} tests passed" if total != 1 else "The test passed"


def _head(report: Report, bad: Sequence[Outcome]) -> Iterator[str]:
    title = _headline(report, bad)
    policy = f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; base-uri 'none'"
    counts = {verdict: count for verdict, count in report.counts().items() if count}
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{'✗' if report.status else '✓'} {title} · vmdbg test</title><style>{STYLE}</style></head><body>"
    yield f'<header><div><h1 class="{"failed" if report.status else "passed"}">{title}</h1>'
    about = [f"{report.seconds:.2f} s", f"{report.workers} at once", f"processors {report.busy:.0%} busy"]
    yield f'<p class="about">{" · ".join(about)}{" · " + _text(report.interrupted) if report.interrupted else ""}</p>'
    yield _bar(counts)
    yield '<ul class="legend">'
    for verdict, count in counts.items():
        yield f'<li class="{_class(verdict)}"><i class="dot"></i><b>{count}</b> {verdict}</li>'
    yield "</ul></div></header>"


def _bar(counts: dict[Verdict, int]) -> str:
    """An image rather than styled boxes: a page that allows no inline styles cannot have widths of its own."""
    total, x, parts = sum(counts.values()), 0.0, []
    for verdict, count in counts.items():
        width = 1000 * count / max(total, 1)
        parts.append(f'<rect class="{_class(verdict)}" x="{x:.2f}" width="{max(width - 2, 2):.2f}" height="10"/>')
        x += width
    label = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    shape = 'viewBox="0 0 1000 10" preserveAspectRatio="none"'
    return f'<svg class="bar" {shape} role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _failure(one: Outcome, anchor: str) -> str:
    return "\n".join(_parts_of_failure(one, anchor))


def _parts_of_failure(one: Outcome, anchor: str) -> Iterator[str]:
    yield f'<article id="{anchor}" class="{_class(one.verdict)}"><h3><span class="badge">{one.verdict}</span>{_text(one.id)}'
    yield f"<span>line {one.line} · {one.kind} · {one.seconds:.2f} s</span></h3>"
    yield '<ul class="why">'
    for reason in one.reasons or [f"the test is {one.verdict}"]:
        first, *rest = printable(reason).strip("\n").split("\n", 1)
        # What pytest says of a failure is many lines, of which the first is no summary.
        shown = f"<pre>{escape(reason)}</pre>" if rest else _text(first)
        yield f'<li{" class=more" if rest else ""}>{shown}</li>'
    yield "</ul>"
    if one.ended and one.ended not in one.reasons:
        yield f'<p class="ended">{_text(one.ended)}, after {one.ticks:,} ticks</p>'
    for command in one.reproduce:
        yield (f'<div class="command"><pre>{_text(command)}</pre>'
               '<button type="button" class="script" data-copy>Copy</button></div>')  # fmt: skip
    for title, text in told_of(one):
        is_open = title in _OPEN or text.count("\n") < _LONG
        shown = _diff(text) if title == "exits against the golden trace" else f"<pre>{escape(text)}</pre>"
        shown = f'<div class="tail">{shown}</div>' if title in _ENDS else shown
        yield f"<details{' open' if is_open else ''}><summary>{_text(title.capitalize())}</summary>{shown}</details>"
    yield "</article>"


def _diff(text: str) -> str:
    """A golden trace's lines with - and those of the run with +."""
    lines = []
    for number, line in enumerate(text.split("\n")):
        mark = {"-": "minus", "+": "plus"}.get(line.lstrip()[:1], "head" if not number else "same")
        lines.append(f'<span class="{mark}">{escape(line)}</span>')
    return f'<pre class="diff">{"".join(lines)}</pre>'


def _all(report: Report, anchors: dict[int, str]) -> Iterator[str]:
    yield f"<h2>All tests<small>{len(report.outcomes)}</small></h2>"
    yield '<input id="filter" class="script" type="search" placeholder="Filter: words of names, verdicts, kinds">'
    ordered = sorted(report.outcomes, key=lambda one: one.file)
    for file, group in groupby(ordered, key=lambda one: one.file):
        yield f"<table><caption>{_text(file)}</caption><tbody>"
        for one in sorted(group, key=lambda one: _ORDER.index(one.verdict)):
            anchor = anchors.get(id(one))
            name = f'<a href="#{anchor}">{_text(one.name)}</a>' if anchor else _text(one.name)
            why = f"<small>{_text(one.reasons[0].split(chr(10))[0])}</small>" if one.reasons and not one.bad else ""
            yield (
                f'<tr><td class="verdict"><span class="{_class(one.verdict)}"><i class="dot"></i>{one.verdict}</span></td>'
                f'<td class="name">{name}{why}</td><td class="kind">{one.kind}</td><td class="time">{one.seconds:.2f} s</td></tr>'
            )
        yield "</tbody></table>"
