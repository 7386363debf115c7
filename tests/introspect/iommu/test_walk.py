"""One case of each rule of translation: docs/iommu.md has them in this order."""

from __future__ import annotations

import pytest

from introspect.iommu.checks import dte_problems
from introspect.iommu.records import EventCode
from introspect.iommu.registers import CONTROL, FEATURES, FEATURES2
from introspect.iommu.state import EVERY_FEATURE
from introspect.iommu.structures import DTE, PTE, gcr3_root_bits
from introspect.iommu.verdicts import Cause, DmaAccess, IoFault, IoTranslation, Route, StepKind
from introspect.iommu.walk import IoWalk, translate, walk

from .machines import BDF, RW, Machine

READ, WRITE = DmaAccess(), DmaAccess(True)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def look(machine: Machine, iova: int, access: DmaAccess = READ, device: int = BDF) -> IoWalk:
    return walk(machine.memory, machine.iommu, device, iova, access)


def reached(machine: Machine, iova: int, access: DmaAccess = READ) -> IoTranslation:
    verdict = look(machine, iova, access).verdict
    assert isinstance(verdict, IoTranslation), verdict
    return verdict


def refused(machine: Machine, iova: int, access: DmaAccess = READ, device: int = BDF) -> IoFault:
    verdict = look(machine, iova, access, device).verdict
    assert isinstance(verdict, IoFault), verdict
    return verdict


def domain(machine: Machine, mode: int, extra: int = 0, **fields: int) -> int:
    """A domain with tables of so many levels for the device; where they begin."""
    root = machine.page()
    machine.device(BDF, extra, **{"Mode": mode, "PageTableRoot": root >> 12, "IR": 1, "IW": 1, "DomainID": 9, **fields})
    return root


# The entry


def test_off_and_untranslated(machine: Machine) -> None:
    machine.device(V=0, TV=0)
    assert reached(machine, 0x1234).route == Route.UNMANAGED
    machine.device(Mode=0, IR=1)
    found = reached(machine, 0x1234)
    assert (found.route, found.spa, found.writable) == (Route.IDENTITY, 0x1234, False)
    assert refused(machine, 0x1234, WRITE).cause == Cause.PERMISSION
    machine.device(TV=0, IR=1, IW=1)
    fault = refused(machine, 0x1234)
    assert (fault.cause, fault.event.code, fault.event.flags) == (Cause.TRANSLATION_OFF, EventCode.IO_PAGE_FAULT, frozenset())
    machine.registers["control"] = 0
    assert reached(machine, 0xFEE00000).route == Route.OFF


def test_entries_that_cannot_be_read(machine: Machine) -> None:
    assert refused(machine, 0, device=128).cause == Cause.BEYOND_TABLE
    event = refused(machine, 0x5000, DmaAccess(True, 3), 128).event
    assert (event.code, event.pasid, event.domain) == (EventCode.IO_PAGE_FAULT, 3, 0)
    assert event.flags == {"RW", "US"}
    machine.registers["device_table_base"] = 1 << 40
    fault = refused(machine, 0)
    assert (fault.event.code, fault.event.address) == (EventCode.DEV_TAB_HARDWARE_ERROR, (1 << 40) + 32 * BDF)


@pytest.mark.parametrize(("bits", "reserved"), [
    (1 << 2, True), (1 << 63, True), (1 << 6, True), (DTE.make(SATS=1), True), (DTE.make(IoCtl=3), False),
    (DTE.make(HAD=2), False), (DTE.make(GV=1, GLX=3), False),
])  # fmt: skip
def test_illegal_entries(machine: Machine, bits: int, reserved: bool) -> None:
    machine.device(BDF, bits, IR=1, IW=1)
    fault = refused(machine, 0x5000, WRITE)
    assert (fault.cause, fault.event.code) == (Cause.ENTRY_ILLEGAL, EventCode.ILLEGAL_DEV_TABLE_ENTRY)
    assert ("RZ" in fault.event.flags) == reserved
    assert "RW" in fault.event.flags
    assert fault.detail


