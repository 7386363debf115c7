"""RAM says where it was ever touched: a search or a core need not read the rest."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from introspect.sources import data_ranges
from vmdbg.engine.memory import HIGH, PAGE, Ram

GIB = 1 << 30


def test_pages_that_were_touched() -> None:
    ram = Ram(4 * GIB)
    assert list(data_ranges(ram)) == []
    for spa in (0x5000, 0x6FF8, 0x123_4567_8000 % GIB, HIGH + 0x3000):
        ram.write(spa, b"12345678")
    found = list(data_ranges(ram))
    assert found[0] == (0x5000, 0x7000)
    assert found[-1] == (HIGH + 0x3000, HIGH + 0x4000)
    assert sum(end - first for first, end in found) == 4 * PAGE
    assert list(ram.data(0x5800, 0x5900)) == [(0x5800, 0x5900)]
    assert list(ram.data(0x4800, 0x6800)) == [(0x5000, 0x6800)]
    assert list(ram.data(0x6000, 0x9000)) == [(0x6000, 0x7000)]


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.open

    def refused(path: Any, *arguments: Any, **options: Any) -> Any:
        if path == "/proc/self/pagemap":
            raise FileNotFoundError(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refused)
    assert list(Ram(1 << 20).data(0x1000, 0x5000)) == [(0x1000, 0x5000)]
