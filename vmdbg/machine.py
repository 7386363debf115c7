"""The machine: CPUs, memory and devices put together, and the clock that drives them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Container
from dataclasses import dataclass, field, replace
from enum import IntEnum, auto
from functools import partial
from typing import TextIO

from introspect.registers import EFER
from introspect.rules import SVM_FEATURES
from vmdbg.boot.image import BootImage
from vmdbg.boot.images import BootOptions, Module, Source, load, read
from vmdbg.boot.memory_map import EBDA
from vmdbg.boot.state import GENERAL_REGISTERS, Mode
from vmdbg.cpu import smm
from vmdbg.cpu.core import Notice
from vmdbg.cpu.processor import Outcome, Processor
from vmdbg.cpu.reset import power_on
from vmdbg.engine import layout
from vmdbg.engine.engine import Engine
from vmdbg.engine.layout import PHYSICAL_BITS
from vmdbg.engine.physical import APIC_PAGE
from vmdbg.engine.state import CS, DS, ES, FS, GDTR, GS, IDTR, LDTR, SS, TR
from vmdbg.fingerprint import Fingerprint, FingerprintOptions
from vmdbg.history import History
from vmdbg.identity import Identity, given
from vmdbg.iommu.config import IommuConfig
from vmdbg.late_launch import LateLaunch
from vmdbg.platform.apicbus import ApicBus
from vmdbg.platform.bus import Bus
from vmdbg.platform.chipset import Chipset
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.cpuid import DEFAULT_FEATURES, CpuidConfig
from vmdbg.platform.debugexit import DebugExit, PowerManagement
from vmdbg.platform.fwcfg import FwCfg, FwCfgContents
from vmdbg.platform.lapic import Lapic
from vmdbg.platform.msrs import SMBASE_RESET, VM_CR, VM_CR_DIS_A20M, MsrFile
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.platform.pit import Pit
from vmdbg.platform.rtc import Rtc
from vmdbg.platform.serial import FileSerial, NullSerial, Serial
from vmdbg.platform.system_ports import KeyboardController, PortA, PortB, SmiPort
from vmdbg.platform.uart import Uart
from vmdbg.svm import world
from vmdbg.svm.avic import Avic
from vmdbg.svm.held import Tables
from vmdbg.svm.images import DEFAULT_TRIPS
from vmdbg.svm.ring import DEFAULT_EXITS
from vmdbg.svm.switch import Switcher, on_exit
from vmdbg.svm.tlb import Tlb
from vmdbg.svm.vmcbcache import VmcbCache

QUANTUM = 200_000
"""Ticks that a CPU runs before the next one's turn."""
READ_TICKS = TICKS_PER_SECOND // 1_000_000
"""Guest time that a read of device memory takes besides the instruction: a microsecond, as on PCI.  Software polls so; what
it writes is on its way while it goes on."""
RESET_TICKS = TICKS_PER_SECOND // 1000
"""Guest time that a reset takes, so that a machine that only resets comes to its limits, too."""
SLICE = 4_000_000
"""Ticks that `run` executes at most before it looks for outside input."""

LOOK = 1 << 23
"""Ticks between two looks at which guests are still there: a grid of guest time, so that every run finds the same."""

LIMIT_REACHED = 124
"""Exit status of a run that did not come to its own end."""

BDA = 0x400
"""The BIOS data area: a few of its words are asked for by boot code that runs without firmware calls."""
_BDA = struct.pack("<H12xHHxH", 0x3F8, EBDA >> 4, 0, EBDA >> 10)
"""COM1's port, the EBDA's segment, no equipment, KiB of base memory (IBM PC/AT technical reference)."""

_SMM_HANDLER = b"\x0f\xaa"
"""RSM: firmware that knows no SMI."""

_ENCODING = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
assert set(_ENCODING) == set(GENERAL_REGISTERS)

NOT_EMULATED = frozenset((
    "AVX", "AVX2", "F16C", "FMA", "RDRAND", "RDSEED", "SHA", "CLWB", "UMIP", "RDPID", "INVPCID",
    "PCID",
))  # fmt: skip
"""CPUID features that the engine lacks or whose host-dependent results would leak in."""
XSAVE = frozenset(("XSAVE", "XSAVEOPT", "XGETBV1"))
"""Those that stand or fall with XSAVE."""


