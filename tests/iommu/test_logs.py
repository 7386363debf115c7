"""Event, page request and guest APIC logs: pointers, overflow, interrupts."""

from __future__ import annotations

import pytest

from introspect.iommu.records import PPR_RECORD, CommandCode, EventCode
from introspect.iommu.registers import CONTROL, REGISTERS, STATUS, X2APIC_CONTROL
from tests.iommu.rig import DATA, DEVICE, ENTRIES, ON, PPR_AT, Bench
from vmdbg.iommu.pagerequests import FAILURE, INVALID, SUCCESS
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
    bench.control(CONTROL.PprEn | CONTROL.PprLogEn | CONTROL.PprIntEn)
    bench.entry(V=1, PPR=1)
    requests = bench.unit.page_requests
    requests.request(DEVICE, 0x123456789ABC, 0x155, pasid=0x54321, write=True)
    record = int.from_bytes(bench.ram.read(PPR_AT, 16), "little")
    assert record == 0x123456789000 << 64 | 0x1124_1555_4321_0018 | PPR_RECORD.GN
    assert {name: PPR_RECORD.get(record, name) for name in ("DeviceID", "PPRTag", "PASID_15_0", "PASID_19_16", "W", "R", "GN")} == {
        "DeviceID": DEVICE, "PPRTag": 0x155, "PASID_15_0": 0x4321, "PASID_19_16": 5, "W": 1, "R": 1, "GN": 1,
    }  # fmt: skip
    assert bench.vectors == [0x62]
    bench.issue(CommandCode.COMPLETE_PPR_REQUEST, DeviceID=DEVICE, PASID=0x54321, GN=1, CompletionTag=0x155)
    bench.commands_done()
    assert list(requests.responses) == [(DEVICE, 0x54321, 0x155, SUCCESS)]


def test_page_requests_that_may_not_be() -> None:
    bench = Bench()
    bench.control(CONTROL.PprEn | CONTROL.PprLogEn)
    bench.entry(V=1)
    bench.unit.page_requests.request(DEVICE, 0x1000, 3)
    read = PPR_RECORD.R
    assert bench.events() == [0x1000 << 64 | EventCode.INVALID_PPR_REQUEST << 60 | read | 3 << 32 | DEVICE]
    assert bench.unit.page_requests.responses[-1].response == INVALID
    bench.entry(V=1, PPR=1)
    for tag in range(ENTRIES + 1):
        bench.unit.page_requests.request(DEVICE, 0x1000, tag)
    assert bench.get("status") & STATUS.PprOverflow
    assert bench.unit.page_requests.responses[-1] == (DEVICE, None, ENTRIES, FAILURE)


def test_what_is_not_built_is_not_there() -> None:
    bench = Bench(control=0)
    bench.put("control", (1 << 64) - 1)
    kept = bench.get("control")
    for name in ("MarcEn", "PprAutoRspEn", "SmiFEn", "vIommuEn", "DualEventLogEn", "DualPprLogEn", "SnpAvicEn", "HtTunEn"):
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
    bench.bus.write_mmio(bench.base, 1, 0xFF)
    bench.bus.write_mmio(bench.base + 2, 4, 0xFFFFFFFF)
    assert bench.get("device_table_base") == before
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
