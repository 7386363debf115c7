"""One case of each rule of interrupt remapping."""

from __future__ import annotations

import pytest

from introspect.iommu.records import EventCode
from introspect.iommu.registers import CONTROL, FEATURES2
from introspect.iommu.remapping import InterruptRoute, Remapped, remap
from introspect.iommu.structures import DTE, GUEST_IRTE, IRTE, IRTE128
from introspect.iommu.verdicts import Cause, IoFault

from .machines import BDF, Machine

TABLE = 0x8000
ADDRESS = 0xFEE0_3004
"""To logical destination 3."""
PHYSICAL = 0xFEE0_3000


@pytest.fixture
def machine() -> Machine:
    found = Machine()
    remaps(found)
    return found


def remaps(machine: Machine, extra: int = 0, **fields: int) -> None:
    chosen = {"V": 0, "TV": 0, "IV": 1, "IntCtl": 2, "IntTabLen": 2, "IntTabRoot": TABLE >> 6, "DomainID": 5, **fields}
    machine.device(BDF, extra, **chosen)


def ask(machine: Machine, data: int, address: int = ADDRESS) -> Remapped | IoFault:
    return remap(machine.memory, machine.iommu, BDF, address, data)


def delivered(machine: Machine, data: int, address: int = ADDRESS) -> Remapped:
    found = ask(machine, data, address)
    assert isinstance(found, Remapped), found
    return found


def refused(machine: Machine, data: int, address: int = ADDRESS) -> IoFault:
    found = ask(machine, data, address)
    assert isinstance(found, IoFault), found
    assert found.event.address == address or found.cause == Cause.INTERRUPT_UNREADABLE
    assert found.event.interrupt
    return found


@pytest.mark.parametrize(("change", "route"), [
    ("off", InterruptRoute.OFF), ("iv", InterruptRoute.UNMANAGED), ("forward", InterruptRoute.FORWARDED),
])  # fmt: skip
def test_what_is_not_remapped_stays_as_it_is(machine: Machine, change: str, route: InterruptRoute) -> None:
    if change == "off":
        machine.registers["control"] = 0
    remaps(machine, **({"IV": 0} if change == "iv" else {"IntCtl": 1}))
    found = delivered(machine, 0x8141)
    assert found == Remapped(route, 0x41, 1, 3, True, True)


@pytest.mark.parametrize(
    ("mode", "bit"), [(2, ""), (3, "NMIPass"), (4, "NMIPass"), (5, "InitPass"), (6, "NMIPass"), (7, "EIntPass")]
)
def test_pass_bits(machine: Machine, mode: int, bit: str) -> None:
    """Table 19; SMIs pass, no type from 2 up has a logical destination."""
    if bit:
        fault = refused(machine, mode << 8, PHYSICAL)
        assert (fault.cause, fault.event.code, fault.event.domain) == (Cause.INTERRUPT_ABORTED, EventCode.IO_PAGE_FAULT, 5)
        assert fault.event.flags == {"I"}
        remaps(machine, **{bit: 1})
    assert delivered(machine, mode << 8, PHYSICAL).route == InterruptRoute.PASSED
    assert refused(machine, mode << 8).cause == Cause.INTERRUPT_ABORTED


def test_aborted(machine: Machine) -> None:
    """An invalid request of the device, not a fault of the table (2.5.9, tables 50 and 64)."""
    remaps(machine, IntCtl=0)
    fault = refused(machine, 1)
    assert (fault.cause, fault.suppressed) == (Cause.INTERRUPT_ABORTED, "")
    assert fault.event.encode() == ADDRESS << 64 | 8 << 60 | 5 << 57 | BDF
    remaps(machine, IntCtl=0, IG=1)
    assert refused(machine, 1).suppressed == "IG"


@pytest.mark.parametrize(("fields", "reserved"), [({"IntCtl": 3}, False), ({"IntTabLen": 12}, False), ({"vImuEn": 1}, True)])
def test_illegal_entries(machine: Machine, fields: dict[str, int], reserved: bool) -> None:
    remaps(machine, **fields)
    fault = refused(machine, 1)
    assert fault.event.code == EventCode.ILLEGAL_DEV_TABLE_ENTRY
    assert ("RZ" in fault.event.flags) == reserved


def test_entries_of_32_bits(machine: Machine) -> None:
    machine.memory.write_u32(TABLE + 12, IRTE.make(RemapEn=1, Vector=0x51, Destination=7, DM=0, IntType=1, RqEoi=1))
    found = delivered(machine, 3)
    assert found == Remapped(InterruptRoute.TABLE, 0x51, 1, 7, False, False, False, True, None, 3, found.entry)
    assert found.entry == TABLE + 12
    for value, cause in (
        (0, Cause.NOT_REMAPPED), (IRTE.make(RemapEn=1, IntType=2), Cause.INTERRUPT_TYPE),
        (IRTE.make(RemapEn=1, GuestMode=1), Cause.INTERRUPT_RESERVED), (1 | 1 << 24, Cause.INTERRUPT_RESERVED),
    ):  # fmt: skip
        machine.memory.write_u32(TABLE + 12, value)
        fault = refused(machine, 3)
        assert fault.cause == cause
        assert set(fault.event.flags) == ({"I"} if cause == Cause.NOT_REMAPPED else {"I", "PR", "RZ"})


