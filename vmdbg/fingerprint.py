# SPDX-License-Identifier: GPL-2.0-or-later
"""The fingerprint of a run: a hash of what it executed and when, of what its processors, devices and the outside did, and of what
it has left in registers and memory.  docs/determinism.md says what is in it, and how two of them are compared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from struct import pack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmdbg.contexts import GENERAL, LiveContext
from vmdbg.engine.fingerprint import MASK, VMEXIT, VMRUN, Sums, chain, stretch
from vmdbg.engine.memory import PAGE, Ram
from vmdbg.identity import DIGITS, digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vmdbg.cpu.core import Cpu
    from vmdbg.cpu.faults import Event
    from vmdbg.cpu.processor import Processor
    from vmdbg.history import Vcpu
    from vmdbg.machine import Machine
    from vmdbg.platform.pci.dma import Record
    from vmdbg.svm.guest import Guest

EVERY = 1 << 23
"""Ticks from one checkpoint to the next, unless something else is asked for."""
MOST = 1 << 16
"""Checkpoints that are kept: of twice as many every second one is."""
_REGISTERS = (
    *GENERAL, "rip", "eflags", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "mxcsr", "fctrl", "fstat", "ftag",
    *(f"st{n}" for n in range(8)), *(f"xmm{n}" for n in range(16)),
)  # fmt: skip
_SEGMENTS = 10
"""ES to TR, then GDTR and IDTR, by their numbers in the engine."""


@dataclass(frozen=True)
class FingerprintOptions:
    """What `Config.fingerprint` asks for: a checkpoint at every so many ticks, from tick `first` on."""

    every: int = EVERY
    first: int = 0


class Checkpoint(NamedTuple):
    """All that had happened at the first boundary of instructions at or behind a tick.

    `code`: what was executed, and when; `switches`: VMRUNs and #VMEXITs; `events`: accesses to devices, interrupts, exceptions,
    DMA, input, resets.
    """

    tick: int
    code: str
    switches: str
    events: str


@dataclass(frozen=True)
class Trace:
    """A run up to a moment.  `trace` is the hash of all the others."""

    tick: int
    code: str
    switches: str
    events: str
    registers: str
    memory: str
    status: int | None
    """The exit status; None while it goes on."""

    @property
    def hash(self) -> str:
        members = [self.tick, self.code, self.switches, self.events, self.registers, self.memory, self.status]
        return digest(json.dumps(members).encode())


class Fingerprint:
    """Of one machine's run, which tells it all that happens.  It changes nothing of it."""

    def __init__(self, options: FingerprintOptions) -> None:
        self.sums = Sums()
        self.every, self.first = options.every, options.first
        self.checkpoints: list[Checkpoint] = []
        self.next = max(self._on_grid(options.first), options.every)
        """The tick of the next checkpoint."""
        self._events = bytes(DIGITS // 2)

    def _note(self, kind: bytes, *numbers: int, data: bytes = b"") -> None:
        """One more event."""
        words = pack(f"<{len(numbers)}Q", *numbers)
        self._events = hashlib.blake2b(self._events + kind + words + data, digest_size=DIGITS // 2).digest()

    def attach(self, machine: Machine) -> None:
        """Have a machine tell what happens on it."""
        machine.engine.devices = _Devices(self, machine)
        machine.history.fingerprint = self
        machine.chipset.dma.listeners.append(lambda record: self.dma(machine.clock.now, record))
        for cpu in machine.cpus:
            cpu.recorder = self

    # What happens on the machine

    def port(self, cpu: Cpu, port: int, size: int, write: bool, value: int) -> None:
        """IN and OUT, as executed."""
        self._note(b"port", cpu.engine.clock.now, cpu.index, port, size, write, value)

    def executed(self, cpu: Cpu, length: int) -> None:
        """A read of a control register, which the engine executes unless a debugger waits for it."""
        state = cpu.state
        self.sums.code = self.sums.code + stretch(state.linear_rip, cpu.engine.clock.now, length, state.salt) & MASK

    def mmio(self, now: int, cpu: int, spa: int, size: int, write: bool, value: int) -> None:
        self._note(b"mmio", now, cpu, spa, size, write, value)

    def taken(self, cpu: Cpu, event: Event, source: int) -> None:
        """An interrupt or exception has come to its handler."""
        code = event.error if event.error is not None else (1 << 64) - 1
        self._note(b"event", cpu.engine.clock.now, cpu.index, event.vector, event.kind, code, source & (1 << 64) - 1)

    def dma(self, now: int, record: Record) -> None:
        where = record.requester, record.address, record.length, record.write, bool(record.refused)
        self._note(b"dma", now, *where, data=record.data)

    def reset(self, now: int) -> None:
        self._note(b"reset", now)

    def input(self, now: int, what: str, data: bytes) -> None:
        self._note(b"input", now, data=f"{what} ".encode() + data)

    def vmrun(self, cpu: Cpu, guest: Guest) -> None:
        """As switch.c has it."""
        crossing = cpu.crossing
        self._switch((VMRUN, cpu.index, guest.vmcb, crossing.entered, crossing.host_rip))

    def vmexit(self, cpu: Cpu, vcpu: Vcpu, rip: int, code: int, info1: int, info2: int, intinfo: int) -> None:
        """Likewise; the general registers are in `vcpu`."""
        known = (VMEXIT, cpu.index, vcpu.vmcb, cpu.engine.clock.now, rip, code, info1, info2, intinfo)
        self._switch((*known, *vcpu.registers))

    def _switch(self, words: Iterable[int]) -> None:
        self.sums.switches = chain(self.sums.switches, words)

    def checkpoint(self, now: int) -> None:
        """Guest time has come to `next`, or beyond it.  While all CPUs are halted it may jump, at once or in a debugger's slices:
        so where nothing has happened since the last checkpoint, there is none."""
        here = self._so_far(self.next)
        if not self.checkpoints or self.checkpoints[-1][1:] != here[1:]:
            self.checkpoints.append(here)
        self.next = (now // self.every + 1) * self.every
        if len(self.checkpoints) > MOST:
            self.every *= 2
            # One between two ticks of the new grid stands at the later one: if that has none, nothing has happened since.
            self.checkpoints = list({(at := self._on_grid(one.tick)): one._replace(tick=at) for one in self.checkpoints}.values())
            self.next = self._on_grid(self.next)

    def _on_grid(self, tick: int) -> int:
        return -(-tick // self.every) * self.every

    def _so_far(self, tick: int) -> Checkpoint:
        return Checkpoint(tick, f"{self.sums.code:016x}", f"{self.sums.switches:016x}", self._events.hex())

    # What is asked

    def trace(self, machine: Machine) -> Trace:
        """Of the run up to now."""
        now = machine.clock.now
        return Trace(
            now, *self._so_far(now)[1:], registers_digest(machine.cpus), memory_digest(machine.ram), machine.exit_status
        )

    def state(self) -> dict[str, object]:
        """For a snapshot, of JSON's types; `restore` takes it."""
        return {
            "code": self.sums.code, "switches": self.sums.switches, "events": self._events.hex(), "every": self.every,
            "first": self.first, "next": self.next, "checkpoints": [list(one) for one in self.checkpoints],
        }  # fmt: skip

    def restore(
        self, *, code: int, switches: int, events: str, every: int, first: int, next: int,
        checkpoints: Sequence[tuple[int, str, str, str]],
    ) -> None:  # fmt: skip
        """Go on as that run would have.  TypeError or ValueError for what `state` did not give."""
        if min(every, next) < 1:
            raise ValueError("no grid")
        self.sums.code, self.sums.switches, self._events = code, switches, bytes.fromhex(events)
        self.every, self.first, self.next = int(every), int(first), int(next)
        self.checkpoints = [Checkpoint(int(tick), *map(str, rest)) for tick, *rest in checkpoints]


class _Devices:
    """Between the engine and the machine's devices."""

    def __init__(self, fingerprint: Fingerprint, machine: Machine) -> None:
        self._fingerprint, self._machine = fingerprint, machine

    def read_mmio(self, spa: int, size: int) -> int:
        machine = self._machine
        value = machine.read_mmio(spa, size)
        self._fingerprint.mmio(machine.clock.now, machine.current, spa, size, False, value)
        return value

    def write_mmio(self, spa: int, size: int, value: int) -> None:
        machine = self._machine
        machine.write_mmio(spa, size, value)
        self._fingerprint.mmio(machine.clock.now, machine.current, spa, size, True, value)


def registers_digest(cpus: Sequence[Processor]) -> str:
    """Of what software could read of every processor's registers, and of where it is."""
    whole = hashlib.sha256()
    for cpu in cpus:
        context, s = LiveContext(cpu), cpu.state
        values: list[int | None] = [context.read(name) for name in _REGISTERS]
        for number in range(_SEGMENTS):
            values += s.selector(number), s.base(number), s.limit(number), s.attrib(number)
        values += [*cpu.dr, s.xcr0, s.gif, s.shadow, cpu.halted, cpu.wait_for_sipi]
        values += [cpu.msrs.read(number, cpu) for number, msr in sorted(cpu.msrs.table.items()) if "r" in msr.access]
        values.append(cpu.guest.vmcb if cpu.guest is not None else None)
        whole.update(json.dumps(values).encode())
    return whole.hexdigest()[:DIGITS]


def memory_digest(ram: Ram) -> str:
    """Of all memory that is not zero."""
    whole = hashlib.blake2b(digest_size=DIGITS // 2)
    for first, end in ram.ranges:
        for low, high in ram.data(first, end):
            pages = np.frombuffer(ram.view[low:high], np.uint64).reshape(-1, PAGE // 8)
            used = pages.any(axis=1)
            for index in np.flatnonzero(used).tolist():
                whole.update(pack("<Q", low + index * PAGE))
                whole.update(pages[index].data)
    return whole.hexdigest()
