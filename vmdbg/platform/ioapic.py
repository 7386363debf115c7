"""The I/O APIC (Intel 82093AA, with the EOI register of version 0x20), and the lines that lead to it and to the 8259s."""

from collections.abc import Callable

from introspect.layout import Bits, bit, bits
from vmdbg.platform.apicbus import ApicBus, DeliveryMode
from vmdbg.platform.bus import State
from vmdbg.platform.pic import CASCADE, Pic

IOAPIC_BASE = 0xFEC00000
SELECT, WINDOW, EOI = 0x00, 0x10, 0x40
ID, VERSION, ARBITRATION, TABLE = 0x00, 0x01, 0x02, 0x10
PINS = 24
VERSION_VALUE = 0x20 | PINS - 1 << 16
REPLACED = (0, 8)
"""IRQs of PIT and RTC."""
TIMER_PIN = 2
"""Where IRQ 0 leads; all other IRQs have the pin of their number."""
MSI_ADDRESS = 0xFEE00000


class REDIRECTION(Bits):
    VECTOR = bits(7, 0)
    MODE = bits(10, 8)
    LOGICAL = bit(11)
    PENDING = bit(12)
    ACTIVE_LOW = bit(13)
    REMOTE_IRR = bit(14)
    LEVEL = bit(15)
    MASK = bit(16)
    DESTINATION = bits(63, 56)


READ_ONLY = REDIRECTION.PENDING | REDIRECTION.REMOTE_IRR


class IoApic:
    """24 pins, each with an entry of the redirection table.

    Pins are driven by whether they ask, not by voltage: the entry's polarity is kept, and nothing follows from it.
    """

    def __init__(self, apics: ApicBus, send: Callable[[int, int], None]) -> None:
        """`send(address, data)`: an interrupt goes out as a message like a device's."""
        self.send = send
        apics.eoi_listeners.append(self.end_of_interrupt)
        self.pins = 0
        self.reset()

    def reset(self) -> None:
        """The levels of the pins are the devices'."""
        self.id = self._selected = 0
        self.table = [REDIRECTION.MASK] * PINS

    name, title = "ioapic", "I/O APIC"

    def state(self) -> State:
        entries = {
            f"pin {pin}": REDIRECTION.describe(entry) + " (asks)" * (self.pins >> pin & 1)
            for pin, entry in enumerate(self.table) if entry != REDIRECTION.MASK or self.pins >> pin & 1
        }  # fmt: skip
        return {"id": self.id, "selected": self._selected, "pins": self.pins, **entries}

    def set_pin(self, pin: int, level: bool) -> None:
        rising = level and not self.pins >> pin & 1
        self.pins = self.pins & ~(1 << pin) | level << pin
        entry = self.table[pin]
        if entry & REDIRECTION.LEVEL:
            self._ask(pin)
        elif rising and not entry & REDIRECTION.MASK:  # an edge at a masked pin is lost
            self._send(entry)

    def _ask(self, pin: int) -> None:
        """A level-triggered pin asks once until its EOI."""
        entry = self.table[pin]
        if self.pins >> pin & 1 and not entry & (REDIRECTION.MASK | REDIRECTION.REMOTE_IRR):
            self.table[pin] |= REDIRECTION.REMOTE_IRR
            self._send(entry)

    def _send(self, entry: int) -> None:
        mode = REDIRECTION.get(entry, "MODE")
        level = bool(entry & REDIRECTION.LEVEL) and mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST)
        logical = bool(entry & REDIRECTION.LOGICAL)
        address = MSI_ADDRESS | REDIRECTION.get(entry, "DESTINATION") << 12 | logical << 2
        self.send(address, entry & 0xFF | mode << 8 | 1 << 14 | level << 15)

    def end_of_interrupt(self, vector: int) -> None:
        """Of a level-triggered interrupt, from a local APIC or the EOI register."""
        for pin, entry in enumerate(self.table):
            if entry & REDIRECTION.REMOTE_IRR and entry & REDIRECTION.VECTOR == vector:
                self.table[pin] &= ~REDIRECTION.REMOTE_IRR
                self._ask(pin)

    def read_mmio(self, offset: int, size: int) -> int:
        """Four bytes at a time; the rest of each 16 reads as zero."""
        if offset == SELECT:
            return self._selected
        return self._read(self._selected) if offset == WINDOW else 0

    def _read(self, register: int) -> int:
        if register in (ID, ARBITRATION):
            return self.id << 24
        if register == VERSION:
            return VERSION_VALUE
        if TABLE <= register < TABLE + 2 * PINS:
            return self.table[register - TABLE >> 1] >> 32 * (register & 1) & 0xFFFFFFFF
        return 0

    def write_mmio(self, offset: int, size: int, value: int) -> None:
        if offset == SELECT:
            self._selected = value & 0xFF
        elif offset == EOI:
            self.end_of_interrupt(value & 0xFF)
        elif offset == WINDOW and self._selected == ID:
            self.id = value >> 24 & 0xF
        elif offset == WINDOW and TABLE <= self._selected < TABLE + 2 * PINS:
            self._write_entry(self._selected - TABLE >> 1, 32 * (self._selected & 1), value)

    def _write_entry(self, pin: int, shift: int, value: int) -> None:
        old = self.table[pin]
        new = old & ~(0xFFFFFFFF << shift) | (value & 0xFFFFFFFF) << shift
        new = new & REDIRECTION.defined & ~READ_ONLY | old & READ_ONLY
        if not new & REDIRECTION.LEVEL:
            new &= ~REDIRECTION.REMOTE_IRR
        self.table[pin] = new
        if new & REDIRECTION.LEVEL:
            self._ask(pin)


class IrqLines:
    """IRQ 0 to 15 of the ISA bus, which both kinds of interrupt controllers see."""

    def __init__(self, pic: Pic, ioapic: IoApic) -> None:
        self.pic, self.ioapic = pic, ioapic
        self._replaced = False

    def set(self, irq: int, level: bool) -> None:
        """A device of the ISA bus drives its line."""
        if not (self._replaced and irq in REPLACED):
            self.drive(irq, level)

    def replace(self, on: bool) -> None:
        """While it is on, PIT and RTC reach nobody: the HPET drives their lines."""
        if on and not self._replaced:
            for irq in REPLACED:
                self.drive(irq, False)
        self._replaced = on

    def drive(self, irq: int, level: bool) -> None:
        self.pic.set_irq(irq, level)
        if irq != CASCADE:
            self.ioapic.set_pin(TIMER_PIN if irq == 0 else irq, level)


class PciLines:
    """The four interrupt lines of the root bus: pins of their own at the I/O APIC, and an IRQ of the 8259s, shared by two."""

    def __init__(self, pic: Pic, ioapic: IoApic, first_pin: int, irqs: tuple[int, ...]) -> None:
        self.pic, self.ioapic = pic, ioapic
        self.first_pin, self.irqs = first_pin, irqs
        self.reset()

    def reset(self) -> None:
        self._levels = [False] * len(self.irqs)

    def set(self, line: int, level: bool) -> None:
        self._levels[line] = level
        self.ioapic.set_pin(self.first_pin + line, level)
        irq = self.irqs[line]
        self.pic.set_irq(irq, any(level for level, shared in zip(self._levels, self.irqs, strict=True) if shared == irq))
