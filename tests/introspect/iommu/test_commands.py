"""`iommu ...`, `irq try`, I/O addresses in `x`, and devices in `who-maps` and `audit isolation`, on bytes."""

from __future__ import annotations

import contextlib
import json
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.commands import CommandError, default_registry, run_line
from introspect.commands.iommu_reach import Reached, _going_on
from introspect.iommu.records import GA_RECORD, INVALID_PPR_REQUEST, INVALIDATE_IOTLB_PAGES, PPR_RECORD, Event, EventCode
from introspect.iommu.registers import CONTROL, STATUS
from introspect.iommu.space import IoRange
from introspect.iommu.state import EVERY_FEATURE, Iommu
from introspect.iommu.structures import DTE, GUEST_IRTE, IRTE128, PTE, encode_dte, gcr3_root_bits
from introspect.iommu.verdicts import DmaAccess, IoFault
from introspect.iommu.walk import walk
from introspect.pci import RequesterId
from introspect.vmcb import VMCB
from tests.introspect.fleet import RAM, Fleet

TABLE, TABLES, EVENTS, COMMANDS, IRT, GUEST_TABLES = 0x40000, 0x50000, 0x80000, 0x81000, 0x90000, 0xA0000
NIC, DISK, SPARE = RequesterId(0x18), RequesterId(0x20), RequesterId(0x28)
RW = PTE.IR | PTE.IW


class Board(Fleet):
    """Two guests; 00:03.0 is guest 2's: its I/O addresses are that one's guest-physical ones."""

    def __init__(self) -> None:
        super().__init__(2)
        self.registers_of = {
            "control": CONTROL.IommuEn | CONTROL.EventLogEn | CONTROL.CmdBufEn | CONTROL.GTEn | CONTROL.GAEn | CONTROL.make(GAMEn=1),
            "extended_features": EVERY_FEATURE, "device_table_base": TABLE, "event_base": EVENTS | 8 << 56,
            "command_base": COMMANDS | 8 << 56, "status": 0x18,
        }  # fmt: skip
        self.pages = iter(range(TABLES, EVENTS, 0x1000))
        self.device_names = {NIC: "edu", DISK: "virtio-blk"}
        root = next(self.pages)
        self.nic_root = root
        ram = self.part(2) + RAM
        for page in range(16):
            self.map(root, 3, page << 12, ram + (page << 12))
        self.device(NIC, Mode=3, PageTableRoot=root >> 12, IR=1, IW=1, DomainID=7, IV=1, IntCtl=2, IntTabRoot=IRT >> 6, IntTabLen=4)
        self.device(DISK, Mode=1, PageTableRoot=next(self.pages) >> 12, IR=1, IW=1, DomainID=8, IV=1)

    @property
    def iommu(self) -> Iommu:
        return Iommu(self.registers_of, 0, ((8, 0xFFFF),), 0x02, 0xFED80000)

    def turn_on(self) -> Board:
        self.iommus = (self.iommu,)
        return self

    def device(self, bdf: int, **fields: int) -> None:
        self.memory.write(TABLE + 32 * bdf, encode_dte(DTE.make(**{"V": 1, "TV": 1, **fields})))

    def map(self, table: int, level: int, iova: int, target: int, rights: int = RW) -> None:
        memory = self.memory
        while level > 1:
            at = table + (iova >> 3 + 9 * level & 0x1FF) * 8
            entry = memory.read_u64(at)
            if not entry & 1:
                entry = next(self.pages) | PTE.make(NextLevel=level - 1) | PTE.PR | RW
                memory.write_u64(at, entry)
            table, level = entry & PTE.Address, level - 1
        memory.write_u64(table + (iova >> 12 & 0x1FF) * 8, target | rights | PTE.PR)


@pytest.fixture
def board() -> Board:
    return Board().turn_on()


def say(board: Fleet, line: str) -> str:
    result = run_line(board, line)
    json.dumps(result.json())
    text = result.text()
    assert all(one == one.rstrip() for one in text.split("\n"))
    return text


def log(board: Board, *records: int, ring: str = "event") -> None:
    base = EVENTS if ring == "event" else COMMANDS
    for number, record in enumerate(records):
        board.memory.write(base + 16 * number, record.to_bytes(16, "little"))
    board.registers_of[f"{ring}_tail"] = 16 * len(records)
    board.turn_on()


# State and devices


