"""Held translations against page tables that have changed since."""

from __future__ import annotations

from dataclasses import replace

import pytest

from introspect.paging import Access, Translation, translate
from introspect.sources import BytesMemory
from introspect.tlb_audit import Held, Why, audit

from .tables import MODES, NX, A, D, P, Tables, U, W, nested, state

PAGES = range(0x100000, 0x140000, 0x1000)
FLAGS = P | W | U | A | D


class Guest:
    """Page tables of a mode over nested ones that move the guest by 512 KiB, and what a processor holds of them."""

    def __init__(self, mode: str = "4-level") -> None:
        self.memory = BytesMemory(0x140000)
        self.npt = Tables(self.memory, "4-level", PAGES)
        for gpa in range(0, 0x40000, 0x1000):
            self.npt.map(gpa, 0x80000 + gpa, FLAGS)
        inner = BytesMemory({0: memoryview(self.memory.regions[0][1])[0x80000:0xC0000]})
        self.tables = Tables(inner, mode, range(0x10000, 0x30000, 0x1000))
        for page in range(4):
            self.tables.map(0x40_0000 + 0x1000 * page, 0x5000 + 0x1000 * page, FLAGS)
        self.paging = state(mode, self.tables.root)
        self.nested = nested("4-level", self.npt.root)

    def held(self) -> list[Held]:
        found = []
        for page in range(4):
            base = 0x40_0000 + 0x1000 * page
            t = translate(self.memory, self.paging, base, Access(user=True), self.nested, set_ad=False)
            assert isinstance(t, Translation)
            found.append(Held(0, 7, False, base, 0x1000, t.gpa, t.spa, True, True, True, False, self.paging, self.nested))
            found.append(
                Held(0, 7, True, t.gpa, 0x1000, t.gpa, t.spa, True, True, True, False, None, self.nested)
            )  # fmt: skip
        return found


@pytest.fixture(params=[mode for mode in MODES if mode != "legacy"])
def guest(request: pytest.FixtureRequest) -> Guest:
    return Guest(request.param)


def test_nothing_is_stale_at_first(guest: Guest) -> None:
    before = bytes(guest.memory.regions[0][1])
    found = audit(guest.memory, guest.held())
    assert (found.checked, found.stale, found.complete) == (8, (), True)
    assert bytes(guest.memory.regions[0][1]) == before


@pytest.mark.parametrize(
    ("add", "drop", "why"),
    [(0, P, Why.ABSENT), (0, W, Why.READ_ONLY), (0, U, Why.SUPERVISOR), (NX, 0, Why.NO_EXECUTE), (0, D, Why.CLEAN), (0x8000, 0, Why.MOVED)],
)
def test_a_change_of_the_guests_tables(guest: Guest, add: int, drop: int, why: Why) -> None:
    held = guest.held()
    guest.tables.change(0x40_1000, 1, add=add, drop=drop)
    (stale,) = audit(guest.memory, held).stale
    assert (stale.address, stale.why, stale.held.nested, stale.in_nested) == (0x40_1000, why, False, False)
    assert stale.spa == {Why.ABSENT: None, Why.MOVED: 0x8E000}.get(why, 0x86000)
    assert "INVLPG" in stale.remedy


@pytest.mark.parametrize(
    ("add", "drop", "why"),
    [(0, P, Why.ABSENT), (0, W, Why.READ_ONLY), (NX, 0, Why.NO_EXECUTE), (0x10000, 0, Why.MOVED)],
)
def test_a_change_of_the_nested_tables(guest: Guest, add: int, drop: int, why: Why) -> None:
    """What it makes stale is the guest-physical translation and the linear one that was made from it."""
    held = guest.held()
    guest.npt.change(0x6000, 1, add=add, drop=drop)
    found = {stale.held.nested: stale for stale in audit(guest.memory, held).stale}
    assert {nested: stale.why for nested, stale in found.items()} == {False: why, True: why}
    assert (found[False].address, found[True].address) == (0x40_1000, 0x6000)
    assert "TLB_CONTROL" in found[True].remedy
    if why in (Why.ABSENT, Why.MOVED):
        assert found[False].in_nested


def test_more_rights_are_no_finding(guest: Guest) -> None:
    held = [replace(one, write=False, execute=False, user=False) for one in guest.held()]
    assert audit(guest.memory, held).stale == ()


def test_a_part_of_a_large_page() -> None:
    """A large page that was held whole, split since with one small page elsewhere."""
    memory = BytesMemory(0x140000)
    tables = Tables(memory, "4-level", PAGES)
    for page in range(512):
        tables.map(0x20_0000 + 0x1000 * page, 0x1000 * page, FLAGS)
    paging = state("4-level", tables.root)
    one = Held(1, 0, False, 0x20_0000, 2 << 20, 0, 0, True, True, True, True, paging, None)
    assert audit(memory, [one]).stale == ()
    tables.change(0x20_0000 + 0x1000 * 300, 1, add=1 << 33)
    (stale,) = audit(memory, [one]).stale
    assert (stale.address, stale.why) == (0x20_0000 + 0x1000 * 300, Why.MOVED)
    assert "CR4.PGE" in stale.remedy


def test_work_is_bounded(guest: Guest) -> None:
    held = [replace(one, size=1 << 30) for one in guest.held()] * 1000
    found = audit(guest.memory, held, budget=50)
    assert not found.complete
    assert found.checked <= 50
