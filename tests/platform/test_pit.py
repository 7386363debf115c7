from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdbg.platform.bus import Bus
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.pit import PIT_PORT, Pit, counts_at, tick_of
from vmdbg.platform.system_ports import PORT_B, PortB


class Rig:
    def __init__(self) -> None:
        self.clock, self.bus, self.edges = Clock(), Bus(), list[tuple[int, bool]]()
        self.pit = Pit(self.clock, self.irq)
        self.bus.add_ports(PIT_PORT, PIT_PORT + 3, self.pit)
        self.bus.add_ports(PORT_B, PORT_B, PortB(self.clock, self.pit))

    def irq(self, level: bool) -> None:
        self.edges.append((counts_at(self.clock.now), level))

    def out(self, port: int, *values: int) -> None:
        for value in values:
            self.bus.write_port(port, 1, value)

    def inb(self, port: int) -> int:
        return self.bus.read_port(port, 1)

    def go(self, count: int) -> None:
        """Advance to the first tick of PIT clock `count`."""
        end = tick_of(count)
        while (deadline := self.clock.next_deadline()) is not None and deadline <= end:
            self.clock.now = deadline
            self.clock.fire()
        self.clock.now = end

    def count(self, channel: int) -> int:
        self.out(PIT_PORT + 3, channel << 6)
        return self.inb(PIT_PORT + channel) | self.inb(PIT_PORT + channel) << 8


@pytest.fixture
def rig() -> Rig:
    return Rig()


@given(st.integers(0, 1 << 60))
def test_the_rate_is_exact(tick: int) -> None:
    rate = Fraction(14_318_180, 12 * TICKS_PER_SECOND)
    assert counts_at(tick) == int(tick * rate)
    assert counts_at(tick_of(counts_at(tick))) == counts_at(tick)
    assert tick_of(counts_at(tick)) <= tick


def test_mode_0_interrupts_once(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0x30)
    rig.out(PIT_PORT, 0xE8, 0x03)
    rig.go(400)
    assert rig.count(0) == 600
    rig.go(5000)
    assert rig.edges == [(0, False), (1000, True)]
    assert rig.count(0) == (1000 - 5000) & 0xFFFF


def test_mode_2_is_periodic_and_takes_a_new_count_at_the_end(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0x34)
    rig.out(PIT_PORT, 100, 0)
    rig.go(150)
    rig.out(PIT_PORT, 50, 0)
    rig.go(300)
    falls = [99, 199, 249, 299]
    assert rig.edges == [edge for fall in falls for edge in ((fall, False), (fall + 1, True))]


def test_mode_3_square_wave(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0x36)
    rig.out(PIT_PORT, 101, 0)
    rig.go(210)
    assert rig.edges == [(51, False), (101, True), (152, False), (202, True)]
    assert rig.count(0) == 100 - 2 * 8


def test_mode_4_strobes_once(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0x38)
    rig.out(PIT_PORT, 10, 0)
    rig.go(70_000)
    assert rig.edges == [(10, False), (11, True)]


def test_late_fire_still_makes_an_edge_and_keeps_the_phase(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0x34)
    rig.out(PIT_PORT, 100, 0)
    rig.clock.now = tick_of(12_345)
    rig.clock.fire()
    assert [level for _, level in rig.edges] == [False, True]
    rig.edges.clear()
    rig.go(12_400)
    assert rig.edges == [(12_399, False), (12_400, True)]


def test_zero_means_the_modulus_in_binary_and_bcd(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0x34)
    rig.out(PIT_PORT, 0, 0)
    rig.go(1)
    assert rig.count(0) == 0xFFFF
    rig.out(PIT_PORT + 3, 0x35)
    rig.out(PIT_PORT, 0, 0)
    rig.go(2)
    assert rig.count(0) == 0x9999


def test_latch_holds_and_byte_order_survives_interleaving(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0x34)
    rig.out(PIT_PORT, 0, 0x10)
    rig.go(0x10)
    rig.out(PIT_PORT + 3, 0x00)
    rig.go(0x500)
    rig.out(PIT_PORT + 3, 0x00)
    assert (rig.inb(PIT_PORT), rig.inb(PIT_PORT)) == (0xF0, 0x0F)
    assert (rig.inb(PIT_PORT), rig.inb(PIT_PORT)) == (0x00, 0x0B)


def test_read_back_status_and_count(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0xB0)
    rig.out(PIT_PORT + 3, 0xE8)  # status of channel 2
    assert rig.inb(PIT_PORT + 2) == 0x70, "OUT low, null count, two bytes, mode 0"
    rig.out(PORT_B, 1)
    rig.out(PIT_PORT + 2, 0x34, 0x12)
    rig.go(4)
    rig.out(PIT_PORT + 3, 0xC8)  # both: status first
    assert [rig.inb(PIT_PORT + 2) for _ in range(3)] == [0x30, 0x30, 0x12]


def test_single_byte_access(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0x24)  # channel 0, high byte, mode 2
    rig.out(PIT_PORT, 2)
    rig.go(0x80)
    assert rig.inb(PIT_PORT) == 1


def test_channel_2_counts_while_port_b_lets_it(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0xB0)
    rig.out(PIT_PORT + 2, 100, 0)
    rig.go(50)
    assert (rig.count(2), rig.inb(PORT_B) & 0x20) == (100, 0)
    rig.out(PORT_B, 1)
    rig.go(80)
    rig.out(PORT_B, 0)
    rig.go(500)
    assert (rig.count(2), rig.inb(PORT_B) & 0x20) == (70, 0)
    rig.out(PORT_B, 1)
    rig.go(569)
    assert rig.inb(PORT_B) & 0x21 == 1
    rig.go(570)
    assert rig.inb(PORT_B) & 0x21 == 0x21


def test_mode_1_is_triggered_by_the_gate(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0xB2)
    rig.out(PIT_PORT + 2, 100, 0)
    assert rig.inb(PORT_B) & 0x20
    rig.out(PORT_B, 1)
    assert not rig.inb(PORT_B) & 0x20
    rig.out(PIT_PORT + 2, 30, 0)
    rig.go(100)
    assert rig.inb(PORT_B) & 0x20
    rig.out(PORT_B, 0)
    rig.out(PORT_B, 1)
    rig.go(129)
    assert not rig.inb(PORT_B) & 0x20
    rig.go(130)
    assert rig.inb(PORT_B) & 0x20


def test_refresh_bit_toggles(rig: Rig) -> None:
    seen = set()
    for _ in range(4):
        seen.add(rig.inb(PORT_B) & 0x10)
        rig.clock.now += 70_000
    assert seen == {0, 0x10}


def test_reset_stops_everything(rig: Rig) -> None:
    rig.out(PIT_PORT + 3, 0x34)
    rig.out(PIT_PORT, 100, 0)
    rig.pit.reset()
    assert rig.clock.next_deadline() is None


step = st.tuples(st.integers(0, 3), st.integers(0, 255), st.integers(0, 200))


@given(st.lists(step, max_size=40))
def test_any_programming_is_survived(steps: list[tuple[int, int, int]]) -> None:
    rig = Rig()
    for offset, value, ahead in steps:
        rig.out(PIT_PORT + offset, value)
        rig.out(PORT_B, value & 1)
        rig.go(counts_at(rig.clock.now) + ahead)
        for port in range(PIT_PORT, PIT_PORT + 4):
            assert 0 <= rig.inb(port) <= 255
        deadline = rig.clock.next_deadline()
        assert deadline is None or deadline > rig.clock.now
