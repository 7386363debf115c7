"""Literal verdicts: what the manual says about one set of tables (APM2 chapter 5, 15.25)."""

from dataclasses import replace

import pytest

from introspect.address import Gpa, Spa
from introspect.exits import describe_exit
from introspect.paging import (
    Access,
    Fault,
    Nested,
    NestedFault,
    NestedTranslation,
    PagingState,
    Translation,
    nested_translate,
    translate,
    walk,
)
from introspect.registers import CR0, CR4, EFER
from introspect.sources import BytesMemory
from introspect.vmcb import VMCB

from .tables import LONG, MODES, NX, PAGED, SHIFTS, A, D, G, P, Tables, U, W, nested, state

READ, WRITE, FETCH = Access(), Access(write=True), Access(execute=True)
USER_READ, USER_WRITE, USER_FETCH = (replace(access, user=True) for access in (READ, WRITE, FETCH))
GVA = 0x0040_2000


def pages(start: int) -> range:
    return range(start, start + 0x20000, 0x1000)


def guest(mode: str = "4-level") -> tuple[BytesMemory, Tables]:
    """Memory where GVA maps to 0x5000, with tables from 0x10000 on."""
    memory = BytesMemory(0x100000)
    tables = Tables(memory, mode, pages(0x10000))
    tables.map(GVA, 0x5000)
    return memory, tables


def verdict(memory: BytesMemory, where: PagingState, access: Access, gva: int = GVA + 0x123) -> Translation | Fault:
    return translate(memory, where, gva, access, set_ad=False)


def pf(code: int, address: int = GVA + 0x123) -> Fault:
    return Fault("PF", code, address)


@pytest.mark.parametrize("mode", MODES)
def test_a_small_page(mode: str) -> None:
    memory, tables = guest(mode)
    found = verdict(memory, state(mode, tables.root), USER_WRITE)
    assert found == Translation(Spa(0x5123), Gpa(0x5123), 0x1000, 0x1000, True, True, True, True, W | U)
    assert verdict(memory, state(mode, tables.root), READ, GVA + 0x1000) == Fault("PF", 0, GVA + 0x1000)


@pytest.mark.parametrize(
    ("mode", "level", "size"),
    [("legacy", 2, 22), ("PAE", 2, 21), ("4-level", 2, 21), ("4-level", 3, 30), ("5-level", 3, 30)],
)
def test_large_pages(mode: str, level: int, size: int) -> None:
    memory = BytesMemory(0x100000)
    tables = Tables(memory, mode, pages(0x10000))
    tables.map(0x8000_0000, 0x4000_0000, level=level)
    found = verdict(memory, state(mode, tables.root), USER_READ, 0x8012_3456)
    assert isinstance(found, Translation)
    assert (found.spa, found.page_size) == (0x4012_3456, 1 << size)


def test_pse36_address_bits() -> None:
    memory = BytesMemory(0x100000)
    tables = Tables(memory, "legacy", pages(0x10000))
    tables.map(0, 0x0040_0000 | 0x12 << 13, level=2)
    found = verdict(memory, state("legacy", tables.root, maxphyaddr=40), READ, 0x1234)
    assert isinstance(found, Translation)
    assert found.spa == 0x12_0040_1234
    assert verdict(memory, state("legacy", tables.root, maxphyaddr=36), READ, 0) == Fault("PF", 9, 0)
    tables.change(0, 2, add=1 << 21, drop=0xFF << 13)
    assert verdict(memory, state("legacy", tables.root, maxphyaddr=40), READ, 0) == Fault("PF", 9, 0)


def test_without_pse_the_bit_is_ignored() -> None:
    memory, tables = guest("legacy")
    tables.change(GVA, 2, add=0x80)
    where = PagingState(PAGED, tables.root, 0, 0)
    assert isinstance(verdict(memory, where, READ), Translation)


