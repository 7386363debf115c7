"""What a strict TLB holds, in the terms of `introspect.tlb_audit`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from introspect.paging import ENTRY, PagingState
from introspect.tlb_audit import Held

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu


def held_by(cpu: Cpu, asid: int | None = None) -> Iterator[Held]:
    """The translations that a CPU holds, of all address spaces or one; none without a strict TLB."""
    if cpu.tlb is None:
        return
    for number, space in cpu.tlb.spaces.items():
        if asid not in (None, number) or not space.paging:
            continue
        cr0, cr3, cr4, efer = space.paging
        paging = PagingState(cr0, cr3, cr4, efer, maxphyaddr=cpu.physical_bits)
        for entries in (space.linear, space.nested):
            for entry in entries:
                rights = entry.rights
                yield Held(
                    cpu.index, number, entry.nested, entry.base, entry.size, entry.gpa, entry.spa,
                    bool(rights & ENTRY.W) and entry.dirty, bool(rights & ENTRY.U), not rights & ENTRY.NX,
                    bool(rights & ENTRY.G), None if entry.nested else paging, space.by, entry.origin.vmcb,
                )  # fmt: skip