@pytest.mark.parametrize(("feature", "field"), [
    ("HASup", "HAD"), ("EPHSup", "PPR"), ("EPHSup", "GPRP"), ("GTSup", "GV"), ("GTSup", "GLX"), ("GTSup", "GCR3Root_51_31"),
    ("GIoSup", "GIoV"), ("SATSSup", "SATS"),
])  # fmt: skip
def test_fields_of_features_that_are_not_there_are_reserved(feature: str, field: str) -> None:
    """Table 7, of bits 127:0."""
    dte = DTE.make(V=1, TV=1, IR=1, I=1, **{field: 1})
    assert [one.reserved for one in dte_problems(dte, EVERY_FEATURE & ~FEATURES.fields[feature])] == [True]
    assert not dte_problems(dte, EVERY_FEATURE | FEATURES.fields[feature])


@pytest.mark.parametrize(("feature", "field"), [
    ("GTSup", "GuestPagingMode"), ("SATSSup", "HPTMode"), ("vIommuSup", "vImuEn"), ("AttrFWSup", "SnoopAttribute"),
])  # fmt: skip
def test_likewise_in_the_half_for_interrupts(feature: str, field: str) -> None:
    dte = DTE.make(IV=1, **{field: 1})
    assert [one.reserved for one in dte_problems(dte, EVERY_FEATURE & ~FEATURES.fields[feature])] == [True]
    assert not dte_problems(dte, EVERY_FEATURE | FEATURES.fields[feature])


def test_dirty_bits_need_their_feature() -> None:
    assert dte_problems(DTE.make(V=1, TV=1, HAD=3), EVERY_FEATURE & ~FEATURES.HDSup)
    assert not dte_problems(DTE.make(V=1, TV=1, HAD=1), EVERY_FEATURE & ~FEATURES.HDSup)


def test_without_tv_what_the_tables_need_does_not_count(machine: Machine) -> None:
    """Table 8; but GV without GTSup is illegal."""
    machine.device(TV=0, HAD=2, GV=1, GLX=3, Mode=7)
    assert refused(machine, 0x1000).cause == Cause.TRANSLATION_OFF
    machine.registers["extended_features"] &= ~FEATURES.GTSup
    machine.device(TV=0, GV=1)
    assert refused(machine, 0x1000).event.flags == {"RZ"}


def test_segments_of_the_device_table(machine: Machine) -> None:
    machine.registers["control"] |= CONTROL.make(DevTblSegEn=3)
    machine.registers["device_table_base7"] = 0x8000
    machine.memory.write(0x8000 + 32 * 5, DTE.make(V=1, TV=1, IR=1).to_bytes(32, "little"))
    assert isinstance(look(machine, 0x1000, device=0xE005).verdict, IoTranslation)


# Special addresses


def test_special_addresses(machine: Machine) -> None:
    machine.device(IR=1, IW=1)
    fault = refused(machine, 0xFEE00000, WRITE)
    assert (fault.event.code, fault.event.type) == (EventCode.INVALID_DEVICE_REQUEST, 0)
    for control, kinds in ((0, (4, 3)), (1, (4, None)), (2, (4, 3)), (3, (None, None))):
        machine.device(IR=1, IW=1, SysMgt=control)
        for access, kind in zip((READ, WRITE), kinds, strict=True):
            verdict = look(machine, 0xFD_F910_0000, access).verdict
            if kind is None:
                assert isinstance(verdict, IoTranslation)
                assert verdict.route == (Route.FORWARDED if control == 1 else Route.IDENTITY)
            else:
                assert isinstance(verdict, IoFault)
                assert verdict.event.type == kind
    for control, route in ((1, Route.FORWARDED), (2, Route.IDENTITY)):
        machine.device(IR=1, IW=1, IoCtl=control)
        assert reached(machine, 0xFD_FC00_0000).route == route
    machine.device(IR=1, IW=1)
    assert refused(machine, 0xFD_FC00_0000).event.type == 2
    for fields, address in (({"SysMgt": 3}, 0xFD_F91F_FFFF), ({"IoCtl": 2}, 0xFD_FDFF_FFFF)):
        machine.device(TV=0, **fields)
        assert (refused(machine, address).event.code, refused(machine, address).event.type) == (EventCode.INVALID_DEVICE_REQUEST, 7)


