"""An IOMMU on a board without a processor: its registers, tables and rings as software writes them."""

from __future__ import annotations

from introspect.iommu.records import COMMANDS, CommandCode, Event
from introspect.iommu.registers import CONTROL, REGISTERS, RING_BASE
from introspect.iommu.structures import DTE, IRTE, PTE, encode_dte
from introspect.pci import RequesterId
from tests.platform.pci.board import MSI_ADDRESS, Board
from vmdbg.iommu.config import IommuConfig
from vmdbg.iommu.translator import BASE
from vmdbg.platform.pci.dma import Dma

DEVICE = RequesterId.make(0, 3, 0)
OTHER = RequesterId.make(0, 4, 0)
DEVICE_TABLE, COMMANDS_AT, EVENTS_AT, PPR_AT, GA_AT = 0x200000, 0x400000, 0x410000, 0x420000, 0x430000
TABLES, INTERRUPT_TABLE, STORE = 0x500000, 0x480000, 0x490000
DATA = 0x800000
"""Memory that mappings lead to."""
RW = PTE.IR | PTE.IW
ON = CONTROL.IommuEn | CONTROL.EventLogEn | CONTROL.CmdBufEn
ENTRIES = 256


class Bench(Board):
    """IOMMU 0 (or `number`) with rings of 256 entries and a device table of 64 Ki entries; on, if `control` says so."""

    def __init__(
        self, *devices: str, strict: bool = False, units: int = 1, control: int = ON, number: int = 0, memory: int = 16 << 20
    ) -> None:
        super().__init__(*devices, iommu=IommuConfig(units, strict), memory=memory)
        assert self.chipset.iommus is not None
        self.unit = self.chipset.iommus.units[number]
        self.base = BASE + number * 0x4000
        self.next_table = TABLES
        self.put("device_table_base", DEVICE_TABLE | 0x1FF)
        for name, at in (("command", COMMANDS_AT), ("event", EVENTS_AT), ("ppr", PPR_AT), ("ga", GA_AT)):
            self.put(f"{name}_base", at | RING_BASE.make(Length=8))
        if control:
            self.put("control", control)

    @property
    def dma(self) -> Dma:
        return self.chipset.dma

    # Registers

    def get(self, name: str) -> int:
        register = REGISTERS[name]
        return self.bus.read_mmio(self.base + register.offset, register.size)

    def put(self, name: str, value: int) -> None:
        register = REGISTERS[name]
        self.bus.write_mmio(self.base + register.offset, register.size, value)

    def control(self, add: int = 0, drop: int = 0) -> None:
        self.put("control", self.get("control") & ~drop | add)

    def interrupts(self, vector: int) -> None:
        """Have the IOMMU's own sent as MSI."""
        self.messages(str(self.unit.function.address), vector)

    @property
    def vectors(self) -> list[int]:
        return [vector for vector, _, _ in self.apic.taken]

    # Tables

    def entry(self, device: int = DEVICE, **fields: int) -> None:
        """A device table entry; translation valid, unless fields say else."""
        self.ram.write(DEVICE_TABLE + device * 32, encode_dte(DTE.make(**fields)))

    def table(self) -> int:
        self.next_table += 0x1000
        return self.next_table - 0x1000

    def host(self, pages: dict[int, int], levels: int = 4, rights: int = RW) -> int:
        """Root of tables of so many levels that map 4 KiB pages; software's plain way, no level skipped."""
        root = self.table()
        for iova, spa in pages.items():
            at = root
            for level in range(levels, 1, -1):
                slot = at + (iova >> 12 + 9 * (level - 1) & 0x1FF) * 8
                if not self.ram.read_u64(slot):
                    self.ram.write_u64(slot, self.table() | PTE.make(PR=1, NextLevel=level - 1) | RW)
                at = self.ram.read_u64(slot) & PTE.Address
            self.ram.write_u64(at + (iova >> 12 & 0x1FF) * 8, spa | PTE.PR | rights)
        return root

    def leaf_of(self, root: int, iova: int, levels: int = 4) -> int:
        """Where the last entry for an address is."""
        at = root
        for level in range(levels, 1, -1):
            at = self.ram.read_u64(at + (iova >> 12 + 9 * (level - 1) & 0x1FF) * 8) & PTE.Address
        return at + (iova >> 12 & 0x1FF) * 8

    def give(self, pages: dict[int, int], device: int = DEVICE, levels: int = 4, rights: int = RW, **fields: int) -> int:
        """Map pages for a device; the root."""
        root = self.host(pages, levels, rights)
        self.entry(device, **{
            "V": 1, "TV": 1, "Mode": levels, "PageTableRoot": root >> 12, "IR": 1, "IW": 1, "DomainID": 7, **fields,
        })  # fmt: skip
        return root

    def irte(self, index: int, value: int, size: int = 4, device: int = DEVICE, **fields: int) -> None:
        """An interrupt table entry, and a device table entry that leads to it."""
        self.ram.write(INTERRUPT_TABLE + index * size, value.to_bytes(size, "little"))
        self.entry(device, **{
            "IV": 1, "IntCtl": 2, "IntTabLen": 8, "IntTabRoot": INTERRUPT_TABLE >> 6, **fields,
        })  # fmt: skip

    # Rings

    def issue(self, code: CommandCode, **fields: int) -> None:
        """Put one into the buffer."""
        self.issue_raw(COMMANDS[code].bits.make(code=code, **fields))

    def issue_raw(self, record: int) -> None:
        tail = self.get("command_tail")
        self.ram.write(COMMANDS_AT + tail, record.to_bytes(16, "little"))
        self.put("command_tail", (tail + 16) % (16 * ENTRIES))

    def commands_done(self) -> None:
        """Let time pass until the buffer is empty, or stopped."""
        for _ in range(100):
            self.pass_time(5000)

    def wait(self) -> None:
        """COMPLETION_WAIT, as drivers do."""
        self.ram.write_u64(STORE, 0)
        self.issue(CommandCode.COMPLETION_WAIT, Store=1, StoreAddress=STORE >> 3, StoreData=0xC0FFEE)
        self.commands_done()
        assert self.ram.read_u64(STORE) == 0xC0FFEE

    def events(self) -> list[int]:
        """What software reads from the log, and takes out."""
        head, tail = self.get("event_head"), self.get("event_tail")
        found = []
        while head != tail:
            found.append(int.from_bytes(self.ram.read(EVENTS_AT + head, 16), "little"))
            head = (head + 16) % (16 * ENTRIES)
        self.put("event_head", head)
        return found

    def event(self) -> Event:
        """The only one."""
        (record,) = self.events()
        decoded = Event.decode(record)
        assert decoded is not None
        assert decoded.encode() == record
        return decoded

    def message(self, data: int, device: int = DEVICE) -> None:
        """An interrupt message of a device, and time for what follows."""
        self.dma.write(RequesterId(device), MSI_ADDRESS, data.to_bytes(4, "little"))
        self.pass_time(2)


def plain_irte(vector: int, destination: int = 0) -> int:
    return IRTE.make(RemapEn=1, Vector=vector, Destination=destination)