def test_state(board: Board) -> None:
    text = say(board, "iommu")
    assert text.startswith("IOMMU 0 at 00:00.2, registers at spa 0xfed80000: on\n")
    for words in ("spa 0x40000, 128 entries, 2 with V or IV", "EventLogRun CmdBufRun", "HATS=6-level", "translates for",
                  "event ring", "00:01.0-ff:1f.7"):  # fmt: skip
        assert words in text
    board.registers_of.update(exclusion_base=0x3001, exclusion_limit=0x5000)
    board.registers_of["command_tail"] = 0x20
    text = say(board.turn_on(), "iommu")
    assert "0x3000-0x5fff, devices with EX" in text
    assert "tail 0x20: 2 in it" in text
    board.registers_of |= {"status": STATUS.EventOverflow, "ppr_base": 8 << 56}
    text = say(board.turn_on(), "iommu")
    assert re.search(r"command ring +spa 0x81000, .*: 2 in it, stopped$", text, re.MULTILINE)
    assert re.search(r"event ring .*: empty, overflowed$", text, re.MULTILINE)
    assert re.search(r"ppr ring +off$", text, re.MULTILINE)
    assert max(map(len, text.split("\n"))) <= 81
    board.registers_of["control"] = 0
    assert "off, devices are not translated" in say(board.turn_on(), "iommu")


def test_devices_with_their_owners(board: Board) -> None:
    rows = say(board, "iommu devices").split("\n")
    assert rows[1].split()[:3] == ["00:03.0", "edu", "0x7"]
    assert "3-level at 0x50000" in rows[1]
    assert "16 at 0x90000" in rows[1]
    assert rows[1].endswith("guest 2 (g2)")
    assert rows[2].split()[:3] == ["00:04.0", "virtio-blk", "0x8"]
    assert "guest" not in rows[2]


def test_neighbours_with_the_same_entry_are_one_line(board: Board) -> None:
    for number in range(0x30, 0x50):
        board.device(number, IR=0)
    board.memory.write(TABLE + 0x60 * 32, encode_dte(DTE.V | DTE.TV | DTE.make(Mode=7, IoCtl=3)))
    text = say(board, "iommu devices")
    assert "00:06.0-00:09.7" in text
    assert "! IoCtl: 3 is reserved; Mode: 7 levels are more than the IOMMU walks" in text
    assert "(3 more)" in say(board, "iommu devices --limit 1")


# Walks


def test_a_walk(board: Board) -> None:
    text = say(board, "iommu walk 00:03.0 0x3123 --access w")
    assert "iova 0x3123 of 00:03.0, write" in text
    assert [line.split()[0] for line in text.split("\n")[2:6]] == ["DTE", "L3", "L2", "L1"]
    assert f"-> spa {board.part(2) + RAM + 0x3123:#x}, in a 4 KiB page, domain 0x7" in text
    assert "rights: read, write" in text


def test_a_walk_that_is_refused_names_the_entry_and_the_event(board: Board) -> None:
    found = say(board, "iommu walk 00:03.0 0x3_0123 --access w")
    assert "<-- refuses this" in found.split("\n")[5]
    assert "-> refused: PR is 0" in found
    assert "IO_PAGE_FAULT: DeviceID=0x18 Address=0x30123 DomainID=0x7 RW" in found
    result = run_line(board, "iommu walk 00:03.0 0x3_0123 --access w").json()
    assert isinstance(result, dict)
    assert result["cause"] == "NOT_PRESENT"
    assert result["blame"] == 3
    event = walk(board.memory, board.iommu, NIC, 0x30123, DmaAccess(True)).verdict
    assert isinstance(event, IoFault)
    assert result["event"]["record"] == f"{event.event.encode():032x}"


def test_skipped_levels_are_told(board: Board) -> None:
    leaf = next(board.pages)
    board.memory.write_u64(board.nic_root + 8, leaf | PTE.make(NextLevel=1) | PTE.PR | RW)
    board.memory.write_u64(leaf, 0x7000 | PTE.PR | RW)
    text = say(board, "iommu walk 00:03.0 0x40000000")
    assert "(skips 1)" in text
    assert "-> spa 0x7000" in text
    assert "levels that NextLevel skips" in say(board, "iommu walk 00:03.0 0x40200000")


