"""The cascaded pair of 8259A interrupt controllers with the ELCR of PC chipsets (Intel 8259A data sheet)."""

from collections.abc import Callable

from vmdbg.platform.bus import State

MASTER_PORT, SLAVE_PORT, ELCR_PORT = 0x20, 0xA0, 0x4D0
CASCADE = 2
ELCR_BITS = (0xF8, 0xDE)
"""IRQ 0, 1, 2, 8 and 13 are edge-triggered always."""

ICW1_IC4, ICW1_SNGL, ICW1_LTIM, ICW1 = 1, 2, 8, 0x10
ICW4_AEOI, ICW4_SFNM = 2, 0x10
OCW3 = 8
OCW3_RIS, OCW3_RR, OCW3_POLL, OCW3_SMM, OCW3_ESMM = 1, 2, 4, 0x20, 0x40


class Chip:
    """One 8259A.  `lines` is the level of IR0..IR7."""

    def __init__(self, elcr_bits: int) -> None:
        self._elcr_bits = elcr_bits
        self.reset()

    def reset(self) -> None:
        self.lines = self.irr = self.isr = self.elcr = 0
        self.imr = 0xFF
        self.base = 0
        self._lowest = 7
        self._init_step = 0
        self._single = self._wants_icw4 = False
        self._level = False
        self.auto_eoi = self._rotate_auto = self.special_nested = False
        self._special_mask = self._read_isr = self._poll = False

    def set_line(self, line: int, level: bool) -> None:
        bit = 1 << line
        if level:
            if not self.lines & bit or self._level_triggered & bit:
                self.irr |= bit
            self.lines |= bit
        else:
            self.lines &= ~bit
            # The request must last until it is acknowledged: an edge that goes away early is spurious (data sheet,
            # "Edge and level triggered modes").
            self.irr &= ~bit

    def state(self, first: int) -> State:
        """`first` is the IRQ of its line 0."""

        def lines(bits: int) -> str:
            return " ".join(f"IRQ{first + n}" for n in range(8) if bits >> n & 1) or "none"

        modes = (
            ("auto EOI", self.auto_eoi), ("rotating", self._rotate_auto), ("special nested", self.special_nested),
            ("special mask", self._special_mask), ("level", self._level), ("initialising", bool(self._init_step)),
        )  # fmt: skip
        return {
            "vectors": f"{self.base:#x}-{self.base + 7:#x}", "requested (IRR)": lines(self.irr),
            "in service (ISR)": lines(self.isr),
            "masked (IMR)": lines(self.imr), "high lines": lines(self.lines), "level-triggered (ELCR)": lines(self.elcr),
            "highest priority": f"IRQ{first + (self._lowest + 1 & 7)}",
            "modes": ", ".join(name for name, on in modes if on) or "plain",
        }  # fmt: skip

    @property
    def _level_triggered(self) -> int:
        return 0xFF if self._level else self.elcr

    @property
    def order(self) -> tuple[int, ...]:
        """The lines by priority, the highest first."""
        return tuple((self._lowest + rank) & 7 for rank in range(1, 9))

    @property
    def blocking(self) -> int:
        """The lines whose service holds those back that come behind them: all in service, but for special mask mode."""
        return self.isr & ~self.imr if self._special_mask else self.isr

    def pending(self, slave_lines: int) -> int | None:
        """The line that INTR is for; `slave_lines` have an 8259 behind them and may nest over themselves (SFNM)."""
        requests = self.irr & ~self.imr
        if not requests:
            return None
        for rank in range(1, 9):
            line = (self._lowest + rank) & 7
            bit = 1 << line
            if self.isr & bit and not (self._special_mask and self.imr & bit):
                return line if self.special_nested and slave_lines & requests & bit else None
            if requests & bit and not self.isr & bit:
                return line
        return None

    def acknowledge(self, line: int) -> None:
        bit = 1 << line
        if not self._level_triggered & bit:
            self.irr &= ~bit
        if not self.auto_eoi:
            self.isr |= bit
        elif self._rotate_auto:
            self._lowest = line

    def read(self, address: int, slave_lines: int) -> int:
        if self._poll:
            self._poll = False
            line = self.pending(slave_lines)
            if line is None:
                return 0
            self.acknowledge(line)
            return 0x80 | line
        if address:
            return self.imr
        return self.isr if self._read_isr else self.irr

    def write(self, address: int, value: int) -> None:
        if not address and value & ICW1:
            self._write_icw1(value)
        elif not address and value & OCW3:
            self._poll = bool(value & OCW3_POLL)
            if value & OCW3_RR:
                self._read_isr = bool(value & OCW3_RIS)
            if value & OCW3_ESMM:
                self._special_mask = bool(value & OCW3_SMM)
        elif not address:
            self._write_ocw2(value >> 5, value & 7)
        elif self._init_step:
            self._write_icw(value)
        else:
            self.imr = value

    def _write_icw1(self, value: int) -> None:
        self.imr = self.isr = 0
        self._level = bool(value & ICW1_LTIM)
        self.irr = self.lines & self._level_triggered  # edges must be seen again
        self._lowest = 7
        self._special_mask = self._read_isr = self._poll = False
        self.auto_eoi = self._rotate_auto = self.special_nested = False
        self._single = bool(value & ICW1_SNGL)
        self._wants_icw4 = bool(value & ICW1_IC4)
        self._init_step = 2

    def _write_icw(self, value: int) -> None:
        step = self._init_step
        if step == 2:
            self.base = value & 0xF8
            self._init_step = 3 if not self._single else 4 if self._wants_icw4 else 0
        elif step == 3:  # the cascade is wired, not programmed
            self._init_step = 4 if self._wants_icw4 else 0
        else:
            self.auto_eoi = bool(value & ICW4_AEOI)
            self.special_nested = bool(value & ICW4_SFNM)
            self._init_step = 0

    def _write_ocw2(self, command: int, line: int) -> None:
        """R, SL, EOI in bits 2..0 of `command`."""
        rotate, specific, eoi = command & 4, command & 2, command & 1
        if command in (0, 4):  # rotate in automatic EOI mode: clear, set
            self._rotate_auto = bool(rotate)
            return
        if command == 2:
            return  # no operation
        if not specific:
            served = [(self._lowest + rank) & 7 for rank in range(1, 9) if self.isr >> (self._lowest + rank & 7) & 1]
            if self._special_mask:  # a masked line in service is not cleared by a non-specific EOI
                served = [number for number in served if not self.imr >> number & 1]
            if not served:
                return
            line = served[0]
        if eoi:
            self.isr &= ~(1 << line)
        if rotate:
            self._lowest = line

    def write_elcr(self, value: int) -> None:
        self.elcr = value & self._elcr_bits
        self.irr |= self.lines & self._level_triggered


