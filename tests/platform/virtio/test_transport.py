"""The transport and the queues of virtio, on virtio-rng: negotiation, rings, interrupts, broken drivers."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from struct import pack, unpack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.pci import COMMAND, CapabilityId, capabilities
from tests.platform.virtio.driver import BUFFERS, INDIRECT, NEXT, READY, VERSION_1, WHERE, WRITE, Driver, parts
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.virtio.queue import MOST_BYTES, NO_INTERRUPT
from vmdbg.platform.virtio.transport import ACCESS_PLATFORM, COMMON_CFG, EVENT_INDEX, INDIRECT_DESCRIPTORS, NOTIFY, STATUS

RNG = "virtio-rng,slot=03.0,seed=7"


@pytest.fixture
def driver() -> Driver:
    return Driver(RNG)


def started(**options: bool) -> Driver:
    driver = Driver(RNG)
    driver.start(**options)
    return driver


def test_identity_and_structures(driver: Driver) -> None:
    assert driver.board.read(WHERE, 0) == 0x1044_1AF4
    assert driver.board.read(WHERE, 8, 1) == 1
    assert parts(driver) == {1: (0, 0, 56), 3: (0, 0x1000, 1), 2: (0, NOTIFY, 4), 5: (0, 0, 0)}


def test_negotiation(driver: Driver) -> None:
    assert driver.features == INDIRECT_DESCRIPTORS | EVENT_INDEX | VERSION_1 | ACCESS_PLATFORM
    for wrong in (INDIRECT_DESCRIPTORS, VERSION_1 | 1 << 5, 0):
        driver.write("device_status", 0)
        driver.write("device_status", STATUS.ACKNOWLEDGE | STATUS.DRIVER)
        driver.accept(wrong)
        driver.write("device_status", READY)
        assert driver.status == STATUS.ACKNOWLEDGE | STATUS.DRIVER, "not these features"
    driver.accept(VERSION_1)
    driver.write("device_status", READY)
    driver.accept(VERSION_1 | INDIRECT_DESCRIPTORS)
    driver.write("driver_feature_select", 0)
    assert driver.read("driver_feature") == 0, "too late"
    driver.write("device_feature_select", 2)
    assert driver.read("device_feature") == 0


def test_queue_registers(driver: Driver) -> None:
    assert driver.read("num_queues") == 1
    assert driver.read("queue_size") == 256
    for size, kept in ((3, 256), (0, 256), (512, 256), (64, 64)):
        driver.write("queue_size", size)
        assert driver.read("queue_size") == kept
    driver.write("queue_desc", 0x1122334455667788)
    assert driver.read("queue_desc") == 0x1122334455667788
    driver.board.bus.write_mmio(driver.bar + COMMON_CFG.offset_of("queue_driver"), 8, 0x8877665544332211)
    assert driver.read("queue_driver") == 0x8877665544332211
    driver.write("queue_enable", 1)
    driver.write("queue_desc", 0)
    assert driver.read("queue_desc") == 0x1122334455667788, "an enabled queue stays where it is"
    driver.write("queue_msix_vector", 5)
    assert driver.read("queue_msix_vector") == 0xFFFF, "there is no such vector"
    driver.write("queue_select", 1)
    assert driver.read("queue_size") == driver.read("queue_desc") == 0, "there is no such queue"
    driver.write("device_status", 0)
    assert driver.read("queue_size") == 256


def test_random_bytes_from_a_seed() -> None:
    driver = started()
    found = driver.request(0, [], [10, 6])
    assert found == Random(7).randbytes(16)
    assert started().request(0, [], [16]) == found


def test_indices_wrap_around() -> None:
    """At the ring's size and at 65536."""
    driver = started()
    queue = driver.device.queues[0]
    queue._taken = queue._used = driver.next[0] = driver.seen[0] = 0xFFF4
    driver.board.ram.write(driver.ring(0) + 0x4002, b"\xf4\xff")
    driver.board.ram.write(driver.ring(0) + 0x8002, b"\xf4\xff")
    for count in (3, 8, 5, 8):
        for index in range(count):
            driver.describe(0, index, BUFFERS, 4, WRITE)
            driver.offer(0, index)
        driver.kick(0)
        assert driver.used(0) == [(index, 4) for index in range(count)]


def test_pin_and_isr() -> None:
    driver = started()
    driver.request(0, [], [4])
    pins = driver.board.chipset.ioapic
    assert pins.pins >> 16
    assert driver.isr() == 1
    assert (driver.isr(), pins.pins) == (0, 0)
    driver.board.ram.write(driver.ring(0) + 0x4000, b"\1\0")
    driver.request(0, [], [4])
    assert (driver.isr(), pins.pins) == (0, 0), "the driver wanted no interrupt"