def test_two_dimensions(board: Board) -> None:
    """GCR3 and guest tables in guest 2's RAM, whose own tables are used."""
    tables = board.tables[2]
    gcr3 = 0x8000
    ram = board.part(2) + RAM
    board.memory.write_u64(ram + gcr3, tables.root | 1)
    dte = DTE.make(V=1, TV=1, GV=1, Mode=3, PageTableRoot=board.nic_root >> 12, IR=1, IW=1, DomainID=7) | gcr3_root_bits(ram + gcr3)
    board.memory.write(TABLE + 32 * NIC, encode_dte(dte))
    text = say(board, "iommu walk 00:03.0 0x401010 --pasid 0 --supervisor --access w")
    assert f"-> gpa 0x1010 -> spa {ram + 0x1010:#x}, in a 4 KiB page" in text
    names = [line.split()[0] for line in text.split("\n")[2:]]
    assert names[:5] == ["DTE", "GCR3", "L3", "L2", "L1"]
    assert [name for name in names if name.startswith("P")] == ["PML4E", "PDPE", "PDE", "PTE"]
    refused = say(board, "iommu walk 00:03.0 0x401010 --pasid 0")
    assert "the guest's tables withhold the right" in refused
    assert "US" in refused
    assert "P or V is 0" in say(board, "iommu walk 00:03.0 0 --pasid 513")
    assert "nothing is mapped" in say(board, "iommu map 00:03.0 --pasid 0"), "no page of it has U"


def test_the_hosts_tables_confine_a_device_with_pasids(board: Board) -> None:
    dte = DTE.make(V=1, TV=1, GV=1, GIoV=1, Mode=3, PageTableRoot=board.nic_root >> 12, IR=1, IW=1, DomainID=7, IV=1)
    board.memory.write(TABLE + 32 * NIC, encode_dte(dte | gcr3_root_bits(0x8000)))
    board.map(board.nic_root, 3, 0x20000, board.part(3), RW)
    assert "writes VMCB of guest 3" in say(board, "audit isolation")


def test_tables_of_pasid_0_confine_a_device_without_a_hosts(board: Board) -> None:
    """As Linux has it with v2 tables."""
    root, gcr3 = next(board.pages), next(board.pages)
    board.memory.write_u64(gcr3, root | 1)
    table = root
    for _ in range(3):
        below = next(board.pages)
        board.memory.write_u64(table, below | 7)
        table = below
    board.memory.write_u64(table + 8 * 5, board.part(3) | 7)
    dte = DTE.make(V=1, TV=1, GV=1, GIoV=1, IR=1, IW=1, DomainID=7, IV=1) | gcr3_root_bits(gcr3)
    board.memory.write(TABLE + 32 * NIC, encode_dte(dte))
    assert "writes VMCB of guest 3" in say(board, "audit isolation")
    assert f"page table of device {NIC}" in say(board, f"who-maps {table:#x}")
    assert "0x5000" in say(board, "iommu map 00:03.0")


def process(board: Board, gcr3: int, pasid: int, target: int) -> int:
    """Tables of four levels for one more, in which 0x5000 is `target`; the root."""
    root = table = next(board.pages)
    board.memory.write_u64(gcr3 + 8 * pasid, root | 1)
    for _ in range(3):
        below = next(board.pages)
        board.memory.write_u64(table, below | 7)
        table = below
    board.memory.write_u64(table + 8 * 5, target | 7)
    return root


def test_every_pasid_is_looked_at(board: Board) -> None:
    """Where no tables of the host's confine them: a VMCB is in reach of PASID 9 alone."""
    gcr3 = next(board.pages)
    roots = {pasid: process(board, gcr3, pasid, target) for pasid, target in ((0, board.part(2) + RAM), (9, board.part(3)))}
    dte = DTE.make(V=1, TV=1, GV=1, GIoV=1, IR=1, IW=1, DomainID=7, IV=1) | gcr3_root_bits(gcr3)
    board.memory.write(TABLE + 32 * NIC, encode_dte(dte))
    lines = [line for line in say(board, "audit isolation").split("\n") if "writes VMCB of guest 3" in line]
    assert ["(domain 0x7, PASID 0x9)" in line for line in lines] == [True]
    assert say(board, "iommu pasids 00:03.0").split("\n") == [
        f"00:03.0: 2 in use, 1-level GCR3 at {gcr3:#x}, 4-level tables, requests without one have PASID 0 (GIoV)",
        "  PASID  tables at    GCR3 entry at",
        f"  0x0    gpa {roots[0]:#x}  spa {gcr3:#x}", f"  0x9    gpa {roots[9]:#x}  spa {gcr3 + 72:#x}",
    ]  # fmt: skip
    assert "1 and more in use" in say(board, "iommu pasids 00:03.0 --limit 1")
    board.memory.write_u64(gcr3 + 8 * 9, roots[9] | 1 | 1 << 60)
    assert "1 in use" in say(board, "iommu pasids 00:03.0"), "a reserved bit is set"
    for pasid in range(1, 80):
        board.memory.write_u64(gcr3 + 8 * pasid, roots[0] | 1)
    assert "further PASIDs of device 00:03.0" in say(board, "audit isolation")
    assert "no PASIDs: GV is 0" in say(board, "iommu pasids 00:04.0")
    assert "no PASIDs: V, TV, GV are 0" in say(board, "iommu pasids 00:07.0")
    board.registers_of["control"] = 0
    assert "00:03.0: the IOMMU is off" in say(board.turn_on(), "iommu pasids 00:03.0")


