"""Interrupt messages through the tables: remapped, passed, refused, or put into a guest's virtual APIC."""

from __future__ import annotations

import pytest

from introspect.iommu.records import CommandCode, EventCode
from introspect.iommu.registers import CONTROL, STATUS
from introspect.iommu.structures import GUEST_IRTE, IRTE, IRTE128
from tests.iommu.rig import DATA, DEVICE, GA_AT, INTERRUPT_TABLE, Bench, plain_irte
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.chipset import IOAPIC_REQUESTER
from vmdbg.platform.pci.dma import DmaError


def refused(bench: Bench, data: int) -> None:
    with pytest.raises(DmaError):
        bench.message(data)
    bench.pass_time(2)


def test_32_bit_entries() -> None:
    bench = Bench()
    bench.irte(5, plain_irte(0x91))
    bench.message(5)
    assert bench.apic.taken == [(0x91, DeliveryMode.FIXED, False)]
    assert bench.events() == []


def test_128_bit_entries_with_x2apic_destinations() -> None:
    bench = Bench()
    bench.control(CONTROL.GAEn | CONTROL.XTEn)
    bench.irte(6, IRTE128.make(RemapEn=1, IntType=1, DM=1, Vector=0x92, Destination_23_0=0x345678, Destination_31_24=0x12), 16)
    bench.message(6)
    assert bench.vectors == [0x92]
    assert bench.apic.asked == [(0x12345678, True, True)]


@pytest.mark.parametrize(
    ("index", "value", "flags"),
    [
        (5, plain_irte(0x91) & ~1, {"I"}), (0x1FF, plain_irte(0x91), {"I"}),
        (5, plain_irte(0x91) | IRTE.make(IntType=2), {"I", "PR", "RZ"}), (5, plain_irte(0x91) | 1 << 31, {"I", "PR", "RZ"}),
    ],
    ids=["off", "index", "type", "reserved"],
)  # fmt: skip
def test_entries_that_are_refused(index: int, value: int, flags: set[str]) -> None:
    bench = Bench()
    bench.irte(index & 0xFF, value)
    refused(bench, index)
    event = bench.event()
    assert (event.code, event.device) == (EventCode.IO_PAGE_FAULT, DEVICE)
    assert event.flags == flags
    assert bench.vectors == []


def test_events_can_be_suppressed() -> None:
    bench = Bench()
    bench.irte(5, IRTE.make(SupIOPF=1))
    refused(bench, 5)
    bench.irte(5, 0, IG=1)
    refused(bench, 5)
    assert bench.events() == []


def test_without_iv_they_pass() -> None:
    bench = Bench()
    bench.message(0x41)
    bench.entry(IV=1, IntCtl=1)
    bench.message(0x42)
    assert bench.vectors == [0x41, 0x42]
    bench.entry(IV=1, IntCtl=0)
    refused(bench, 0x43)
    assert len(bench.events()) == 1


@pytest.mark.parametrize(
    ("mode", "bit"), [(DeliveryMode.NMI, "NMIPass"), (DeliveryMode.INIT, "InitPass"), (DeliveryMode.EXTINT, "EIntPass")]
)
def test_pass_bits(mode: DeliveryMode, bit: str) -> None:
    bench = Bench()
    bench.entry(IV=1, IntCtl=2, IntTabLen=8, IntTabRoot=INTERRUPT_TABLE >> 6)
    refused(bench, mode << 8)
    bench.entry(IV=1, IntCtl=2, IntTabLen=8, IntTabRoot=INTERRUPT_TABLE >> 6, **{bit: 1})
    bench.message(mode << 8)
    assert [taken for _, taken, _ in bench.apic.taken] == [mode]


def test_the_io_apic_is_a_device_as_others() -> None:
    bench = Bench()
    bench.irte(7, plain_irte(0x97), device=IOAPIC_REQUESTER)
    bench.chipset.ioapic.write_mmio(0, 4, 0x10 + 2 * 9)
    bench.chipset.ioapic.write_mmio(0x10, 4, 7)
    bench.chipset.irq(9)(True)
    assert bench.vectors == [0x97]


GUEST_PAGE = 0x700000


def guest_irte(**fields: int) -> int:
    return GUEST_IRTE.make(**{
        "RemapEn": 1, "GuestMode": 1, "Vector": 0xA5, "GATag": 0xCAFE, "VAPICRoot": GUEST_PAGE >> 12, "Destination_23_0": 3,
        **fields,
    })  # fmt: skip


def test_a_running_guest_is_rung() -> None:
    bench = Bench()
    rung: list[int] = []
    bench.apics.doorbell_listeners.append(rung.append)
    bench.control(CONTROL.GAEn | CONTROL.make(GAMEn=1) | CONTROL.GALogEn)
    bench.irte(5, guest_irte(IsRun=1, GALogIntr=1), 16)
    bench.message(5)
    assert bench.ram.read_u32(GUEST_PAGE + 0x200 + 0x50) == 1 << 5
    assert rung == [3]
    assert bench.get("ga_tail") == 0
    assert bench.vectors == []


