"""The small ports of a PC: system control A (0x92) and B (0x61), the keyboard controller (0x60, 0x64), SMIs (0xb2)."""

from collections.abc import Callable

from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.pit import Channel, Pit

PORT_A, PORT_B = 0x92, 0x61
KEYBOARD_DATA, KEYBOARD_COMMAND = 0x60, 0x64
SMI_COMMAND = 0xB2


class PortA:
    """Port 0x92: bit 0, fast reset, on its rising edge; bit 1, A20, reads back but A20 is always on."""

    def __init__(self, machine_reset: Callable[[], None]) -> None:
        self.machine_reset = machine_reset
        self.reset()

    def reset(self) -> None:
        self._value = 2

    def read_port(self, port: int, size: int) -> int:
        return self._value

    def write_port(self, port: int, size: int, value: int) -> None:
        rising = value & ~self._value & 1
        self._value = value & 3
        if rising:
            self.machine_reset()


class PortB:
    """Port 0x61: bit 0 gates PIT channel 2, bit 1 lets its output to the speaker (there is none), bit 4 toggles with
    the memory refresh (15.085 us), bit 5 is channel 2's output.
    """

    REFRESH_TICKS = TICKS_PER_SECOND * 15_085 // 1_000_000_000

    def __init__(self, clock: Clock, pit: Pit) -> None:
        self.clock = clock
        self.pit = pit
        self._value = 0

    def reset(self) -> None:
        self._value = 0
        self._channel.set_gate(False)

    @property
    def _channel(self) -> Channel:
        return self.pit.channels[2]

    def read_port(self, port: int, size: int) -> int:
        return self._value | (self.clock.now // self.REFRESH_TICKS & 1) << 4 | self._channel.out << 5

    def write_port(self, port: int, size: int, value: int) -> None:
        self._value = value & 0xF
        self._channel.set_gate(bool(value & 1))


class SmiPort:
    """Ports 0xb2 and 0xb3: writing a command to the first raises an SMI; both read back, and mean what its handler says."""

    def __init__(self, smi: Callable[[], None]) -> None:
        self.smi = smi
        self.reset()

    def reset(self) -> None:
        self._values = [0, 0]

    def read_port(self, port: int, size: int) -> int:
        return self._values[port & 1]

    def write_port(self, port: int, size: int, value: int) -> None:
        self._values[port & 1] = value
        if port == SMI_COMMAND:
            self.smi()


class KeyboardController:
    """What is left of an 8042 without keyboard: self-tests, command byte, A20 (always on), and reset by 0xfe.

    A write to the data port is a command's argument, or goes to a keyboard that does not answer.
    """

    SELF_TEST, PORT_TEST, READ_COMMAND_BYTE, WRITE_COMMAND_BYTE = 0xAA, 0xAB, 0x20, 0x60
    READ_OUTPUT, WRITE_OUTPUT = 0xD0, 0xD1
    STATUS_OUTPUT_FULL, STATUS_SYSTEM, STATUS_COMMAND, STATUS_UNLOCKED = 1, 4, 8, 0x10

    def __init__(self, machine_reset: Callable[[], None]) -> None:
        self.machine_reset = machine_reset
        self.reset()

    def reset(self) -> None:
        self._command_byte = 0x34  # tested, both ports disabled
        self._output = 3  # A20 on, reset line high
        self._data: int | None = None
        self._argument_of: int | None = None
        self._last_was_command = False

    def read_port(self, port: int, size: int) -> int:
        if port == KEYBOARD_DATA:
            data, self._data = self._data, None
            return data or 0
        status = self.STATUS_SYSTEM | self.STATUS_UNLOCKED
        status |= self.STATUS_COMMAND if self._last_was_command else 0
        return status | (self.STATUS_OUTPUT_FULL if self._data is not None else 0)

    def write_port(self, port: int, size: int, value: int) -> None:
        self._last_was_command = port == KEYBOARD_COMMAND
        if port == KEYBOARD_DATA:
            command, self._argument_of = self._argument_of, None
            if command == self.WRITE_COMMAND_BYTE:
                self._command_byte = value
            elif command == self.WRITE_OUTPUT:
                self._output = value | 2
                if not value & 1:
                    self.machine_reset()
            return
        self._argument_of = value if value in (self.WRITE_COMMAND_BYTE, self.WRITE_OUTPUT) else None
        if value >= 0xF0:  # pulse the output lines whose bit is 0; line 0 is the reset
            if not value & 1:
                self.machine_reset()
        elif value == self.READ_COMMAND_BYTE:
            self._data = self._command_byte
        elif value == self.READ_OUTPUT:
            self._data = self._output
        elif value == self.SELF_TEST:
            self._data = 0x55
        elif value == self.PORT_TEST:
            self._data = 0x00
