"""Event, page request and guest APIC logs: pointers, overflow, interrupts."""

from __future__ import annotations

import pytest

from introspect.iommu.records import PPR_RECORD, CommandCode, EventCode
from introspect.iommu.registers import CONTROL, REGISTERS, STATUS, X2APIC_CONTROL
from introspect.pci import PageResponse
from tests.iommu.rig import DATA, DEVICE, ENTRIES, ON, PPR_AT, Bench
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.pci.dma import DmaError


def fault(bench: Bench, address: int = 0x5000) -> None:
    with pytest.raises(DmaError):
        bench.dma.read(DEVICE, address, 4)


def test_a_full_log_overflows_once() -> None:
    bench = Bench()
    bench.interrupts(0x61)
    bench.control(CONTROL.EventIntEn)
    bench.give({0: DATA})
    for _ in range(ENTRIES + 10):
        fault(bench)
    status = bench.get("status")
    assert status & STATUS.EventOverflow
    assert not status & STATUS.EventLogRun
    assert len(bench.events()) == ENTRIES - 1
    assert bench.vectors == [0x61]
    fault(bench)
    assert bench.events() == [], "it stays stopped"
    bench.put("status", STATUS.EventOverflow | STATUS.EventLogInt)
    bench.control(drop=CONTROL.EventLogEn)
    bench.control(CONTROL.EventLogEn)
    fault(bench, 0x7000)
    assert bench.event().address == 0x7000
    assert bench.vectors == [0x61, 0x61]


def test_runs_only_with_both_enables() -> None:
    bench = Bench(control=CONTROL.EventLogEn | CONTROL.CmdBufEn)
    assert not bench.get("status") & (STATUS.EventLogRun | STATUS.CmdBufRun)
    bench.control(CONTROL.IommuEn)
    assert bench.get("status") & STATUS.EventLogRun
    assert bench.get("status") & STATUS.CmdBufRun
    bench.control(drop=CONTROL.IommuEn)
    assert not bench.get("status") & (STATUS.EventLogRun | STATUS.CmdBufRun)


def test_a_log_where_no_memory_is() -> None:
    bench = Bench(control=0)
    bench.put("event_base", 0xD0000000 | 8 << 56)
    bench.put("control", ON)
    bench.give({0: DATA})
    fault(bench)
    assert not bench.get("status") & STATUS.EventLogRun


def test_x2apic_interrupts() -> None:
    """With IntCapXTEn interrupts go where registers say, not by MSI: here to x2APIC 0x12345, vector 0x71."""
    bench = Bench()
    bench.interrupts(0x61)
    bench.control(CONTROL.EventIntEn | CONTROL.IntCapXTEn)
    bench.put("x2apic_general", X2APIC_CONTROL.make(Destination_23_0=0x12345, Vector=0x71))
    bench.give({0: DATA})
    fault(bench)
    assert bench.apic.taken == [(0x71, DeliveryMode.FIXED, False)]
    assert bench.apic.asked == [(0x12345, False, True)]


def test_page_requests() -> None:
    bench = Bench()
    bench.interrupts(0x62)
    bench.control(CONTROL.PprEn | CONTROL.PprLogEn | CONTROL.PprIntEn | CONTROL.GTEn)
    bench.entry(V=1, PPR=1, GV=1)
    requests = bench.unit.page_requests
    requests.request(DEVICE, 0x123456789ABC, 0x155, pasid=0x54321, write=True)
    record = int.from_bytes(bench.ram.read(PPR_AT, 16), "little")
    assert record == 0x123456789000 << 64 | 0x1124_1555_4321_0018 | PPR_RECORD.GN
    assert {name: PPR_RECORD.get(record, name) for name in ("DeviceID", "PPRTag", "PASID_15_0", "PASID_19_16", "WP", "RP", "GN")} == {
        "DeviceID": DEVICE, "PPRTag": 0x155, "PASID_15_0": 0x4321, "PASID_19_16": 5, "WP": 1, "RP": 1, "GN": 1,
    }  # fmt: skip
    assert bench.vectors == [0x62]
    bench.issue(CommandCode.COMPLETE_PPR_REQUEST, DeviceID=DEVICE, PASID=0x54321, GN=1, CompletionTag=0x155)
    bench.commands_done()
    assert list(requests.responses) == [(DEVICE, 0x54321, 0x155, PageResponse.SUCCESS)]


