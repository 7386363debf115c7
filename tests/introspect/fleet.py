"""A host with guests in bytes: VMCBs, permission maps, nested tables, guests' own tables."""

from __future__ import annotations

from dataclasses import replace

from introspect.commands import GuestView, HostView
from introspect.paging import PagingState
from introspect.sources import BytesMemory
from introspect.vmcb import VMCB

from .tables import LONG, PAGED, P, Tables, U, W, nested, state
from .world import World

IMAGE, HSAVE, HOST_TABLES = 0x10000, 0x18000, 0x20000
FIRST, STRIDE = 0x100000, 0x40000
"""Guest n has its part of memory from FIRST + (n - 2) * STRIDE on."""
IOPM, MSRPM, NPT, RAM, PAGES = 0x1000, 0x4000, 0x6000, 0x20000, 16
"""Where a guest's structures are in its part; the VMCB is first. RAM has so many pages, the guest's tables in the last four."""


class Fleet(World):
    """Guests 2, 3 ... with 64 KiB each: gva 40_0000h leads to gpa 0, and on for four pages."""

    def __init__(self, count: int) -> None:
        memory = BytesMemory(FIRST + count * STRIDE)
        self.host_tables = Tables(memory, "4-level", range(HOST_TABLES, HOST_TABLES + 0x8000, 0x1000))
        self.host_tables.map(0, 0, P | W, level=2)
        self.host_tables.map(0x20_0000, 0x20_0000, P | W, level=2)
        self.host_tables.map(0x7FC0_0000_0000, IMAGE, P)
        host = HostView(
            paging=state("4-level", self.host_tables.root), image=((IMAGE, IMAGE + 0x4000),), saves=(HSAVE, 0)
        )
        self.nested_tables: dict[int, Tables] = {}
        self.tables: dict[int, Tables] = {}
        guests = [self._guest(memory, number) for number in range(2, 2 + count)]
        super().__init__(memory, guests, None, host=host)

    @staticmethod
    def part(number: int) -> int:
        return FIRST + (number - 2) * STRIDE

    def _guest(self, memory: BytesMemory, number: int) -> GuestView:
        at = self.part(number)
        outer = self.nested_tables[number] = Tables(memory, "4-level", range(at + NPT, at + NPT + 0x8000, 0x1000))
        for page in range(PAGES):
            outer.map(page << 12, at + RAM + (page << 12))
        ram = BytesMemory({0: memory.regions[0][1][at + RAM : at + RAM + (PAGES << 12)]})
        inner = self.tables[number] = Tables(ram, "4-level", range((PAGES - 4) << 12, PAGES << 12, 0x1000))
        for page in range(4):
            inner.map(0x40_0000 + (page << 12), page << 12, P | W)
        paging = state("4-level", inner.root)
        fields = {
            "intercept_misc1": 1 << 27 | 1 << 28, "guest_asid": number, "misc_ctl": 1, "n_cr3": outer.root, "cr0": PAGED, "cr3": inner.root,
            "cr4": paging.cr4, "efer": LONG, "iopm_base_pa": at + IOPM, "msrpm_base_pa": at + MSRPM,
        }  # fmt: skip
        memory.write(at, bytes(VMCB.encode(fields)))
        return GuestView(
            number=number, name=f"g{number}", vmcbs=(at,), asid=number, ncr3=outer.root, paging=paging,
            nested=nested("4-level", outer.root),
        )  # fmt: skip

    def change(self, number: int, **changes: object) -> None:
        """A guest's view with some fields changed."""
        self.guests = [replace(one, **changes) if one.number == number else one for one in self.guests]  # type: ignore[arg-type]

    def add_vcpu(self, number: int, spa: int, cr3: int) -> None:
        """One more VMCB, with tables of its own."""
        guest = next(one for one in self.guests if one.number == number)
        vmcb = bytearray(self.memory.read(guest.vmcbs[0], 0x1000))
        VMCB.write(vmcb, "cr3", cr3)
        self.memory.write(spa, bytes(vmcb))
        self.change(number, vmcbs=(*guest.vmcbs, spa))

    def shadow(self, number: int) -> None:
        """Take the guest's nested paging away: its tables, in the host's memory, lead to system-physical addresses."""
        at = self.part(number)
        tables = Tables(self.memory, "4-level", range(at + NPT, at + NPT + 0x8000, 0x1000))  # type: ignore[arg-type]
        self.memory.write(at + NPT, bytes(0x8000))
        tables.map(0x40_0000, at + RAM, P | W | U)
        self.tables[number] = tables
        self.change(number, nested=None, ncr3=None, paging=PagingState(PAGED, tables.root, 0x20, LONG))