def test_gcr3_tables_of_several_levels(board: Board) -> None:
    """In two dimensions: all but the first are where the host's tables lead."""
    first, ram = next(board.pages), board.part(2) + RAM
    board.memory.write_u64(first + 8 * 3, 0x2000 | 1)
    board.memory.write_u64(first + 8 * 4, 0x40000 | 1)  # not mapped
    board.memory.write_u64(ram + 0x2000 + 8 * 7, 0x5000 | 1)
    board.device(NIC, Mode=3, PageTableRoot=board.nic_root >> 12, IR=1, IW=1, GV=1, GLX=1)
    at = TABLE + 32 * NIC
    entry = int.from_bytes(board.memory.read(at, 32), "little") | gcr3_root_bits(first)
    board.memory.write(at, encode_dte(entry))
    assert f"0x607  gpa 0x5000  spa {ram + 0x2000 + 56:#x}" in say(board, "iommu pasids 00:03.0")
    found = walk(board.memory, board.iommu, NIC, 0x1000, DmaAccess(pasid=0x607))
    assert ram + 0x2000 + 56 in [int(step.spa) for step in found.steps], "as a walk comes by it"


def test_without_an_iommu_nothing_is_translated() -> None:
    fleet = Fleet(1)
    assert "-> spa 0x1000: the IOMMU is off" in say(fleet, "iommu walk 00:03.0 0x1000")
    for line in ("iommu", "iommu devices", "iommu events", "iommu commands", "iommu tlb"):
        assert "no IOMMU is known" in say(fleet, line)
    assert "not remapped" in say(fleet, "iommu irt 00:03.0")
    assert "fixed interrupt, vector 0x41" in say(fleet, "irq try 00:03.0 0xfee00000 0x41")


def test_page_requests(board: Board) -> None:
    assert say(board, "iommu requests") == "no page request is in the log"
    board.registers_of |= {"ppr_base": COMMANDS | 8 << 56, "ppr_tail": 0x20}
    asked = PPR_RECORD.make(code=1, DeviceID=NIC, PPRTag=0x203, WP=1, Address=0x40000)
    board.memory.write(COMMANDS, asked.to_bytes(16, "little") + (5 << 60).to_bytes(16, "little"))
    board.turn_on()
    text = say(board, "iommu requests")
    assert "   0x0 new  PAGE_SERVICE_REQUEST 00:03.0 PPRTag=0x203 WP Address=0x40000" in text
    assert "  0x10 new  unknown code 0x5" in text
    assert "still not: DTE at spa 0x40300: I, V or TV is 0" in say(board, "iommu requests --explain")
    board.device(NIC, Mode=3, PageTableRoot=board.nic_root >> 12, IR=1, IW=1, I=1)
    assert "still not: L1 at spa" in say(board, "iommu requests --explain")
    board.map(board.nic_root, 3, 0x40000, board.part(2))
    assert "by now the page is there" in say(board, "iommu requests --explain")
    assert json.loads(json.dumps(run_line(board, "iommu requests").json()))["requests"][0]["name"] == "PAGE_SERVICE_REQUEST"


def test_interrupts_of_guests_that_do_not_run(board: Board) -> None:
    assert say(board, "iommu ga-log") == "no interrupt of a guest is in the log"
    board.registers_of |= {"ga_base": COMMANDS | 8 << 56, "ga_head": 8, "ga_tail": 0x10}
    first = GA_RECORD.make(code=1, GATag=0x123, DeviceID=NIC)
    board.memory.write(COMMANDS, first.to_bytes(8, "little") + (first ^ 1 << 62).to_bytes(8, "little"))
    board.turn_on()
    assert say(board, "iommu ga-log").splitlines() == [
        "   0x0 old  GA_GUEST_NR 00:03.0 GATag=0x123", f"   0x8 new  unknown code 0x5 {first ^ 1 << 62:#034x}"
    ]
    board.iommus = ()
    assert "GATag=0x123" in say(board, f"iommu ga-log 1 --base {TABLE:#x} --ring {COMMANDS:#x}")