class Pic:
    """The pair: IRQ 0..15, IRQ 2 the cascade.  `intr_changed(level)` is called when the INTR output changes."""

    name, title = "pic", "two 8259A interrupt controllers"

    def __init__(self, intr_changed: Callable[[bool], None]) -> None:
        self.intr_changed = intr_changed
        self.intr = False
        self.master, self.slave = Chip(ELCR_BITS[0]), Chip(ELCR_BITS[1])

    def reset(self) -> None:
        self.master.reset()
        self.slave.reset()
        self._update()

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive an IRQ line; IRQ 2 has no pin, its requests are the slave's."""
        if irq < 8:
            if irq != CASCADE:
                self.master.set_line(irq, level)
        else:
            self.slave.set_line(irq - 8, level)
        self._update()

    def state(self) -> State:
        found: dict[str, int | str] = {"intr": int(self.intr)}
        for name, chip, first in (("master", self.master, 0), ("slave", self.slave, 8)):
            found |= {f"{name} {key}": value for key, value in chip.state(first).items()}
        return found

    def set_level_triggered(self, irq: int) -> None:
        """As firmware sets ELCR for the lines of PCI."""
        chip = self.master if irq < 8 else self.slave
        chip.write_elcr(chip.elcr | 1 << (irq & 7))
        self._update()

    def acknowledge(self) -> int:
        """The INTA cycles: the vector, line 7's if the request has gone (spurious)."""
        line = self.master.pending(1 << CASCADE)
        if line is None:
            vector = self.master.base | 7
        else:
            self.master.acknowledge(line)
            vector = self.master.base | line
            if line == CASCADE:
                behind = self.slave.pending(0)
                if behind is not None:
                    self.slave.acknowledge(behind)
                vector = self.slave.base | (7 if behind is None else behind)
        self._update()
        return vector

    def read_port(self, port: int, size: int) -> int:
        if port & ~1 == ELCR_PORT:
            return (self.slave if port & 1 else self.master).elcr
        chip = self.slave if port & 0x80 else self.master
        value = chip.read(port & 1, 0 if chip is self.slave else 1 << CASCADE)
        self._update()
        return value

    def write_port(self, port: int, size: int, value: int) -> None:
        if port & ~1 == ELCR_PORT:
            (self.slave if port & 1 else self.master).write_elcr(value)
        else:
            (self.slave if port & 0x80 else self.master).write(port & 1, value)
        self._update()

    def _update(self) -> None:
        # A slave's output falls between two requests; the fall and rise make the master's edge.
        request = self.slave.pending(0) is not None
        if request and not self.master.irr >> CASCADE & 1:
            self.master.set_line(CASCADE, False)
        self.master.set_line(CASCADE, request)
        intr = self.master.pending(1 << CASCADE) is not None
        if intr != self.intr:
            self.intr = intr
            self.intr_changed(intr)
