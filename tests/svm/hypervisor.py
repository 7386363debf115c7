"""A small hypervisor around a guest in any mode: VMCB, permission maps, nested tables that move the guest to 4 MiB.

The guest is a `Rig` of its own, made on a scratch machine: its registers become the VMCB's save area, its first 2 MiB
the guest's memory.  What the hypervisor executes is the test's, by default VMRUN and a halt.
"""

from __future__ import annotations

import struct

from introspect.vmcb import VMCB
from tests.engine.rig import HANDLERS, IDT, STACK, TSS, Mode, Rig
from vmdbg.engine.state import FS, GS, LDTR, RAX, TR
from vmdbg.machine import Config, Event, Machine
from vmdbg.svm import world

HOST_CODE = 0x88000
VMCB_PAGE, HSAVE, IOPM, MSRPM = 0x90000, 0x91000, 0x92000, 0x96000
NESTED = 0xB0000
"""PML4, PDPT, two page directories' worth of page tables."""
HOST_TABLES = 0xD0000
GUEST = 0x400000
"""Where guest-physical 0 is, under nested paging."""
SVME = 1 << 12
INTERCEPTS = ("intercept_cr_read", "intercept_cr_write", "intercept_dr_read", "intercept_dr_write",
"intercept_exceptions",
              "intercept_misc1", "intercept_misc2", "intercept_misc3")  # fmt: skip
VMMCALL, HLT, SHUTDOWN, NPF, INVALID = 0x81, 0x78, 0x7F, 0x400, (1 << 64) - 1
P, W, U, A, D, NX = 1, 2, 4, 0x20, 0x40, 1 << 63


