"""Which IOMMU stands before which requester, as the IVRS says and as transactions are led."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from introspect.pci import RequesterId
from vmdbg.platform.pci.bus import Bridge
from vmdbg.platform.pci.root import RootComplex

FIRST_FUNCTION, MOST_UNITS = 2, 6
"""IOMMUs are functions 2 to 7 of device 0 on the root bus, beside the host bridge."""
FIRST_TRANSLATED, LAST_REQUESTER = 0x0008, 0xFFFF
"""Device 0 is the root complex itself: what it sends is not translated."""


class Share(NamedTuple):
    """Requesters first..last are behind IOMMU number `unit`."""

    first: RequesterId
    last: RequesterId
    unit: int


def shares(root: RootComplex, units: int) -> list[Share]:
    """Every requester from device 1 on, ascending and without a gap.

    Slots of the root bus that hold something go to the IOMMUs in turn, with the buses behind them; all else is the first's.
    """
    owned: list[tuple[int, int, int]] = []
    slots = sorted({devfn >> 3 for devfn in root.bus.functions if devfn >> 3})
    for index, slot in enumerate(slots):
        unit = index % units
        if unit:
            owned.append((slot << 3, slot << 3 | 7, unit))
            owned.extend((*buses, unit) for buses in _behind(root, slot))
    return list(_filled(sorted(owned)))


def _behind(root: RootComplex, slot: int) -> Iterable[tuple[int, int]]:
    for devfn, function in root.bus.functions.items():
        if devfn >> 3 == slot and isinstance(function, Bridge) and function.header_field("secondary_bus"):
            yield function.header_field("secondary_bus") << 8, function.header_field("subordinate_bus") << 8 | 0xFF


def _filled(owned: Sequence[tuple[int, int, int]]) -> Iterable[Share]:
    at = FIRST_TRANSLATED
    for first, last, unit in owned:
        if at < first:
            yield Share(RequesterId(at), RequesterId(first - 1), 0)
        yield Share(RequesterId(first), RequesterId(last), unit)
        at = last + 1
    if at <= LAST_REQUESTER:
        yield Share(RequesterId(at), RequesterId(LAST_REQUESTER), 0)


def unit_of(found: Sequence[Share], requester: RequesterId) -> int | None:
    """None for the root complex."""
    index = bisect_right(found, requester, key=lambda share: share.first) - 1
    return found[index].unit if index >= 0 else None
