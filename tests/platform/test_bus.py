import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdbg.platform.bus import Bus


class Bytes:
    """A device whose port or offset n holds one byte, and that records how it was accessed."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self.sizes: list[int] = []

    def read_port(self, port: int, size: int) -> int:
        self.sizes.append(size)
        return sum(self.bytes.get(port + i, 0) << 8 * i for i in range(size))

    def write_port(self, port: int, size: int, value: int) -> None:
        self.sizes.append(size)
        for i in range(size):
            self.bytes[port + i] = value >> 8 * i & 0xFF

    read_mmio = read_port
    write_mmio = write_port


def test_unclaimed_reads_are_all_ones_and_are_counted() -> None:
    bus = Bus()
    assert bus.read_port(0x80, 1) == 0xFF
    assert bus.read_port(0x80, 4) == 0xFFFFFFFF
    bus.write_port(0x81, 1, 0)
    assert bus.read_mmio(0xFED00004, 8) == (1 << 64) - 1
    assert bus.unclaimed == {("port", 0x80): 2, ("port", 0x81): 1, ("mmio", 0xFED00000): 1}


def test_the_unclaimed_counter_is_bounded() -> None:
    bus = Bus()
    for port in range(0x10000):
        bus.read_port(port, 1)
    assert len(bus.unclaimed) <= Bus.UNCLAIMED_KEYS + 1
    assert bus.unclaimed.total() == 0x10000


def test_wide_accesses_are_split_by_width_and_range() -> None:
    bus, device = Bus(), Bytes()
    bus.add_ports(0x10, 0x13, device, width=2)
    bus.write_port(0x10, 4, 0x44332211)
    assert device.sizes == [2, 2]
    assert bus.read_port(0x12, 4) == 0xFFFF4433
    assert bus.read_port(0x0F, 4) == 0x332211FF


def test_the_last_port_has_no_neighbour() -> None:
    bus, device = Bus(), Bytes()
    bus.add_ports(0xFFFF, 0xFFFF, device)
    bus.write_port(0xFFFF, 2, 0x1234)
    assert bus.read_port(0xFFFF, 2) == 0xFF34


def test_overlaps_are_refused_and_ranges_listed() -> None:
    bus = Bus()
    bus.add_mmio(0x2000, 0x2FFF, Bytes())
    bus.add_mmio(0x0, 0xFFF, Bytes())
    with pytest.raises(ValueError, match=r"0x2fff\.\.0x3000 overlap 0x2000\.\.0x2fff of Bytes"):
        bus.add_mmio(0x2FFF, 0x3000, Bytes())
    bus.add_ports(0x70, 0x71, Bytes())
    with pytest.raises(ValueError, match="port 0x71 already belongs to Bytes"):
        bus.add_ports(0x71, 0x72, Bytes())
    assert bus.mmio_ranges() == [(0, 0xFFF), (0x2000, 0x2FFF)]
    bus.remove_mmio(0)
    assert bus.mmio_ranges() == [(0x2000, 0x2FFF)]
    with pytest.raises(KeyError, match="no MMIO range"):
        bus.remove_mmio(0)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8), st.sampled_from([1, 2, 4, 8])), max_size=4),
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))),
)
def test_splitting_never_loses_or_moves_a_byte(
    claims: list[tuple[int, int, int]], accesses: list[tuple[int, int, int]]
) -> None:
    bus = Bus()
    model: dict[int, int] = {}
    for first, length, width in claims:
        if all(a not in model for a in range(first, first + length)):
            bus.add_mmio(first, first + length - 1, Bytes(), width)
            model.update(dict.fromkeys(range(first, first + length), 0))
    for address, size, value in accesses:
        expected = sum(model.get(address + i, 0xFF) << 8 * i for i in range(size))
        assert bus.read_mmio(address, size) == expected
        bus.write_mmio(address, size, value)
        for i in range(size):
            if address + i in model:
                model[address + i] = value >> 8 * i & 0xFF