@pytest.mark.parametrize(
    ("access", "leaf", "code"),
    [
        (USER_READ, P, 5), (USER_WRITE, P | U, 7), (WRITE, P | U, 3), (USER_FETCH, P | U | NX, 0x15),
        (FETCH, P | NX, 0x11), (USER_READ, 0, 4), (WRITE, 0, 2), (FETCH, 0, 0x10), (USER_FETCH, 0, 0x14),
        (USER_WRITE, P | W, 7), (USER_READ, P | U | 1 << 51, 0xD), (FETCH, P | 1 << 50, 0x19),
    ],
)  # fmt: skip
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_error_codes(access: Access, leaf: int, code: int, level: int) -> None:
    """Any level may withhold the right."""
    memory, tables = guest()
    tables.change(GVA, level, add=leaf, drop=(P | W | U) & ~leaf)
    where = state("4-level", tables.root)
    assert verdict(memory, where, access) == pf(code)
    seen = walk(memory, where, GVA + 0x123, access)
    assert seen.verdict == pf(code)
    assert seen.blame is not None
    assert (seen.blame.level, seen.blame.spa) == (level, tables.entry(GVA, level))


def test_supervisor_writes_need_w_only_with_wp() -> None:
    memory, tables = guest()
    tables.change(GVA, 2, drop=W)
    found = verdict(memory, state("4-level", tables.root, cr0=PAGED & ~CR0.WP), WRITE)
    assert isinstance(found, Translation)
    assert found.writable
    assert verdict(memory, state("4-level", tables.root, cr0=PAGED & ~CR0.WP), USER_WRITE) == pf(7)


def test_smep() -> None:
    memory, tables = guest()
    where = state("4-level", tables.root, cr4=CR4.SMEP)
    assert verdict(memory, where, FETCH) == pf(0x11)
    assert isinstance(verdict(memory, where, USER_FETCH), Translation)
    found = verdict(memory, where, READ)
    assert isinstance(found, Translation)
    assert not found.executable
    tables.change(GVA, 3, drop=U)
    assert isinstance(verdict(memory, where, FETCH), Translation)


def test_smap() -> None:
    memory, tables = guest()
    where = state("4-level", tables.root, cr4=CR4.SMAP)
    spared = state("4-level", tables.root, cr4=CR4.SMAP, rflags_ac=True)
    implicit = Access(write=True, user=True, implicit_supervisor=True)
    assert verdict(memory, where, READ) == pf(1)
    assert verdict(memory, where, WRITE) == pf(3)
    assert isinstance(verdict(memory, spared, WRITE), Translation)
    assert verdict(memory, spared, implicit) == pf(3), "RFLAGS.AC does not spare implicit accesses"
    assert isinstance(verdict(memory, where, FETCH), Translation)
    assert isinstance(verdict(memory, where, USER_READ), Translation)
    blame = walk(memory, where, GVA, READ).blame
    assert blame is not None
    assert blame.level == 1


def test_without_nxe_the_bit_is_reserved_and_fetches_are_not_told() -> None:
    memory, tables = guest()
    where = PagingState(PAGED, tables.root, CR4.PAE, EFER.LME | EFER.LMA)
    assert verdict(memory, where, FETCH, GVA + 0x1000) == Fault("PF", 0, GVA + 0x1000)
    tables.change(GVA, 1, add=NX)
    assert verdict(memory, where, READ) == pf(9)


@pytest.mark.parametrize(
    ("mode", "level", "bit", "reserved"),
    [
        ("4-level", 4, 7, True), ("4-level", 4, 8, True), ("4-level", 3, 8, False), ("4-level", 2, 8, False),
        ("5-level", 5, 7, True), ("4-level", 1, 8, False), ("4-level", 1, 48, True), ("4-level", 4, 51, True),
        ("4-level", 1, 52, False), ("4-level", 1, 62, False), ("PAE", 1, 52, True), ("PAE", 2, 62, True),
        ("PAE", 3, 1, True), ("PAE", 3, 2, True), ("PAE", 3, 5, True), ("PAE", 3, 63, True), ("PAE", 3, 3, False),
    ],
)  # fmt: skip
def test_reserved_bits(mode: str, level: int, bit: int, reserved: bool) -> None:
    memory, tables = guest(mode)
    tables.change(GVA, level, add=1 << bit)
    found = verdict(memory, state(mode, tables.root), READ)
    assert found == pf(9) if reserved else isinstance(found, Translation)


