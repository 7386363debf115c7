"""The high precision event timer (IA-PC HPET 1.0a): a counter of 100 MHz, three comparators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from introspect.layout import Bits, bit, bits
from vmdbg.platform.bus import State
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock, Timer

HPET_BASE, HPET_SIZE = 0xFED00000, 0x400
FREQUENCY = 100_000_000
TICKS = TICKS_PER_SECOND // FREQUENCY
"""Of guest time for a count."""
PERIOD = 10**15 // FREQUENCY
"""Femtoseconds of a count."""
COMPARATORS = 3
CAPABILITIES = PERIOD << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | COMPARATORS - 1 << 8 | 1
"""Replaces legacy timers, counts 64 bits, revision 1."""
ID, CONFIG, INTERRUPT_STATUS, COUNTER = 0x00, 0x10, 0x20, 0xF0
FIRST_TIMER, TIMER_SIZE, LAST_TIMER = 0x100, 0x20, 0x100 + 0x20 * COMPARATORS
ENABLE, LEGACY = 1, 2
"""Of the configuration register."""
LEGACY_IRQS = (0, 8)
"""What comparators 0 and 1 drive in the place of PIT and RTC."""
ROUTES = 0xF00000
"""Pins of the I/O APIC that a comparator may be led to: those that PCI does not use."""
MASK = (1 << 64) - 1


class TIMER(Bits):
    """Configuration of a comparator."""

    LEVEL = bit(1)
    INTERRUPT = bit(2)
    PERIODIC = bit(3)
    SET_VALUE = bit(6)
    NARROW = bit(8)
    ROUTE = bits(13, 9)
    MESSAGE = bit(14)


WRITABLE = TIMER.defined
READ_ONLY = 1 << 4 | 1 << 5 | 1 << 15 | ROUTES << 32
"""It may be periodic, has 64 bits and sends messages."""


@dataclass
class Comparator:
    config: int = 0
    value: int = MASK
    period: int = 0
    message: int = 0
    """Data 31:0, address 63:32."""
    timer: Timer | None = None

    @property
    def mask(self) -> int:
        return 0xFFFFFFFF if self.config & TIMER.NARROW else MASK


class Hpet:
    name, title = "hpet", "high precision event timer"

    def __init__(
        self, clock: Clock, legacy: Callable[[int, bool], None], replace: Callable[[bool], None],
        pin: Callable[[int, bool], None], send: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        """`legacy(irq, level)` and `pin(number, level)` drive lines; `replace(on)`: PIT and RTC no longer do;
        `send(address, data)` is an interrupt message."""
        self.clock, self.legacy, self.replace, self.pin, self.send = clock, legacy, replace, pin, send
        self.comparators = [Comparator() for _ in range(COMPARATORS)]
        self._clear()

    def _clear(self) -> None:
        self.config = self.pending = 0
        self._stopped = self._start = 0

    def reset(self) -> None:
        for number, comparator in enumerate(self.comparators):
            if comparator.timer is not None:
                comparator.timer.cancel()
            self._drive(number, False)
            self.comparators[number] = Comparator()
        self.replace(False)
        self._clear()

    def state(self) -> State:
        found: dict[str, int | str] = {"config": self.config, "pending": self.pending, "counter": self.counter}
        for number, one in enumerate(self.comparators):
            found[f"comparator {number}"] = f"{one.value:#x} {TIMER.describe(one.config)}".rstrip()
        return found

    @property
    def counter(self) -> int:
        if not self.config & ENABLE:
            return self._stopped
        return self._stopped + (self.clock.now - self._start) // TICKS & MASK

    # Registers: eight bytes each, read and written whole or in halves

    def read_mmio(self, offset: int, size: int) -> int:
        return self._read(offset & ~7) >> 8 * (offset & 7)

    def _read(self, register: int) -> int:
        if FIRST_TIMER <= register < LAST_TIMER:
            comparator = self.comparators[(register - FIRST_TIMER) // TIMER_SIZE]
            self._pass(comparator)
            return (comparator.config | READ_ONLY, comparator.value, comparator.message, 0)[register % TIMER_SIZE // 8]
        return {ID: CAPABILITIES, CONFIG: self.config, INTERRUPT_STATUS: self.pending, COUNTER: self.counter}.get(register, 0)

    def write_mmio(self, offset: int, size: int, value: int) -> None:
        if size < 4 or offset % size:
            return
        register, shift = offset & ~7, 8 * (offset & 7)
        mask = (1 << 8 * size) - 1 << shift
        if register == INTERRUPT_STATUS:
            self._acknowledge(value << shift & mask)
        elif register == CONFIG:
            self._configure(self.config & ~mask | value << shift)
        elif register == COUNTER:
            if not self.config & ENABLE:
                self._stopped = self._stopped & ~mask | value << shift
        elif FIRST_TIMER <= register < LAST_TIMER:
            self._write_timer((register - FIRST_TIMER) // TIMER_SIZE, register % TIMER_SIZE // 8, mask, value << shift)

    def _acknowledge(self, which: int) -> None:
        for number in range(COMPARATORS):
            if self.pending & which & 1 << number:
                self.pending &= ~(1 << number)
                self._drive(number, False)

    def _configure(self, value: int) -> None:
        value &= ENABLE | LEGACY
        if (value ^ self.config) & LEGACY:
            for number in range(COMPARATORS):
                self._drive(number, False)
            self.replace(bool(value & LEGACY))
        self._stopped, self._start = self.counter, self.clock.now
        self.config = value
        for number in range(COMPARATORS):
            self._arm(number)

    def _write_timer(self, number: int, register: int, mask: int, value: int) -> None:
        comparator = self.comparators[number]
        self._pass(comparator)
        if register == 0:
            if comparator.config & TIMER.LEVEL and not value & TIMER.LEVEL and mask & TIMER.LEVEL:
                self._acknowledge(1 << number)
            comparator.config = (comparator.config & ~mask | value) & WRITABLE
            if not ROUTES >> TIMER.get(comparator.config, "ROUTE") & 1:
                comparator.config &= ~TIMER.ROUTE
            comparator.value &= comparator.mask
        elif register == 1:
            periodic = bool(comparator.config & TIMER.PERIODIC)
            if not periodic or comparator.config & TIMER.SET_VALUE:
                comparator.value = (comparator.value & ~mask | value) & comparator.mask
            if periodic:
                comparator.period = (comparator.period & ~mask | value) & comparator.mask
            if mask >> 63 or comparator.config & TIMER.NARROW or mask == 0xFFFFFFFF:
                comparator.config &= ~TIMER.SET_VALUE
        elif register == 2:
            comparator.message = comparator.message & ~mask | value
        self._arm(number)

    # Time

    def _pass(self, comparator: Comparator) -> None:
        """A periodic comparator that the counter has passed unseen goes on to what is next."""
        if comparator.config & TIMER.PERIODIC and comparator.period and self.config & ENABLE and comparator.timer is None:
            behind = (self.counter - comparator.value) & comparator.mask
            if behind <= comparator.mask >> 1:
                steps = behind // comparator.period + 1
                comparator.value = (comparator.value + steps * comparator.period) & comparator.mask

    def _arm(self, number: int) -> None:
        comparator = self.comparators[number]
        if comparator.timer is not None:
            comparator.timer.cancel()
            comparator.timer = None
        if not (self.config & ENABLE and comparator.config & TIMER.INTERRUPT):
            return
        self._pass(comparator)
        counts = (comparator.value - self.counter) & comparator.mask or comparator.mask + 1
        if counts >> 62:
            return  # in a thousand years
        due = self._start + (self.counter - self._stopped + counts) * TICKS
        comparator.timer = self.clock.at(max(due, self.clock.now + 1), partial(self._match, number))

    def _match(self, number: int) -> None:
        comparator = self.comparators[number]
        comparator.timer = None
        if comparator.config & TIMER.MESSAGE and not (self.config & LEGACY and number < len(LEGACY_IRQS)):
            self.send(comparator.message >> 32, comparator.message & 0xFFFFFFFF)
        elif comparator.config & TIMER.LEVEL:
            self.pending |= 1 << number
            self._drive(number, True)
        else:  # the line falls just before it rises: the 8259s want it high until they have told the processor
            self._drive(number, False)
            self._drive(number, True)
        self._arm(number)

    def _drive(self, number: int, level: bool) -> None:
        """The line of a comparator."""
        if self.config & LEGACY and number < len(LEGACY_IRQS):
            self.legacy(LEGACY_IRQS[number], level)
            return
        route = TIMER.get(self.comparators[number].config, "ROUTE")
        if route:
            self.pin(route, level)
