from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.rtc import RTC_PORT, Rtc

A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D


class Rig:
    def __init__(self, start: datetime = datetime(2024, 2, 28, 23, 59, 58, tzinfo=UTC), ram: int = 64 << 20) -> None:
        self.clock, self.level, self.interrupts = Clock(), False, 0
        self.rtc = Rtc(self.clock, self.irq, ram, start)

    def irq(self, level: bool) -> None:
        self.interrupts += level and not self.level
        self.level = level

    def get(self, index: int) -> int:
        self.rtc.write_port(RTC_PORT, 1, index | 0x80)
        return self.rtc.read_port(RTC_PORT + 1, 1)

    def put(self, index: int, value: int) -> None:
        self.rtc.write_port(RTC_PORT, 1, index)
        self.rtc.write_port(RTC_PORT + 1, 1, value)

    def time(self) -> list[int]:
        return [self.get(index) for index in (0x32, 9, 8, 7, 4, 2, 0)]

    def go(self, ticks: int) -> None:
        end = self.clock.now + ticks
        while (deadline := self.clock.next_deadline()) is not None and deadline <= end:
            self.clock.now = deadline
            self.clock.fire()
        self.clock.now = end


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_time_starts_fixed_and_follows_guest_time(rig: Rig) -> None:
    assert rig.time() == [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x58]
    assert rig.get(6) == 4, "Wednesday"
    rig.go(2 * TICKS_PER_SECOND)
    assert rig.time() == [0x20, 0x24, 0x02, 0x29, 0, 0, 0]
    assert (rig.get(A) & 0x80, rig.get(D)) == (0, 0x80)


def test_binary_and_12_hour_formats(rig: Rig) -> None:
    rig.put(B, 0x06)
    assert rig.time() == [20, 24, 2, 28, 23, 59, 58]
    rig.put(B, 0x00)
    assert rig.get(4) == 0x91
    rig.put(4, 0x12)  # 12 am
    rig.put(B, 0x02)
    assert rig.get(4) == 0


def test_setting_stops_and_restarts(rig: Rig) -> None:
    rig.put(B, 0x86)
    rig.go(5 * TICKS_PER_SECOND)
    for index, value in ((7, 1), (8, 12), (9, 99), (0x32, 19), (4, 1), (2, 2), (0, 3), (6, 1)):
        rig.put(index, value)
    assert rig.time() == [19, 99, 12, 1, 1, 2, 3]
    rig.put(B, 0x06)
    rig.go(TICKS_PER_SECOND)
    assert rig.time() == [19, 99, 12, 1, 1, 2, 4]
    rig.put(8, 13)
    assert rig.get(8) == 12


def test_memory_sizes() -> None:
    rig = Rig(ram=5 << 30)
    assert rig.get(0x34) | rig.get(0x35) << 8 == (0xC0000000 - (16 << 20)) >> 16
    assert rig.get(0x5B) | rig.get(0x5C) << 8 | rig.get(0x5D) << 16 == ((5 << 30) - 0xC0000000) >> 16
    assert (rig.get(0x15) | rig.get(0x16) << 8, rig.get(0x17), rig.get(0x18)) == (640, 0xFF, 0xFF)


def test_memory_keeps_what_is_written(rig: Rig) -> None:
    rig.put(0x40, 0x5A)
    rig.put(D, 0)
    rig.rtc.reset()
    assert (rig.get(0x40), rig.get(D)) == (0x5A, 0x80)


def test_periodic_interrupt(rig: Rig) -> None:
    rig.put(A, 0x26)  # 1024 Hz
    rig.put(B, 0x42)
    for _ in range(5):
        rig.go(TICKS_PER_SECOND // 1024)
        assert rig.level
        assert rig.get(C) == 0xC0
        assert not rig.level
    rig.go(TICKS_PER_SECOND)
    assert rig.interrupts == 6, "no further interrupt until C was read"
    rig.put(B, 0x02)
    rig.get(C)
    rig.go(TICKS_PER_SECOND)
    assert not rig.level


def test_update_and_alarm_interrupts(rig: Rig) -> None:
    rig.put(B, 0x12)
    rig.go(TICKS_PER_SECOND)
    assert rig.get(C) & 0x90 == 0x90
    rig.put(1, 0x03)
    rig.put(3, 0xC0)
    rig.put(5, 0xFF)
    rig.put(B, 0x22)
    rig.go(3 * TICKS_PER_SECOND)
    assert not rig.level
    rig.go(TICKS_PER_SECOND)
    assert rig.level
    assert rig.get(C) & 0xA0 == 0xA0


step = st.tuples(st.integers(0, 127), st.integers(0, 255), st.integers(0, TICKS_PER_SECOND // 64))


def test_the_last_year_is_out_of_reach(rig: Rig) -> None:
    rig.put(B, 0x16)
    for index, value in ((0x32, 99), (9, 99), (8, 12), (7, 31), (4, 23), (2, 59), (0, 59)):
        rig.put(index, value)
    rig.go(3 * TICKS_PER_SECOND)
    assert rig.time()[:3] == [21, 0, 1]


@given(st.lists(step, max_size=30))
def test_any_programming_is_survived(steps: list[tuple[int, int, int]]) -> None:
    rig = Rig()
    for index, value, ticks in steps:
        rig.put(index, value)
        assert 0 <= rig.get(index) <= 255
        rig.go(ticks)
