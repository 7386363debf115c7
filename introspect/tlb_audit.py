"""Translations that a processor holds against what the page tables say now (APM2 5.5, 15.16).

A processor may use what it holds until software makes it forget; so whatever is found here is a flush that is due, or was
forgotten.  That a held translation grants less than the tables do is no finding: a processor looks again before it refuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from introspect.paging import (
    ENTRY,
    Access,
    Fault,
    Nested,
    NestedFault,
    PagingState,
    Translation,
    nested_translate,
    translate,
)
from introspect.sources import Memory

__all__ = ["BUDGET", "Audit", "Held", "Stale", "Why", "audit"]

BUDGET = 65_536
"""Translations that one audit makes at most."""
MOST_FINDINGS = 1_000


@dataclass(frozen=True, slots=True)
class Held:
    """One translation that a processor holds.  Addresses and sizes in bytes."""

    cpu: int
    asid: int
    nested: bool
    """Of guest-physical addresses; else of linear ones."""
    base: int
    size: int
    gpa: int
    spa: int
    write: bool
    user: bool
    execute: bool
    is_global: bool
    paging: PagingState | None
    """By which registers the tables are to be read; None for a nested one."""
    by: Nested | None
    """The nested tables, if there are any."""
    vmcb: int = 0
    """Whose translation it was made as; 0 for the host."""


class Why(StrEnum):
    """How a held translation differs from the tables."""

    ABSENT = "the tables have no such page"
    MOVED = "the tables lead elsewhere"
    READ_ONLY = "the tables forbid writing"
    NO_EXECUTE = "the tables forbid execution"
    SUPERVISOR = "the tables forbid users"
    CLEAN = "the tables want the dirty bit set again"


@dataclass(frozen=True, slots=True)
class Stale:
    """A held translation that the tables contradict at `address`.  `spa`: where they lead now, None for nowhere."""

    held: Held
    address: int
    why: Why
    spa: int | None
    in_nested: bool
    """It is the nested tables that differ."""

    @property
    def remedy(self) -> str:
        """What flushes it, with the manual's section."""
        held = self.held
        if held.asid and (held.nested or self.in_nested):
            return "flush the ASID by TLB_CONTROL 3 (or 1) at VMRUN, on each CPU that has run it (APM2 15.16)"
        if held.asid and held.by is None:
            return f"INVLPGA with rAX {self.address:#x} and ECX {held.asid}, or TLB_CONTROL 3 at VMRUN (APM2 15.16)"
        if held.is_global:
            return "INVLPG, or a change of CR4.PGE (APM2 5.5.2)"
        return "INVLPG, or a load of CR3 (APM2 5.5.2)"


@dataclass(frozen=True, slots=True)
class Audit:
    """How many translations were looked at, what was found, and whether that is all."""

    checked: int
    stale: tuple[Stale, ...]
    complete: bool


def audit(memory: Memory, held: Iterable[Held], budget: int = BUDGET) -> Audit:
    """Compare held translations with the tables in memory.  Nothing is written, not even an accessed bit."""
    checked, found = 0, list[Stale]()
    for one in held:
        if budget <= 0 or len(found) >= MOST_FINDINGS:
            return Audit(checked, tuple(found), False)
        checked += 1
        offset = 0
        while offset < one.size and budget > 0:
            budget -= 1
            stale, size = _compare(memory, one, one.base + offset)
            if stale is not None:
                found.append(stale)
                break
            offset += max(size - (one.base + offset) % size, 0x1000) if size else one.size
    return Audit(checked, tuple(found), True)


def _compare(memory: Memory, held: Held, address: int) -> tuple[Stale | None, int]:
    """What is stale at an address, if anything, and the size of the page that the tables have there."""
    expected = held.spa + address - held.base
    if held.nested or held.paging is None:
        assert held.by is not None
        final = nested_translate(memory, held.by, address, False, False, held.user, set_ad=False)
        if isinstance(final, NestedFault):
            return Stale(held, address, Why.ABSENT, None, True), 0
        rights = ENTRY.U | (ENTRY.W if final.writable else 0) | (0 if final.executable else ENTRY.NX)
        why = _differs(held, expected, final.spa, rights, final.dirty)
        return (Stale(held, address, why, final.spa, True) if why else None), final.page_size
    access = Access(user=held.user)
    found = translate(memory, held.paging.privileged(), address, access, held.by, set_ad=False)
    if isinstance(found, Fault) and found.kind == "PF" and found.code & 1:
        # The page is there, but no longer for users.
        found = translate(memory, held.paging.privileged(), address, Access(), held.by, set_ad=False)
        if isinstance(found, Translation) and found.spa == expected:
            return Stale(held, address, Why.SUPERVISOR, found.spa, False), found.page_size
    if isinstance(found, Fault):
        return Stale(held, address, Why.ABSENT, None, found.kind == "NPF"), 0
    why = _differs(held, expected, found.spa, found.rights, found.dirty)
    below = found.gpa == held.gpa + address - held.base and held.by is not None
    return (Stale(held, address, why, found.spa, below and why == Why.MOVED) if why else None), found.page_size


def _differs(held: Held, expected: int, spa: int, rights: int, dirty: bool) -> Why | None:
    if spa != expected:
        return Why.MOVED
    if held.user and not rights & ENTRY.U:
        return Why.SUPERVISOR
    if held.execute and rights & ENTRY.NX:
        return Why.NO_EXECUTE
    if held.write and not rights & ENTRY.W:
        return Why.READ_ONLY
    return Why.CLEAN if held.write and not dirty else None