def test_a_guests_pages_in_any_order_are_one_range(board: Board) -> None:
    def one(first: int, target: int, gpa: int, size: int = 0x1000, *, who: str = "guest 2", write: bool = True) -> Reached:
        reach = IoRange(first, first + size - 1, target, True, True, write, (size,))
        return Reached(reach, ((who, gpa, size, 1),))

    ram = board.part(2) + RAM
    assert len(say(board, "iommu map 00:03.0").splitlines()) == 3
    for page in range(16):
        board.map(board.nic_root, 3, page << 12, ram + (15 - page << 12))
    assert len(say(board, "iommu map 00:03.0").splitlines()) == 2 + 16, "the guest's order is another"
    pages = [one(0, 0x9000, 0), one(0x1000, 0x3000, 0x1000), one(0x2000, 0x40000, 0x2000, 0x10000)]
    joined = Reached(IoRange(0, 0x11FFF, 0x9000, False, True, True, (0x1000, 0x10000)), (("guest 2", 0, 0x12000, 1),))
    assert list(_going_on(pages)) == [joined]
    for apart in (one(0x2000, 0, 0x1000), one(0x1000, 0, 0x2000), one(0x1000, 0, 0x1000, who="guest 3"), one(0x1000, 0, 0x1000, write=False)):
        assert list(_going_on([pages[0], apart])) == [pages[0], apart]
    assert list(_going_on([])) == []


def test_a_device_table_of_a_dump(board: Board) -> None:
    board.iommus = ()
    assert "00:03.0" in say(board, f"iommu devices --base {TABLE:#x} --entries 128")
    assert "-> spa" in say(board, f"iommu walk 00:03.0 0x1000 --base {TABLE:#x}")
    assert "16 entries of 16 bytes" in say(board, f"iommu irt 00:03.0 --base {TABLE:#x}")
    assert "16 entries of 4 bytes" in say(board, f"iommu irt 00:03.0 --base {TABLE:#x} --irte 32")
    assert "64 KiB" in say(board, f"iommu map 7 --base {TABLE:#x}")
    assert "128 entries, 2 with" in say(board, f"iommu --base {TABLE:#x} --entries 128")
    assert "IntCtl is 0" in say(board, f"irq try 00:04.0 0xfee00000 0x41 --base {TABLE:#x}")
    with pytest.raises(CommandError, match="4 KiB"):
        say(board, "iommu --base 0x40010")
    with pytest.raises(CommandError, match="--ring"):
        say(board, f"iommu events --base {TABLE:#x}")
    log(board, Event(EventCode.IO_PAGE_FAULT, NIC, 0x30000).encode())
    board.iommus = ()
    assert "IO_PAGE_FAULT" in say(board, f"iommu events --base {TABLE:#x} --ring {EVENTS:#x} --explain")


# Maps


def test_a_map_says_whose_ram_it_is(board: Board) -> None:
    text = say(board, "iommu map 00:03.0")
    assert "00:03.0, domain 0x7: 64 KiB mapped, 3 tables" in text
    assert "64 KiB of guest 2 (g2) from gpa 0x0" in text
    assert say(board, "iommu map 7").split("\n")[1:] == text.split("\n")[1:]
    board.map(board.nic_root, 3, 0x10000, board.part(3) + RAM + 0x2000, PTE.IR)
    text = say(board, "iommu map 00:03.0")
    assert "4 KiB of guest 3 (g3) from gpa 0x2000" in text
    assert "r-" in text
    with pytest.raises(CommandError, match="no device table entry has this domain"):
        say(board, "iommu map 0x99")


# Rings


def test_events_are_explained(board: Board) -> None:
    fault = walk(board.memory, board.iommu, NIC, 0x30123, DmaAccess(True)).verdict
    assert isinstance(fault, IoFault)
    gone = Event(EventCode.IO_PAGE_FAULT, NIC, 0x1000, frozenset(("RW",)), 7)
    bad = Event(EventCode.ILLEGAL_COMMAND_ERROR, 0, COMMANDS)
    board.memory.write(COMMANDS, (9 << 60).to_bytes(16, "little"))
    interrupt = Event(EventCode.IO_PAGE_FAULT, NIC, 0xFEE00000, frozenset(("I",)), 7)
    table = Event(EventCode.PAGE_TAB_HARDWARE_ERROR, NIC, 1 << 40, frozenset(), 7, type=1)
    log(board, fault.event.encode(), gone.encode(), bad.encode(), interrupt.encode(), table.encode(), 15 << 60)
    plain = say(board, "iommu events").split("\n")
    assert len(plain) == 6
    assert plain[0].startswith("   0x0 new  IO_PAGE_FAULT 00:03.0")
    assert "unknown code 0xf" in plain[5]
    text = say(board, "iommu events --explain")
    assert f"refused by L1 at spa {0x52000 + 8 * 0x30:#x}: PR is 0" in text
    assert "by now it is let through" in text
    assert "unknown code 0x9" in text
    assert "`irq try` replays" in text
    assert "no memory is there" in text
    found = run_line(board, "iommu events --explain").json()
    assert isinstance(found, dict)
    assert [one["same"] for one in found["events"]] == [True, False, None, None, None, None]
    board.registers_of["event_head"] = 0x20
    assert [line.split()[1] for line in say(board.turn_on(), "iommu events").split("\n")] == ["old"] * 2 + ["new"] * 4
    assert len(say(board, "iommu events 1").split("\n")) == 4, "what is new is told in any case"