def test_reserved_bits_of_large_pages() -> None:
    for level, bit in ((2, 13), (2, 20), (3, 13), (3, 29)):
        memory = BytesMemory(0x100000)
        tables = Tables(memory, "4-level", pages(0x10000))
        tables.map(0, 0, level=level)
        tables.change(0, level, add=1 << 12 | G)
        assert isinstance(verdict(memory, state("4-level", tables.root), READ, 0), Translation), "bit 12 is PAT"
        tables.change(0, level, add=1 << bit)
        assert verdict(memory, state("4-level", tables.root), READ, 0) == Fault("PF", 9, 0)


def test_canonical_addresses() -> None:
    memory, tables = guest()
    four, five = state("4-level", tables.root), state("5-level", tables.root)
    assert verdict(memory, four, READ, 1 << 47) == Fault("GP", 0, 1 << 47)
    assert verdict(memory, four, READ, 0xFFFF_8000_0000_0000) == Fault("PF", 0, 0xFFFF_8000_0000_0000)
    assert verdict(memory, five, READ, 1 << 56) == Fault("GP", 0, 1 << 56)
    assert verdict(memory, five, READ, 1 << 47) != Fault("GP", 0, 1 << 47)


def test_pdptes_held_by_the_processor() -> None:
    memory, tables = guest("PAE")
    held = tuple(memory.read_u64(tables.root + 8 * n) for n in range(4))
    tables.put(tables.root, 0)
    assert isinstance(verdict(memory, state("PAE", tables.root, pdptes=held), READ), Translation)
    assert verdict(memory, state("PAE", tables.root), READ) == pf(0)
    seen = walk(memory, state("PAE", tables.root, pdptes=held), GVA, READ)
    assert [step.spa is None for step in seen.steps] == [True, False, False]


def test_paging_off() -> None:
    memory = BytesMemory(0x1000)
    off = PagingState(CR0.PE, 0x123000, 0, 0)
    found = verdict(memory, off, USER_WRITE, 0x1_0000_5123)
    assert found == Translation(Spa(0x5123), Gpa(0x5123), 0, 0, True, True, True, True, W | U)


def test_tables_outside_memory_read_as_ones() -> None:
    memory = BytesMemory(0x1000)
    assert verdict(memory, state("4-level", 0x9000_0000), READ) == pf(9)
    assert walk(memory, state("legacy", 0x9000_0000), GVA, READ).steps[0].value == 0xFFFF_FFFF


@pytest.mark.parametrize("mode", MODES)
def test_accessed_and_dirty_bits(mode: str) -> None:
    memory, tables = guest(mode)
    where = state(mode, tables.root)
    levels = [n for n in range(1, len(SHIFTS[mode]) + 1) if (mode, n) != ("PAE", 3)]

    def marks() -> list[int]:
        return [tables.get(tables.entry(GVA, level)) & (A | D) for level in levels]

    assert walk(memory, where, GVA, WRITE).steps
    translate(memory, where, GVA, WRITE, set_ad=False)
    assert set(marks()) == {0}
    found = translate(memory, where, GVA, READ, set_ad=True)
    assert isinstance(found, Translation)
    assert not found.dirty
    assert set(marks()) == {A}
    found = translate(memory, where, GVA, WRITE, set_ad=True)
    assert isinstance(found, Translation)
    assert found.dirty
    assert marks() == [A | D, *[A] * (len(levels) - 1)]


def test_a_refused_access_leaves_no_marks() -> None:
    memory, tables = guest()
    tables.change(GVA, 1, drop=W)
    before = memory.read(0, 0x100000)
    assert translate(memory, state("4-level", tables.root), GVA, WRITE, set_ad=True) == pf(3, GVA)
    assert memory.read(0, 0x100000) == before


def test_impossible_address_widths_are_clamped() -> None:
    memory, tables = guest()
    assert isinstance(verdict(memory, state("4-level", tables.root, maxphyaddr=64), READ), Translation)
    assert isinstance(verdict(memory, state("4-level", tables.root, maxphyaddr=-1), READ), Translation)


# The nested dimension