@dataclass(frozen=True)
class Config:
    """What a machine is made of."""

    memory: int = 512 << 20
    cpus: int = 1
    command_line: str = ""
    modules: tuple[Module, ...] = ()
    flat_address: int | None = None
    mode: Mode | None = None
    serial: Serial = field(default_factory=NullSerial)
    python_runtime: bool = False
    native_switch: bool = True
    """Common world switches are made in C, where the runtime is native."""
    vmcb_cache: bool = False
    """VMRUN takes clean bits at their word: a forgotten one is found."""
    strict_tlb: bool = False
    """Translations are kept until they must be forgotten: a forgotten flush is found."""
    stop_on: frozenset[Notice] = frozenset()
    """What `run` stops for (PAUSED, with `history.stopped_for`)."""
    physical_bits: int = PHYSICAL_BITS
    """MAXPHYADDR: 36 to what the engine can."""
    exit_ring: int = DEFAULT_EXITS
    """#VMEXITs that are remembered of each guest.  With 0, guests of guests cannot be told apart."""
    vmcb_images: int = DEFAULT_TRIPS
    """VMRUNs of each guest, with their #VMEXITs, of which the VMCB is kept."""
    trace: TextIO | None = None
    max_time: int | None = None
    """The machine ends at this tick, with LIMIT_REACHED."""
    devices: tuple[DeviceSpec, ...] = ()
    """On PCI, besides the host bridge."""
    dev: str = ""
    """A device exclusion vector: "coherent", or "strict", which keeps what it has read of bitmaps until it is told to forget."""
    tpm: bool = False
    """A TPM 2.0."""
    tpm_seed: int = 0
    """Of its random numbers."""
    hpet: bool = False
    iommu: IommuConfig | None = None
    fingerprint: FingerprintOptions | None = None
    """A hash of all that is executed and happens, for `Machine.fingerprint`."""
    reboot: bool = False
    """A reset or a triple fault starts the machine over; else it ends the run."""


class Event(IntEnum):
    """Why `Machine.run` returned."""

    SLICE = auto()
    """Nothing special: the slice is over."""
    EXIT = auto()
    """The machine has ended, with `exit_status`."""
    BREAKPOINT = auto()
    WATCHED = auto()
    IDLE = auto()
    """Every CPU waits for something that only the outside can bring."""
    PAUSED = auto()
    """Somebody asked the running CPU to pause (`Processor.pause`), or the watched one got its turn."""
    INTERRUPTED = auto()
    """`Machine.step` took an interrupt instead of executing an instruction."""


_EVENTS = {
    Outcome.BREAKPOINT: Event.BREAKPOINT, Outcome.WATCHED: Event.WATCHED, Outcome.PAUSED: Event.PAUSED,
    Outcome.INTERRUPTED: Event.INTERRUPTED,
}  # fmt: skip


def _root(cpu: Processor) -> int:
    """Of the table that a CPU runs on, or is about to; also where switches in C have led it since Python looked."""
    switched = cpu.switcher is not None and cpu.switcher.has_switched()
    return cpu.state.q[layout.NESTED_CR3 >> 3] if switched else cpu.npt.root


