"""A machine in any processor mode with everything a test program needs: descriptor tables, a TSS, stacks, page tables.

`Rig` writes them from Python, so that a test starts at the instruction it is about.  All memory is mapped to itself.
"""

from __future__ import annotations

import struct
from typing import Literal

from tests.engine.assembler import Program, assemble
from vmdbg.cpu.processor import Processor
from vmdbg.engine.state import CS, DS, ES, FS, GDTR, GS, IDTR, LDTR, RSP, SS, TR
from vmdbg.fingerprint import FingerprintOptions
from vmdbg.iommu.config import IommuConfig
from vmdbg.machine import Config, Event, Machine
from vmdbg.platform.pci.catalogue import DeviceSpec

Mode = Literal["real", "virtual", "protected16", "protected32", "legacy", "pae", "compatibility", "long"]
MODES: tuple[Mode, ...] = (
    "real", "virtual", "protected16", "protected32", "legacy", "pae", "compatibility", "long",
)  # fmt: skip
LONG_MODES = ("compatibility", "long")
PROTECTED_MODES = ("protected16", "protected32", "legacy", "pae")

GDT, TSS, LDT, TSS2 = 0x1000, 0x3000, 0x2F00, 0x3800
IDT = 0x2000
CODE = 0x8000
HANDLERS = 0xA000
"""Handler of vector n: HANDLERS + 16 n, an HLT."""
STACK, USER_STACK, RING0_STACK, IST_STACK = 0x7000, 0x7800, 0x6000, 0x5000
DATA = 0x100000
TABLES = 0x40000
MEMORY = 16 << 20

# Selectors of the GDT below; user ones with RPL 3.
CODE64, DATA32, CODE32, CODE16, DATA16 = 0x08, 0x10, 0x18, 0x20, 0x28
USER_CODE64, USER_DATA, USER_CODE32, USER_CODE16 = 0x33, 0x3B, 0x43, 0x4B
CONFORMING32, CONFORMING64, ABSENT_CODE, TSS_SELECTOR, LDT_SELECTOR, TSS2_SELECTOR, ABSENT_DATA, READ_ONLY = (
    0x50, 0x58, 0x60, 0x68, 0x78, 0x88, 0x98, 0xA0,
)  # fmt: skip
GDT_LIMIT = 0xAF

CODE_ATTRIB = {64: 0xA9B, 32: 0xC9B, 16: 0x09B}
P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
NX = 1 << 63


def descriptor(base: int, limit: int, attrib: int) -> int:
    """A segment descriptor; `attrib` in the VMCB's packed form."""
    return (
        limit & 0xFFFF | (base & 0xFFFFFF) << 16 | (attrib & 0xFF) << 40 | (limit >> 16 & 0xF) << 48
        | (attrib >> 8 & 0xF) << 52 | (base >> 24 & 0xFF) << 56
    )  # fmt: skip


def bits_of(mode: Mode) -> int:
    return {"real": 16, "virtual": 16, "protected16": 16, "long": 64}.get(mode, 32)