def both(host: str = "4-level", mode: str = "4-level") -> tuple[BytesMemory, Tables, Tables]:
    """GVA -> gpa 0x5000 -> spa 0x85000; guest memory is 0x80000 + gpa, in small nested pages."""
    memory = BytesMemory(0x200000)
    shifted = BytesMemory({0: memory.regions[0][1][0x80000:0x100000]})
    tables = Tables(shifted, mode, pages(0x10000))
    tables.map(GVA, 0x5000)
    npt = Tables(memory, host, pages(0x100000))
    for gpa in range(0, 0x40000, 0x1000):
        npt.map(gpa, 0x80000 + gpa)
    return memory, tables, npt


@pytest.mark.parametrize("host", MODES)
@pytest.mark.parametrize("mode", MODES)
def test_two_dimensions(host: str, mode: str) -> None:
    memory, tables, npt = both(host, mode)
    inner = nested(host, npt.root)
    found = translate(memory, state(mode, tables.root), GVA + 5, USER_WRITE, inner, set_ad=True)
    assert found == Translation(Spa(0x85005), Gpa(0x5005), 0x1000, 0x1000, True, True, True, True, W | U)
    seen = walk(memory, state(mode, tables.root), GVA + 5, USER_WRITE, inner)
    assert seen.verdict == found
    guest_levels, nested_levels = len(SHIFTS[mode]), len(SHIFTS[host])
    assert len(seen.steps) == (guest_levels + 1) * (nested_levels + 1) - 1
    assert (seen.mode, seen.nested_mode) == (mode, host)


def test_real_mode_under_nested_paging() -> None:
    memory, _, npt = both()
    off = PagingState(CR0.ET, 0, 0, 0)
    found = translate(memory, off, 0x7C00, FETCH, nested("4-level", npt.root), set_ad=True)
    assert found == Translation(Spa(0x87C00), Gpa(0x7C00), 0x1000, 0, True, True, True, False, W | U)
    assert translate(memory, off, 0x50000, FETCH, nested("4-level", npt.root), set_ad=True) == Fault(
        "NPF", 1 << 32 | 0x14, 0x50000
    )


@pytest.mark.parametrize(
    ("access", "add", "drop", "info"),
    [
        (READ, 0, P, 0x4), (WRITE, 0, P, 0x6), (FETCH, 0, P, 0x14), (WRITE, 0, W, 0x7), (READ, 0, U, 0x5),
        (FETCH, NX, 0, 0x15), (READ, 1 << 50, 0, 0xD), (WRITE, 1 << 50, 0, 0xF),
    ],
)  # fmt: skip
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_final_nested_fault(access: Access, add: int, drop: int, info: int, level: int) -> None:
    """Nested accesses are user accesses, whatever the guest's privilege (APM2 15.25.5)."""
    memory, _, npt = both()
    npt.change(0x5000, level, add=add, drop=drop)
    inner = nested("4-level", npt.root)
    assert nested_translate(memory, inner, 0x5678, access.write, access.execute, set_ad=True) == NestedFault(
        1 << 32 | info, Gpa(0x5678)
    )
    seen = walk(memory, PagingState(0, 0, 0, 0), 0x5678, access, inner)
    assert seen.verdict == Fault("NPF", 1 << 32 | info, 0x5678)
    assert seen.blame is not None
    assert (seen.blame.nested, seen.blame.spa) == (True, npt.entry(0x5000, level))


@pytest.mark.parametrize("host", MODES)
@pytest.mark.parametrize("user", [False, True])
def test_gmet(user: bool, host: str) -> None:
    """The U bit of the nested dimension is about code only, and either users' or supervisors' (APM2 15.25.13)."""
    memory, tables, npt = both(host)
    where = replace(state("4-level", tables.root), cpl=3 if user else 0)
    inner = replace(nested(host, npt.root), gmet=True)
    fetch, read, write = Access(execute=True, user=user), Access(user=user), Access(write=True, user=user)
    tables.change(GVA, 1, add=U)
    for of_user in (True, False):
        npt.change(0x5000, 1, **({"add": U} if of_user else {"drop": U}))
        for access in (read, write):
            found = translate(memory, where, GVA, access, inner, set_ad=False)
            assert isinstance(found, Translation)
            assert found.executable == (user == of_user)
        found = translate(memory, where, GVA, fetch, inner, set_ad=False)
        if user == of_user:
            assert isinstance(found, Translation)
        else:
            assert found == Fault("NPF", 1 << 32 | 0x11 | (4 if user else 0), 0x5000)
            assert found == Fault("NPF", *nested_translate(memory, inner, 0x5000, False, True, user, set_ad=False))
            blame = walk(memory, where, GVA, fetch, inner).blame
            assert blame is not None
            assert (blame.nested, blame.spa) == (True, npt.entry(0x5000, 1))
    npt.change(tables.entry(GVA, 1), 1, drop=U)
    assert isinstance(translate(memory, where, GVA, read, inner, set_ad=False), Translation), "guest tables are data"
    npt.change(0x5000, 1, drop=P)
    assert translate(memory, where, GVA, fetch, inner, set_ad=False) == Fault(
        "NPF", 1 << 32 | 0x10 | (4 if user else 0), 0x5000
    )
    assert translate(memory, where, GVA, write, inner, set_ad=False) == Fault("NPF", 1 << 32 | 6, 0x5000)