def test_msix() -> None:
    driver = started(messages=True)
    driver.request(0, [], [4])
    assert driver.board.apic.taken == [(0x51, DeliveryMode.FIXED, False)]
    assert driver.isr() == 0
    driver.describe(0, 0, BUFFERS, 4, WRITE | NEXT, 99)
    driver.offer(0, 0)
    driver.kick(0)
    assert driver.board.apic.taken[1:] == [(0x50, DeliveryMode.FIXED, False)], "the configuration has changed: it is broken"


def test_event_indices() -> None:
    """Each side says of which entry it wants to hear: the driver by used_event, the device by avail_event, once it has none left."""
    driver = Driver(RNG)
    driver.start(features=VERSION_1 | ACCESS_PLATFORM | EVENT_INDEX, messages=True)
    ram, ring = driver.board.ram, driver.ring(0)
    used_event, avail_event = ring + 0x4000 + 4 + 2 * driver.size, ring + 0x8000 + 4 + 8 * driver.size
    ram.write(ring + 0x4000, pack("<H", NO_INTERRUPT))

    def interrupts(wanted: int, requests: int) -> int:
        ram.write(used_event, pack("<H", wanted))
        for first in range(requests):
            driver.chain(0, [], [8], first)
        before = len(driver.board.apic.taken)
        driver.kick(0)
        assert len(driver.used(0)) == requests
        return len(driver.board.apic.taken) - before

    assert interrupts(0, 1) == 1, "whatever the flag says"
    assert unpack("<H", ram.read(avail_event, 2)) == (1,)
    assert interrupts(0, 2) == 0, "that one has been"
    assert interrupts(4, 1) == 0, "not yet"
    assert interrupts(4, 3) == 1
    assert unpack("<H", ram.read(avail_event, 2)) == (7,)
    driver.start(features=VERSION_1 | ACCESS_PLATFORM, messages=True)
    driver.next, driver.seen = [0], [0]
    for at in (ring + 0x4002, ring + 0x8002):
        ram.write(at, bytes(2))
    assert interrupts(0, 1) == 0, "without the feature the flag counts"


def test_indirect_descriptors() -> None:
    driver = started()
    ram, table = driver.board.ram, BUFFERS + 0x8000
    for index, (address, length) in enumerate(((BUFFERS, 5), (BUFFERS + 0x100, 7))):
        flags = WRITE | (NEXT if index == 0 else 0)
        ram.write(table + 16 * index, address.to_bytes(8, "little") + length.to_bytes(4, "little") + bytes([flags, 0, 1, 0]))
    driver.describe(0, 3, table, 32, INDIRECT)
    driver.offer(0, 3)
    driver.kick(0)
    assert driver.used(0) == [(3, 12)]
    assert ram.read(BUFFERS, 5) + ram.read(BUFFERS + 0x100, 7) == Random(7).randbytes(12)


def _too_many(driver: Driver) -> None:
    driver.next[0] = 20
    driver.offer(0, 0)


def _table(length: int, flags: int = INDIRECT) -> Callable[[Driver], None]:
    def lay(driver: Driver) -> None:
        driver.describe(0, 0, BUFFERS, length, flags)
        driver.offer(0, 0)

    return lay


def _nested(driver: Driver) -> None:
    driver.board.ram.write(BUFFERS, (BUFFERS).to_bytes(8, "little") + (16).to_bytes(4, "little") + bytes([INDIRECT, 0, 0, 0]))
    _table(16)(driver)


def _loop(driver: Driver) -> None:
    for index in range(8):
        driver.describe(0, index, BUFFERS, 1, WRITE | NEXT, (index + 1) % 8)
    driver.offer(0, 0)


def _order(driver: Driver) -> None:
    driver.describe(0, 0, BUFFERS, 4, WRITE | NEXT, 1)
    driver.describe(0, 1, BUFFERS, 4, 0)
    driver.offer(0, 0)


def _huge(driver: Driver) -> None:
    driver.describe(0, 0, BUFFERS, MOST_BYTES + 1, WRITE)
    driver.offer(0, 0)


def _nowhere(driver: Driver) -> None:
    driver.describe(0, 0, 0xD0000000, 4, WRITE)
    driver.offer(0, 0)


def _ring_nowhere(driver: Driver) -> None:
    driver.device.queues[0].driver = 0xFFFFFFFFFFFFFFFE


