"""The local APIC (APM2 chapter 16): one register model behind xAPIC MMIO and x2APIC MSRs."""

from dataclasses import dataclass
from enum import IntEnum

from vmdbg.platform.apicbus import ApicBus, CpuSignals, DeliveryMode
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock, Timer
from vmdbg.platform.faults import MsrFault

MSR_FIRST, MSR_LAST = 0x800, 0x8FF
MSR_APIC_BASE, MSR_TSC_DEADLINE = 0x1B, 0x6E0
DEFAULT_BASE = 0xFEE00000
BASE_BSC, BASE_EXTD, BASE_ENABLE = 1 << 8, 1 << 10, 1 << 11

TIMER_HZ = 1_000_000_000
"""Rate of the timer before its divider, that of QEMU's local APIC: software that assumes it rather than measuring works."""
TICKS_PER_COUNT = TICKS_PER_SECOND // TIMER_HZ

ID, VERSION, TPR, APR, PPR, EOI, RRR, LDR, DFR, SPIV = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICRL, ICRH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
INITIAL_COUNT, CURRENT_COUNT, DIVIDE, SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0

SPIV_ASE = 1 << 8
ESR_SAE, ESR_SIV, ESR_RIV, ESR_IRA = 1 << 2, 1 << 5, 1 << 6, 1 << 7
LVT_RIR, LVT_TGM, LVT_MASK = 1 << 14, 1 << 15, 1 << 16
ICR_LOGICAL, ICR_ASSERT, ICR_LEVEL = 1 << 11, 1 << 14, 1 << 15
ICR_RRS_VALID = 2 << 16
ICR_BITS = 0xCCFFF
ICR_RESERVED = 0xFFF00000 | 3 << 16 | 1 << 13
"""x2APIC: #GP if set.  Bit 12, delivery status, is ignored instead: software writes back what it read."""


class Lvt(IntEnum):
    """Local vector table entries by register offset."""

    TIMER = 0x320
    THERMAL = 0x330
    PERFORMANCE = 0x340
    LINT0 = 0x350
    LINT1 = 0x360
    ERROR = 0x370


LINTS = (Lvt.LINT0, Lvt.LINT1)
LOCAL_MODES = (DeliveryMode.FIXED, DeliveryMode.SMI, DeliveryMode.NMI, DeliveryMode.INIT)
"""What an LVT entry may ask for, besides ExtINT of LINT0, which follows the pin and not an edge."""


