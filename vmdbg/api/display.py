# SPDX-License-Identifier: GPL-2.0-or-later
"""How a notebook shows things: tables for lists, text as it would be in a terminal for results of commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from html import escape
from typing import Protocol

from introspect.commands import Result

__all__ = ["definitions", "register", "table", "text_html"]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """HTML of a table."""

    def row(cells: Sequence[object], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    return f"<table><thead>{row(head, 'th')}</thead><tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table>"


def definitions(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """HTML of names with what they are."""
    shown = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    return f"<b>{escape(title)}</b><table>{shown}</table>"


def text_html(result: Result) -> str:
    """Of aligned text."""
    return f"<pre>{escape(result.text())}</pre>"


class _Printer(Protocol):
    def text(self, text: str) -> object: ...


def _pretty(result: Result, printer: _Printer, cycle: bool) -> None:
    printer.text(result.text())


def register(kinds: Iterable[type]) -> None:
    """In a notebook, or IPython's prompt, show results of these types so; nothing elsewhere."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    if shell is None:
        return
    formatters = shell.display_formatter.formatters
    for kind in kinds:
        formatters["text/plain"].for_type(kind, _pretty)
        formatters["text/html"].for_type(kind, text_html)