def _no_master(driver: Driver) -> None:
    driver.chain(0, [], [4])
    driver.board.command(WHERE, 0, drop=COMMAND.BUS_MASTER)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (_too_many, "holds"), (_table(15), "indirect"), (_table(0), "indirect"), (_table(16, INDIRECT | NEXT), "indirect"),
        (_nested, "indirect"), (_loop, "more than 8"), (_order, "behind one to write"), (_huge, "request of more"),
        (_nowhere, "no memory"), (_ring_nowhere, "64 bits"), (_no_master, "bus mastering"),
    ],
)  # fmt: skip
def test_a_broken_driver_is_told(break_it: Callable[[Driver], None], words: str) -> None:
    """DEVICE_NEEDS_RESET, and nothing more happens until there is one."""
    driver = started()
    break_it(driver)
    driver.kick(0)
    assert driver.status & STATUS.NEEDS_RESET
    assert words in driver.device.trouble
    assert words in str(driver.device.state()["trouble"])
    driver.kick(0)
    assert driver.used(0) == []
    driver.board.command(WHERE)
    driver.next = [0]
    driver.seen = [0]
    driver.board.ram.write(driver.ring(0), bytes(0x9000))
    driver.start()
    assert len(driver.request(0, [], [4])) == 4


def test_much_work_is_done_in_pieces() -> None:
    """A guest that asks for gigabytes at once is served, some at a time."""
    driver = started()
    for index in range(8):
        driver.describe(0, index, BUFFERS, 2 << 20, WRITE)
        driver.offer(0, index)
    driver.kick(0)
    first = len(driver.used(0))
    assert 0 < first < 8
    for _ in range(8):
        driver.board.pass_time(100_000)
    assert len(driver.used(0)) == 8 - first


def test_the_window_in_configuration_space(driver: Driver) -> None:
    """4.1.4.9: registers without a mapped BAR."""
    config = bytes(driver.device.config.bytes)
    at = next(at for at, number in capabilities(config) if number == CapabilityId.VENDOR and config[at + 3] == 5)
    board = driver.board

    def aim(offset: int, size: int) -> None:
        board.write(WHERE, at + 4, 0, 1)
        board.write(WHERE, at + 8, offset)
        board.write(WHERE, at + 12, size)

    aim(COMMON_CFG.offset_of("num_queues"), 2)
    assert board.read(WHERE, at + 16) == 1
    aim(COMMON_CFG.offset_of("device_status"), 1)
    board.write(WHERE, at + 16, 1, 1)
    assert driver.status == STATUS.ACKNOWLEDGE
    before = bytes(driver.device.config.bytes)
    aim(0x5000, 4)
    board.read(WHERE, at + 16)
    board.write(WHERE, at + 16, 0xFFFFFFFF)
    assert driver.status == STATUS.ACKNOWLEDGE, "beyond the BAR there is nothing"
    assert before != bytes(driver.device.config.bytes)


def test_a_reset_forgets_what_was_to_come() -> None:
    driver = started()
    driver.chain(0, [], [4])
    driver.board.bus.write_mmio(driver.bar + NOTIFY, 2, 0)
    driver.write("device_status", 0)
    driver.board.pass_time(1_000_000)
    assert driver.used(0) == []
    driver.next = [0]
    driver.start()
    driver.board.bus.write_mmio(driver.bar + NOTIFY, 2, 0)
    driver.device.function_level_reset()
    driver.board.pass_time(1_000_000)
    assert driver.used(0) == []


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=60), st.integers(0, 0xFFFF), st.integers(1, 8))
def test_any_rings_are_survived(table: bytes, ring: bytes, index: int, kicks: int) -> None:
    """Descriptors and rings of random bytes, laid out over each other."""
    driver = started()
    ram = driver.board.ram
    ram.write(driver.ring(0), table)
    ram.write(driver.ring(0) + 0x4004, ring)
    ram.write(driver.ring(0) + 0x4002, index.to_bytes(2, "little"))
    for _ in range(kicks):
        driver.kick(0)
    driver.write("device_status", 0)
    assert driver.status == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)), max_size=60))
def test_any_register_writes_are_survived(writes: list[tuple[int, int, int]]) -> None:
    driver = Driver(RNG)
    for offset, size, value in writes:
        driver.board.bus.write_mmio(driver.bar + offset % 0x40, size, value & (1 << 8 * size) - 1)
        driver.board.bus.write_mmio(driver.bar + offset, size, value & (1 << 8 * size) - 1)
        driver.board.bus.read_mmio(driver.bar + offset, size)
        driver.board.pass_time(20_000)
