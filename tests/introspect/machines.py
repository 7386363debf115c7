"""A small dead machine in bytes: a hypervisor with a guest, and one that it runs for that guest's own hypervisor."""

from __future__ import annotations

from introspect.sources import BytesMemory
from introspect.vmcb import VMCB

from .tables import CR4S, EFERS, PAGED, P, Tables, U

SIZE = 0x400000
HSAVE, VMCB_A, VMCB_B, VMCB_MADE = 0x2000, 0x3000, 0x4000, 0x109000
"""The host's save area; VMCBs of guest A and of its guest B; the VMCB that A's hypervisor made for B."""
IOPM, MSRPM = 0x5000, 0x8000
MEMORY_A = 0x100000
"""Guest A's memory of 1 MiB: its gpa 0."""
MEMORY_B = 0x140000
"""B's of 256 KiB lies in A's, at gpa 40000h."""
CODE, STACK = 0x1000, 0x3000
MADE_GPA = VMCB_MADE - MEMORY_A
SVME = 1 << 12

STATE = {
    "cr0": PAGED, "cr4": CR4S["4-level"], "efer": EFERS["4-level"] | SVME, "rflags": 2, "dr6": 0xFFFF_0FF0, "dr7": 0x400,
    "g_pat": 0x0007_0406_0007_0406, "cs.selector": 8, "cs.attrib": 0xA9B, "cs.limit": 0xFFFF_FFFF, "ss.attrib": 0xC93,
    "tr.attrib": 0x8B, "gdtr.limit": 0x27, "idtr.limit": 0xFFF,
}  # fmt: skip
CONTROL = {
    "intercept_misc1": 1 << 27 | 1 << 28, "intercept_misc2": 1, "misc_ctl": 1, "exitcode": 0x60,
}  # fmt: skip


class Offset(BytesMemory):
    """A guest's memory within the machine's."""

    def __init__(self, memory: BytesMemory, base: int, size: int) -> None:
        super().__init__({0: memory.regions[0][1][base : base + size]})


def linear_map(memory: BytesMemory, pages: range, size: int, target: int, flags: int = P | 2 | U) -> int:
    """Page tables that map addresses 0 to `size` to `target`; their root."""
    tables = Tables(memory, "4-level", pages)
    for at in range(0, size, 0x1000):
        tables.map(at, target + at, flags)
    return tables.root


def build(*, nested: bool = True) -> BytesMemory:
    memory = BytesMemory(SIZE)
    put = memory.write
    host_cr3 = linear_map(memory, range(0x10000, 0x20000, 0x1000), 0x100000, 0)
    ncr3_a = linear_map(memory, range(0x20000, 0x30000, 0x1000), 0x100000, MEMORY_A)
    memory_a = Offset(memory, MEMORY_A, 0x100000)
    cr3_a = linear_map(memory_a, range(0x10000, 0x20000, 0x1000), 0x100000, 0)
    host = {**STATE, "cr3": host_cr3, "rip": CODE, "rsp": STACK, "gdtr.base": 0x6000, "idtr.base": 0x7000}
    put(HSAVE, bytes(VMCB.encode(host)))
    maps = {"iopm_base_pa": IOPM, "msrpm_base_pa": MSRPM}
    put(IOPM, b"\xff" * 0x3000)
    put(MSRPM, b"\xff" * 0x2000)
    guest = {**STATE, **CONTROL, **maps, "guest_asid": 1, "n_cr3": ncr3_a, "cr3": cr3_a, "rip": CODE + 0x10, "rsp": STACK}
    put(VMCB_A, bytes(VMCB.encode({**guest, "gdtr.base": 0xA000, "idtr.base": 0xB000})))
    if nested:
        memory_b = Offset(memory, MEMORY_B, 0x40000)
        cr3_b = linear_map(memory_b, range(0x10000, 0x18000, 0x1000), 0x40000, 0)
        composed = linear_map(memory, range(0x30000, 0x38000, 0x1000), 0x40000, MEMORY_B)
        own = linear_map(memory_a, range(0x20000, 0x28000, 0x1000), 0x40000, MEMORY_B - MEMORY_A)
        inner = {**guest, "guest_asid": 2, "cr3": cr3_b, "rip": CODE + 0x20, "gdtr.base": 0xC000, "idtr.base": 0xD000}
        put(VMCB_B, bytes(VMCB.encode({**inner, "n_cr3": composed})))
        put(VMCB_MADE, bytes(VMCB.encode({**inner, "n_cr3": own, "guest_asid": 1})))
    return memory
