"""A translation that is kept is never another than the one that a walk would find."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from introspect.memo import Memo, Place
from introspect.paging import Access, Fault, Nested, PagingState, Translation, translate
from introspect.registers import CR0, CR4, EFER
from introspect.sources import BytesMemory, Unreadable

SIZE = 0x20000
NPT, NPDPT = 0x1E000, 0x1F000
"""The nested table: one page of 1 GiB, there or not."""
PAGES = NPT >> 12
MODES = {
    "none": PagingState(CR0.PE, 0, 0, 0),
    "legacy": PagingState(CR0.PE | CR0.PG, 0x1000, 0, 0),
    "PAE": PagingState(CR0.PE | CR0.PG, 0x1000, CR4.PAE, 0),
    "4-level": PagingState(CR0.PE | CR0.PG, 0x1000, CR4.PAE, EFER.LME | EFER.LMA | EFER.NXE),
    "user with SMAP": PagingState(CR0.PE | CR0.PG, 0x1000, CR4.PAE | CR4.SMAP, EFER.LME | EFER.LMA, 3),
}


def entry(random: Random) -> int:
    """One that often leads on, within the memory."""
    return random.randrange(PAGES) << 12 | random.choice((0, 1, 7, 7, 7, 0x67, 0x87))


def fill(memory: BytesMemory, random: Random, count: int) -> None:
    for _ in range(count):
        # The first entries of each page: those that the addresses below go through.
        memory.write_u64(random.randrange(PAGES) << 12 | random.randrange(4) * 8, entry(random))


@pytest.mark.parametrize("viewed", [False, True], ids=["by calls", "by view"])
@pytest.mark.parametrize("nested", [None, Nested(NPT, CR4.PAE, EFER.LMA | EFER.LME)], ids=["alone", "nested"])
@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_walk(mode: str, nested: Nested | None, viewed: bool) -> None:
    data, random = bytearray(SIZE), Random(f"{mode} {nested is None}")
    memory = BytesMemory({0: data})
    memo = Memo(memory, memoryview(data).cast("Q") if viewed else None)
    fill(memory, random, 4000)
    memory.write_u64(NPT, NPDPT | 7)
    mapped = 0
    for _ in range(3000):
        if random.random() < 0.3:
            fill(memory, random, 3)
            memory.write_u64(NPDPT, random.choice((0, 0x87, 0x87)))
        state = random.choice((MODES[mode], MODES[mode], MODES["4-level"]))
        address = sum(random.randrange(3) << shift for shift in (12, 21, 30, 39)) | random.randrange(0x1000)
        try:
            walked = translate(memory, state.privileged(), address, Access(), nested, set_ad=False)
        except Unreadable:
            continue
        found = memo.find(state, address, nested)
        if isinstance(walked, Translation):
            mapped += 1
            assert found == Place(walked.spa, walked.gpa, walked.page_size)
        else:
            assert found is None
    assert mapped > 100


def test_nothing_is_walked_again_while_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = BytesMemory(SIZE)
    for table in range(1, 5):
        memory.write_u64(table << 12, (table + 1) << 12 | 7)
    memo, walks = Memo(memory), 0

    def counted(*arguments: Any, set_ad: bool) -> Translation | Fault:
        nonlocal walks
        walks += 1
        return translate(*arguments, set_ad=set_ad)

    monkeypatch.setattr("introspect.memo.translate", counted)
    for offset in (0, 8, 0xFFF):
        assert memo.find(MODES["4-level"], offset) == Place(0x5000 + offset, 0x5000 + offset, 0x1000)
    assert walks == 1
    memory.write_u64(0x4000, 0x6007)
    assert memo.find(MODES["4-level"], 8) == Place(0x6008, 0x6008, 0x1000)
    assert walks == 2