def test_an_event_says_whether_it_was_a_write(board: Board) -> None:
    """By its type, where it has no RW; and one of a PASID is replayed with that (2.5.9)."""
    asked = [(0xFD_0000_0000, DmaAccess(True)), (0xFD_F910_0000, DmaAccess(True)), (0xFD_F910_0000, DmaAccess()),
             (0x1000, DmaAccess(True, 5)), (0xFD_0000_0000, DmaAccess())]  # fmt: skip
    verdicts = [walk(board.memory, board.iommu, NIC, address, access).verdict for address, access in asked]
    faults = [verdict.event for verdict in verdicts if isinstance(verdict, IoFault)]
    assert [one.type for one in faults] == [6, 3, 4, 4, 0]
    log(board, *(one.encode() for one in faults))
    found = run_line(board, "iommu events --explain").json()
    assert isinstance(found, dict)
    assert [one["same"] for one in found["events"]] == [True] * 5


def test_events_of_translation_services_are_explained(board: Board) -> None:
    """Requests with translated addresses and for translations are replayed as such; page requests, and answers that do not come."""
    asked = [DmaAccess(True, pretranslated=True), DmaAccess(translation=True), DmaAccess(pasid=5, translation=True)]
    verdicts = [walk(board.memory, board.iommu, NIC, 0x1000, access).verdict for access in asked]
    faults = [verdict.event for verdict in verdicts if isinstance(verdict, IoFault)]
    assert [(one.type, "TR" in one.flags) for one in faults] == [(1, False), (0, True), (0, True)]
    board.memory.write(COMMANDS, INVALIDATE_IOTLB_PAGES.make(code=4, DeviceID=NIC).to_bytes(16, "little"))
    request, answer = INVALID_PPR_REQUEST.make(code=9, DeviceID=NIC, RP=1), INVALID_PPR_REQUEST.make(code=9, DeviceID=NIC, RX=1)
    far = INVALID_PPR_REQUEST.make(code=9, DeviceID=0xFFFF)
    log(board, *(one.encode() for one in faults), Event(EventCode.IOTLB_INV_TIMEOUT, NIC, COMMANDS).encode(), request,
        answer | COMMANDS << 64, far)  # fmt: skip
    found = run_line(board, "iommu events --explain").json()
    assert isinstance(found, dict)
    assert [one["same"] for one in found["events"]] == [True] * 3 + [None] * 4
    assert found["events"][3]["explained"][0] == f"the command at spa {COMMANDS:#x}: INVALIDATE_IOTLB_PAGES 00:03.0"
    assert "has not answered in InvTimeOut" in found["events"][3]["explained"][1]
    words = [one["explained"][1] for one in found["events"][4:]]
    assert words[0] == (
        "PprEn of the control register, PprLogEn, PPR of the device table entry are 0; COMPLETE_PPR_REQUEST answers it"
    )
    assert words[1] == "GV is 0; an answer with a PASID needs the device's guest tables"
    assert words[2].startswith("the device table ends before the device's entry; ")
    board.registers_of["control"] |= CONTROL.PprEn | CONTROL.PprLogEn
    board.device(NIC, Mode=3, PageTableRoot=board.nic_root >> 12, IR=1, IW=1, PPR=1)
    assert "by now nothing is missing" in say(board.turn_on(), "iommu events --explain")


def test_commands(board: Board) -> None:
    log(board, 2 << 60 | 0x18, 3 << 60 | 7 << 32 | (0x7FFF_FFFF_FFFF_F001 << 64), 1 << 60 | 0x5001 | 0x1234 << 64, 0xF << 60,
        ring="command")  # fmt: skip
    lines = say(board, "iommu commands").split("\n")
    assert "INVALIDATE_DEVTAB_ENTRY 00:03.0" in lines[0]
    assert lines[1].endswith("(all pages)")
    assert "COMPLETION_WAIT Store" in lines[2]
    assert "StoreData=0x1234" in lines[2]
    assert "unknown code 0xf" in lines[3]


def test_rings_where_no_memory_is(board: Board) -> None:
    board.registers_of.update(event_base=1 << 40 | 8 << 56, event_tail=0x10)
    with pytest.raises(CommandError, match="event ring is where no memory is"):
        say(board.turn_on(), "iommu events")


