"""The breakpoints of DR0 to DR3 (APM2 13.1): what DR7 enables now, and how the engine is told of it.

Instructions are code hooks, as the debugger's own breakpoints are.  Data lies in guarded pages: the linear addresses are
translated, and the instruction that is about to access such a page is looked at and stepped.  Where page tables may have
changed, the guard follows: at events and IRET, system calls, and whatever flushes the TLB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from introspect.exits import ExitCode
from vmdbg.engine.physical import WATCH_READ, WATCH_WRITE
from vmdbg.engine.state import TR
from vmdbg.svm import world

from .bits import RFLAGS_RF
from .operands import accesses

if TYPE_CHECKING:
    from .core import Cpu

CR4_DE = 1 << 3
DR6_B, DR6_BD = 0xF, 1 << 13
DR7_ENABLED, DR7_LOCAL, DR7_GD = 0xFF, 0x155, 1 << 13
INSTRUCTION, WRITE, PORT, ACCESS = range(4)
"""DR7.R/W."""
_SIZES = (1, 2, 8, 4)
"""By DR7.LEN."""


class Range(NamedTuple):
    """What one register watches: linear addresses or ports; `bit` is its bit in DR6."""

    bit: int
    kind: int
    first: int
    size: int

    def meets(self, first: int, size: int) -> bool:
        return self.first < first + size and first < self.first + self.size


class DebugRegisters:
    """DR0 to DR3 of one CPU at work.  `update` is to be called where they, DR7 or CR4.DE have changed.

    While GIF is clear what they would meet is ignored, and not kept for later (APM2 table 15-10).
    """

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.active = False
        """Some are enabled, or the page tables are followed."""
        self.instructions: dict[int, int] = {}
        """Linear addresses to bits of DR6."""
        self.data: list[Range] = []
        self.ports: list[Range] = []
        self.held = 0
        """Bits of data breakpoints met by MOV SS or POP SS: due after the next instruction (APM2 8.5)."""
        self.moved = True
        """What page tables say may have changed.  Set by what the software does alone: how often the engine happens to stop
        besides must not decide whether a breakpoint is met."""
        self.follower: Callable[[Cpu], None] | None = None
        """Who else follows the page tables: called where they may have changed, before anything is executed."""
        self._pages: dict[int, int] = {}

    def follow(self, follower: Callable[[Cpu], None] | None) -> None:
        self.follower = follower
        self.update()

    def update(self) -> None:
        cpu = self.cpu
        dr7 = cpu.dr[7]
        self.moved = True
        if not dr7 & DR7_ENABLED and not self.active and self.follower is None:
            return
        self.instructions, self.data, self.ports = {}, [], []
        for number in range(4):
            if not dr7 >> 2 * number & 3:
                continue
            kind, size = dr7 >> 16 + 4 * number & 3, _SIZES[dr7 >> 18 + 4 * number & 3]
            address, bit = cpu.dr[number], 1 << number
            if kind == INSTRUCTION:
                self.instructions[address] = self.instructions.get(address, 0) | bit
            elif kind != PORT:
                self.data.append(Range(bit, kind, address & -size, size))
            elif cpu.state.cr(4) & CR4_DE:
                self.ports.append(Range(bit, kind, address & -size, size))
        self.active = bool(self.instructions or self.data or self.ports or self.follower)
        cpu.engine.arm(set(self.instructions), self)
        if not self.active:
            self._guard({})
            world.set_intercepts(cpu.state, cpu.guest)

    def prepare(self) -> None:
        """Before the engine runs: follow the page tables, and have it stop where they or RFLAGS.RF may change."""
        cpu, s = self.cpu, self.cpu.state
        if self.instructions or self.data or self.follower:
            world.stop_at(s, ExitCode.IRET, ExitCode.INVLPG)
        if not self.moved:
            return
        self.moved = False
        if self.follower is not None:
            self.follower(cpu)
        wanted = [(point.first, WATCH_WRITE if point.kind == WRITE else WATCH_WRITE | WATCH_READ) for point in self.data]
        if cpu.dr[7] & DR7_LOCAL and cpu.protected and not s.is_long:
            wanted.append((s.base(TR), WATCH_WRITE))  # a task switch of the engine begins with a store to it
        pages: dict[int, int] = {}
        for address, flags in wanted:
            spa = cpu.translate_quietly(address)
            if spa is not None and cpu.ram.contains(spa):
                pages[spa >> 12] = pages.get(spa >> 12, 0) | flags
        self._guard(pages)

    def _guard(self, pages: dict[int, int]) -> None:
        if pages != self._pages:
            self._pages = pages
            self.cpu.engine.physical.guard(self, pages)

    def instruction(self) -> int:
        """Bits of the instruction breakpoints at RIP, unless RFLAGS.RF holds them back."""
        s = self.cpu.state
        return 0 if s.rflags & RFLAGS_RF or not s.gif else self.instructions.get(s.linear_rip, 0)

    def values(self) -> list[bytes]:
        """The watched bytes: what `touched` compares."""
        cpu = self.cpu
        found = (cpu.translate_quietly(point.first) for point in self.data)
        return [
            b"" if spa is None or not cpu.ram.contains(spa) else bytes(cpu.ram.view[spa : spa + point.size])
            for spa, point in zip(found, self.data, strict=True)
        ]

    def touches(self, write: bool) -> int:
        """Bits of the data breakpoints that the instruction at RIP meets by its operands; `write`: it is about to store.

        That says more of a single operand than the disassembler, which takes some SSE stores for loads.
        """
        found = accesses(self.cpu) if self.data else []
        if len(found) == 1:
            address, size, reads, writes = found[0]
            found = [(address, size, reads or not write, writes or write)]
        bits = 0
        for address, size, reads, writes in found:
            bits |= self.data_bits(address, size, reads=reads, writes=writes)
        return bits

    def data_bits(self, address: int, size: int, *, reads: bool, writes: bool) -> int:
        met = (p for p in self.data if (writes or (reads and p.kind == ACCESS)) and p.meets(address, size))
        return sum(p.bit for p in met) if self.cpu.gif else 0

    def changes(self, before: list[bytes]) -> int:
        """Bits of those whose bytes are not as they were."""
        changed = (p for p, old, new in zip(self.data, before, self.values(), strict=True) if old and old != new)
        return sum(p.bit for p in changed) if self.cpu.gif else 0

    def port(self, first: int, size: int) -> None:
        """A port was accessed."""
        for point in self.ports:
            if point.meets(first, size) and self.cpu.gif:
                self.cpu.due |= point.bit

    def report(self, bits: int) -> None:
        """#DB is raised for these bits of DR6.  B0 to B3 tell of this one, the others stay until software clears them;
        GD is cleared so that the handler, or the hypervisor that intercepts it, gets at the registers (APM2 13.1.1)."""
        dr = self.cpu.dr
        kept = dr[6] & ~DR6_B if bits & (DR6_B | DR6_BD) else dr[6]
        dr[6] = kept | bits
        dr[7] &= ~DR7_GD

    def task_switch(self) -> None:
        """Local breakpoints are those of the task that is left (APM2 13.1.1)."""
        self.cpu.dr[7] &= ~DR7_LOCAL
        self.update()
