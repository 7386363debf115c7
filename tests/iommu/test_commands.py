"""The command buffer: every command, what stops it, and how much is done at a time."""

from __future__ import annotations

import pytest

from introspect.iommu.records import COMMANDS, CommandCode, Event, EventCode
from introspect.iommu.registers import CONTROL, STATUS
from introspect.iommu.structures import PTE
from introspect.pci import RequesterId
from tests.iommu.rig import COMMANDS_AT, DATA, DEVICE, ENTRIES, ON, RW, STORE, Bench
from vmdbg.iommu.commands import PORTION, PORTION_TICKS
from vmdbg.platform.clock import TICKS_PER_SECOND
from vmdbg.platform.pci.dma import Span


def test_completion_wait_stores_and_interrupts() -> None:
    bench = Bench()
    bench.interrupts(0x51)
    bench.control(CONTROL.ComWaitIntEn)
    bench.wait()
    assert bench.vectors == []
    bench.issue(CommandCode.COMPLETION_WAIT, Interrupt=1)
    bench.commands_done()
    assert bench.get("status") & STATUS.ComWaitInt
    assert bench.vectors == [0x51]
    bench.issue(CommandCode.COMPLETION_WAIT, Interrupt=1)
    bench.commands_done()
    assert bench.vectors == [0x51], "the cause was there already"
    bench.put("status", STATUS.ComWaitInt)
    bench.issue(CommandCode.COMPLETION_WAIT, Interrupt=1)
    bench.commands_done()
    assert bench.vectors == [0x51, 0x51]


def test_without_the_enable_the_status_alone_tells() -> None:
    bench = Bench()
    bench.interrupts(0x51)
    bench.issue(CommandCode.COMPLETION_WAIT, Interrupt=1)
    bench.commands_done()
    assert bench.get("status") & STATUS.ComWaitInt
    assert bench.vectors == []
    bench.control(CONTROL.ComWaitIntEn)
    assert bench.vectors == [0x51]


def test_nothing_is_done_amid_the_store_to_the_tail() -> None:
    bench = Bench()
    bench.issue(CommandCode.COMPLETION_WAIT, Store=1, StoreAddress=STORE >> 3, StoreData=1)
    assert bench.ram.read_u64(STORE) == 0
    bench.pass_time(PORTION_TICKS)
    assert bench.ram.read_u64(STORE) == 1