def test_page_requests_that_may_not_be() -> None:
    bench = Bench()
    bench.control(CONTROL.PprEn | CONTROL.PprLogEn)
    bench.entry(V=1)
    bench.unit.page_requests.request(DEVICE, 0x1000, 3)
    assert bench.events() == [0x1000 << 64 | EventCode.INVALID_PPR_REQUEST << 60 | 1 << 50 | 3 << 32 | DEVICE]
    bench.entry(V=1, PPR=1)
    bench.control(drop=CONTROL.PprLogEn)
    assert not bench.unit.page_requests.request(DEVICE, 0x1000, 3, pasid=0x12345, user=True)
    (record,) = bench.events()
    assert record == 0x1000 << 64 | 9 << 60 | 1 << 57 | 1 << 54 | 1 << 50 | 1 << 42 | 3 << 32 | 0x2345 << 16 | DEVICE
    bench.control(CONTROL.PprLogEn)
    for tag in range(ENTRIES + 1):
        bench.unit.page_requests.request(DEVICE, 0x1000, tag)
    assert bench.get("status") & STATUS.PprOverflow
    assert not bench.unit.page_requests.responses, "the IOMMU answers nothing by itself (2.6)"
    assert bench.events() == []


def test_page_requests_run_with_three_enables() -> None:
    """PprEn is one of them; to write PprLogEn again restarts the log and clears its overflow (3.4.1)."""
    bench = Bench()
    bench.control(CONTROL.PprLogEn)
    assert not bench.get("status") & STATUS.PprLogRun
    bench.control(CONTROL.PprEn)
    bench.entry(V=1, PPR=1)
    bench.put("ppr_head", 16)
    bench.unit.page_requests.request(DEVICE, 0x1000, 1)
    assert bench.get("status") & (STATUS.PprLogRun | STATUS.PprOverflow) == STATUS.PprOverflow
    bench.put("ppr_head", 0)
    bench.control(CONTROL.PprLogEn)
    assert bench.get("status") & (STATUS.PprLogRun | STATUS.PprOverflow) == STATUS.PprLogRun


def test_the_event_log_goes_on_when_its_enable_does() -> None:
    """From 0 to 1, which clears the overflow; to write a 1 again has no effect (3.4.1)."""
    bench = Bench()
    bench.give({0: DATA})
    bench.put("event_head", 16)
    fault(bench)
    bench.put("event_head", 0)
    bench.control(CONTROL.EventLogEn)
    assert bench.get("status") & (STATUS.EventLogRun | STATUS.EventOverflow) == STATUS.EventOverflow
    bench.control(drop=CONTROL.EventLogEn)
    bench.control(CONTROL.EventLogEn)
    assert bench.get("status") & (STATUS.EventLogRun | STATUS.EventOverflow) == STATUS.EventLogRun


def test_hardware_errors_are_told_without_a_log() -> None:
    """Registers and interrupt, by EventIntEn (2.5.16.2)."""
    bench = Bench(control=CONTROL.IommuEn | CONTROL.EventIntEn)
    bench.interrupts(0x61)
    bench.entry(V=1, TV=1, Mode=4, PageTableRoot=0xD0000, IR=1, IW=1)
    fault(bench)
    assert bench.get("hardware_event_status") == 1
    assert bench.vectors == [0x61]


