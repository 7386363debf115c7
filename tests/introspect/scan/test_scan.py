"""VMCBs are found where they are, and nowhere else; what speaks for each is said."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.rules import Processor
from introspect.scan import MOST, THRESHOLD, scan
from introspect.sources import BytesMemory, Unreadable, open_raw
from introspect.vmcb import VMCB

from ..machines import HSAVE, IOPM, MSRPM, SIZE, VMCB_A, VMCB_B, VMCB_MADE, build

CPU = Processor()


@pytest.fixture(scope="module")
def machine() -> BytesMemory:
    return build()


def test_everything_is_found(machine: BytesMemory) -> None:
    result = scan(machine)
    assert [(one.kind, one.spa, one.score) for one in result.found] == [
        ("HSAVE", HSAVE, 100), ("VMCB", VMCB_A, 100), ("VMCB", VMCB_B, 100), ("VMCB", VMCB_MADE, 100),
    ]  # fmt: skip
    assert (result.doubtful, result.bytes_read, result.ended) == ((), SIZE, "")


def test_what_a_vmcb_leads_to(machine: BytesMemory) -> None:
    found = {one.spa: one for one in scan(machine).found}
    areas = {area.kind: area for area in found[VMCB_A].areas}
    assert (areas["IOPM"].spa, areas["MSRPM"].spa, areas["nested root"].spa) == (IOPM, MSRPM, 0x20000)
    assert areas["IOPM"].text == f"{0x3000 * 8} bits set"


def test_whose_is_whose(machine: BytesMemory) -> None:
    """The VMCB that a guest's hypervisor made is in that guest's memory, and its addresses are that guest's."""
    result = scan(machine)
    found = {one.spa: one for one in result.found}
    assert (found[VMCB_MADE].inside, found[VMCB_MADE].runs_as) == (VMCB_A, VMCB_B)
    assert all(found[spa].inside is None for spa in (HSAVE, VMCB_A, VMCB_B))
    assert next(area.spa for area in found[VMCB_MADE].areas if area.kind == "nested root") == 0x20000
    assert result.relations is not None
    assert result.relations.made_for([VMCB_B]) == VMCB_MADE
    assert result.relations.made_for([VMCB_A]) is None


def test_a_hypervisor_that_hides_nothing(machine: BytesMemory) -> None:
    """Where the guest's nested tables map the guest's own VMCB, that VMCB is not the guest's."""
    memory = build(nested=False)
    for at in range(0, 0x100000, 0x1000):  # its nested table of the last level, for the machine's addresses instead
        memory.write_u64(0x23000 + at // 0x1000 * 8, at | 7)
    result = scan(memory)
    assert [one.spa for one in result.vmcbs] == [VMCB_A]
    assert result.found[-1].inside is None


def test_a_fault_costs_points_and_says_why() -> None:
    memory = build(nested=False)
    memory.write(VMCB_A + VMCB.offset_of("exitcode"), (0x555).to_bytes(8, "little"))
    memory.write(VMCB_A + VMCB.offset_of("rip"), (0x7777_0000).to_bytes(8, "little"))
    (found,) = scan(memory).vmcbs
    assert found.score == 75
    lost = [(one.points, one.most, one.text) for one in found.evidence if one.points < one.most]
    assert lost == [(0, 10, "its exit code 0x555 does not exist"), (0, 15, "CS:RIP, 0x77770000, leads to no memory")]


@pytest.mark.parametrize(
    ("field", "value"),
    [("intercept_misc2", 0), ("guest_asid", 0), ("efer", 0x500), ("cr0", 1 << 40), ("rflags", 0), ("cr3", 1 << 60), ("dr6", 1 << 33)],
)
def test_what_a_vmcb_must_be(field: str, value: int) -> None:
    memory = build(nested=False)
    contents = bytearray(memory.read(VMCB_A, 0x1000))
    VMCB.write(contents, field, value)
    memory.write(VMCB_A, bytes(contents))
    assert scan(memory).vmcbs == ()


def test_reserved_parts_are_zero() -> None:
    memory = build(nested=False)
    memory.write(VMCB_A + 0x20, b"\1")
    assert scan(memory).vmcbs == ()


pages = st.builds(
    lambda seed, kind, count: (seed, kind, count),
    st.integers(0, 2**32), st.sampled_from(("random", "sparse", "small", "ones", "pointers")), st.integers(1, 40),
)  # fmt: skip


def random_pages(seed: int, kind: str, count: int) -> bytes:
    source = np.random.default_rng(seed)
    words = source.integers(0, 2**64, count * 512, np.uint64)
    if kind == "sparse":
        words[source.random(len(words)) < 0.95] = 0
    elif kind == "small":
        words &= np.uint64(0xFFF)
    elif kind == "ones":
        words |= source.integers(0, 2**64, len(words), np.uint64) | source.integers(0, 2**64, len(words), np.uint64)
    elif kind == "pointers":
        words = words % np.uint64(count) * np.uint64(0x1000) | np.uint64(7)
    return words.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(pages, min_size=1, max_size=6))
def test_no_vmcb_is_found_in_random_memory(chosen: list[tuple[int, str, int]]) -> None:
    result = scan(BytesMemory({0: b"".join(random_pages(*one) for one in chosen)}))
    assert result.found == result.doubtful == ()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_a_damaged_vmcb_is_judged_not_believed(seed: int, changes: int) -> None:
    """Bytes changed at random: found or not, there is an answer, and those below the threshold are not taken."""
    chance = random.Random(seed)
    memory = build(nested=False)
    for _ in range(changes):
        memory.write(VMCB_A + chance.choice((chance.randrange(0x1000), 0x400 + chance.randrange(0x300))), bytes([chance.randrange(256)]))
    result = scan(memory)
    assert all(one.score >= THRESHOLD for one in result.found)
    assert all(one.score < THRESHOLD for one in result.doubtful)


def test_a_search_can_be_ended(machine: BytesMemory) -> None:
    told: list[float] = []

    def enough(part: float) -> bool:
        told.append(part)
        return False

    result = scan(machine, CPU, enough)
    assert told == [1.0]
    assert result.ended.startswith("ended on request at")


def test_a_dump_full_of_vmcbs_is_bounded() -> None:
    page = build(nested=False).read(VMCB_A, 0x1000)
    result = scan(BytesMemory({0: page * (MOST + 2000)}))
    assert "more than 4096 pages look like VMCBs" in result.ended


class Holes(BytesMemory):
    """Memory of which every second page is missing, and does not say so."""

    def read(self, spa: int, length: int, /) -> bytes:
        for at in range(spa, spa + length):
            if at // 0x1000 % 2:
                raise Unreadable(at, super().read(spa, at - spa))
        return super().read(spa, length)


def test_memory_with_holes() -> None:
    page = build(nested=False).read(VMCB_A, 0x1000)
    result = scan(Holes({0: page * 6}))
    assert [one.spa for one in (*result.found, *result.doubtful)] == [0, 0x2000, 0x4000]


def test_a_tebibyte_of_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        os.truncate(path, 1 << 40)
        file.seek(1 << 39)
        file.write(build(nested=False).read(VMCB_A, 0x1000))
    result = scan(open_raw(path).memory)
    assert [one.spa for one in (*result.found, *result.doubtful)] == [1 << 39]
    assert result.bytes_read < 1 << 20


def test_a_vmcb_in_the_last_page_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(0x1000) + build(nested=False).read(VMCB_A, 0x800))
    assert scan(open_raw(path).memory).found == ()

