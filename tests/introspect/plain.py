"""Listings of address spaces the plain way: one walk after the other. What `introspect.tables` must agree with."""

from __future__ import annotations

from collections.abc import Iterator

from introspect.paging import Access, Nested, PagingState, Translation, walk
from introspect.sources import Memory
from introspect.tables import Mapped, canonical

_WIDTHS = {"off": 32, "legacy": 32, "PAE": 32, "4-level": 48, "5-level": 57}
_SHIFTS = {"legacy": (12, 22), "PAE": (12, 21, 30), "4-level": (12, 21, 30, 39), "5-level": (12, 21, 30, 39, 48)}


def plain_space(
    memory: Memory, state: PagingState, nested: Nested | None, most: int
) -> Iterator[tuple[int, int, Mapped | None]]:
    """(start, end, what is there) of the linear addresses, in order, at most so many. A step is as far as the entries of one
    walk speak for."""
    width = _WIDTHS[state.mode]
    state = state.privileged()
    address = 0
    while address < 1 << width and most:
        most -= 1
        seen = walk(memory, state, canonical(address, width), Access(), nested)
        guest = [step for step in seen.steps if not step.nested]
        shift = _SHIFTS[state.mode][guest[-1].level - 1] if guest else width
        arrived = guest[-1].leaf if guest else state.mode == "off"
        if nested is not None and arrived and seen.steps[-1].nested:
            shift = min(shift, _SHIFTS[nested.format.name][seen.steps[-1].level - 1])
        if nested is not None and nested.apic is not None and isinstance(seen.verdict, Translation):
            shift = 12
        end = (address | (1 << shift) - 1) + 1
        yield address, end, _mapped(seen.verdict) if isinstance(seen.verdict, Translation) else None
        address = end


def _mapped(found: Translation) -> Mapped:
    return Mapped(found.spa, found.rights, found.page_size, found.guest_page_size)
