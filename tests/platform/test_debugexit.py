import pytest

from vmdbg.platform.bus import Bus
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.debugexit import (
    DEBUG_EXIT_PORT,
    PM_PORT,
    RESET_CONTROL_PORT,
    DebugExit,
    PowerManagement,
    ResetControl,
)


@pytest.mark.parametrize(("size", "value", "status"), [(1, 0, 1), (1, 0x10, 0x21), (4, 0x80000000, 0x100000001)])
def test_debug_exit(size: int, value: int, status: int) -> None:
    log: list[int] = []
    bus = Bus()
    bus.add_ports(DEBUG_EXIT_PORT, DEBUG_EXIT_PORT + 3, DebugExit(log.append), width=4)
    bus.write_port(DEBUG_EXIT_PORT, size, value)
    assert log == [status]


def test_soft_off_needs_slp_en_and_type_zero() -> None:
    log: list[int] = []
    clock, bus = Clock(), Bus()
    bus.add_ports(PM_PORT, PM_PORT + 11, PowerManagement(clock, log.append), width=4)
    bus.write_port(PM_PORT + 4, 2, 0x3400)
    bus.write_port(PM_PORT + 4, 2, 0x0001)
    bus.write_port(PM_PORT + 2, 2, 0x0120)
    assert log == []
    assert bus.read_port(PM_PORT, 4) == 0x01200000
    assert bus.read_port(PM_PORT + 4, 2) == 1
    bus.write_port(PM_PORT + 4, 2, 0x2000)
    assert log == [0]
    bus.write_port(PM_PORT + 5, 1, 0x20)
    assert log == [0, 0]
    clock.now = TICKS_PER_SECOND
    assert bus.read_port(PM_PORT + 8, 4) == 3_579_545


def test_reset_control_wants_a_rising_edge() -> None:
    log: list[str] = []
    device = ResetControl(lambda: log.append("reset"))
    device.write_port(RESET_CONTROL_PORT, 1, 0x02)
    assert log == []
    device.write_port(RESET_CONTROL_PORT, 1, 0x06)
    device.write_port(RESET_CONTROL_PORT, 1, 0x06)
    assert log == ["reset"]