def test_the_interrupt_ranges_of_hypertransport(machine: Machine) -> None:
    """Table 3 and 2.5.9; the addresses around them are as any other."""
    machine.device(IR=1, IW=1)
    for address, write, read in ((0xFD_0000_0000, 6, 0), (0xFD_F7FF_FFFF, 6, 0), (0xFD_F800_0000, 0, 0), (0xFD_F8FF_FFFF, 0, 0)):
        for access, kind in ((WRITE, write), (READ, read)):
            event = refused(machine, address, access).event
            assert (event.code, event.type, event.flags) == (EventCode.INVALID_DEVICE_REQUEST, kind, frozenset())
    for address in (0xFC_FFFF_FFFF, 0xFD_F900_0000, 0xFD_F920_0000, 0xFD_FB00_0000, 0xFD_FE00_0000, 0xFF_FFFF_FFFF):
        assert reached(machine, address).route == Route.IDENTITY
    machine.registers["extended_features2"] = FEATURES2.HTRangeIgnore
    for address in (0xFD_0000_0000, 0xFD_F910_0000, 0xFD_FC00_0000):
        assert reached(machine, address).route == Route.IDENTITY
    assert refused(machine, 0xFEE0_0000).event.type == 0


def test_an_interrupt_with_a_pasid(machine: Machine) -> None:
    """2.5.3: IO_PAGE_FAULT with I and GN; of interrupts SA and SE say nothing, but IG does."""
    for fields, word in (({"SA": 1, "SE": 1}, ""), ({"IV": 1, "IG": 1}, "IG"), ({"IG": 1}, "")):
        machine.device(IR=1, IW=1, GV=1, DomainID=9, **fields)
        fault = refused(machine, 0xFEE0_1000, DmaAccess(True, 0x12345))
        assert (fault.event.code, fault.event.pasid, fault.suppressed) == (EventCode.IO_PAGE_FAULT, 0x12345, word)
        assert fault.event.flags == {"I", "US"}


def test_ig_keeps_invalid_requests_from_the_log(machine: Machine) -> None:
    machine.device(IR=1, IV=1, IG=1, SA=1)
    assert refused(machine, 0xFD_FC00_0000).suppressed == "IG"
    machine.device(IR=1, IG=1, SA=1)
    assert refused(machine, 0xFD_FC00_0000).suppressed == "", "IG is of the half that IV makes count"


def test_the_exclusion_range(machine: Machine) -> None:
    machine.registers.update(exclusion_base=0x5000 | 1, exclusion_limit=0x6000)
    domain(machine, 1, EX=1)
    assert reached(machine, 0x6FFF).route == Route.EXCLUSION
    assert refused(machine, 0x7000).cause == Cause.NOT_PRESENT
    domain(machine, 1)
    assert refused(machine, 0x5000).cause == Cause.NOT_PRESENT
    machine.registers["exclusion_base"] |= 2
    assert reached(machine, 0x5000).route == Route.EXCLUSION


# Host tables


@pytest.mark.parametrize("mode", range(1, 7))
def test_levels(machine: Machine, mode: int) -> None:
    root = domain(machine, mode)
    iova = sum(1 << 12 + 9 * level for level in range(mode)) | 0x123
    machine.map(root, mode, iova & ~0xFFF, 0x7_7000)
    seen = look(machine, iova, WRITE)
    assert isinstance(seen.verdict, IoTranslation)
    assert (seen.verdict.spa, seen.verdict.page_size, seen.verdict.domain) == (0x7_7123, 0x1000, 9)
    assert [step.level for step in seen.steps] == [mode, *range(mode, 0, -1)]
    if mode < 6:
        fault = refused(machine, 1 << 12 + 9 * mode)
        assert (fault.cause, set(fault.event.flags)) == (Cause.REACH, {"PR"})


@pytest.mark.parametrize(("hats", "levels"), [(0, 4), (1, 5), (2, 6), (3, 0)])
def test_more_levels_than_the_iommu_walks(machine: Machine, hats: int, levels: int) -> None:
    machine.registers["extended_features"] = EVERY_FEATURE & ~FEATURES.HATS | FEATURES.make(HATS=hats)
    for mode in range(1, 8):
        domain(machine, mode)
        cause = refused(machine, 0).cause
        assert cause == (Cause.MODE if mode > levels else Cause.NOT_PRESENT)