class Hypervisor(Rig):
    """A host in `host_mode` about to run a guest in `mode`; VMMCALL, HLT and SHUTDOWN of the guest come back."""

    def __init__(
        self, guest: str | bytes, mode: Mode = "long", *, host: str = "vmrun; hlt", python: bool = False, np: bool = True,
        user: bool = False, cpus: int = 1, host_mode: Mode = "long", strict_tlb: bool = False,
        physical_bits: int = 40, devices: tuple[str, ...] = (), dev: str = "",
    ) -> None:  # fmt: skip
        super().__init__(host, host_mode, python=python, cpus=cpus, origin=HOST_CODE, strict_tlb=strict_tlb,
                         physical_bits=physical_bits, devices=devices, dev=dev)  # fmt: skip
        self.inner = inner = Rig(guest, mode, user=user)
        self.labels = {**inner.labels, **{f"host_{name}": value for name, value in self.labels.items()}}
        self.base = GUEST if np else 0
        self.view = self.ram.view[VMCB_PAGE : VMCB_PAGE + 0x1000]
        if np:
            self.ram.write(GUEST, inner.ram.read(0, 0x200000))
        else:
            self._own_tables()
            self.ram.write(0, inner.ram.read(0, 0x80000))
        world._store_state(inner.cpu, self.view)
        s = inner.state
        for name, segment in (("fs", FS), ("gs", GS), ("ldtr", LDTR), ("tr", TR)):
            for field, value in (
                ("selector", s.selector(segment)), ("attrib", s.attrib(segment)), ("limit", s.limit(segment)),
                ("base", s.base(segment)),
            ):  # fmt: skip
                VMCB.write(self.view, f"{name}.{field}", value)
        self.set(
            efer=self["efer"] | SVME, guest_asid=1, iopm_base_pa=IOPM, msrpm_base_pa=MSRPM, misc_ctl=int(np),
            n_cr3=NESTED if np else 0, g_pat=0x0007040600070406,
        )  # fmt: skip
        self.intercept(0x80, VMMCALL, HLT, SHUTDOWN)
        self._nested()
        self.state.efer |= SVME
        self.state.set_field("vm_hsave", HSAVE)
        self.state.refresh()
        self.state.set_reg(RAX, VMCB_PAGE)

    def _own_tables(self) -> None:
        """A guest without nested paging lies where the host's tables were: the host gets others, of its largest pages."""
        at = HOST_TABLES
        if self.mode == "long":
            self.ram.write_u64(at, at + 0x1000 | P | W)
            self.ram.write(at + 0x1000, struct.pack("<4Q", *(n << 30 | P | W | 0x80 for n in range(4))))
        elif self.mode == "pae":
            self.ram.write(at, struct.pack("<4Q", *(at + 0x1000 + 0x1000 * n | P for n in range(4))))
            self.ram.write(at + 0x1000, struct.pack("<2048Q", *(n << 21 | P | W | 0x80 for n in range(2048))))
        elif self.mode == "legacy":
            self.ram.write(at, struct.pack("<1024I", *(n << 22 | P | W | 0x80 for n in range(1024))))
        self.state.set_cr(3, at)

    def _nested(self) -> None:
        """4 KiB pages in the format of the host's own tables: gpa to gpa + GUEST for 4 MiB, nothing above."""
        every = P | W | U
        tables = NESTED + 0x3000
        if self.mode == "legacy":
            self.ram.write_u32(NESTED, tables | every)
            self.ram.write(tables, struct.pack("<1024I", *((n << 12) + GUEST | every for n in range(1024))))
            return
        directory = NESTED + 0x2000
        if self.mode == "pae":
            self.ram.write_u64(NESTED, directory | P)
        else:
            self.ram.write_u64(NESTED, NESTED + 0x1000 | every)
            self.ram.write_u64(NESTED + 0x1000, directory | every)
        self.ram.write(directory, struct.pack("<2Q", *(tables + 0x1000 * n | every for n in range(2))))
        self.ram.write(tables, struct.pack("<1024Q", *((n << 12) + GUEST | every for n in range(1024))))

    def nested_entry(self, gpa: int) -> int:
        """Address of the last-level nested entry."""
        return NESTED + 0x3000 + (gpa >> 12) * (4 if self.mode == "legacy" else 8)

    def change_nested(self, gpa: int, *, add: int = 0, drop: int = 0) -> None:
        at, size = self.nested_entry(gpa), 4 if self.mode == "legacy" else 8
        entry = int.from_bytes(self.ram.read(at, size), "little")
        self.ram.write(at, (entry & ~drop | add).to_bytes(size, "little"))

    # The VMCB

    def __getitem__(self, name: str) -> int:
        return VMCB.read(self.view, name)

    def set(self, **fields: int) -> None:
        for name, value in fields.items():
            VMCB.write(self.view, name.replace("__", "."), value)

    def intercept(self, *codes: int, on: bool = True) -> None:
        """Set or clear the intercept bits of exit codes."""
        for code in codes:
            byte = code >> 3
            self.view[byte] = self.view[byte] & ~(1 << (code & 7)) | on << (code & 7)

    # The guest's memory

    def guest_read(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.ram.read(self.base + gpa, size), "little")

    def guest_write(self, gpa: int, data: bytes) -> None:
        self.ram.write(self.base + gpa, data)

    def guest_handler(self, vector: int, source: str) -> None:
        self.guest_write(HANDLERS + 16 * vector, self.inner.handler_code(vector, source))

    # Running

    def enter(self, ticks: int = 100_000) -> int:
        """From the host's present RIP to its halt; returns EXITCODE."""
        self.run(ticks)
        assert self.cpu.guest is None
        return self["exitcode"]

    def again(self, **fields: int) -> int:
        """Change fields, go back to the VMRUN at the start, and run it again."""
        self.set(**fields)
        self.state.rip = self.program.origin
        self.state.set_reg(RAX, VMCB_PAGE)
        self.cpu.halted = False
        return self.enter()

    def skip(self, length: int) -> int:
        """Let the guest go on behind an instruction of `length` bytes."""
        return self.again(rip=self["rip"] + length)

    @property
    def guest_vector(self) -> int | None:
        """The vector whose handler the guest is in."""
        offset = self["rip"] - 0xA000
        return offset // 16 if 0 <= offset < 0x1000 and offset % 16 <= 1 else None

    def guest_stack(self, count: int, size: int = 8) -> list[int]:
        at = self["ss.base"] * (self.inner.mode != "long") + self["rsp"]
        return [self.guest_read(at + size * n, size) for n in range(count)]


def bare_machine(code: bytes, python: bool = False) -> Machine:
    """A flat long-mode image alone on its machine."""
    return Machine(code, Config(memory=16 << 20, flat_address=0x200000, mode="long", python_runtime=python))


__all__ = [
    "GUEST",
    "HLT",
    "HOST_CODE",
    "HSAVE",
    "IDT",
    "INTERCEPTS",
    "INVALID",
    "IOPM",
    "MSRPM",
    "NESTED",
    "NPF",
    "NX",
    "SHUTDOWN",
    "STACK",
    "SVME",
    "TSS",
    "VMCB_PAGE",
    "VMMCALL",
    "A",
    "D",
    "Event",
    "Hypervisor",
    "P",
    "U",
    "W",
    "bare_machine",
]  # fmt: skip
