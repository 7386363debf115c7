import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdbg.platform.bus import Bus
from vmdbg.platform.pic import ELCR_PORT, MASTER_PORT, SLAVE_PORT, Pic


class Rig:
    def __init__(self, icw4: int = 1) -> None:
        self.levels: list[bool] = []
        self.pic, self.bus = Pic(self.levels.append), Bus()
        for first in (MASTER_PORT, SLAVE_PORT, ELCR_PORT):
            self.bus.add_ports(first, first + 1, self.pic)
        for port, base, cascade in ((MASTER_PORT, 0x20, 4), (SLAVE_PORT, 0x28, 2)):
            self.out(port, 0x11)
            for value in (base, cascade, icw4):
                self.out(port + 1, value)

    def out(self, port: int, value: int) -> None:
        self.bus.write_port(port, 1, value)

    def inb(self, port: int) -> int:
        return self.bus.read_port(port, 1)

    def registers(self, port: int) -> tuple[int, int]:
        self.out(port, 0x0A)
        irr = self.inb(port)
        self.out(port, 0x0B)
        return irr, self.inb(port)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_nothing_is_delivered_before_initialisation() -> None:
    pic = Pic(lambda level: None)
    pic.set_irq(0, True)
    assert not pic.intr


def test_edge_request_service_eoi(rig: Rig) -> None:
    rig.pic.set_irq(3, True)
    assert rig.levels == [True]
    assert rig.registers(MASTER_PORT) == (8, 0)
    assert rig.pic.acknowledge() == 0x23
    assert rig.registers(MASTER_PORT) == (0, 8)
    rig.pic.set_irq(4, True)
    assert not rig.pic.intr, "lower priority waits"
    rig.pic.set_irq(1, True)
    assert rig.pic.acknowledge() == 0x21
    rig.out(MASTER_PORT, 0x20)
    rig.out(MASTER_PORT, 0x20)
    assert rig.pic.acknowledge() == 0x24
    rig.out(MASTER_PORT, 0x64)
    assert rig.registers(MASTER_PORT) == (0, 0)


def test_mask(rig: Rig) -> None:
    rig.out(MASTER_PORT + 1, 0xFE)
    rig.pic.set_irq(1, True)
    assert not rig.pic.intr
    rig.out(MASTER_PORT + 1, 0xFC)
    assert (rig.pic.intr, rig.inb(MASTER_PORT + 1)) == (True, 0xFC)


def test_request_that_goes_away_is_spurious(rig: Rig) -> None:
    rig.pic.set_irq(0, True)
    rig.pic.set_irq(0, False)
    assert rig.levels == [True, False]
    assert rig.pic.acknowledge() == 0x27
    assert rig.registers(MASTER_PORT) == (0, 0)


def test_slave_through_the_cascade(rig: Rig) -> None:
    rig.pic.set_irq(12, True)
    assert rig.pic.acknowledge() == 0x2C
    assert (rig.registers(MASTER_PORT)[1], rig.registers(SLAVE_PORT)[1]) == (4, 0x10)
    rig.pic.set_irq(14, True)
    rig.out(SLAVE_PORT, 0x20)
    assert not rig.pic.intr, "the master still serves IR2"
    rig.out(MASTER_PORT, 0x20)
    assert rig.pic.acknowledge() == 0x2E


def test_special_fully_nested_mode_lets_the_slave_nest() -> None:
    rig = Rig(icw4=0x11)
    rig.pic.set_irq(12, True)
    rig.pic.acknowledge()
    rig.pic.set_irq(8, True)
    assert rig.pic.acknowledge() == 0x28


def test_level_triggered_asks_until_the_line_falls(rig: Rig) -> None:
    rig.out(ELCR_PORT, 0xFF)
    rig.out(ELCR_PORT + 1, 0xFF)
    assert (rig.inb(ELCR_PORT), rig.inb(ELCR_PORT + 1)) == (0xF8, 0xDE)
    rig.pic.set_irq(11, True)
    assert rig.pic.acknowledge() == 0x2B
    for port in (SLAVE_PORT, MASTER_PORT):
        rig.out(port, 0x20)
    assert rig.pic.acknowledge() == 0x2B
    rig.pic.set_irq(11, False)
    for port in (SLAVE_PORT, MASTER_PORT):
        rig.out(port, 0x20)
    assert not rig.pic.intr


def test_automatic_eoi_and_rotation() -> None:
    rig = Rig(icw4=3)
    rig.out(MASTER_PORT, 0x80)  # rotate in automatic EOI mode
    for irq in (0, 1):
        rig.pic.set_irq(irq, True)
    assert rig.pic.acknowledge() == 0x20
    assert rig.registers(MASTER_PORT) == (2, 0)
    rig.pic.set_irq(0, False)
    rig.pic.set_irq(0, True)
    assert [rig.pic.acknowledge(), rig.pic.acknowledge()] == [0x21, 0x20]


def test_set_priority_and_rotate_on_eoi(rig: Rig) -> None:
    rig.out(MASTER_PORT, 0xC4)  # 4 lowest, 5 highest
    for irq in (0, 4, 5):
        rig.pic.set_irq(irq, True)
    assert rig.pic.acknowledge() == 0x25
    rig.out(MASTER_PORT, 0xA0)  # rotate on non-specific EOI: 5 lowest
    assert rig.pic.acknowledge() == 0x20


def test_special_mask_mode(rig: Rig) -> None:
    rig.pic.set_irq(1, True)
    rig.pic.acknowledge()
    rig.pic.set_irq(6, True)
    rig.out(MASTER_PORT + 1, 0x02)
    assert not rig.pic.intr
    rig.out(MASTER_PORT, 0x68)
    assert rig.pic.acknowledge() == 0x26
    rig.out(MASTER_PORT, 0x20)
    assert rig.registers(MASTER_PORT)[1] == 2, "a masked line keeps its service bit"


def test_poll(rig: Rig) -> None:
    rig.out(MASTER_PORT, 0x0C)
    assert rig.inb(MASTER_PORT) == 0
    rig.pic.set_irq(5, True)
    rig.out(MASTER_PORT, 0x0C)
    assert rig.inb(MASTER_PORT) == 0x85
    assert rig.registers(MASTER_PORT) == (0, 0x20)


def test_edges_must_be_seen_again_after_icw1(rig: Rig) -> None:
    rig.pic.set_irq(5, True)
    rig.out(MASTER_PORT, 0x13)
    rig.out(MASTER_PORT + 1, 0x40)
    rig.out(MASTER_PORT + 1, 0x01)
    assert not rig.pic.intr
    rig.pic.set_irq(5, False)
    rig.pic.set_irq(5, True)
    assert rig.pic.acknowledge() == 0x45


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]), st.integers(0, 255)),
            st.tuples(st.just(0), st.integers(0, 31)),
        )
    )
)
def test_any_programming_is_survived_and_intr_is_reported(steps: list[tuple[int, int]]) -> None:
    rig = Rig()
    for port, value in steps:
        if port:
            rig.out(port, value)
            rig.inb(port)
        else:
            rig.pic.set_irq(value & 15, value > 15)
        assert rig.pic.intr == (rig.levels[-1] if rig.levels else False)
        if rig.pic.intr:
            assert 0 <= rig.pic.acknowledge() <= 255