# Interrupts


def test_interrupt_tables(board: Board) -> None:
    vapic = board.part(2) + RAM + 0x9000
    vmcb = bytearray(board.memory.read(board.part(2), 0x1000))
    VMCB.write(vmcb, "avic_backing_page", vapic)
    board.memory.write(board.part(2), bytes(vmcb))
    entries = (
        IRTE128.make(RemapEn=1, Vector=0x51, Destination_23_0=3, DM=1),
        GUEST_IRTE.make(RemapEn=1, GuestMode=1, Vector=0x61, VAPICRoot=vapic >> 12, GATag=0x1234, GALogIntr=1),
        IRTE128.make(Vector=0x71),
    )
    for number, entry in enumerate(entries):
        board.memory.write(IRT + 16 * number, entry.to_bytes(16, "little"))
    text = say(board, "iommu irt 00:03.0")
    assert "16 entries of 16 bytes at spa 0x90000, 2 in use" in text
    assert "Vector=0x51" in text
    assert text.split("\n")[3].endswith("guest 2 (g2)")
    assert "Vector=0x71" in say(board, "iommu irt 00:03.0 --all")
    assert "fixed interrupt, vector 0x51, logical destination 0x3: the interrupt table" in say(board, "irq try 00:03.0 0xfee00000 0")
    virtual = say(board, "irq try 00:03.0 0xfee00000 1")
    assert f"vector 0x61 in the virtual APIC at spa {vapic:#x} (guest 2 (g2)), it is not running, GA log tag 0x1234" in virtual
    assert "refused: RemapEn is 0" in say(board, "irq try 00:03.0 0xfee00000 2")
    assert "the interrupt table is shorter (index 0x10 of 0x10)" in say(board, "irq try 00:03.0 0xfee00000 0x10")
    assert "denies interrupts of this type (NMI interrupts)" in say(board, "irq try 00:03.0 0xfee00000 0x400")
    assert "IntCtl is 0" in say(board, "irq try 00:04.0 0xfee00000 0x41")
    assert "no table is looked at" in say(board, "iommu irt 00:04.0")
    with pytest.raises(CommandError, match="0xfee00000-0xfeefffff"):
        say(board, "irq try 00:03.0 0x1000 1")


# Elsewhere


def test_io_addresses_are_a_space(board: Board) -> None:
    board.memory.write(board.part(2) + RAM + 0x2000, b"\x11\x22\x33\x44")
    assert say(board, "x/wx 00:03.0:iova:0x2000") == "00:03.0:iova:0x2000:  0x44332211"
    assert "0x44332211" in say(board, "x/wx 00:03.0:0x2000"), "a device has no other addresses"
    assert "0x44332211" in say(board, "x/wx 00:03.0:8192"), "no line 8192 of a file 03.0"
    assert "0x44332211" in say(board, "print u32[00:03.0:iova:0x2000]")
    with pytest.raises(CommandError, match=r"iommu walk 00:03\.0"):
        say(board, "x/wx 00:03.0:iova:0x40000")
    with pytest.raises(CommandError, match="I/O addresses alone"):
        say(board, "x/wx 00:03.0:gva:0x2000")
    with pytest.raises(CommandError, match="some device's"):
        say(board, "x/wx iova:0x2000")
    text = say(board, "who-maps 00:03.0:iova:0x2000")
    assert text.startswith(f"spa {board.part(2) + RAM + 0x2000:#x}\n")


def test_completion_knows_devices(board: Board) -> None:
    registry = default_registry()
    for line in ("iommu walk 00", "iommu map 00", "irq try 00", "iommu irt 00"):
        assert "00:03.0" in [one.text for one in registry.complete(board, line).candidates]
    assert "00:03.0:iova:" in [one.text for one in registry.complete(board, "x 00").candidates]


def test_who_maps_takes_devices_in(board: Board) -> None:
    text = say(board, f"who-maps {board.part(2) + RAM + 0x2000:#x}")
    assert "device 00:03.0 (edu) (domain 0x7)  iova 0x2000" in text
    assert "rw" in text
    assert "device table of IOMMU 0" in say(board, f"who-maps {TABLE:#x}")
    assert "event log of IOMMU 0" in say(board, f"who-maps {EVENTS:#x}")
    assert "interrupt table of device 00:03.0" in say(board, f"who-maps {IRT:#x}")
    assert "I/O page-directory-pointer table of device 00:03.0" in say(board, f"who-maps {board.nic_root:#x}")


def test_a_device_of_a_guest_is_no_finding(board: Board) -> None:
    assert "device" not in say(board, "audit isolation").replace("page tables of", "")


