"""The command buffer: every command, what stops it, and how much is done at a time."""

from __future__ import annotations

import pytest

from introspect.iommu.records import COMMANDS, CommandCode, Event, EventCode
from introspect.iommu.registers import CONTROL, STATUS
from introspect.pci import RequesterId
from tests.iommu.rig import COMMANDS_AT, DATA, DEVICE, ENTRIES, ON, STORE, Bench
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
    bench.issue(CommandCode.PREFETCH_IOMMU_PAGES, DeviceID=DEVICE, DomainID=7, PFCount=7, Address=1)
    bench.commands_done()
    assert bench.events() == []
    bench.ram.write_u64(bench.leaf_of(root, 0x2000), 0)
    bench.dma.write(DEVICE, 0x2000, b"kept")
    assert bench.ram.read(DATA + 0x1000, 4) == b"kept"


def test_commands_of_a_reset_machine() -> None:
    bench = Bench()
    bench.issue(CommandCode.COMPLETION_WAIT, Store=1, StoreAddress=STORE >> 3, StoreData=1)
    bench.chipset.reset()
    bench.commands_done()
    assert bench.ram.read_u64(STORE) == 0
    assert bench.get("control") == bench.get("status") == 0
