"""How a guest ends the run or resets the machine: debug exit, ACPI power management, reset control."""

from collections.abc import Callable

from vmdbg.platform.bus import State
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock

DEBUG_EXIT_PORT = 0xF4
PM_PORT = 0x600
RESET_CONTROL_PORT = 0xCF9


class DebugExit:
    """QEMU's isa-debug-exit: writing v ends the run with status (v << 1) | 1, never 0."""

    name, title = "debug-exit", "ends the run with a status"

    def __init__(self, machine_exit: Callable[[int], None]) -> None:
        self.machine_exit = machine_exit

    def state(self) -> State:
        return {}

    def read_port(self, port: int, size: int) -> int:
        return 0

    def write_port(self, port: int, size: int, value: int) -> None:
        self.machine_exit(value << 1 | 1)


class PowerManagement:
    """The ACPI PM1a event (+0, +2) and control (+4) registers and the PM timer (+8), 12 ports (ACPI 4.8.3).

    Writing PM1a_CNT with SLP_EN and SLP_TYP 0, QEMU's soft-off (0x2000), ends the run with status 0.
    """

    name, title = "power", "ACPI power management: PM1a, PM timer"
    TIMER_HZ = 3_579_545
    SCI_EN, SLP_TYP, SLP_EN = 1 << 0, 7 << 10, 1 << 13

    def __init__(self, clock: Clock, machine_exit: Callable[[int], None], base: int = PM_PORT) -> None:
        self.clock = clock
        self.machine_exit = machine_exit
        self.base = base
        self.reset()

    def reset(self) -> None:
        self._enable = 0
        self._control = self.SCI_EN  # there is no firmware to hand over: the machine is in ACPI mode

    def state(self) -> State:
        return {"PM1a_EN": self._enable, "PM1a_CNT": self._control, "timer": self._timer()}

    def _timer(self) -> int:
        return self.clock.now * self.TIMER_HZ // TICKS_PER_SECOND & 0xFFFFFF

    def read_port(self, port: int, size: int) -> int:
        registers = self._enable << 16 | self._control << 32 | self._timer() << 64
        return registers >> 8 * (port - self.base) & ((1 << 8 * size) - 1)

    def write_port(self, port: int, size: int, value: int) -> None:
        shift = 8 * (port - self.base)
        mask = ((1 << 8 * size) - 1) << shift
        registers = (self._enable << 16 | self._control << 32) & ~mask | value << shift
        self._enable = registers >> 16 & 0xFFFF
        self._control = registers >> 32 & (self.SLP_TYP | self.SCI_EN)
        if registers >> 32 & self.SLP_EN and mask >> 32 & self.SLP_EN and not self._control & self.SLP_TYP:
            self.machine_exit(0)


class ResetControl:
    """Port 0xcf9: bit 2 going from 0 to 1 resets; bit 1 says whether the reset is a hard one."""

    name, title = "reset", "reset control"

    def __init__(self, reset: Callable[[], None]) -> None:
        self.machine_reset = reset
        self._value = 0

    def reset(self) -> None:
        self._value = 0

    def state(self) -> State:
        return {"value": self._value}

    def read_port(self, port: int, size: int) -> int:
        return self._value

    def write_port(self, port: int, size: int, value: int) -> None:
        rising = value & ~self._value & 4
        self._value = value & 0x0E
        if rising:
            self.machine_reset()