class Rig:
    """A machine with a program at CODE, about to execute its first instruction."""

    def __init__(
        self, source: str | bytes = "", mode: Mode = "long", *, python: bool = False, user: bool = False, cpus: int = 1,
        memory: int = MEMORY, origin: int = CODE, strict_tlb: bool = False, physical_bits: int = 40,
        devices: tuple[str, ...] = (), iommu: IommuConfig | None = None, dev: str = "", tpm: bool = False,
        fingerprint: bool = False,
    ) -> None:  # fmt: skip
        if isinstance(source, bytes):
            self.program = Program(origin, source, {})
        else:
            self.program = assemble(source, origin, bits_of(mode))
        config = Config(
            memory=memory, cpus=cpus, flat_address=0x80000, mode="real", python_runtime=python, strict_tlb=strict_tlb,
            physical_bits=physical_bits, devices=tuple(map(DeviceSpec.parse, devices)), iommu=iommu,
            dev=dev, tpm=tpm, fingerprint=FingerprintOptions() if fingerprint else None,
        )
        self.machine = Machine(b"\xf4", config)
        self.cpu: Processor = self.machine.cpus[0]
        self.state = self.cpu.state
        self.ram = self.machine.ram
        self.mode = mode
        self.user = user or mode == "virtual"
        self.labels = self.program.labels
        self.ram.write(origin, self.program.code)
        self._handlers()
        self._descriptors()
        self._paging()
        self._registers(origin)

    # Memory

    def _handlers(self) -> None:
        self.ram.write(HANDLERS, b"\xf4".ljust(16, b"\x90") * 256)

    def handler_code(self, vector: int, source: str) -> bytes:
        """A handler of at most 16 bytes, to stand in the place of a vector's halt."""
        code = assemble(source, HANDLERS + 16 * vector, 64 if self.mode in LONG_MODES else bits_of(self.mode)).code
        assert len(code) <= 16, f"{source!r} is {len(code)} bytes long"
        return code

    def handler(self, vector: int, source: str) -> None:
        self.ram.write(HANDLERS + 16 * vector, self.handler_code(vector, source))

    def _descriptors(self) -> None:
        wide = self.mode in LONG_MODES
        table = {
            CODE64: descriptor(0, 0xFFFFF, 0xA9B), DATA32: descriptor(0, 0xFFFFF, 0xC93),
            CODE32: descriptor(0, 0xFFFFF, 0xC9B), CODE16: descriptor(0, 0xFFFF, 0x09B),
            DATA16: descriptor(0, 0xFFFF, 0x093), USER_CODE64: descriptor(0, 0xFFFFF, 0xAFB),
            USER_DATA: descriptor(0, 0xFFFFF, 0xCF3), USER_CODE32: descriptor(0, 0xFFFFF, 0xCFB),
            USER_CODE16: descriptor(0, 0xFFFF, 0x0FB), CONFORMING32: descriptor(0, 0xFFFFF, 0xC9F),
            CONFORMING64: descriptor(0, 0xFFFFF, 0xA9F), ABSENT_CODE: descriptor(0, 0xFFFFF, 0xA1B if wide else 0xC1B),
            TSS_SELECTOR: descriptor(TSS, 0x20FF, 0x08B), LDT_SELECTOR: descriptor(LDT, 0xFF, 0x082),
            TSS2_SELECTOR: descriptor(TSS2, 0x67, 0x089), ABSENT_DATA: descriptor(0, 0xFFFFF, 0xC13),
            READ_ONLY: descriptor(0, 0xFFFFF, 0xC91),
        }  # fmt: skip
        self.ram.write(GDT, bytes(GDT_LIMIT + 1))
        for selector, value in table.items():
            self.ram.write_u64(GDT + (selector & ~7), value)
        if wide:
            for number, stack in enumerate((RING0_STACK, 0, 0)):
                self.ram.write(TSS + 4 + 8 * number, struct.pack("<Q", stack))
            self.ram.write(TSS + 0x24, struct.pack("<Q", IST_STACK))
        else:
            self.ram.write(TSS + 4, struct.pack("<II", RING0_STACK, DATA32))
        self.ram.write(TSS + 0x66, b"\x68\x00")
        self.ram.write(TSS + 0x68, b"\xff" * 0x2000)
        for vector in range(256):
            self.gate(vector)

    def gate(
        self, vector: int, *, kind: int = 0xE, dpl: int = 0, present: bool = True, ist: int = 0,
        selector: int | None = None,
        offset: int | None = None,
    ) -> None:  # fmt: skip
        """Make the IDT entry of a vector; `kind` is the gate's type: 5 task, 6, 7 16-bit, E interrupt, F trap."""
        offset = HANDLERS + 16 * vector if offset is None else offset
        if self.mode == "real":
            self.ram.write(4 * vector, struct.pack("<HH", offset & 0xFFFF, selector or 0))
            return
        if selector is None:
            selector = CODE64 if self.mode in LONG_MODES else CODE16 if kind in (6, 7) else CODE32
        low = (
            offset & 0xFFFF
            | selector << 16
            | ist << 32
            | kind << 40
            | dpl << 45
            | present << 47
            | (offset >> 16 & 0xFFFF) << 48
        )
        if self.mode in LONG_MODES:
            self.ram.write(IDT + 16 * vector, struct.pack("<QQ", low, offset >> 32))
        else:
            self.ram.write(IDT + 8 * vector, struct.pack("<Q", low))

    def _paging(self) -> None:
        """Everything to itself, for user and supervisor, 4 KiB pages for the first 4 MiB and large ones above."""
        entries = MEMORY >> 12 if self.mode == "legacy" else 512
        if self.mode == "legacy":
            table, directory = TABLES + 0x1000, TABLES
            self.ram.write(table, struct.pack("<1024I", *(n << 12 | P | W | U for n in range(1024))))
            self.ram.write(
                directory, struct.pack("<1024I", table | P | W | U, *(n << 22 | P | W | U | PS for n in range(1, 1024)))
            )
        elif self.mode == "pae" or self.mode in LONG_MODES:
            tables = [TABLES + 0x10000 + n * 0x1000 for n in range(2)]
            directories = [TABLES + 0x2000 + n * 0x1000 for n in range(4)]
            for number, table in enumerate(tables):
                self.ram.write(
                    table, struct.pack("<512Q", *((number << 9 | n) << 12 | P | W | U for n in range(entries)))
                )
            for number, directory in enumerate(directories):
                values = [(number << 9 | n) << 21 | P | W | U | PS for n in range(512)]
                if number == 0:
                    values[:2] = [table | P | W | U for table in tables]
                self.ram.write(directory, struct.pack("<512Q", *values))
            rights = P if self.mode == "pae" else P | W | U
            self.ram.write(TABLES + 0x1000, struct.pack("<4Q", *(directory | rights for directory in directories)))
            self.ram.write_u64(TABLES, TABLES + 0x1000 | P | W | U)

    def entry(self, address: int) -> int:
        """Address of the last-level entry of one of the first 4 MiB."""
        if self.mode == "legacy":
            return TABLES + 0x1000 + (address >> 12) * 4
        return TABLES + 0x10000 + (address >> 12) * 8

    def change(self, address: int, *, add: int = 0, drop: int = 0) -> None:
        """Change bits of that entry."""
        at = self.entry(address)
        if self.mode == "legacy":
            self.ram.write_u32(at, self.ram.read_u32(at) & ~drop | add)
        else:
            self.ram.write_u64(at, self.ram.read_u64(at) & ~drop | add)
        self.cpu.flush()

    # Registers

    def _registers(self, origin: int) -> None:
        s, mode = self.state, self.mode
        for number in range(16):
            s.set_reg(number, 0)
        if mode == "real":
            for register in (CS, DS, ES, SS, FS, GS):
                s.set_segment(register, 0, 0, 0xFFFF, 0x9B if register == CS else 0x93)
            s.set_table(IDTR, 0, 0x3FF)
            s.set_cr(0, 0x10)
        else:
            s.set_cr(0, 0x11 | (1 << 31 if mode in ("legacy", "pae", "compatibility", "long") else 0))
            s.set_cr(4, {"legacy": 0x10, "pae": 0x20, "compatibility": 0x20, "long": 0x20}.get(mode, 0) | 0x600)
            s.set_cr(3, TABLES + (0x1000 if mode == "pae" else 0))
            s.efer = {"pae": 0x800, "compatibility": 0xD00, "long": 0xD00}.get(mode, 0)
            self.set_level(3 if self.user else 0)
            s.set_table(GDTR, GDT, GDT_LIMIT)
            s.set_table(IDTR, IDT, 0xFFF if mode in LONG_MODES else 0x7FF)
            s.set_segment(TR, TSS_SELECTOR, TSS, 0x20FF, 0x08B)
            s.set_segment(LDTR, LDT_SELECTOR, LDT, 0xFF, 0x082)
        s.rflags = 0x20002 if mode == "virtual" else 2
        s.rip = origin
        s.set_reg(RSP, USER_STACK if self.user else STACK)
        s.refresh(3 if self.user else 0)

    def set_level(self, cpl: int) -> None:
        """Code and data segments of the mode at privilege 0 or 3."""
        s, mode = self.state, self.mode
        if mode == "virtual":
            for register in (CS, DS, ES, SS, FS, GS):
                s.set_segment(register, 0, 0, 0xFFFF, 0xF3)
            return
        bits = bits_of(mode)
        selectors = {64: (CODE64, USER_CODE64), 32: (CODE32, USER_CODE32), 16: (CODE16, USER_CODE16)}[bits]
        data = USER_DATA if cpl else DATA16 if bits == 16 else DATA32
        limit = 0xFFFF if bits == 16 else 0xFFFFFFFF
        s.set_segment(CS, selectors[cpl // 3], 0, limit, CODE_ATTRIB[bits] | cpl << 5)
        for register in (DS, ES, SS, FS, GS):
            if data == DATA16:
                s.set_segment(register, data, 0, 0xFFFF, 0x093)
            else:
                s.set_segment(register, data, 0, 0xFFFFFFFF, 0xC93 | cpl << 5)
        s.refresh(cpl)

    @property
    def now(self) -> int:
        return self.machine.clock.now

    @property
    def rip(self) -> int:
        return self.state.rip

    def reg(self, number: int) -> int:
        return self.state.reg(number)

    # Running

    def step(self, count: int = 1) -> None:
        """Execute `count` instructions; what they raise is delivered."""
        for _ in range(count):
            self.machine.run(step=True)

    def run(self, ticks: int = 1_000_000) -> Event:
        """Run until the machine idles (a handler halted) or ends; fails if it is still busy after `ticks`."""
        event = self.machine.run(ticks)
        assert event in (Event.IDLE, Event.EXIT), f"{event!r} at RIP {self.rip:#x}: still running after {ticks} ticks"
        return event

    @property
    def handled(self) -> int | None:
        """The vector whose handler RIP is in (or behind its HLT); None elsewhere."""
        offset = self.state.rip - HANDLERS
        return offset // 16 if 0 <= offset < 0x1000 and offset % 16 <= 1 else None

    def stack(self, count: int, size: int) -> list[int]:
        """The top `count` values of `size` bytes of the stack."""
        s = self.state
        mask = 0xFFFFFFFFFFFFFFFF if s.is_code64 else 0xFFFFFFFF if s.attrib(SS) & 0x400 else 0xFFFF
        base = 0 if s.is_code64 else s.base(SS)
        at = base + (s.reg(RSP) & mask)
        data = self.ram.read(at, count * size)
        return [int.from_bytes(data[n * size : (n + 1) * size], "little") for n in range(count)]
