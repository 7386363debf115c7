"""The HPET: its counter, one-shot and periodic comparators, the three ways of its interrupts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.platform.pci.board import MSI_ADDRESS, Board
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.hpet import CAPABILITIES, COUNTER, FIRST_TIMER, HPET_BASE, HPET_SIZE, PERIOD, TICKS, TIMER
from vmdbg.platform.ioapic import IOAPIC_BASE

CONFIG, STATUS = 0x10, 0x20
ON, ON_LEGACY = 1, 3
FIXED = DeliveryMode.FIXED


class Rig(Board):
    def __init__(self) -> None:
        super().__init__(hpet=True)
        for pin in range(24):
            self.entry(pin, 0x80 + pin)

    def entry(self, pin: int, value: int) -> None:
        for half in range(2):
            self.bus.write_mmio(IOAPIC_BASE, 4, 0x10 + 2 * pin + half)
            self.bus.write_mmio(IOAPIC_BASE + 0x10, 4, value >> 32 * half & 0xFFFFFFFF)

    def get(self, offset: int, size: int = 8) -> int:
        return self.bus.read_mmio(HPET_BASE + offset, size)

    def put(self, offset: int, value: int, size: int = 8) -> None:
        self.bus.write_mmio(HPET_BASE + offset, size, value)

    def timer(self, number: int, config: int, value: int) -> None:
        self.put(FIRST_TIMER + 0x20 * number, config)
        self.put(FIRST_TIMER + 0x20 * number + 8, value)

    def counts(self, count: int) -> list[int]:
        """Let so many pass, one at a time; the vectors that came."""
        before = len(self.apic.taken)
        for _ in range(count):
            self.pass_time(TICKS)
        return [vector for vector, _, _ in self.apic.taken[before:]]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_capabilities_and_counter(rig: Rig) -> None:
    assert rig.get(0) == CAPABILITIES
    assert rig.get(4, 4) == PERIOD == 10_000_000
    rig.put(COUNTER, 0x1_0000_0000)
    rig.put(CONFIG, ON)
    rig.pass_time(10 * TICKS + 3)
    assert rig.get(COUNTER) == 0x1_0000_000A
    rig.put(COUNTER, 0)
    assert rig.get(COUNTER) == 0x1_0000_000A, "it is not written while it runs"
    rig.put(CONFIG, 0)
    rig.pass_time(10 * TICKS)
    assert rig.get(COUNTER) == 0x1_0000_000A
    rig.put(COUNTER + 4, 0, 4)
    assert rig.get(COUNTER) == 10


def test_one_shot(rig: Rig) -> None:
    rig.put(CONFIG, ON)
    rig.timer(2, TIMER.INTERRUPT | 20 << 9, 5)
    assert rig.counts(20) == [0x94]
    assert rig.get(FIRST_TIMER + 0x48) == 5


def test_periodic(rig: Rig) -> None:
    rig.timer(0, TIMER.INTERRUPT | TIMER.PERIODIC | TIMER.SET_VALUE | 21 << 9, 4)
    rig.put(FIRST_TIMER + 8, 3)
    rig.put(CONFIG, ON)
    assert rig.counts(3) == []
    assert rig.counts(1) == [0x95]
    assert rig.counts(7) == [0x95, 0x95]
    assert rig.get(FIRST_TIMER + 8) == 13
    rig.pass_time(1000 * TICKS)
    assert rig.counts(3) == [0x95], "what was missed merges"


def test_level(rig: Rig) -> None:
    rig.entry(22, 0x96 | 1 << 15)
    rig.put(CONFIG, ON)
    rig.timer(1, TIMER.INTERRUPT | TIMER.LEVEL | 22 << 9, 2)
    rig.counts(5)
    assert (rig.apic.taken, rig.get(STATUS)) == ([(0x96, FIXED, True)], 2)
    rig.apics.end_of_interrupt(0x96)
    assert len(rig.apic.taken) == 2
    rig.put(STATUS, 2)
    rig.apics.end_of_interrupt(0x96)
    assert (len(rig.apic.taken), rig.get(STATUS)) == (2, 0)


def test_message(rig: Rig) -> None:
    rig.put(FIRST_TIMER + 0x50, MSI_ADDRESS << 32 | 0x4077)
    rig.put(CONFIG, ON)
    rig.timer(2, TIMER.INTERRUPT | TIMER.MESSAGE, 2)
    assert rig.counts(5) == [0x77]


def test_in_the_place_of_pit_and_rtc(rig: Rig) -> None:
    pit = rig.chipset.irq(0)
    pit(True)
    assert rig.chipset.ioapic.pins >> 2 & 1
    rig.timer(0, TIMER.INTERRUPT, 2)
    rig.timer(1, TIMER.INTERRUPT, 3)
    rig.put(CONFIG, ON_LEGACY)
    assert not rig.chipset.ioapic.pins >> 2 & 1
    before = len(rig.apic.taken)
    pit(False)
    pit(True)
    assert len(rig.apic.taken) == before, "the PIT is cut off"
    assert rig.counts(4) == [0x82, 0x88]
    assert rig.chipset.pic.master.irr & 1, "the 8259 has it, too"
    rig.chipset.reset()
    pit(False)
    pit(True)
    assert rig.chipset.ioapic.pins >> 2 & 1
    assert rig.get(CONFIG) == 0


def test_32_bits(rig: Rig) -> None:
    rig.put(COUNTER, 0xFFFF_FFFE)
    rig.put(CONFIG, ON)
    rig.timer(2, TIMER.INTERRUPT | TIMER.NARROW | 20 << 9, 1)
    assert rig.counts(3) == [0x94], "it compares 32 bits"


def test_routes_that_there_are(rig: Rig) -> None:
    assert rig.get(FIRST_TIMER, 8) >> 32 == 0xF00000
    rig.put(FIRST_TIMER, 5 << 9)
    assert rig.get(FIRST_TIMER) & TIMER.ROUTE == 0


def test_without_it_nothing_answers() -> None:
    assert Board().bus.read_mmio(HPET_BASE, 4) == 0xFFFFFFFF


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, HPET_SIZE - 1), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)), max_size=40))
def test_any_writes_are_survived(writes: list[tuple[int, int, int]]) -> None:
    rig = Rig()
    for offset, size, value in writes:
        rig.put(offset, value & (1 << 8 * size) - 1, size)
        rig.put(CONFIG, ON)
        rig.get(offset, size)
        for _ in range(5):
            rig.clock.now = max(rig.clock.next_deadline() or 0, rig.clock.now + 1)
            rig.clock.fire()
    rig.chipset.reset()
    assert rig.get(COUNTER) == 0