def test_a_waiting_guest_is_logged() -> None:
    bench = Bench()
    bench.interrupts(0x6A)
    bench.control(CONTROL.GAEn | CONTROL.make(GAMEn=1) | CONTROL.GALogEn | CONTROL.GAIntEn)
    bench.irte(5, guest_irte(GALogIntr=1), 16)
    bench.message(5)
    assert bench.ram.read_u32(GUEST_PAGE + 0x250) == 1 << 5
    assert bench.ram.read_u64(GA_AT) == 1 << 60 | DEVICE << 32 | 0xCAFE
    assert bench.get("status") & STATUS.GALogInt
    assert bench.vectors == [0x6A]


def test_memory_changes_behind_the_instruction_that_asks() -> None:
    bench = Bench()
    bench.control(CONTROL.GAEn | CONTROL.make(GAMEn=1))
    bench.irte(5, guest_irte(), 16)
    bench.dma.interrupt(DEVICE, 0xFEE00000, 5)
    assert bench.ram.read_u32(GUEST_PAGE + 0x250) == 0
    bench.pass_time(1)
    assert bench.ram.read_u32(GUEST_PAGE + 0x250) == 1 << 5


def test_strict_entries_stay_until_they_are_invalidated() -> None:
    bench = Bench(strict=True)
    told: list[str] = []
    bench.unit.stale_listeners.append(told.append)
    bench.irte(5, plain_irte(0x91))
    bench.message(5)
    bench.message(5)
    assert told == []
    bench.irte(5, plain_irte(0x92))
    bench.dma.messages(DEVICE, 0xFEE00000, 5)
    assert told == [], "to ask is not to use"
    bench.message(5)
    assert told == [
        "iommu 00:00.2 uses an interrupt table entry that its tables no longer have: the message 0x5 of 00:03.0 becomes vector 0x91 "
        "(fixed) of APIC 0x0, by them it becomes vector 0x92 (fixed) of APIC 0x0; INVALIDATE_INTERRUPT_TABLE was forgotten"
    ]
    bench.issue(CommandCode.INVALIDATE_INTERRUPT_TABLE, DeviceID=DEVICE)
    bench.commands_done()
    bench.message(5)
    assert bench.vectors == [0x91, 0x91, 0x91, 0x92]
    bench.irte(5, plain_irte(0x93))
    bench.control(CONTROL.IRTCacheDis)
    bench.message(5)
    assert bench.vectors[-1] == 0x92, "to cache no more does not forget what is cached (3.4.1)"
    bench.issue(CommandCode.INVALIDATE_INTERRUPT_TABLE, DeviceID=DEVICE)
    bench.commands_done()
    bench.message(5)
    bench.irte(5, plain_irte(0x94))
    bench.message(5)
    assert bench.vectors[-2:] == [0x93, 0x94]
    assert len(told) == 2
    bench.irte(5, plain_irte(0x93), IntCtl=1)
    bench.message(5)
    assert told[2].endswith("becomes vector 0x93 (fixed) of APIC 0x0, by them it becomes vector 0x5 (fixed) of APIC 0x0; "
                            "INVALIDATE_DEVTAB_ENTRY was forgotten")  # fmt: skip


def test_strict_where_a_guest_runs_needs_no_invalidation() -> None:
    """IsRun, Destination, GATag and GALogIntr are read each time; the vector and the backing page are kept."""
    bench = Bench(strict=True)
    told: list[str] = []
    rung: list[int] = []
    bench.unit.stale_listeners.append(told.append)
    bench.apics.doorbell_listeners.append(rung.append)
    bench.control(CONTROL.GAEn | CONTROL.make(GAMEn=1) | CONTROL.GALogEn)
    bench.irte(5, guest_irte(), 16)
    bench.message(5)
    bench.irte(5, guest_irte(IsRun=1, Destination_23_0=7), 16)
    bench.message(5)
    bench.irte(5, guest_irte(GALogIntr=1, GATag=0xBEEF), 16)
    bench.message(5)
    assert rung == [7]
    assert bench.ram.read_u64(GA_AT) == 1 << 60 | DEVICE << 32 | 0xBEEF
    assert told == []
    bench.irte(5, guest_irte(Vector=0xA6, IsRun=1, Destination_23_0=7), 16)
    bench.message(5)
    assert bench.ram.read_u32(GUEST_PAGE + 0x250) == 1 << 5, "0xA5"
    assert "becomes vector 0xa5 of the guest with the backing page" in told[0]
    assert told[0].endswith("INVALIDATE_INTERRUPT_TABLE was forgotten")


def test_dma_and_interrupts_have_halves_of_their_own() -> None:
    """V without IV: addresses are translated, interrupts are not."""
    bench = Bench()
    bench.give({0: DATA})
    bench.message(0x44)
    assert bench.vectors == [0x44]