def test_guest_table_reads_are_writes_to_the_nested_tables() -> None:
    memory, tables, npt = both()
    where, inner = state("4-level", tables.root), nested("4-level", npt.root)
    for level in (4, 3, 2, 1):
        at = tables.entry(GVA, level)
        npt.change(at, 1, drop=W)
        fault = Fault("NPF", 1 << 33 | 7, at)
        assert translate(memory, where, GVA, READ, inner, set_ad=True) == fault
        assert walk(memory, where, GVA, READ, inner).verdict == fault
        npt.change(at, 1, drop=P)
        assert translate(memory, where, GVA, FETCH, inner, set_ad=True) == Fault("NPF", 1 << 33 | 6, at)
        npt.change(at, 1, add=P | W)
    npt.change(tables.root, 1, add=NX)
    assert isinstance(translate(memory, where, GVA, READ, inner, set_ad=True), Translation)
    assert "guest page table" in describe_exit(0x400, fault.code, fault.address)


def test_guest_fault_comes_before_the_final_nested_fault() -> None:
    memory, tables, npt = both()
    where, inner = state("4-level", tables.root), nested("4-level", npt.root)
    npt.change(0x5000, 1, drop=P)
    tables.change(GVA, 1, drop=W)
    assert translate(memory, where, GVA, WRITE, inner, set_ad=True) == pf(3, GVA)
    assert translate(memory, where, GVA, READ, inner, set_ad=True) == Fault("NPF", 1 << 32 | 4, 0x5000)


def test_rights_of_both_dimensions_combine() -> None:
    memory, tables, npt = both()
    npt.change(0x5000, 1, drop=W, add=NX)
    found = translate(memory, state("4-level", tables.root), GVA, READ, nested("4-level", npt.root), set_ad=False)
    assert found == Translation(Spa(0x85000), Gpa(0x5000), 0x1000, 0x1000, False, False, True, False, U | NX)


def test_page_size_is_the_smaller() -> None:
    memory = BytesMemory(0x200000)
    tables = Tables(memory, "4-level", pages(0x10000))
    tables.map(0x4000_0000, 0, level=2)
    npt = Tables(memory, "4-level", pages(0x100000))
    npt.map(0, 0, level=3)
    found = walk(memory, state("4-level", tables.root), 0x4000_1234, READ, nested("4-level", npt.root)).verdict
    assert isinstance(found, Translation)
    assert (found.page_size, found.guest_page_size) == (1 << 21, 1 << 21)


def test_marks_in_both_dimensions() -> None:
    memory, tables, npt = both()
    where, inner = state("4-level", tables.root), nested("4-level", npt.root)
    translate(memory, where, GVA, READ, inner, set_ad=True)
    assert tables.get(tables.entry(GVA, 1)) & (A | D) == A
    assert npt.get(npt.entry(0x5000, 1)) & (A | D) == A
    assert npt.get(npt.entry(tables.root, 1)) & (A | D) == A | D, "guest tables are accessed as writes"
    translate(memory, where, GVA, WRITE, inner, set_ad=True)
    assert tables.get(tables.entry(GVA, 1)) & (A | D) == A | D
    assert npt.get(npt.entry(0x5000, 1)) & (A | D) == A | D