def test_what_is_not_built_is_not_there() -> None:
    bench = Bench(control=0)
    bench.put("control", (1 << 64) - 1)
    kept = bench.get("control")
    for name in ("MarcEn", "PprAutoRspEn", "SmiFEn", "vIommuEn", "DualEventLogEn", "DualPprLogEn", "SNPAVICEn", "HtTunEn", "CRW",
                 "NumIntRemapMode", "TMPMEn", "GCR3TRPMode", "GstBufferTRPMode", "GAPPIEn"):  # fmt: skip
        assert not CONTROL.get(kept, name), name
    for name in ("marc0_base", "smi_filter3", "event_b_base", "ppr_auto_response", "performance_optimisation"):
        bench.put(name, (1 << 8 * REGISTERS[name].size) - 1)
        assert bench.get(name) == 0, name


def test_widths_of_accesses() -> None:
    bench = Bench(control=0)
    bench.bus.write_mmio(bench.base + 0x0C, 4, 0x09000000)
    assert bench.get("command_base") >> 56 == 9
    assert bench.bus.read_mmio(bench.base + 0x0C, 4) == 0x09000000
    before = bench.get("device_table_base")
    bench.bus.write_mmio(bench.base + 2, 4, 0xFFFFFFFF)
    assert bench.get("device_table_base") == before
    bench.bus.write_mmio(bench.base, 1, 0x12)
    bench.bus.write_mmio(bench.base + 4, 2, 0x5678)
    assert bench.get("device_table_base") == before & ~0xFF | 0x5678_0000_0012
    assert bench.bus.read_mmio(bench.base + 4, 2) == 0x5678
    assert bench.bus.read_mmio(bench.base + 0x3FF8, 8) == 0


def test_a_base_resets_its_pointers() -> None:
    bench = Bench(control=0)
    for name in ("command", "event", "ppr", "ga"):
        bench.put(f"{name}_head", 64)
        bench.put(f"{name}_tail", 64)
        bench.put(f"{name}_base", 0x440000 | 9 << 56)
        assert bench.get(f"{name}_head") == bench.get(f"{name}_tail") == 0


def test_the_msi_capability_is_mirrored() -> None:
    bench = Bench()
    bench.interrupts(0x63)
    assert bench.get("msi_data") == 0x63
    bench.put("msi_data", 0x64)
    bench.control(CONTROL.EventIntEn)
    bench.give({0: DATA})
    fault(bench)
    assert bench.vectors == [0x64]
    assert bench.get("msi_capability") == 0x05 | 1 << 16 | 1 << 23, "ID, enable, 64 bits; the pointer to the next one is reserved"
    assert bench.get("msi_mapping") == 0xA8030008


def test_registers_after_a_reset() -> None:
    """Chapter 3: lengths of 4 KiB, Coherent; a ring's length is of 4 KiB, whatever its entries are."""
    bench = Bench()
    bench.chipset.reset()
    ones = {"control": CONTROL.Coherent, **dict.fromkeys(("command_base", "event_base", "ppr_base", "ga_base"), 8 << 56)}
    seen = {name for name, one in REGISTERS.items() if one.offset < 0x150 and bench.get(name) != ones.get(name, 0)}
    assert seen == {"extended_features"}
    assert bench.get("msi_capability") == 0x05 | 1 << 23


def test_the_guest_apic_log() -> None:
    """512 entries in 4 KiB; a copy of the tail is written where its register says, an overflow asks for no interrupt."""
    bench = Bench()
    bench.interrupts(0x66)
    bench.control(CONTROL.GAEn | CONTROL.GALogEn)
    log = bench.unit.ga_log
    assert log.append(1)
    bench.control(CONTROL.GAIntEn)
    assert bench.vectors == [], "asked for when the bit is set, and not afterwards (3.4.1)"
    bench.put("status", STATUS.GALogInt)
    assert log.append(1)
    assert bench.vectors == [0x66]
    bench.put("status", STATUS.GALogInt)
    bench.put("ga_tail_address", DATA | 7)
    while log.append(2):
        assert bench.ram.read_u64(DATA) == bench.get("ga_tail")
        bench.put("status", STATUS.GALogInt)
    assert bench.get("ga_tail") == 511 * 8
    assert bench.get("status") & (STATUS.GALogRun | STATUS.GALogOverflow) == STATUS.GALogOverflow
    assert len(bench.vectors) == 510