class Machine:
    """An AMD64 machine with an image loaded, ready to run."""

    def __init__(self, image: Source, config: Config | None = None) -> None:
        self.config = config = config or Config()
        self.files = [read(image), *(read(module.source) for module in config.modules)]
        """The image and its modules, as they were when they were read."""
        self.image = self._load()
        self.clock = Clock()
        self.fingerprint = Fingerprint(config.fingerprint) if config.fingerprint is not None else None
        sums = self.fingerprint.sums if self.fingerprint is not None else None
        self.engine = Engine(
            config.memory, self.clock, python=config.python_runtime, physical_bits=config.physical_bits, sums=sums
        )
        self.ram = self.engine.ram
        self.bus = Bus()
        self.engine.devices = self
        self.engine.physical.pinned = lambda: {_root(cpu) for cpu in self.cpus}
        self.history = History(config.exit_ring, config.vmcb_images)
        self.history.trace = config.trace
        self.history.stop_on = config.stop_on
        self.exit_status: int | None = None
        self.ended = ""
        """In words, why the machine ended."""
        self._last_instruction: int | None = None
        """At which `run` stops, as the engine counts them."""
        self._reset_requested = False
        self._next_look = LOOK
        self._a20 = [True, True]
        self._devices()
        self.current = 0
        if config.vmcb_cache:
            for cpu in self.cpus:
                cpu.vmcb_cache = VmcbCache()
        if config.strict_tlb:
            tables = Tables(self.engine.physical)
            for cpu in self.cpus:
                cpu.use_tlb(Tlb(cpu, tables))
        if config.native_switch and not (config.vmcb_cache or config.strict_tlb):
            self._switch_in_c()
        self._quantum = QUANTUM if config.cpus > 1 else 1 << 62
        """A CPU on its own keeps its turn: each end of one costs as much as a thousand instructions."""
        self._quantum_end = self._quantum
        self._start()
        self.identity = Identity(partial(given, self))
        if self.fingerprint is not None:
            self.fingerprint.attach(self)

    def is_like(self, other: Machine) -> bool:
        """Whether both are made of the same: what is kept of one fits the other."""
        mine, its = (replace(one.config, serial=NullSerial(), trace=None, modules=()) for one in (self, other))
        return replace(mine, serial=its.serial) == its and self.files == other.files

    def _load(self) -> BootImage:
        config = self.config
        image, *modules = self.files
        options = BootOptions(
            ram_size=config.memory, command_line=config.command_line,
            modules=tuple(replace(module, source=file) for module, file in zip(config.modules, modules, strict=True)),
            flat_address=config.flat_address, mode=config.mode,
        )  # fmt: skip
        return load(image, options)

    def _devices(self) -> None:
        config, clock, bus = self.config, self.clock, self.bus
        features = world.FEATURES if self.engine.has_gmet else world.FEATURES & ~SVM_FEATURES.GMET
        self.cpuid = CpuidConfig(
            cpus=config.cpus, physical_bits=config.physical_bits, svm_features=features, asids=world.ASIDS,
            features=DEFAULT_FEATURES - NOT_EMULATED - (frozenset() if self.engine.has_xsave else XSAVE),
        )  # fmt: skip
        self.apic_bus = ApicBus()
        self.apic_bus.doorbell_listeners.append(self._ring)
        self.chipset = chipset = Chipset(
            clock, bus, self.apic_bus, self.ram, config.devices, config.physical_bits, self._intr, self.request_reset,
            config.iommu, hpet=config.hpet,
        )  # fmt: skip
        self.pic, irq = chipset.pic, chipset.irq
        for unit in chipset.iommus.units if chipset.iommus is not None else ():
            unit.stale_listeners.append(lambda text: self.history.notice(self.cpu, Notice.STALE, None, text))
        for function in chipset.root.functions:
            function.on_input = self.outside
        self.late_launch = LateLaunch(
            clock, bus, chipset, self.ram, dev=config.dev, tpm=config.tpm, seed=config.tpm_seed
        )
        self.cpus = [Processor(n, self.engine, bus, self.cpuid, self.pic, self.history) for n in range(config.cpus)]
        for cpu in self.cpus:
            cpu.lapic = Lapic(cpu.index, cpu.index == 0, clock, self.apic_bus, cpu)
            cpu.msrs = MsrFile(self.cpuid, cpu.lapic)
            cpu.platform = self.late_launch
            cpu.on_vm_cr = self._mask_a20
        self.late_launch.cpus = self.cpus
        pit = Pit(clock, irq(0))
        self.uart = Uart(clock, irq(4), config.serial)
        self.rtc = Rtc(clock, irq(8), config.memory)
        power = PowerManagement(clock, self.exit)
        port_a, port_b = PortA(self.request_reset, partial(self._set_a20, 0)), PortB(clock, pit)
        keyboard = KeyboardController(self.request_reset, irq(1), irq(12), partial(self._set_a20, 1))
        fw_cfg = FwCfg(FwCfgContents(config.memory, config.cpus, config.command_line))
        self._reset_line = chipset, pit, self.uart, self.rtc, power, port_a, port_b, keyboard, fw_cfg, self.late_launch
        bus.add_ports(0x40, 0x43, pit)
        bus.add_ports(0x61, 0x61, port_b)
        bus.add_ports(0x70, 0x71, self.rtc)
        bus.add_ports(0x92, 0x92, port_a)
        bus.add_ports(0x60, 0x60, keyboard)
        bus.add_ports(0x64, 0x64, keyboard)
        bus.add_ports(0xB2, 0xB3, SmiPort(self._smi))
        bus.add_ports(0x3F8, 0x3FF, self.uart)
        bus.add_ports(0xF4, 0xF7, DebugExit(self.exit), width=4)
        bus.add_ports(0x600, 0x60B, power, width=4)
        bus.add_ports(0x510, 0x511, fw_cfg, width=2)

    def _switch_in_c(self) -> None:
        """Give each CPU the native world switch, where there is one."""
        self.engine.on_exit = on_exit()
        if self.engine.binding.name != "native" or not self.engine.on_exit:
            return
        sums = self.fingerprint.sums if self.fingerprint is not None else None
        switchers = [Switcher(cpu, world.NO_GUEST, ctypes.addressof(self.history.total), sums) for cpu in self.cpus]
        for cpu, own in zip(self.cpus, switchers, strict=True):
            cpu.use_switcher(own)

        def forget(vmcb: int | None = None, root: int | None = None) -> None:
            for switcher in switchers:
                switcher.forget(vmcb, root)

        self.history.unused = forget
        self.engine.physical.on_unfit = lambda root: forget(root=root)

    def _set_a20(self, source: int, on: bool) -> None:
        """One of the two sources of A20, port 0x92 and the keyboard controller: they are ORed."""
        self._a20[source] = on
        self._mask_a20()

    def _mask_a20(self) -> None:
        """A processor with VM_CR.DIS_A20M does not look at the line (APM2 15.30.1); memory is one for all, so none does then."""
        ignored = any(cpu.msrs.values[VM_CR] & VM_CR_DIS_A20M for cpu in self.cpus)
        self.engine.physical.set_a20(any(self._a20) or ignored)

    def _ring(self, apic_id: int) -> None:
        for cpu in self.cpus:
            if cpu.lapic.apic_id == apic_id:
                cpu.doorbell()

    def _intr(self, level: bool) -> None:
        self.cpus[0].lapic.set_lint(0, level)

    def _smi(self) -> None:
        for cpu in self.cpus:
            cpu.smi()

    def _start(self) -> None:
        """Every CPU from power-on, the first one at the image."""
        for cpu in self.cpus:
            power_on(cpu)
            cpu.wait_for_sipi = cpu.index != 0
        self._mask_a20()
        self.cpus[0].lapic.virtual_wire()
        self.ram.write(BDA, _BDA)
        self.ram.write(SMBASE_RESET + smm.ENTRY, _SMM_HANDLER)
        self.late_launch.firmware()
        self.chipset.leave_tables([cpu.lapic.apic_id for cpu in self.cpus], tpm=self.config.tpm)
        self.image.place(self.ram)
        boot, cpu = self.image.state, self.cpus[0]
        s = cpu.state
        for number, name in enumerate(_ENCODING):
            s.set_reg(number, getattr(boot, name))
        s.rip, s.rflags, s.efer = boot.rip, boot.rflags, boot.efer
        s.set_cr(0, boot.cr0)
        s.set_cr(3, boot.cr3)
        s.set_cr(4, boot.cr4)
        for register, segment in (
            (CS, boot.cs), (DS, boot.ds), (ES, boot.es), (SS, boot.ss), (FS, boot.fs), (GS, boot.gs), (LDTR, boot.ldtr),
            (TR, boot.tr),
        ):  # fmt: skip
            s.set_segment(register, segment.selector, segment.base, segment.limit, segment.attrib)
        s.set_table(GDTR, boot.gdtr.base, boot.gdtr.limit)
        s.set_table(IDTR, boot.idtr.base, boot.idtr.limit)
        s.refresh(0)

    # Devices of the engine: the APICs of the CPU that runs come before the bus.

    def read_mmio(self, spa: int, size: int) -> int:
        if spa >= APIC_PAGE:
            return self._avic.read(spa - APIC_PAGE, size)
        lapic = self.cpus[self.current].lapic
        base = lapic.mmio_base
        if base is not None and base <= spa < base + 0x1000:
            return lapic.read_mmio(spa - base, size)
        if self.bus.claims_mmio(spa):
            self.clock.now += READ_TICKS
        return self.bus.read_mmio(spa, size)

    def write_mmio(self, spa: int, size: int, value: int) -> None:
        if spa >= APIC_PAGE:
            self._avic.write(spa - APIC_PAGE, size, value)
            return
        lapic = self.cpus[self.current].lapic
        base = lapic.mmio_base
        if base is not None and base <= spa < base + 0x1000:
            lapic.write_mmio(spa - base, size, value)
        else:
            self.bus.write_mmio(spa, size, value)

    @property
    def _avic(self) -> Avic:
        guest = self.cpu.guest
        assert guest is not None
        assert guest.avic is not None
        return guest.avic

    def exit(self, status: int) -> None:
        """A device ends the run."""
        self.clock.changes += 1
        if self.exit_status is None:
            self.exit_status = status
            self.ended = f"the guest ended the run with status {status}"

    def give_up(self, why: str) -> None:
        """End a run that did not come to its own end."""
        if self.exit_status is None:
            self.exit_status = LIMIT_REACHED
            self.ended = f"{why} at {self.cpu.where}"

    def request_reset(self) -> None:
        self.clock.changes += 1
        self._reset_requested = True

    def _reset(self) -> None:
        """Start over: processors and devices from power-on, the image placed anew; other memory stays as it is."""
        self._reset_requested = False
        if self.fingerprint is not None:
            self.fingerprint.reset(self.clock.now)
        for device in self._reset_line:
            device.reset()
        for vmcb in list(self.history.by_vmcb):
            self.history.forget(vmcb)
        self.clock.now += RESET_TICKS
        self.current, self._quantum_end = 0, self.clock.now + self._quantum
        self._start()

    @property
    def cpu(self) -> Processor:
        """The CPU whose turn it is."""
        return self.cpus[self.current]

    def _next_cpu(self) -> bool:
        """Give the turn to the next CPU that has something to do; False if none has."""
        count = len(self.cpus)
        for step in range(1, count + 1):
            candidate = (self.current + step) % count
            if self.cpus[candidate].runnable:
                self.current = candidate
                self._quantum_end = self.clock.now + self._quantum
                return True
        return False

    def turn(self, end: int) -> Processor | Event:
        """Settle what is due now, and whose turn it is: the CPU that executes next, or why none does.

        CPUs take turns of `QUANTUM` ticks; the order depends on guest time alone.  No turn goes beyond tick `end`.
        """
        clock = self.clock
        limit = self.config.max_time
        if limit is not None:
            end = min(end, limit)
        if self.cpu.postponed is not None and not self.cpu.hold and self.exit_status is None:
            return self.cpu  # amid an instruction or event: nothing comes between
        while True:
            if self._reset_requested and self.config.reboot:
                self._reset()
            if self._reset_requested and self.exit_status is None:
                self.exit(0)
                self.ended = "the guest reset the machine"
            if limit is not None and clock.now >= limit:
                self.give_up(f"--max-time {limit} reached")
            if self.exit_status is not None:
                return Event.EXIT
            if clock.now >= self._next_look:
                self._look()
            if self.fingerprint is not None and clock.now >= self.fingerprint.next:
                self.fingerprint.checkpoint(clock.now)
            clock.fire()
            cpu = self.cpus[self.current]
            if cpu.pause or (cpu.runnable and clock.now < self._quantum_end):
                return cpu
            if self._next_cpu():
                return self.cpus[self.current]
            stopped = self._idle(end)
            if stopped is not None:
                return stopped

    def run(
        self, ticks: int = SLICE, *, breakpoints: bool = False, watch: Container[Processor] = (), step: bool = False
    ) -> Event:
        """Run for up to `ticks`; with `step`, one instruction.  Pause when a CPU of `watch` gets its turn."""
        self.engine.tidy()
        clock = self.clock
        end = clock.now + ticks
        limit = self.config.max_time
        if limit is not None and clock.now < limit:
            end = min(end, limit)
        while clock.now < end:
            cpu = self.turn(end)
            if isinstance(cpu, Event):
                return cpu
            if step:
                return self.step(cpu)
            if cpu in watch:
                return Event.PAUSED
            deadline = min(end, self._quantum_end, self._next_look)
            if self.fingerprint is not None:
                deadline = min(deadline, self.fingerprint.next)
            left = self.instructions_left
            if left is not None:  # no instruction is shorter than a tick
                deadline = min(deadline, clock.now + left)
            if left == 0:
                return Event.SLICE
            timer = clock.next_deadline()
            if timer is not None:
                deadline = min(deadline, timer)
            event = self._outcome(cpu, cpu.run(deadline, breakpoints=breakpoints))
            if event is not None:
                return event
        return Event.SLICE

    def limit_instructions(self, count: int | None) -> None:
        """Let `run` go no further than so many instructions from here, of all CPUs together; None: as far as it likes."""
        self.engine.count(count is not None)
        self._last_instruction = None if count is None else self.engine.instructions + count

    @property
    def instructions_left(self) -> int | None:
        """Of `limit_instructions`; None without a limit."""
        return None if self._last_instruction is None else max(self._last_instruction - self.engine.instructions, 0)

    def step(self, cpu: Processor) -> Event:
        """Execute one instruction, or take one event, on the CPU that `turn` gave."""
        return self._outcome(cpu, cpu.run(0, step=True)) or Event.SLICE

    def _outcome(self, cpu: Processor, outcome: Outcome) -> Event | None:
        if outcome == Outcome.SHUTDOWN and self.config.reboot:
            self._reset_requested = True
            return None
        if outcome == Outcome.SHUTDOWN:
            self.give_up("a triple fault: shutdown")
            return Event.EXIT
        return _EVENTS.get(outcome)

    @property
    def waits_forever(self) -> bool:
        """With no timer running either, only input could bring an end to the waiting: and there is none."""
        return isinstance(self.config.serial, NullSerial | FileSerial) and not self.chipset.hears

    def outside(self, what: str, data: bytes) -> None:
        """Something has come in from outside, now: `what` says from where.  A run with it is another run than one without."""
        self.identity.inputs.add(self.clock.now, what, data)
        if self.fingerprint is not None:
            self.fingerprint.input(self.clock.now, what, data)

    def poll_input(self) -> bool:
        """Take what came in on the serial port since the last time; the only way outside input enters."""
        data = self.config.serial.receive()
        if data:
            self.outside("serial", data)
            self.uart.receive(data)
        return self.chipset.poll_input() or bool(data)

    def close(self) -> None:
        """Free the engine and close the serial port."""
        self.config.serial.close()
        self.chipset.close()
        self.engine.close()

    def _look(self) -> None:
        """See which guests are still there, once for each point of the grid: no CPU has executed between them."""
        points = (self.clock.now - self._next_look) // LOOK + 1
        self._next_look += points * LOOK
        self._look_for_guests(points)

    def _look_for_guests(self, times: int) -> None:
        # In SMM EFER is clear, and what it interrupted, a guest perhaps, comes back.
        svm = any(cpu.guest is not None or cpu.smm is not None or cpu.state.efer & EFER.SVME for cpu in self.cpus)
        for _ in range(min(times, 2)):
            self.history.look(self.ram, svm)

    def _idle(self, end: int) -> Event | None:
        """All CPUs wait: time passes at once to the next timer, or to the end of the slice."""
        timer = self.clock.next_deadline()
        if timer is None:
            self._look_for_guests(2)  # nothing will change until something comes from outside
            return Event.IDLE
        if timer > end:
            self.clock.now = max(self.clock.now, end)
            return Event.SLICE
        self.clock.now = max(self.clock.now, timer)
        return None
