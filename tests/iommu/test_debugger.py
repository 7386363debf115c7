"""The debugger's commands on a machine with an IOMMU whose caches are strict."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from introspect.commands import CommandError
from introspect.iommu.registers import CONTROL, REGISTERS
from introspect.iommu.structures import DTE, IRTE, PTE, encode_dte
from vmdbg.debugger import Debugger
from vmdbg.iommu.config import IommuConfig
from vmdbg.machine import Config, Machine
from vmdbg.monitor import Monitor
from vmdbg.platform.pci.ats import Ats
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.platform.pci.dma import Answer

TABLE, ROOT, INTERRUPTS, EVENTS, COMMANDS = 0x200000, 0x500000, 0x600000, 0x410000, 0x400000
LEAF = 0x800000 | PTE.PR | PTE.IR | PTE.IW


@pytest.fixture
def commands() -> Iterator[Monitor]:
    config = Config(
        memory=16 << 20, flat_address=0x80000, mode="real", devices=(DeviceSpec.parse("edu,slot=03.0"),),
        iommu=IommuConfig(1, True),
    )  # fmt: skip
    machine = Machine(b"\xf4", config)
    assert machine.chipset.iommus is not None
    unit = machine.chipset.iommus.units[0]
    on = CONTROL.IommuEn | CONTROL.EventLogEn | CONTROL.CmdBufEn
    for name, value in (("device_table_base", TABLE | 0x1FF), ("command_base", COMMANDS | 8 << 56), ("event_base", EVENTS | 8 << 56),
                        ("control", on)):  # fmt: skip
        unit.write_mmio(REGISTERS[name].offset, 8, value)
    dte = DTE.make(V=1, TV=1, Mode=1, PageTableRoot=ROOT >> 12, IR=1, IW=1, DomainID=7, IV=1, IntCtl=2,
                   IntTabRoot=INTERRUPTS >> 6, IntTabLen=8)  # fmt: skip
    machine.ram.write(TABLE + 0x18 * 32, encode_dte(dte))
    machine.ram.write(ROOT + 16, LEAF.to_bytes(8, "little"))
    machine.ram.write(INTERRUPTS + 4 * 0x41, IRTE.make(RemapEn=1, Vector=0x51).to_bytes(4, "little"))
    yield Debugger(machine).monitor_commands
    machine.close()


def say(commands: Monitor, line: str) -> str:
    return commands.registry.answer(commands, line)[0]


def test_tables_rings_and_caches(commands: Monitor) -> None:
    assert "EventLogRun CmdBufRun" in say(commands, "iommu")
    assert "00:03.0  edu   0x7     1-level at 0x500000" in say(commands, "iommu devices")
    assert "the IOTLB is empty" in say(commands, "iommu tlb")
    assert "spa 0x800000+0x4" in say(commands, "dma 00:03.0 0x2000 4 w cafe")
    assert "0xfecafeca" in say(commands, "x/wx 00:03.0:iova:0x2000")
    assert "0xfecafeca" in say(commands, "print/x u32[00:03.0:iova:0x2000]")
    ram = commands.debugger.machine.ram
    assert "stale" not in say(commands, "iommu tlb")
    assert "0      device table  00:03.0  spa 0x200300" in say(commands, "iommu tlb")
    ram.write(ROOT + 16, bytes(8))
    assert "! stale: a write is refused by now: PR is 0" in say(commands, "iommu tlb")
    assert "refused" in say(commands, "dma 00:03.0 0x5000 4 w cafe")
    assert "refused by L1 at spa 0x500028: PR is 0" in say(commands, "iommu events --explain")


def test_kept_entries_and_what_memory_has_by_now(commands: Monitor) -> None:
    machine = commands.debugger.machine
    directory = 0x700000
    machine.ram.write(directory, ((ROOT | PTE.make(PR=1, NextLevel=1)) | PTE.IR | PTE.IW).to_bytes(8, "little"))
    dte = DTE.make(V=1, TV=1, Mode=2, PageTableRoot=directory >> 12, IR=1, IW=1, DomainID=7, IV=1, IntCtl=2,
                   IntTabRoot=INTERRUPTS >> 6, IntTabLen=8)  # fmt: skip
    machine.ram.write(TABLE + 0x18 * 32, encode_dte(dte))
    say(commands, "dma 00:03.0 0x2000 4 w cafe")
    say(commands, "dma 00:03.0 0xfee00000 4 w 41000000")
    text = say(commands, "iommu tlb")
    assert "stale" not in text
    for row in ("0      device table     00:03.0     spa 0x200300", "0      interrupt table  00:03.0     spa 0x600104",
                "0      page directory   domain 0x7  spa 0x700000"):  # fmt: skip
        assert row in text
    machine.ram.write(directory, machine.ram.read(directory, 1) + b"\x0e")
    machine.ram.write(INTERRUPTS + 4 * 0x41, IRTE.make(RemapEn=1, Vector=0x52).to_bytes(4, "little"))
    machine.ram.write(TABLE + 0x18 * 32, bytes(32))
    lines = say(commands, "iommu tlb").splitlines()
    stale = {line.split()[1]: line.partition("! stale: ")[2] for line in lines if "spa" in line and "! stale" in line}
    assert stale["interrupt"] == "0x520001 by now"
    assert stale["device"] == "0x0 by now"
    assert stale["page"].endswith("e01 by now")
    found = json.loads(say(commands, "iommu tlb --json"))["result"]
    assert [(one["kind"], one["now"] is None) for one in found["entries"]] == [
        ("device table", False), ("interrupt table", False), ("page directory", False)
    ]  # fmt: skip


def test_what_is_only_tried_is_not_logged(commands: Monitor) -> None:
    text = say(commands, "dma try 00:03.0 0x5000 4 w")
    assert "refused" in text
    assert "<-- refuses this" in text
    text = say(commands, "irq try 00:03.0 0xfee00000 0x41")
    assert "vector 0x51" in text
    assert "IRTE 0x41 at spa 0x600104: RemapEn Vector=0x51" in text
    assert "RemapEn is 0" in say(commands, "irq try 00:03.0 0xfee00000 0x42")
    assert "no event is in the log" in say(commands, "iommu events")
    assert "the IOTLB is empty" in say(commands, "iommu tlb")


def test_a_device_in_audits(commands: Monitor) -> None:
    assert "device 00:03.0 (edu) (domain 0x7)" in say(commands, "who-maps 0x800000")
    commands.debugger.machine.ram.write(ROOT + 24, (TABLE | PTE.PR | PTE.IR | PTE.IW).to_bytes(8, "little"))
    assert "writes device table of IOMMU 0" in say(commands, "audit isolation")


def test_what_a_request_says_besides(commands: Monitor) -> None:
    """PASIDs and translated addresses, to rehearse what a device may do that lies."""
    machine = commands.debugger.machine
    assert "I or V is 0" in say(commands, "dma try 00:03.0 0x700000 4 w --translated")
    dte = DTE.make(V=1, TV=1, Mode=1, PageTableRoot=ROOT >> 12, IR=1, IW=1, DomainID=7, I=1)
    machine.ram.write(TABLE + 0x18 * 32, encode_dte(dte))
    text = say(commands, "dma try 00:03.0 0x700000 4 w --translated")
    assert "would lead to spa 0x700000+0x4" in text
    assert "I is 1: no table is asked" in text
    say(commands, "dma 00:03.0 0x700000 4 w cafe --translated")
    assert machine.ram.read(0x700000, 4) == bytes.fromhex("cafecafe")
    assert "the request has a PASID, and TV, GV or GTEn is 0" in say(commands, "dma 00:03.0 0x2000 4 r --pasid 5")
    assert "PASID_15_0=0x5 GN" in say(commands, "iommu events")
    for line, words in (
        ("dma try 00:03.0 0 4 r --pasid 1 --translated", "a request with a PASID has an untranslated address"),
        ("dma 00:03.0 0 4 r --supervisor", "only requests with a PASID have privilege; give --pasid, too"),
        ("dma 00:03.0 0 4 r --pasid 0x100000", "0xfffff"),
    ):  # fmt: skip
        with pytest.raises(CommandError, match=words):
            say(commands, line)


def test_what_a_device_keeps_itself() -> None:
    config = Config(
        memory=16 << 20, flat_address=0x80000, mode="real", devices=(DeviceSpec.parse("edu,slot=03.0,ats=on"),), iommu=IommuConfig(),
    )  # fmt: skip
    machine = Machine(b"\xf4", config)
    edu = next(one for one in machine.chipset.root.functions if one.kind == "edu")
    ats = edu.capability(Ats)
    assert ats is not None
    ats.kept = {(5, False): {0x1000: {0x2000: Answer(0x2000, 0x1000, 0x300000, True, False)}}}
    commands = Debugger(machine).monitor_commands
    text = say(commands, "iommu tlb")
    assert "device           00:03.0  0x5    0x2000  4 KiB  r-      spa 0x300000" in text
    assert json.loads(say(commands, "iommu tlb --json"))["result"]["pages"][0]["own"] is True
    assert "[100] ATS: off, takes 32 invalidations at once" in say(commands, "pci 00:03.0")
    assert "PM ATS PRI PASID" in say(commands, "pci")
    assert "translations          0x1" in say(commands, "devices edu-00:03.0")
    machine.close()
