"""The I/O APIC: registers, edges, levels with their EOI, routing of the ISA's and PCI's lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.platform.pci.board import Board
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.ioapic import IOAPIC_BASE, PINS, REDIRECTION

FIXED = DeliveryMode.FIXED
LEVEL, MASK = REDIRECTION.LEVEL, REDIRECTION.MASK


class Rig(Board):
    def out(self, register: int, value: int) -> None:
        self.bus.write_mmio(IOAPIC_BASE, 4, register)
        self.bus.write_mmio(IOAPIC_BASE + 0x10, 4, value)

    def look(self, register: int) -> int:
        self.bus.write_mmio(IOAPIC_BASE, 4, register)
        return self.bus.read_mmio(IOAPIC_BASE + 0x10, 4)

    def entry(self, pin: int, value: int) -> None:
        self.out(0x11 + 2 * pin, value >> 32)
        self.out(0x10 + 2 * pin, value & 0xFFFFFFFF)

    def entry_of(self, pin: int) -> int:
        return self.look(0x10 + 2 * pin) | self.look(0x11 + 2 * pin) << 32


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_registers(rig: Rig) -> None:
    assert rig.look(1) == 0x170020
    rig.out(0, 0xFF000000)
    assert (rig.look(0), rig.look(2), rig.look(0x40), rig.look(3)) == (0x0F000000, 0x0F000000, 0, 0)
    assert rig.bus.read_mmio(IOAPIC_BASE, 4) == 3
    for pin in range(PINS):
        assert rig.entry_of(pin) == MASK
    rig.entry(5, (1 << 64) - 1)
    assert rig.entry_of(5) == REDIRECTION.defined & ~(REDIRECTION.PENDING | REDIRECTION.REMOTE_IRR)


def test_an_edge_is_sent_once_and_lost_while_masked(rig: Rig) -> None:
    pin = rig.chipset.ioapic.set_pin
    pin(5, True)
    rig.entry(5, 0x55)
    assert not rig.apic.taken
    pin(5, True)
    assert not rig.apic.taken, "the pin was up already"
    pin(5, False)
    pin(5, True)
    assert rig.apic.taken == [(0x55, FIXED, False)]


def test_a_level_asks_again_after_eoi(rig: Rig) -> None:
    pin = rig.chipset.ioapic.set_pin
    rig.entry(16, 0x61 | LEVEL | MASK)
    pin(16, True)
    assert not rig.apic.taken
    rig.entry(16, 0x61 | LEVEL)
    assert rig.apic.taken == [(0x61, FIXED, True)]
    assert rig.entry_of(16) & REDIRECTION.REMOTE_IRR
    pin(16, False)
    pin(16, True)
    assert len(rig.apic.taken) == 1, "it waits for the EOI"
    rig.apics.end_of_interrupt(0x62)
    assert len(rig.apic.taken) == 1
    rig.apics.end_of_interrupt(0x61)
    assert len(rig.apic.taken) == 2
    pin(16, False)
    rig.bus.write_mmio(IOAPIC_BASE + 0x40, 4, 0x61)
    assert (len(rig.apic.taken), rig.entry_of(16) & REDIRECTION.REMOTE_IRR) == (2, 0)


def test_to_edge_and_back_clears_remote_irr(rig: Rig) -> None:
    """What software does that has no EOI register."""
    rig.entry(16, 0x61 | LEVEL)
    rig.chipset.ioapic.set_pin(16, True)
    rig.entry(16, 0x61 | MASK)
    rig.entry(16, 0x61 | LEVEL)
    assert len(rig.apic.taken) == 2


@pytest.mark.parametrize(("mode", "expected"), [(DeliveryMode.NMI, (0, DeliveryMode.NMI, False)),
                                                (DeliveryMode.LOWEST, (0x70, FIXED, True))])  # fmt: skip
def test_delivery_modes(rig: Rig, mode: DeliveryMode, expected: tuple[int, DeliveryMode, bool]) -> None:
    rig.entry(7, expected[0] | mode << 8 | LEVEL)
    rig.chipset.ioapic.set_pin(7, True)
    assert rig.apic.taken == [expected]


def test_lines_of_the_isa_bus(rig: Rig) -> None:
    """IRQ 0 is pin 2; IRQ 2, the cascade, none; the 8259s see them all."""
    for irq in (0, 1, 2, 4, 15):
        rig.chipset.irq(irq)(True)
    assert rig.chipset.ioapic.pins == 1 << 2 | 1 << 1 | 1 << 4 | 1 << 15
    assert rig.chipset.pic.master.irr & 0x13 == 0x13


def test_the_8259s_output_is_pin_0(rig: Rig) -> None:
    rig.entry(0, DeliveryMode.EXTINT << 8)
    for port, base in ((0x20, 0x20), (0xA0, 0x28)):
        for at, value in ((port, 0x11), (port + 1, base), (port + 1, 4), (port + 1, 1), (port + 1, 0)):
            rig.bus.write_port(at, 1, value)
    rig.chipset.irq(4)(True)
    assert rig.apic.taken == [(0, DeliveryMode.EXTINT, False)]
    assert rig.intr[-1]


@given(st.lists(st.tuples(st.integers(0, 0x1F).map(lambda word: 4 * word), st.integers(0, (1 << 32) - 1)), max_size=40))
def test_any_writes_are_survived(writes: list[tuple[int, int]]) -> None:
    rig = Rig()
    for pin, (offset, value) in enumerate(writes):
        rig.bus.write_mmio(IOAPIC_BASE + offset, 4, value)
        rig.chipset.ioapic.set_pin(pin % PINS, bool(value & 1))
        rig.bus.read_mmio(IOAPIC_BASE + offset, 8)
        rig.apics.end_of_interrupt(value & 0xFF)