def test_portions() -> None:
    """A full buffer takes several steps of guest time."""
    bench = Bench()
    for _ in range(ENTRIES - 1):
        bench.issue_raw(COMMANDS[CommandCode.INVALIDATE_IOMMU_ALL].bits.make(code=CommandCode.INVALIDATE_IOMMU_ALL))
    steps = 0
    while bench.get("command_head") != bench.get("command_tail"):
        before = bench.get("command_head")
        bench.pass_time(PORTION_TICKS)
        assert (bench.get("command_head") - before) // 16 <= PORTION
        steps += 1
    assert steps == -(-(ENTRIES - 1) // PORTION)


def test_it_wraps() -> None:
    bench = Bench()
    bench.put("command_head", 16 * (ENTRIES - 1))
    bench.put("command_tail", 16 * (ENTRIES - 1))
    bench.wait()
    assert bench.get("command_head") == 0


@pytest.mark.parametrize("code", [0, 9, 10, 15])
def test_unknown_commands_stop_it(code: int) -> None:
    bench = Bench()
    bench.issue_raw(code << 60)
    bench.issue(CommandCode.INVALIDATE_IOMMU_ALL)
    bench.commands_done()
    assert not bench.get("status") & STATUS.CmdBufRun
    assert bench.get("command_head") == 0, "software finds the command there"
    assert bench.event() == Event(EventCode.ILLEGAL_COMMAND_ERROR, 0, COMMANDS_AT)


@pytest.mark.parametrize("code", list(CommandCode))
def test_reserved_bits_stop_it(code: CommandCode) -> None:
    bits, bench = COMMANDS[code].bits, Bench()
    for position in (at for at in range(128) if not bits.defined >> at & 1):
        bench.put("command_head", 0)
        bench.put("command_tail", 0)
        bench.control(drop=CONTROL.CmdBufEn)
        bench.control(CONTROL.CmdBufEn)
        bench.issue_raw(bits.make(code=code) | 1 << position)
        bench.commands_done()
        assert bench.event().code == EventCode.ILLEGAL_COMMAND_ERROR, position


def test_turned_off_and_on_it_goes_on() -> None:
    bench = Bench()
    bench.issue_raw(0)
    bench.commands_done()
    bench.events()
    bench.put("command_head", 16)
    bench.control(drop=CONTROL.CmdBufEn)
    bench.control(CONTROL.CmdBufEn)
    bench.wait()


def test_a_buffer_where_no_memory_is() -> None:
    bench = Bench(control=0)
    bench.put("command_base", 0xD0000000 | 8 << 56)
    bench.put("control", ON)
    bench.put("command_tail", 16)
    bench.commands_done()
    assert bench.event() == Event(EventCode.COMMAND_HARDWARE_ERROR, 0, 0xD0000000, type=1)
    assert not bench.get("status") & STATUS.CmdBufRun
    assert bench.get("hardware_event_status") == 1


def test_a_store_where_no_memory_is() -> None:
    bench = Bench()
    bench.issue(CommandCode.COMPLETION_WAIT, Store=1, StoreAddress=0xD0000000 >> 3)
    bench.commands_done()
    assert bench.event().code == EventCode.COMMAND_HARDWARE_ERROR


def test_memory_that_is_guarded_against_devices() -> None:
    """As the block of SKINIT is: the IOMMU reads and writes nothing there, either."""
    bench = Bench()

    class Block:
        on = True

        def refuse(self, requester: RequesterId, span: Span, write: bool, *, quiet: bool) -> str:
            return "guarded" if COMMANDS_AT <= span.spa < COMMANDS_AT + 0x10000 else ""

    bench.dma.guards.append(Block())
    bench.issue(CommandCode.INVALIDATE_IOMMU_ALL)
    bench.commands_done()
    assert bench.event() == Event(EventCode.COMMAND_HARDWARE_ERROR, 0, COMMANDS_AT, type=1)


def test_a_reserved_length_is_an_empty_ring() -> None:
    bench = Bench(control=0)
    bench.put("command_base", COMMANDS_AT | 7 << 56)
    bench.put("control", ON)
    bench.put("command_tail", 16)
    bench.commands_done()
    assert bench.events() == []


def test_a_device_that_does_not_answer() -> None:
    """None here has an IOTLB of its own: with InvTimeOut the wait ends, without nothing is told."""
    bench = Bench()
    bench.issue(CommandCode.INVALIDATE_IOTLB_PAGES, DeviceID=DEVICE)
    bench.commands_done()
    bench.pass_time(TICKS_PER_SECOND)
    assert bench.events() == []
    bench.control(CONTROL.make(InvTimeOut=1))
    bench.issue(CommandCode.INVALIDATE_IOTLB_PAGES, DeviceID=DEVICE)
    bench.commands_done()
    assert bench.events() == []
    bench.pass_time(TICKS_PER_SECOND // 1000)
    assert bench.event() == Event(EventCode.IOTLB_INV_TIMEOUT, DEVICE, COMMANDS_AT + 16)


def test_prefetch() -> None:
    """Translations are there before they are needed; what is refused leaves no event."""
    bench = Bench(strict=True)
    root = bench.give({0x1000: DATA, 0x2000: DATA + 0x1000})
    bench.issue(CommandCode.PREFETCH_IOMMU_PAGES, DeviceID=DEVICE, PFCount=2, Address=1)
    bench.commands_done()
    assert bench.events() == []
    bench.ram.write_u64(bench.leaf_of(root, 0x2000), 0)
    bench.dma.write(DEVICE, 0x2000, b"kept")
    assert bench.ram.read(DATA + 0x1000, 4) == b"kept"


@pytest.mark.parametrize(("count", "size", "reached"), [(0, 0, {0x1000}), (1, 0, {0x1000}), (3, 0, {0x1000, 0x2000, 0x3000}),
                                                        (2, 1, {0x0000, 0x2000})])  # fmt: skip
def test_what_is_prefetched(count: int, size: int, reached: set[int]) -> None:
    """PFCount translations, 0 is 1, each of the size that S and the address say; GN is ignored (2.4.6, table 39)."""
    bench = Bench(strict=True)
    pages = {at: DATA + at for at in range(0, 0x8000, 0x1000)}
    root = bench.give(pages)
    fields = {"DeviceID": DEVICE, "PFCount": count, "GN": 1, "PASID": 5, "S": size, "Address": 0 if size else 1}
    bench.issue(CommandCode.PREFETCH_IOMMU_PAGES, **fields)
    bench.commands_done()
    for at in pages:
        bench.ram.write_u64(bench.leaf_of(root, at), DATA + 0x10000 + at | PTE.PR | RW)
    assert {at for at in pages if bench.dma.locate(DEVICE, at, 1, False)[0].spa == DATA + at} == reached
    bench.issue(CommandCode.PREFETCH_IOMMU_PAGES, **{**fields, "Inval": 1})
    bench.commands_done()
    assert all(bench.dma.locate(DEVICE, at, 1, False)[0].spa == DATA + 0x10000 + at for at in pages)


def test_a_prefetch_that_cannot_read_stops_the_commands() -> None:
    """Hardware errors do, and no other fault is an event (2.4.6.1)."""
    bench = Bench()
    bench.entry(V=1, TV=1, Mode=4, PageTableRoot=0xD0000, IR=1, IW=1, DomainID=7)
    bench.issue(CommandCode.PREFETCH_IOMMU_PAGES, DeviceID=DEVICE)
    bench.commands_done()
    assert bench.event() == Event(EventCode.PAGE_TAB_HARDWARE_ERROR, DEVICE, 0xD0000000, domain=7, type=1)
    assert not bench.get("status") & STATUS.CmdBufRun
    assert bench.get("command_head") == 0


def test_an_invalidation_of_an_iotlb_has_its_pasid_in_three_parts() -> None:
    """2.4.4, figure 47: bits 15:8 at 23:16, bits 7:0 at 55:48, bits 19:16 at 59:56; the type only with InvIotlbTypeSup."""
    bits, bench = COMMANDS[CommandCode.INVALIDATE_IOTLB_PAGES].bits, Bench()
    assert bits.make(PASID_15_8=0xBC, PASID_7_0=0xDE, PASID_19_16=0xA) == 0xADE << 48 | 0xBC << 16
    bench.issue(CommandCode.INVALIDATE_IOTLB_PAGES, DeviceID=DEVICE, Type=1)
    bench.commands_done()
    assert bench.event().code == EventCode.ILLEGAL_COMMAND_ERROR


def test_completion_waits_for_devices() -> None:
    """Commands behind it wait, too; without a time-out until software turns the buffer off (2.4.1)."""
    bench = Bench()
    bench.issue(CommandCode.INVALIDATE_IOTLB_PAGES, DeviceID=DEVICE)
    bench.issue(CommandCode.COMPLETION_WAIT, Store=1, StoreAddress=STORE >> 3, StoreData=1)
    bench.commands_done()
    bench.pass_time(TICKS_PER_SECOND)
    assert (bench.get("command_head"), bench.ram.read_u64(STORE), bench.events()) == (16, 0, [])
    bench.control(drop=CONTROL.CmdBufEn)
    bench.control(CONTROL.CmdBufEn | CONTROL.make(InvTimeOut=2))
    bench.commands_done()
    assert bench.ram.read_u64(STORE) == 1
    bench.issue(CommandCode.INVALIDATE_IOTLB_PAGES, DeviceID=DEVICE)
    bench.issue(CommandCode.COMPLETION_WAIT, Store=1, StoreAddress=STORE >> 3, StoreData=2)
    bench.pass_time(TICKS_PER_SECOND // 1000)
    assert bench.ram.read_u64(STORE) == 1
    bench.pass_time(TICKS_PER_SECOND // 100)
    bench.commands_done()
    assert bench.event().code == EventCode.IOTLB_INV_TIMEOUT
    assert bench.ram.read_u64(STORE) == 2


def test_answers_to_page_requests() -> None:
    """Illegal while those or their log are off; with GN for a device without guests' tables only told of (2.5.10, table 52)."""
    bench = Bench()
    bench.control(CONTROL.PprEn | CONTROL.PprLogEn)
    bench.issue(CommandCode.COMPLETE_PPR_REQUEST, DeviceID=DEVICE, PASID=0x54321, GN=1, CompletionTag=0x1155)
    bench.commands_done()
    (record,) = bench.events()
    assert record == COMMANDS_AT << 64 | 9 << 60 | 1 << 57 | 1 << 48 | 5 << 42 | 0x155 << 32 | 0x4321 << 16 | DEVICE
    assert bench.get("status") & STATUS.CmdBufRun
    bench.control(drop=CONTROL.PprLogEn)
    bench.issue(CommandCode.COMPLETE_PPR_REQUEST, DeviceID=DEVICE)
    bench.commands_done()
    assert bench.event() == Event(EventCode.ILLEGAL_COMMAND_ERROR, 0, COMMANDS_AT + 16)


def test_writing_the_enable_restarts_it() -> None:
    """Once stopped it runs again when CmdBufEn is written with 1, whatever it was (3.4.1, 3.4.16)."""
    bench = Bench()
    bench.issue_raw(0)
    bench.commands_done()
    assert not bench.get("status") & STATUS.CmdBufRun
    bench.put("command_head", 16)
    bench.control()
    assert bench.get("status") & STATUS.CmdBufRun
    bench.wait()


def test_commands_of_a_reset_machine() -> None:
    bench = Bench()
    bench.issue(CommandCode.COMPLETION_WAIT, Store=1, StoreAddress=STORE >> 3, StoreData=1)
    bench.chipset.reset()
    bench.commands_done()
    assert bench.ram.read_u64(STORE) == 0
    assert (bench.get("control"), bench.get("status")) == (CONTROL.Coherent, 0)