class TimerMode(IntEnum):
    """Bits 18:17 of the timer's LVT entry; 3 is reserved and stops the timer."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


@dataclass(frozen=True, slots=True)
class Register:
    """Access ("r", "w", "rw", "" for none) in each mode.

    `bits` can be written: other bits are ignored in xAPIC mode, and raise #GP in x2APIC mode if set.
    """

    name: str
    xapic: str
    x2apic: str
    bits: int = 0
    reset: int = 0


def _bank(name: str, offset: int) -> dict[int, Register]:
    return {offset + 0x10 * n: Register(f"{name}{n}", "r", "r") for n in range(8)}


REGISTERS: dict[int, Register] = {
    ID: Register("ID", "rw", "r", 0xFF000000),
    VERSION: Register("VERSION", "r", "r", reset=0x00050010),
    TPR: Register("TPR", "rw", "rw", 0xFF),
    APR: Register("APR", "r", ""),
    PPR: Register("PPR", "r", "r"),
    EOI: Register("EOI", "rw", "w"),
    RRR: Register("RRR", "r", ""),
    LDR: Register("LDR", "rw", "r", 0xFF000000),
    DFR: Register("DFR", "rw", "", 0xF0000000, 0xFFFFFFFF),
    SPIV: Register("SPIV", "rw", "rw", 0x3FF, 0xFF),
    **_bank("ISR", ISR),
    **_bank("TMR", TMR),
    **_bank("IRR", IRR),
    ESR: Register("ESR", "rw", "rw"),
    ICRL: Register("ICRL", "rw", "rw", ICR_BITS),
    ICRH: Register("ICRH", "rw", "", 0xFF000000),
    Lvt.TIMER: Register("LVT_TIMER", "rw", "rw", 0x700FF, LVT_MASK),
    Lvt.THERMAL: Register("LVT_THERMAL", "rw", "rw", 0x107FF, LVT_MASK),
    Lvt.PERFORMANCE: Register("LVT_PERFORMANCE", "rw", "rw", 0x107FF, LVT_MASK),
    Lvt.LINT0: Register("LVT_LINT0", "rw", "rw", 0x187FF, LVT_MASK),
    Lvt.LINT1: Register("LVT_LINT1", "rw", "rw", 0x187FF, LVT_MASK),
    Lvt.ERROR: Register("LVT_ERROR", "rw", "rw", 0x107FF, LVT_MASK),
    INITIAL_COUNT: Register("INITIAL_COUNT", "rw", "rw", 0xFFFFFFFF),
    CURRENT_COUNT: Register("CURRENT_COUNT", "r", "r"),
    DIVIDE: Register("DIVIDE", "rw", "rw", 0xB),
    SELF_IPI: Register("SELF_IPI", "", "w", 0xFF),
}


class Lapic:
    """The local APIC of one CPU.

    MMIO: `mmio_base` is the page it answers at for its own CPU, None if it does not; offsets count from there.
    INIT: the APIC only signals it; who takes the INIT calls `init()`.
    """

    def __init__(self, apic_id: int, bsp: bool, clock: Clock, bus: ApicBus, signals: CpuSignals) -> None:
        self.initial_id = apic_id
        self.bsp = bsp
        self.clock = clock
        self.bus = bus
        self.signals = signals
        self._lint = dict.fromkeys(LINTS, False)
        self._extint = self._extint_message = False
        self._timer: Timer | None = None
        self._set_base_and_id()
        self._clear()  # without signals: the CPU may still be under construction
        bus.receivers.append(self)

    def reset(self) -> None:
        """Power-on: INIT, and the APIC base and ID as well."""
        self._set_base_and_id()
        self.init()

    def init(self) -> None:
        """INIT: all registers but the ID and the APIC base."""
        self._clear()
        self._update_extint()
        self.signals.changed()

    def _set_base_and_id(self) -> None:
        self.base = DEFAULT_BASE | BASE_ENABLE | (BASE_BSC if self.bsp else 0)
        self._id = self.initial_id

    def _clear(self) -> None:
        self._values = {offset: register.reset for offset, register in REGISTERS.items()}
        self._irr = self._isr = self._tmr = 0
        self._errors = 0
        self._extint_message = False
        self._disarm()

    def virtual_wire(self) -> None:
        """What firmware leaves on the boot CPU: enabled, LINT0 ExtINT, LINT1 NMI."""
        self._values[SPIV] = SPIV_ASE | 0xFF
        self._write(Lvt.LINT0, DeliveryMode.EXTINT << 8)
        self._write(Lvt.LINT1, DeliveryMode.NMI << 8)

    def peek(self, offset: int) -> int:
        """A register's value, whatever may read it, without side effects."""
        return self._read(offset)

    @property
    def enabled(self) -> bool:
        """APIC_BASE.AE; also what CPUID Fn0000_0001_EDX[APIC] shows."""
        return bool(self.base & BASE_ENABLE)

    @property
    def x2apic(self) -> bool:
        return bool(self.base & BASE_EXTD)

    @property
    def mmio_base(self) -> int | None:
        return self.base & ~0xFFF if self.enabled and not self.x2apic else None

    @property
    def apic_id(self) -> int:
        return self.initial_id if self.x2apic else self._id & 0xFF

    # The CPU's side

    def pending(self) -> int | None:
        """The highest requested vector that TPR and the interrupts in service let through; nothing is acknowledged."""
        if not self._irr or not self.enabled:
            return None
        vector = self._irr.bit_length() - 1
        return vector if vector >> 4 > self.ppr >> 4 else None

    def acknowledge(self) -> int:
        """Take `pending()` into service and return it; the spurious vector if there is none (APM2 16.4.7)."""
        vector = self.pending()
        if vector is None:
            return self._values[SPIV] & 0xFF
        self._irr &= ~(1 << vector)
        self._isr |= 1 << vector
        self.signals.changed()
        return vector

    def extint_taken(self) -> None:
        """The CPU took the ExtINT: a request by message is done, one on LINT0 lasts while the pin is high."""
        self._extint_message = False
        self._update_extint()

    @property
    def tpr(self) -> int:
        return self._values[TPR]

    @tpr.setter
    def tpr(self, value: int) -> None:
        self._values[TPR] = value & 0xFF
        self.signals.changed()

    @property
    def cr8(self) -> int:
        """TPR bits 7:4; writing clears TPR bits 3:0."""
        return self.tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self.tpr = (value & 0xF) << 4

    @property
    def ppr(self) -> int:
        service = max(self._isr.bit_length() - 1, 0)
        return self.tpr if self.tpr >> 4 >= service >> 4 else service & 0xF0

    @property
    def arbitration_priority(self) -> int:
        """APR (APM2 16.6.2)."""
        request, service = max(self._irr.bit_length() - 1, 0) >> 4, max(self._isr.bit_length() - 1, 0) >> 4
        if self.tpr >> 4 >= request and self.tpr >> 4 > service:
            return self.tpr
        return max(self.tpr >> 4 if self.tpr >> 4 > service else service, request) << 4

    # Pins and local sources

    def set_lint(self, pin: int, level: bool) -> None:
        """Drive LINT0 (the 8259's INTR) or LINT1 (NMI)."""
        entry = LINTS[pin]
        rising = level and not self._lint[entry]
        self._lint[entry] = level
        if not self.enabled:
            if entry == Lvt.LINT1 and rising:  # a disabled APIC passes the pins on as INTR and NMI
                self.signals.nmi()
        elif rising or self._values[entry] & LVT_TGM:
            self._lint_request(entry)
        self._update_extint()

    def trigger(self, entry: Lvt) -> None:
        """An event of a local source: performance counter overflow, thermal, error, timer."""
        value = self._values[entry]
        mode = DeliveryMode.FIXED if entry == Lvt.TIMER else DeliveryMode(value >> 8 & 7)
        if self.enabled and not value & LVT_MASK and mode in LOCAL_MODES:
            self.accept(mode, value & 0xFF, False)

    def _lint_request(self, entry: Lvt) -> None:
        value = self._values[entry]
        mode = DeliveryMode(value >> 8 & 7)
        if value & LVT_MASK or not self._lint[entry] or mode not in LOCAL_MODES:
            return
        level = bool(value & LVT_TGM) and mode == DeliveryMode.FIXED
        if not level:
            self.accept(mode, value & 0xFF, False)
        elif not value & LVT_RIR:
            self._values[entry] |= LVT_RIR
            self.accept(mode, value & 0xFF, True)

    def _update_extint(self) -> None:
        entry = self._values[Lvt.LINT0]
        wired = not self.enabled or entry & (LVT_MASK | 7 << 8) == DeliveryMode.EXTINT << 8
        extint = (wired and self._lint[Lvt.LINT0]) or self._extint_message
        if extint != self._extint:
            self._extint = extint
            self.signals.extint(extint)

    # The bus's side

    @property
    def accepts_fixed(self) -> bool:
        return bool(self._values[SPIV] & SPIV_ASE)

    def matches(self, dest: int, logical: bool, wide: bool) -> bool:
        """Whether a message to `dest` is for this APIC (APM2 16.6.1)."""
        if not self.enabled:
            return False
        if dest == (0xFFFFFFFF if wide else 0xFF):
            return True
        if not logical:
            return dest == self.apic_id
        ldr = self._ldr()
        if self.x2apic:
            return dest >> 16 == ldr >> 16 and bool(dest & ldr & 0xFFFF)
        ldr >>= 24
        if dest > 0xFF:
            return False
        if self._values[DFR] >> 28 == 0xF:
            return bool(dest & ldr)
        return dest >> 4 in (ldr >> 4, 0xF) and bool(dest & ldr & 0xF)

    def accept(self, mode: DeliveryMode, vector: int, level: bool) -> None:
        """Receive a message, from the bus or from a local source."""
        if mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST):
            if vector < 16:
                self._error(ESR_RIV)
            elif self.accepts_fixed:
                bit = 1 << vector
                self._irr |= bit
                self._tmr = self._tmr | bit if level else self._tmr & ~bit
                self.signals.changed()
        elif mode == DeliveryMode.SMI:
            self.signals.smi()
        elif mode == DeliveryMode.NMI:
            self.signals.nmi()
        elif mode == DeliveryMode.INIT:
            self.signals.init()
        elif mode == DeliveryMode.SIPI:
            self.signals.sipi(vector)
        elif mode == DeliveryMode.EXTINT:
            self._extint_message = True
            self._update_extint()

    def read_remote(self, offset: int) -> int | None:
        """A register for another APIC's remote read, None if there is no such register."""
        register = REGISTERS.get(offset)
        return self._read(offset) if register and "r" in register.xapic else None

    # APIC base

    def write_base(self, value: int, physical_bits: int) -> None:
        """WRMSR of APIC_BASE.  MsrFault for reserved bits and for transitions that APM2 16.9 forbids."""
        allowed = (1 << physical_bits) - 1 & ~0xFFF | BASE_BSC | BASE_EXTD | BASE_ENABLE
        if value & ~allowed:
            raise MsrFault(MSR_APIC_BASE, value, f"bits {value & ~allowed:#x} are reserved")
        enable, extended = bool(value & BASE_ENABLE), bool(value & BASE_EXTD)
        if extended and not enable:
            raise MsrFault(MSR_APIC_BASE, value, "EXTD without AE is no mode; set both")
        if extended and not self.enabled:
            raise MsrFault(MSR_APIC_BASE, value, "x2APIC mode is entered from xAPIC mode; set AE alone first")
        if enable and not extended and self.x2apic:
            raise MsrFault(MSR_APIC_BASE, value, "x2APIC mode is left by disabling the APIC; clear AE and EXTD first")
        was_enabled, was_extended = self.enabled, self.x2apic
        self.base = value & ~BASE_BSC | self.base & BASE_BSC
        if enable != was_enabled:
            self._id = self.initial_id
            self.init()
        elif extended and not was_extended:
            self._values[ICRH] = 0
        self._update_extint()
        self.signals.changed()

    # Registers through MMIO (xAPIC)

    def read_mmio(self, offset: int, size: int) -> int:
        """Aligned 32-bit reads are defined; bytes and words read their part of the register (APM2 16.3.2)."""
        register = REGISTERS.get(offset & ~0xF)
        if register is None or not register.xapic:
            self._error(ESR_IRA)
            return 0
        value = self._read(offset & ~0xF)
        return value >> 8 * (offset & 0xF) & ((1 << 8 * size) - 1)

    def write_mmio(self, offset: int, size: int, value: int) -> None:
        """Only aligned 32-bit writes are defined (APM2 16.3.2); others do nothing."""
        if offset & 0xF or size < 4:
            return
        register = REGISTERS.get(offset)
        if register is None or not register.xapic:
            self._error(ESR_IRA)
        elif "w" in register.xapic:
            self._write(offset, value & register.bits)

    # Registers through MSRs (x2APIC)

    def read_msr(self, number: int) -> int:
        """RDMSR of 0x800..0x8ff."""
        offset, register = self._msr_register(number, None)
        if "r" not in register.x2apic:
            raise MsrFault(number, None, f"{register.name} is write-only")
        if offset == ICRL:
            return self._values[ICRH] << 32 | self._values[ICRL]
        return self._read(offset)

    def write_msr(self, number: int, value: int) -> None:
        """WRMSR of 0x800..0x8ff."""
        offset, register = self._msr_register(number, value)
        if "w" not in register.x2apic:
            raise MsrFault(number, value, f"{register.name} is read-only")
        reserved = value & (ICR_RESERVED if offset == ICRL else ~register.bits)
        if reserved:
            raise MsrFault(number, value, f"bits {reserved:#x} of {register.name} are reserved")
        if offset == ICRL:
            self._values[ICRH] = value >> 32
            value &= ICR_BITS
        self._write(offset, value)

    def _msr_register(self, number: int, value: int | None) -> tuple[int, Register]:
        offset = number - MSR_FIRST << 4
        register = REGISTERS.get(offset)
        if not self.x2apic:
            raise MsrFault(number, value, "the APIC is not in x2APIC mode")
        if register is None or not register.x2apic:
            raise MsrFault(number, value, "there is no such x2APIC register")
        return offset, register

    # The registers themselves

    def _ldr(self) -> int:
        if self.x2apic:  # derived from the ID
            return self.initial_id >> 4 << 16 | 1 << (self.initial_id & 0xF)
        return self._values[LDR]

    def _read(self, offset: int) -> int:
        if ISR <= offset < ESR:
            bits = self._isr if offset < TMR else self._tmr if offset < IRR else self._irr
            return bits >> 2 * (offset & 0x70) & 0xFFFFFFFF
        if offset == ID:
            return self.initial_id if self.x2apic else (self._id & 0xFF) << 24
        if offset == PPR:
            return self.ppr
        if offset == APR:
            return self.arbitration_priority
        if offset == LDR:
            return self._ldr()
        if offset == CURRENT_COUNT:
            return self._remaining()
        return self._values[offset]

    def _write(self, offset: int, value: int) -> None:
        """Write bits that passed the access rules."""
        if offset == ID:
            self._id = value >> 24
        elif offset == TPR:
            self.tpr = value
        elif offset == EOI:
            self._end_of_interrupt()
        elif offset == DFR:
            self._values[DFR] = value | 0x0FFFFFFF
        elif offset == SPIV:
            self._values[SPIV] = value
            if not value & SPIV_ASE:  # software disable masks every local source (APM2 16.4.7)
                for entry in Lvt:
                    self._values[entry] |= LVT_MASK
            self._update_extint()
        elif offset == ESR:
            self._values[ESR], self._errors = self._errors, 0
        elif offset == ICRL:
            self._values[ICRL] = value
            self._send(value, self._values[ICRH])
        elif offset == SELF_IPI:
            self._send_to_self(value)
        elif offset == INITIAL_COUNT:
            self._values[offset] = value
            if self._timer_mode != TimerMode.TSC_DEADLINE:
                self._start(value)
        elif offset == DIVIDE:
            remaining = self._remaining()
            self._values[offset] = value
            if remaining:
                self._start(remaining)
        elif offset in self._lvt_offsets:
            self._write_lvt(Lvt(offset), value)
        else:
            self._values[offset] = value

    _lvt_offsets = frozenset(Lvt)

    def _write_lvt(self, entry: Lvt, value: int) -> None:
        old = self._values[entry]
        if not self._values[SPIV] & SPIV_ASE:
            value |= LVT_MASK
        if entry in LINTS and value & LVT_TGM:
            value |= old & LVT_RIR
        self._values[entry] = value
        if entry == Lvt.TIMER and (old ^ value) >> 17 & 3:
            modes = {TimerMode(old >> 17 & 3), TimerMode(value >> 17 & 3)}
            if modes != {TimerMode.ONE_SHOT, TimerMode.PERIODIC}:
                self._disarm()
        if entry in LINTS:
            if value & LVT_TGM:
                self._lint_request(entry)
            self._update_extint()

    def _end_of_interrupt(self) -> None:
        if not self._isr:
            return
        vector = self._isr.bit_length() - 1
        self._isr &= ~(1 << vector)
        if self._tmr >> vector & 1:
            self.bus.end_of_interrupt(vector)
            for entry in LINTS:
                if self._values[entry] & LVT_RIR and self._values[entry] & 0xFF == vector:
                    self._values[entry] &= ~LVT_RIR
                    self._lint_request(entry)
        self.signals.changed()

    def _error(self, bit: int) -> None:
        """Note an error for the next ESR write, and raise the error interrupt when it is new (APM2 16.4.6)."""
        new = bit & ~self._errors
        self._errors |= bit
        if new:
            self.trigger(Lvt.ERROR)

    # Interprocessor interrupts

    def _send_to_self(self, vector: int) -> None:
        if vector < 16:
            self._error(ESR_SIV)
        else:
            self.accept(DeliveryMode.FIXED, vector, False)

    def _send(self, command: int, high: int) -> None:
        vector, mode, shorthand = command & 0xFF, DeliveryMode(command >> 8 & 7), command >> 18 & 3
        level = bool(command & ICR_LEVEL)
        dest = high if self.x2apic else high >> 24
        logical = bool(command & ICR_LOGICAL)
        if mode == DeliveryMode.REMOTE_READ:
            self._read_from(dest, logical, vector << 4)
            return
        if mode == DeliveryMode.INIT and level and not command & ICR_ASSERT:
            return  # INIT level de-assert only set arbitration IDs, on buses that had them
        fixed = mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST)
        if fixed and vector < 16:
            self._error(ESR_SIV)
            return
        if shorthand == 0:
            taken = self.bus.deliver(vector, mode, dest, logical, wide=self.x2apic)
        elif shorthand == 1:
            taken = self.bus.deliver_to([self], vector, mode, False)
        else:
            targets = [r for r in self.bus.receivers if r.enabled and (r is not self or shorthand == 2)]
            taken = self.bus.deliver_to(targets, vector, mode, False)
        if fixed and not taken:
            self._error(ESR_SAE)

    def _read_from(self, dest: int, logical: bool, offset: int) -> None:
        """Remote read (APM2 16.5): ICR.RRS says whether RRR holds what was asked for."""
        for receiver in self.bus.receivers:
            if receiver.matches(dest, logical, self.x2apic):
                value = receiver.read_remote(offset)
                if value is not None:
                    self._values[RRR] = value
                    self._values[ICRL] |= ICR_RRS_VALID
                return

    # Timer

    @property
    def _timer_mode(self) -> TimerMode:
        return TimerMode(self._values[Lvt.TIMER] >> 17 & 3)

    def _ticks_per_count(self) -> int:
        divide = self._values[DIVIDE]
        shift = (divide & 3 | divide >> 1 & 4) + 1 & 7  # 0b111 divides by 1
        return TICKS_PER_COUNT << shift

    def _remaining(self) -> int:
        if self._timer is None or self._timer_mode == TimerMode.TSC_DEADLINE:
            return 0
        return max(0, -((self.clock.now - self._timer.tick) // self._ticks_per_count()))

    def _start(self, count: int) -> None:
        self._disarm()
        if count and self._timer_mode != TimerMode.RESERVED:
            self._timer = self.clock.at(self.clock.now + count * self._ticks_per_count(), self._expire)

    def _disarm(self) -> None:
        self._tsc_deadline = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        due, self._timer, self._tsc_deadline = self._timer, None, 0
        if due and self._timer_mode == TimerMode.PERIODIC and self._values[INITIAL_COUNT]:
            period = self._values[INITIAL_COUNT] * self._ticks_per_count()
            late = (self.clock.now - due.tick) // period  # whole periods missed merge into one request
            self._timer = self.clock.at(due.tick + (late + 1) * period, self._expire)
        self.trigger(Lvt.TIMER)

    @property
    def tsc_deadline(self) -> int:
        """MSR TSC_DEADLINE; 0 when disarmed."""
        return self._tsc_deadline

    def set_tsc_deadline(self, deadline: int, tsc: int) -> None:
        """WRMSR of TSC_DEADLINE while the time stamp counter reads `tsc`; ignored in the other timer modes."""
        if self._timer_mode != TimerMode.TSC_DEADLINE:
            return
        self._disarm()
        if deadline:
            self._tsc_deadline = deadline
            self._timer = self.clock.at(self.clock.now + max(0, deadline - tsc), self._expire)

    def tsc_changed(self, tsc: int) -> None:
        """The time stamp counter was written: an armed deadline is that many counts away now."""
        if self._tsc_deadline:
            self.set_tsc_deadline(self._tsc_deadline, tsc)
