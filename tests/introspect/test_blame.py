"""What `walk` says of the entry to blame is what is wrong with it: put right, over and over, the access goes through."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.blame import reason
from introspect.paging import Access, Fault, Nested, PagingState, walk
from introspect.registers import CR0, CR4
from introspect.sources import BytesMemory, Unwritable

from .tables import NX, PAGED, P, Tables, U, W, nested, state
from .test_paging_properties import ACCESSES, GVAS, NESTED, PAGES, memories, states


def put_right(memory: BytesMemory, found_at: int, value: int, why: str, size: int) -> None:
    if why.startswith("reserved bits"):
        match = re.search(r"0x[0-9a-f]+", why)
        assert match is not None
        value &= ~int(match[0], 16)
    elif why == "NX is 1":
        value &= ~NX
    elif why.startswith("U is 1"):
        value &= ~U
    else:
        value |= {"P": P, "W": W, "U": U}[why[0]]
    (memory.write_u64 if size == 8 else memory.write_u32)(found_at, value)


@settings(max_examples=300)
@given(memories(), states(), GVAS, ACCESSES, NESTED)
def test_what_is_blamed_is_what_is_wrong(
    memory: BytesMemory, where: PagingState, gva: int, access: Access, inner: Nested | None
) -> None:
    seen: set[tuple[int, str]] = set()
    for _ in range(PAGES * 40):
        found = walk(memory, where, gva, access, inner)
        if not isinstance(found.verdict, Fault) or found.blame is None or found.blame.spa is None:
            assert not reason(found, where, inner) or found.blame is not None
            return
        why, step = reason(found, where, inner), found.blame
        assert why, found
        form = inner.format if step.nested and inner is not None else where.format
        assert form is not None
        assert step.spa is not None
        if (step.spa, why) in seen:
            return  # a table of both dimensions, or one that two ways lead through: users' and supervisors' at once
        seen.add((step.spa, why))
        try:
            # A right that an entry above has, this one withholds: the first of them is blamed.
            put_right(memory, step.spa, step.value, why, form.entry_size)
        except Unwritable:
            return
    raise AssertionError("it never goes through")


def one(mode: str, flags: int, access: Access, cr0: int = PAGED, cr4: int = 0) -> str:
    """The reason for a page with these flags."""
    memory = BytesMemory(0x20000)
    tables = Tables(memory, mode, range(0x10000, 0x20000, 0x1000))
    tables.map(0x5000, 0x1000, flags)
    where = state(mode, tables.root, cr0=cr0, cr4=cr4)
    return reason(walk(memory, where, 0x5000, access), where, None)


def test_the_reasons() -> None:
    assert one("4-level", 0, Access()) == "P is 0"
    assert one("4-level", P | U, Access(write=True)) == "W is 0"
    assert one("4-level", P | W, Access(user=True)) == "U is 0"
    assert one("4-level", P | W | NX, Access(execute=True)) == "NX is 1"
    assert one("4-level", P | W | 1 << 51, Access()) == "reserved bits 0x8000000000000 are set"
    assert one("4-level", P | W | U, Access(execute=True), cr4=CR4.SMEP).startswith("U is 1, and CR4.SMEP")
    assert one("legacy", P | W | U, Access(), cr4=CR4.SMAP).startswith("U is 1, and CR4.SMAP")
    assert one("PAE", P | U, Access(write=True), cr4=CR4.SMAP) == "W is 0"
    assert one("4-level", P | U, Access(write=True), cr0=CR0.PE | CR0.PG) == ""


@given(st.sampled_from(("4-level", "PAE", "legacy")), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_nested_reasons(mode: str, present: bool, writable: bool, users: bool, gmet: bool) -> None:
    memory = BytesMemory(0x20000)
    tables = Tables(memory, mode, range(0x10000, 0x20000, 0x1000))
    tables.map(0x5000, 0x1000, P * present | W * writable | U * users)
    inner = nested(mode, tables.root)
    inner = Nested(inner.ncr3, inner.host_cr4, inner.host_efer, inner.maxphyaddr, None, gmet)
    for access in (Access(), Access(write=True), Access(execute=True), Access(execute=True, user=True)):
        found = walk(memory, PagingState(0, 0, 0, 0), 0x5000, access, inner)
        why = reason(found, PagingState(0, 0, 0, 0), inner)
        assert bool(why) == isinstance(found.verdict, Fault)
        if why:
            assert why.startswith("P is 0" if not present else f"U is {int(users)}" if "U is" in why else "W is 0"), why