@pytest.mark.parametrize(("level", "size"), [
    (1, 1 << 12), (1, 1 << 13), (1, 1 << 20), (2, 1 << 21), (2, 1 << 22), (3, 1 << 30), (3, 1 << 35), (4, 1 << 39),
    (4, 1 << 47), (5, 1 << 48), (5, 1 << 52),
])  # fmt: skip
def test_page_sizes(level: int, size: int) -> None:
    machine = Machine(0x200000)
    root = domain(machine, 6)
    machine.map(root, 6, 0, 0, level=level, size=size)
    for iova in {0, size - 1, size // 2 + 0x123, size - (1 << 3 + 9 * level)}:
        found = reached(machine, iova)
        assert (found.spa, found.page_size) == (iova, size)


@pytest.mark.parametrize(("level", "stray"), [(2, 12), (2, 20), (3, 12), (3, 29), (4, 38), (5, 47)])
def test_a_page_lies_at_a_multiple_of_its_size(machine: Machine, level: int, stray: int) -> None:
    """2.2.3: else translation ends with an IO_PAGE_FAULT."""
    root = domain(machine, 6)
    at = machine.entry(root, 6, 0, level)
    machine.memory.write_u64(at, 1 << stray | PTE.PR | RW)
    fault = refused(machine, 0)
    assert (fault.cause, set(fault.event.flags)) == (Cause.MISALIGNED, {"PR"})
    machine.memory.write_u64(at, 1 << 3 + 9 * level | PTE.PR | RW)
    assert reached(machine, 0).spa == 1 << 3 + 9 * level


@pytest.mark.parametrize(("level", "ones"), [(1, 8), (1, 9), (2, 8), (2, 7), (3, 17), (5, 40), (6, 0)])
def test_sizes_of_other_levels_fault(machine: Machine, level: int, ones: int) -> None:
    root = domain(machine, 6)
    entry = ((1 << ones) - 1) << 12 | PTE.make(NextLevel=7) | PTE.PR | RW
    machine.memory.write_u64(machine.entry(root, 6, 0, level), entry)
    fault = refused(machine, 0)
    assert (fault.cause, set(fault.event.flags)) == (Cause.BAD_SIZE, {"PR"})


def test_skipped_levels(machine: Machine) -> None:
    root, leaf = domain(machine, 6), machine.page()
    machine.memory.write_u64(root, leaf | PTE.make(NextLevel=1) | PTE.PR | RW)
    machine.memory.write_u64(leaf + 8, 0x9000 | PTE.PR | RW)
    seen = look(machine, 0x1000)
    assert isinstance(seen.verdict, IoTranslation)
    assert [step.skipped for step in seen.steps] == [0, 4, 0]
    for bit in range(21, 57):
        fault = refused(machine, 0x1000 | 1 << bit)
        assert (fault.cause, set(fault.event.flags)) == (Cause.SKIPPED, {"PR"})


@pytest.mark.parametrize("next_level", [1, 2, 3, 6])
def test_a_table_cannot_lead_up(machine: Machine, next_level: int) -> None:
    root = domain(machine, 1)
    machine.memory.write_u64(root, root | PTE.make(NextLevel=next_level) | PTE.PR | RW)
    assert refused(machine, 0).cause == Cause.BAD_LEVEL


def test_rights_are_those_of_every_level(machine: Machine) -> None:
    root = domain(machine, 3)
    machine.map(root, 3, 0x1000, 0x5000)
    assert reached(machine, 0x1000).writable
    at = machine.entry(root, 3, 0x1000, 2)
    entry = machine.memory.read_u64(at)
    machine.memory.write_u64(at, entry & ~PTE.IW)
    found = reached(machine, 0x1000)
    assert (found.readable, found.writable) == (True, False)
    seen = look(machine, 0x1000, WRITE)
    assert isinstance(seen.verdict, IoFault)
    assert seen.verdict.event.flags == {"PR", "PE", "RW"}
    assert seen.blame is not None
    assert seen.blame.spa == at
    domain(machine, 3, IW=0, PageTableRoot=root >> 12)
    seen = look(machine, 0x1000, WRITE)
    assert seen.blame is not None
    assert seen.blame.kind == StepKind.DTE


def test_reserved_bits_and_flags(machine: Machine) -> None:
    root = domain(machine, 2)
    machine.map(root, 2, 0x1000, 0x5000, RW | PTE.U | PTE.FC)
    found = reached(machine, 0x1000)
    assert found.untranslated_only
    assert found.coherent
    for level, bits in ((1, 1 << 52), (1, 1 << 58), (2, PTE.U), (2, PTE.FC), (2, 1 << 52)):
        at = machine.entry(root, 2, 0x1000, level)
        entry = machine.memory.read_u64(at)
        machine.memory.write_u64(at, entry | bits)
        assert refused(machine, 0x1000).event.flags == {"PR", "RZ"}
        machine.memory.write_u64(at, entry | 1 << 63 | 0x19E)
        assert reached(machine, 0x1000).spa == 0x5000, "ignored bits"
        machine.memory.write_u64(at, entry)


@pytest.mark.parametrize(("features2", "control", "free"), [
    (0, CONTROL.TMPMEn, 0), (FEATURES2.TMPMSup, 0, 0), (FEATURES2.TMPMSup, CONTROL.TMPMEn, 3 << 57),
    (FEATURES2.HpteRsvdBitsMode, 0, 0x7F << 52),
])  # fmt: skip
def test_reserved_bits_of_a_leaf_go_by_features(machine: Machine, features2: int, control: int, free: int) -> None:
    """Table 17, 3.4.13; those of other entries are reserved in any case."""
    root = domain(machine, 2)
    machine.map(root, 2, 0x1000, 0x5000)
    machine.registers["extended_features2"] = features2
    machine.registers["control"] |= control
    for level in (1, 2):
        at = machine.entry(root, 2, 0x1000, level)
        entry = machine.memory.read_u64(at)
        for bit in range(52, 59):
            machine.memory.write_u64(at, entry | 1 << bit)
            found = look(machine, 0x1000).verdict
            assert isinstance(found, IoTranslation) == (level == 1 and bool(free >> bit & 1))
        machine.memory.write_u64(at, entry)


def test_tables_where_no_memory_is(machine: Machine) -> None:
    domain(machine, 1, PageTableRoot=1 << 28)
    fault = refused(machine, 0x3000, WRITE)
    assert (fault.event.code, fault.event.address, fault.event.type) == (EventCode.PAGE_TAB_HARDWARE_ERROR, (1 << 40) + 24, 1)
    assert "RW" in fault.event.flags


@pytest.mark.parametrize(("had", "read", "write"), [(0, 0, 0), (1, PTE.A, PTE.A), (3, PTE.A, PTE.A | PTE.D)])
def test_accessed_and_dirty(machine: Machine, had: int, read: int, write: int) -> None:
    root = domain(machine, 2, HAD=had)
    machine.map(root, 2, 0x1000, 0x5000)
    machine.map(root, 2, 0x2000, 0x6000, PTE.IR)
    for iova, access, expected in ((0x2000, WRITE, 0), (0x1000, READ, read), (0x1000, WRITE, write)):
        translate(machine.memory, machine.iommu, BDF, iova, access, set_ad=True)
        leaf = machine.memory.read_u64(machine.entry(root, 2, iova, 1))
        assert leaf & (PTE.A | PTE.D) == expected
    assert machine.memory.read_u64(machine.entry(root, 2, 0x1000, 2)) & PTE.A == read


def test_a_refused_request_has_marked_what_it_came_by(machine: Machine) -> None:
    """2.2.7.4, figure 71: entry by entry, and the one that refuses is not."""
    root = domain(machine, 3, HAD=3)
    machine.map(root, 3, 0x1000, 0x5000, PTE.IR)
    for iova in (0x1000, 0x2000):
        translate(machine.memory, machine.iommu, BDF, iova, WRITE, set_ad=True)
        marks = [machine.memory.read_u64(machine.entry(root, 3, iova, level)) & (PTE.A | PTE.D) for level in (3, 2, 1)]
        assert marks == [PTE.A, PTE.A, 0]


# Guest tables


def guest(machine: Machine, glx: int, levels: int, pasid: int, extra: int = 0) -> tuple[int, int]:
    """GCR3 and guest tables of one PASID, without a host's; the address of the last entry, and the gva."""
    tables = [machine.page() for _ in range(glx + 1)]
    root = machine.page()
    for index, table in enumerate(tables):
        below = [*tables, root][index + 1]
        machine.memory.write_u64(table + (pasid >> 9 * (glx - index) & 0x1FF) * 8, below | 1)
    machine.device(
        BDF, gcr3_root_bits(tables[0]) | extra, GV=1, GLX=glx, IR=1, IW=1, GuestPagingMode=levels == 5, DomainID=9
    )
    gva, table = 0x7000, root
    for level in range(levels, 1, -1):
        below = machine.page()
        machine.memory.write_u64(table + (gva >> 3 + 9 * level & 0x1FF) * 8, below | 7)
        table = below
    at = table + (gva >> 12 & 0x1FF) * 8
    machine.memory.write_u64(at, 0x9000 | 7)
    return at, gva


@pytest.mark.parametrize(("glx", "pasid"), [(0, 5), (0, 511), (1, 512), (1, 0x3FFFF), (2, 0x40000), (2, 0xFFFFF)])
@pytest.mark.parametrize("levels", [4, 5])
def test_pasids(machine: Machine, glx: int, pasid: int, levels: int) -> None:
    at, gva = guest(machine, glx, levels, pasid)
    access = DmaAccess(True, pasid)
    found = reached(machine, gva | 0x12, access)
    assert (found.spa, found.gpa, found.page_size, found.guest_page_size) == (0x9012, 0x9012, 0x1000, 0x1000)
    fault = refused(machine, gva, DmaAccess(True, pasid ^ 1))
    assert fault.cause == Cause.GUEST_NOT_PRESENT
    assert fault.event.pasid == pasid ^ 1
    if glx < 2:
        assert reached(machine, gva, DmaAccess(True, pasid | 1 << 9 * (glx + 1))).spa == 0x9000, "bits above are ignored (2.2.6.3)"
    features = machine.registers["extended_features"]
    machine.registers["extended_features"] = features & ~FEATURES.PASMax | FEATURES.make(PASMax=max(pasid.bit_length() - 2, 0))
    if pasid > 1:
        fault = refused(machine, gva, access)
        assert (fault.cause, fault.event.code, fault.event.pasid) == (Cause.PASID_RANGE, EventCode.IO_PAGE_FAULT, pasid)
    machine.registers["extended_features"] = features
    assert refused(machine, 1 << 60, access).cause == Cause.NOT_CANONICAL
    for bits, cause, flags in (
        (0x9000 | 5, Cause.GUEST_PERMISSION, {"PR", "PE", "US", "RW"}), (0x9000 | 3, Cause.GUEST_PERMISSION, {"PR", "PE", "US", "RW"}),
        (6, Cause.GUEST_NOT_PRESENT, {"US", "RW"}),
    ):  # fmt: skip
        machine.memory.write_u64(at, bits)
        fault = refused(machine, gva, access)
        assert (fault.cause, set(fault.event.flags)) == (cause, flags)
    machine.memory.write_u64(at, 0x9000 | 3)
    assert isinstance(look(machine, gva, access._replace(privileged=True)).verdict, IoTranslation)
    machine.memory.write_u64(at, 0x9000 | 7 | 1 << 63)
    assert refused(machine, gva, DmaAccess(False, pasid, execute=True)).event.flags == {"PR", "PE", "US", "NX"}
    machine.registers["extended_features"] &= ~FEATURES.NXSup
    assert reached(machine, gva, DmaAccess(False, pasid, execute=True)).executable, "NX is ignored (table 29)"


def test_supervisors_pages(machine: Machine) -> None:
    """2.2.6.2: PrivAbrtEn 1 keeps everybody from them."""
    at, gva = guest(machine, 0, 4, 5)
    machine.memory.write_u64(at, 0x9000 | 3)
    privileged = DmaAccess(pasid=5, privileged=True)
    assert reached(machine, gva, privileged)
    machine.registers["control"] |= CONTROL.make(PrivAbrtEn=1)
    fault = refused(machine, gva, privileged)
    assert (fault.cause, set(fault.event.flags)) == (Cause.GUEST_PERMISSION, {"PR", "PE"})
    machine.registers["extended_features"] &= ~FEATURES.USSup
    assert reached(machine, gva, privileged)


@pytest.mark.parametrize(("level", "bits", "refuses"), [
    (5, 0x80, True), (5, 0x100, True), (4, 0x80, True), (4, 0x100, True), (3, 0x100, True), (2, 0x100, False), (1, 0x180, False),
    *((level, 0x7FF << 52 | 0xE18, False) for level in range(1, 6)),
])  # fmt: skip
def test_reserved_bits_of_a_guests_entries(machine: Machine, level: int, bits: int, refuses: bool) -> None:
    """Tables 29 to 31."""
    _, gva = guest(machine, 0, 5, 5)
    step = next(one for one in look(machine, gva, DmaAccess(pasid=5)).steps if one.kind == StepKind.GUEST and one.level == level)
    machine.memory.write_u64(step.spa, step.value | bits)
    verdict = look(machine, gva, DmaAccess(pasid=5)).verdict
    assert isinstance(verdict, IoFault) == refuses
    if isinstance(verdict, IoFault):
        assert verdict.event.flags == {"PR", "RZ", "US"}


def test_large_pages_of_a_guest(machine: Machine) -> None:
    """Figures 35 and 39: PAT and G are ignored, the address bits below the size have to be 0."""
    _, gva = guest(machine, 0, 4, 5)
    access = DmaAccess(pasid=5)
    steps = {one.level: one for one in look(machine, gva, access).steps if one.kind == StepKind.GUEST}
    for level, size in ((2, 1 << 21), (3, 1 << 30)):
        machine.memory.write_u64(steps[level].spa, size | 0x1187)
        assert reached(machine, gva, access).spa == size + gva
        machine.memory.write_u64(steps[level].spa, size | 0x2087)
        assert refused(machine, gva, access).event.flags == {"PR", "RZ", "US"}


def test_more_guest_levels_than_the_iommu_walks(machine: Machine) -> None:
    """Table 44: beyond GATS, or reserved, is an IO_PAGE_FAULT; 2.2.2.1: without GV the field is ignored."""
    _, gva = guest(machine, 0, 5, 5)
    machine.registers["extended_features"] &= ~FEATURES.GATS
    fault = refused(machine, gva, DmaAccess(pasid=5))
    assert (fault.cause, fault.event.code) == (Cause.GUEST_LEVELS, EventCode.IO_PAGE_FAULT)
    assert fault.event.flags == {"PR", "US"}
    assert reached(machine, gva).route == Route.IDENTITY


@pytest.mark.parametrize("mode", [0, 1])
def test_where_the_gcr3_table_is(machine: Machine, mode: int) -> None:
    """2.2.6.3: in system-physical memory, unless GCR3TRPMode; what it leads to is guest-physical in either case."""
    root, first, second = domain(machine, 3), machine.page(), machine.page()
    machine.registers["extended_features2"] = FEATURES2.GCR3TRPModeSup
    machine.registers["control"] |= CONTROL.make(GCR3TRPMode=mode)
    machine.device(BDF, gcr3_root_bits(0x20_0000 if mode else first), Mode=3, PageTableRoot=root >> 12, IR=1, IW=1, GV=1, GLX=1)
    machine.map(root, 3, 0x20_0000, first)
    machine.map(root, 3, 0x21_0000, second)
    machine.memory.write_u64(first, 0x21_0000 | 1 | 0x18)
    machine.memory.write_u64(second + 8 * 5, 0x9000)
    seen = look(machine, 0, DmaAccess(pasid=5))
    assert [(step.spa, step.gpa) for step in seen.steps if step.kind == StepKind.GCR3] == [
        (first, 0x20_0000 if mode else None), (second + 8 * 5, 0x21_0000 + 8 * 5),
    ]  # fmt: skip
    assert isinstance(seen.verdict, IoFault)
    assert seen.verdict.cause == Cause.GUEST_NOT_PRESENT
    for bit in (1, 2, 5, 11, 52, 63):
        machine.memory.write_u64(second + 8 * 5, 0x9000 | 1 | 1 << bit)
        assert refused(machine, 0, DmaAccess(pasid=5)).event.flags == {"PR", "RZ", "US"}


def test_requests_without_a_pasid(machine: Machine) -> None:
    _, gva = guest(machine, 0, 4, 0)
    assert reached(machine, gva).route == Route.IDENTITY, "guest-physical, and the host has no tables"
    _, gva = guest(machine, 0, 4, 0, DTE.GIoV)
    assert reached(machine, gva).gpa == 0x9000
    machine.registers["control"] &= ~CONTROL.GTEn
    for fields in ({}, {"TV": 0}, {"GV": 0}):
        if fields:
            machine.registers["control"] |= CONTROL.GTEn
            machine.device(IR=1, **fields)
        event = refused(machine, gva, DmaAccess(pasid=0x12345)).event
        assert (event.code, event.type, event.pasid) == (EventCode.INVALID_DEVICE_REQUEST, 4, 0x12345), "2.5.9, table 64"
        assert event.flags == {"US"}


def test_marks_in_guest_tables(machine: Machine) -> None:
    at, gva = guest(machine, 0, 4, 0)
    translate(machine.memory, machine.iommu, BDF, gva, DmaAccess(True, 0), set_ad=True)
    assert machine.memory.read_u64(at) & 0x60 == 0x60
    for disabled, marks in ((CONTROL.GDUpdateDis, 0x20), (CONTROL.GAUpdateDis, 0x40), (CONTROL.GDUpdateDis | CONTROL.GAUpdateDis, 0)):
        machine.memory.write_u64(at, 0x9000 | 7)
        machine.registers["control"] = CONTROL.IommuEn | CONTROL.GTEn | disabled
        translate(machine.memory, machine.iommu, BDF, gva, DmaAccess(True, 0), set_ad=True)
        assert machine.memory.read_u64(at) & 0x60 == marks


def test_a_guests_page_is_dirty_once_its_entry_was_used_for_a_write(machine: Machine) -> None:
    """1.3.8: whether or not the host's tables then let the write through."""
    at, gva = guest(machine, 0, 4, 0)
    root = machine.page()
    dte = int.from_bytes(machine.memory.read(0x1000 + 32 * BDF, 32), "little") | DTE.make(Mode=3, PageTableRoot=root >> 12)
    machine.memory.write(0x1000 + 32 * BDF, dte.to_bytes(32, "little"))
    for page in range(0x10000, 0x30000, 0x1000):
        machine.map(root, 3, page, page)
    fault = translate(machine.memory, machine.iommu, BDF, gva, DmaAccess(True, 0), set_ad=True)
    assert isinstance(fault, IoFault)
    assert fault.cause == Cause.NOT_PRESENT
    assert machine.memory.read_u64(at) & 0x60 == 0x60


def test_a_fault_of_the_host_below_a_guest_names_the_request(machine: Machine) -> None:
    """2.5.1: events have the address of the transaction, whatever was being translated; and so GN, PASID and RW (table 57)."""
    gcr3, root = machine.page(), domain(machine, 3)
    machine.memory.write_u64(gcr3 + 32, 0x40_0000 | 1)
    machine.device(BDF, gcr3_root_bits(gcr3), Mode=3, PageTableRoot=root >> 12, IR=1, IW=1, GV=1, DomainID=9)
    fault = refused(machine, 0x7000, DmaAccess(True, 4))
    assert (fault.cause, fault.event.address, fault.event.pasid) == (Cause.NOT_PRESENT, 0x7000, 4)
    assert fault.event.flags == {"RW", "US"}
    machine.map(root, 3, 0x40_0000, 1 << 40)
    fault = refused(machine, 0x7000, DmaAccess(True, 4))
    assert (fault.event.code, fault.event.address, fault.event.pasid) == (EventCode.PAGE_TAB_HARDWARE_ERROR, 1 << 40, 4)
    assert fault.event.flags == {"RW"}


# What is logged


def test_suppression(machine: Machine) -> None:
    for fields, word in (({}, ""), ({"SE": 1}, "SE"), ({"SA": 1, "SE": 1}, "SA")):
        domain(machine, 1, **fields)
        assert refused(machine, 0x5000).suppressed == word


def test_translation_requests(machine: Machine) -> None:
    """2.5.3: their page faults are not logged; tables 51 and 64: what else is refused is, in types of their own."""
    asked = DmaAccess(translation=True)
    domain(machine, 1, I=1, SA=1)
    fault = refused(machine, 0x5000, asked)
    assert (fault.event.code, fault.suppressed) == (EventCode.IO_PAGE_FAULT, "ATS")
    assert "TR" in fault.event.flags
    for fields, address, pasid, kind in (
        ({}, 0x5000, None, 0), ({"I": 1, "TV": 0}, 0x5000, None, 0), ({"V": 0, "I": 1}, 0x5000, None, 0),
        ({"I": 1}, 0xFEE0_0000, None, 1), ({"I": 1, "IoCtl": 1}, 0xFD_FC00_0000, None, 1),
        ({"I": 1, "SysMgt": 1}, 0xFD_F910_0000, None, 1), ({"I": 1, "SysMgt": 3, "TV": 0}, 0xFD_F910_0000, None, 1),
        ({"I": 1}, 0x5000, 3, 2),
    ):  # fmt: skip
        domain(machine, 1, **fields)
        fault = refused(machine, address, asked._replace(pasid=pasid))
        assert (fault.event.code, fault.event.type, fault.suppressed) == (EventCode.INVALID_DEVICE_REQUEST, kind, "")
        assert "TR" in fault.event.flags