@pytest.mark.parametrize(("target", "rights", "expected"), [
    ("vmcb", RW, "writes VMCB of guest 3"), ("vmcb", PTE.IR, "reads VMCB of guest 3"),
    ("nested", RW, "writes tables that confine guest 3"), ("table", RW, "writes device table of IOMMU 0"),
    ("irt", RW, "writes interrupt table of device 00:03.0"), ("io", PTE.IR, "reads tables that confine device 00:03.0"),
    ("other", RW, "both write"), ("command", PTE.IW, "writes command buffer of IOMMU 0"),
])  # fmt: skip
def test_what_a_device_may_not_reach_is_a_finding(board: Board, target: str, rights: int, expected: str) -> None:
    places = {
        "vmcb": board.part(3), "nested": board.nested_tables[3].root, "table": TABLE, "irt": IRT, "io": board.nic_root,
        "other": board.part(3) + RAM, "command": COMMANDS,
    }  # fmt: skip
    board.map(board.nic_root, 3, 0x20000, places[target], rights)
    text = say(board, "audit isolation")
    lines = [line for line in text.split("\n") if expected in line and "00:03.0" in line]
    assert lines, text


def test_write_only_pages_are_not_read(board: Board) -> None:
    board.map(board.nic_root, 3, 0x20000, board.part(3), PTE.IW)
    assert "reads VMCB" not in say(board, "audit isolation")


def test_an_untranslated_device_reaches_everything(board: Board) -> None:
    board.memory.write(TABLE + 32 * NIC, bytes(32))
    text = say(board, "audit isolation")
    assert any("device 00:03.0 (not translated)" in line and "writes VMCB of guest 2" in line for line in text.split("\n"))
    board.registers_of["control"] = 0
    assert "devices 00:03.0, 00:04.0 (not translated)" in say(board.turn_on(), "audit isolation")


def test_interrupts_of_a_guests_device(board: Board) -> None:
    dte = DTE.make(V=1, TV=1, Mode=3, PageTableRoot=board.nic_root >> 12, IR=1, IW=1, DomainID=7)
    for extra, words in ((0, "any interrupt (IV is 0)"), (DTE.make(IV=1, IntCtl=2, NMIPass=1, InitPass=1), "INIT, NMI"),
                         (DTE.make(IV=1, IntCtl=1), "any vector")):  # fmt: skip
        board.memory.write(TABLE + 32 * NIC, encode_dte(dte | extra))
        text = say(board, "audit isolation")
        assert "interrupts-not-remapped" in text
        assert f"device 00:03.0  may send {words}" in text


def test_addresses_that_a_guests_device_translates(board: Board) -> None:
    assert "addresses-not-checked" not in say(board, "audit isolation")
    entry = int.from_bytes(board.memory.read(TABLE + 32 * NIC, 32), "little") | DTE.I
    board.memory.write(TABLE + 32 * NIC, encode_dte(entry))
    text = say(board, "audit isolation")
    assert "medium  device 00:03.0  may send addresses that it says it has translated (I is 1)" in text
    assert "clear I" in text


LINES = (
    "iommu", "iommu devices", "iommu walk 00:03.0 0x1000", "iommu walk 00:00.3 0x40000000 --pasid 1", "iommu map 00:00.1 --limit 4",
    "iommu events --explain", "iommu requests --explain", "iommu ga-log", "iommu pasids 00:03.0", "iommu commands", "iommu irt 00:00.2", "irq try 00:00.4 0xfee00000 3", "who-maps 0x1000",
    "audit isolation",
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(LINES))
def test_any_memory_and_registers_are_answered(seed: int, line: str) -> None:
    """No traceback, and bounded work."""
    chance = random.Random(seed)
    board = Board()
    for page in range(TABLE, 0xB0000, 0x1000):
        if chance.random() < 0.7:
            pool = [chance.getrandbits(64) | chance.getrandbits(1) for _ in range(8)]
            pool += [chance.randrange(TABLE, 0xC0000) & ~0xFFF | chance.randrange(8) << 9 | RW | 1 for _ in range(8)]
            board.memory.write(page, b"".join(chance.choice(pool).to_bytes(8, "little") for _ in range(512)))
    if chance.random() < 0.3:
        board.registers_of = {name: chance.getrandbits(64) for name in board.registers_of}
        board.registers_of["device_table_base"] = chance.choice((TABLE, 1 << 51, (1 << 64) - 1))
    board.turn_on()
    board.iommus = (replace(board.iommu, manages=((0, 0xFFFF),)),)
    with contextlib.suppress(CommandError):
        say(board, line)