def test_nested_translation_reports_rights_size_and_dirt() -> None:
    memory, _, npt = both()
    inner = nested("4-level", npt.root)
    assert nested_translate(memory, inner, 0x5008, False, False, set_ad=True) == NestedTranslation(
        Spa(0x85008), True, True, 0x1000, False
    )
    assert nested_translate(memory, inner, 0x5008, True, False, set_ad=True) == NestedTranslation(
        Spa(0x85008), True, True, 0x1000, True
    )
    assert nested_translate(memory, inner, 0x50000, True, False, set_ad=True, table=True) == NestedFault(
        1 << 33 | 6, Gpa(0x50000)
    )


@pytest.mark.parametrize(("mode", "bits"), [("legacy", 32), ("PAE", 32), ("4-level", 48)])
def test_a_gpa_that_the_nested_tables_cannot_express_is_not_present(mode: str, bits: int) -> None:
    memory, _, npt = both(mode)
    inner = nested(mode, npt.root)
    gpa = 1 << bits | 0x5000
    assert nested_translate(memory, inner, gpa, False, True, set_ad=True) == NestedFault(1 << 32 | 0x14, Gpa(gpa))


def test_pae_guest_under_nested_paging_reads_its_pdpes_from_memory() -> None:
    memory, tables, npt = both(mode="PAE")
    where = state("PAE", tables.root, pdptes=(0, 0, 0, 0))
    assert isinstance(translate(memory, where, GVA, READ, nested("4-level", npt.root), set_ad=False), Translation)


def test_the_apic_page_of_avic_leads_to_the_backing_page() -> None:
    """The nested tables must map it, and decide the rights; where they lead does not count."""
    memory, _, npt = both()
    npt.map(0x5000, 0x7000, P | U)
    avic = replace(nested("4-level", npt.root), apic=(0x5000, 0x6000))
    found = nested_translate(memory, avic, 0x5123, False, False, set_ad=False)
    assert isinstance(found, NestedTranslation)
    assert (found.spa, found.page_size, found.writable) == (0x6123, 0x1000, False)
    assert isinstance(nested_translate(memory, avic, 0x5123, True, False, set_ad=False), NestedFault)
    npt.map(0x4020_0000, 0, level=2)
    large = replace(avic, apic=(0x4020_5000, 0x6000))
    for gpa, spa in ((0x4020_5123, 0x6123), (0x4020_4123, 0x4123), (0x4020_6123, 0x6123)):
        found = nested_translate(memory, large, gpa, False, False, set_ad=False)
        assert isinstance(found, NestedTranslation)
        assert (found.spa, found.page_size) == (spa, 0x1000), "a large page around it does not map linearly"
    avic = replace(avic, apic=(1 << 40, 0x6000))
    assert isinstance(nested_translate(memory, avic, 1 << 40, False, False, set_ad=False), NestedFault)


def test_states_from_a_vmcb() -> None:
    vmcb = VMCB.encode({"cr0": PAGED, "cr3": 0x1000, "cr4": CR4.PAE, "efer": LONG, "cpl": 3, "rflags": 1 << 18,
                        "misc_ctl": 1, "n_cr3": 0x2000})  # fmt: skip
    assert PagingState.from_vmcb(vmcb) == PagingState(PAGED, 0x1000, CR4.PAE, LONG, 3, True)
    assert Nested.from_vmcb(vmcb, CR4.PAE, LONG) == Nested(0x2000, CR4.PAE, LONG)
    VMCB.write(vmcb, "avic_apic_bar", 0xFEE0_0000)
    VMCB.write(vmcb, "avic_backing_page", 0x3000)
    assert Nested.from_vmcb(vmcb, CR4.PAE, LONG) == Nested(0x2000, CR4.PAE, LONG)
    VMCB.write(vmcb, "v_intr", 1 << 31)
    assert Nested.from_vmcb(vmcb, CR4.PAE, LONG) == Nested(0x2000, CR4.PAE, LONG, apic=(0xFEE0_0000, 0x3000))
    VMCB.write(vmcb, "v_intr", 3 << 30)
    assert Nested.from_vmcb(vmcb, CR4.PAE, LONG) == Nested(0x2000, CR4.PAE, LONG)
    VMCB.write(vmcb, "misc_ctl", 0)
    assert Nested.from_vmcb(vmcb, CR4.PAE, LONG) is None
    assert PagingState.from_vmcb(vmcb).mode == "4-level"