def test_the_length_of_the_table(machine: Machine) -> None:
    for length in range(12):
        remaps(machine, IntTabLen=length)
        assert refused(machine, min(1 << length, 0x1FF)).cause == (Cause.INDEX if length < 9 else Cause.NOT_REMAPPED)
        assert refused(machine, min((1 << length) - 1, 0x1FF)).cause == Cause.NOT_REMAPPED


def test_entries_of_128_bits(machine: Machine) -> None:
    machine.registers["control"] |= CONTROL.GAEn
    entry = IRTE128.make(RemapEn=1, Vector=0x61, Destination_23_0=7, DM=1)
    wide = entry | IRTE128.make(Destination_23_0=0x123400, Destination_31_24=0x56)
    machine.memory.write(TABLE + 16, entry.to_bytes(16, "little"))
    found = delivered(machine, 1)
    assert (found.vector, found.destination, found.logical, found.wide) == (0x61, 0x07, True, False)
    for position in (*range(16, 64), *range(72, 128)):
        machine.memory.write(TABLE + 16, (entry | 1 << position).to_bytes(16, "little"))
        assert refused(machine, 1).cause == Cause.INTERRUPT_RESERVED, "without XTEn a destination has 8 bits (2.2.5.3)"
    machine.registers["control"] |= CONTROL.XTEn
    machine.memory.write(TABLE + 16, wide.to_bytes(16, "little"))
    assert (delivered(machine, 1).destination, delivered(machine, 1).wide) == (0x56123407, True)
    for position in (*range(32, 64), *range(72, 120)):
        machine.memory.write(TABLE + 16, (wide | 1 << position).to_bytes(16, "little"))
        fault = refused(machine, 1)
        assert fault.cause == Cause.INTERRUPT_RESERVED
        assert fault.event.flags == {"I", "PR", "RZ"}
    machine.memory.write(TABLE + 16, ((1 << 128) - 2).to_bytes(16, "little"))
    assert refused(machine, 1).cause == Cause.NOT_REMAPPED, "they are reserved while RemapEn is set (table 22)"


def test_guest_mode(machine: Machine) -> None:
    machine.registers["control"] |= CONTROL.GAEn | CONTROL.make(GAMEn=1)
    entry = GUEST_IRTE.make(RemapEn=1, GuestMode=1, Vector=0x71, VAPICRoot=0x12345, GATag=0xCAFE, GALogIntr=1, IsRun=1,
                            Destination_23_0=2)  # fmt: skip
    machine.memory.write(TABLE, entry.to_bytes(16, "little"))
    found = delivered(machine, 0)
    assert found.guest is not None
    assert (found.vector, found.guest.vapic, found.guest.tag) == (0x71, 0x12345000, 0xCAFE)
    assert (found.guest.running, found.guest.log, found.guest.destination) == (True, True, 2)
    for position in (3, 4, 5, *range(16, 32), *range(72, 76), *range(116, 128)):
        machine.memory.write(TABLE, (entry | 1 << position).to_bytes(16, "little"))
        assert refused(machine, 0).cause == Cause.INTERRUPT_RESERVED, position
    machine.registers["extended_features2"] = FEATURES2.GAPPIDisSup
    machine.memory.write(TABLE, (entry | GUEST_IRTE.GAPPIDis).to_bytes(16, "little"))
    assert delivered(machine, 0).guest == found.guest
    machine.registers["control"] &= ~CONTROL.GAMEn
    assert refused(machine, 0).cause == Cause.INTERRUPT_RESERVED


def test_suppression(machine: Machine) -> None:
    assert refused(machine, 0).suppressed == ""
    machine.memory.write_u32(TABLE, IRTE.SupIOPF)
    assert refused(machine, 0).suppressed == "SupIOPF"
    remaps(machine, IG=1)
    assert refused(machine, 0).suppressed == "IG"


def test_a_table_where_no_memory_is(machine: Machine) -> None:
    remaps(machine, IntTabRoot=1 << 30)
    fault = refused(machine, 2)
    assert (fault.event.code, fault.event.address) == (EventCode.PAGE_TAB_HARDWARE_ERROR, (1 << 36) + 8)


def test_v_does_not_matter(machine: Machine) -> None:
    """The halves of an entry are looked at apart."""
    remaps(machine, DTE.make(V=1) | 1 << 2)
    assert refused(machine, 0).cause == Cause.NOT_REMAPPED
