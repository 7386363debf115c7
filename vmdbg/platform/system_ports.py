"""The small ports of a PC: system control A (0x92) and B (0x61), the keyboard controller (0x60, 0x64), SMIs (0xb2)."""

from collections.abc import Callable

from vmdbg.platform.bus import State
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.pit import Channel, Pit

PORT_A, PORT_B = 0x92, 0x61
KEYBOARD_DATA, KEYBOARD_COMMAND = 0x60, 0x64
SMI_COMMAND = 0xB2


class PortA:
    """Port 0x92: bit 0, fast reset, on its rising edge; bit 1, A20."""

    name, title = "port92", "system control port A: fast reset, A20"

    def __init__(self, machine_reset: Callable[[], None], a20: Callable[[bool], None] = lambda on: None) -> None:
        """`a20` is told of this source of the line: it is on where this or the keyboard controller's is."""
        self.machine_reset = machine_reset
        self.a20 = a20
        self.reset()

    def reset(self) -> None:
        self._value = 2
        self.a20(True)

    def state(self) -> State:
        return {"value": self._value, "A20": "on" if self._value & 2 else "off"}

    def read_port(self, port: int, size: int) -> int:
        return self._value

    def write_port(self, port: int, size: int, value: int) -> None:
        rising = value & ~self._value & 1
        self._value = value & 3
        self.a20(bool(value & 2))
        if rising:
            self.machine_reset()


class PortB:
    """Port 0x61: bit 0 gates PIT channel 2, bit 1 lets its output to the speaker (there is none), bit 4 toggles with
    the memory refresh (15.085 us), bit 5 is channel 2's output.
    """

    name, title = "port61", "system control port B: the speaker's gate"
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

    def state(self) -> State:
        return {"value": self._value, "channel 2": "gated on" if self._value & 1 else "gated off"}

    def read_port(self, port: int, size: int) -> int:
        return self._value | (self.clock.now // self.REFRESH_TICKS & 1) << 4 | self._channel.out << 5

    def write_port(self, port: int, size: int, value: int) -> None:
        self._value = value & 0xF
        self._channel.set_gate(bool(value & 1))


class SmiPort:
    """Ports 0xb2 and 0xb3: writing a command to the first raises an SMI; both read back, and mean what its handler says."""

    name, title = "smi", "SMI command port"

    def __init__(self, smi: Callable[[], None]) -> None:
        self.smi = smi
        self.reset()

    def reset(self) -> None:
        self._values = [0, 0]

    def state(self) -> State:
        return {"command": self._values[0], "status": self._values[1]}

    def read_port(self, port: int, size: int) -> int:
        return self._values[port & 1]

    def write_port(self, port: int, size: int, value: int) -> None:
        self._values[port & 1] = value
        if port == SMI_COMMAND:
            self.smi()


class KeyboardController:
    """An 8042 with its auxiliary (PS/2) port, and nothing plugged into either: self-tests, command byte, A20,
    bytes looped back to the output buffer with their interrupts, and reset by 0xfe.

    A write to the data port is a command's argument, or goes to a keyboard that does not answer.
    """

    name, title = "keyboard", "8042 keyboard controller, nothing plugged in"
    READ_COMMAND_BYTE, WRITE_COMMAND_BYTE = 0x20, 0x60
    DISABLE_AUX, ENABLE_AUX, DISABLE_KEYBOARD, ENABLE_KEYBOARD = 0xA7, 0xA8, 0xAD, 0xAE
    AUX_TEST, SELF_TEST, PORT_TEST = 0xA9, 0xAA, 0xAB
    READ_OUTPUT, WRITE_OUTPUT, A20_OFF, A20_ON = 0xD0, 0xD1, 0xDD, 0xDF
    WRITE_KEYBOARD_BUFFER, WRITE_AUX_BUFFER, WRITE_AUX = 0xD2, 0xD3, 0xD4
    STATUS_OUTPUT_FULL, STATUS_SYSTEM, STATUS_COMMAND, STATUS_UNLOCKED, STATUS_AUX = 1, 4, 8, 0x10, 0x20
    KEYBOARD_INTERRUPT, AUX_INTERRUPT, KEYBOARD_OFF, AUX_OFF = 1, 2, 0x10, 0x20
    """Bits of the command byte."""

    TAKES_ARGUMENT = frozenset((WRITE_COMMAND_BYTE, WRITE_OUTPUT, WRITE_KEYBOARD_BUFFER, WRITE_AUX_BUFFER, WRITE_AUX))

    def __init__(
        self, machine_reset: Callable[[], None], keyboard_irq: Callable[[bool], None], aux_irq: Callable[[bool], None],
        a20: Callable[[bool], None] = lambda on: None,
    ) -> None:  # fmt: skip
        self.machine_reset = machine_reset
        self.a20 = a20
        self.keyboard_irq, self.aux_irq = keyboard_irq, aux_irq
        self.reset()

    def reset(self) -> None:
        self._command_byte = 0x34  # tested, both ports disabled
        self._set_output(3)  # A20 on, reset line high
        self._data: int | None = None
        self._aux = False
        self._argument_of: int | None = None
        self._last_was_command = False
        self._interrupt()

    def state(self) -> State:
        data = "empty" if self._data is None else f"{self._data:#x}"
        return {"command byte": self._command_byte, "output buffer": f"{data}{' (auxiliary)' if self._aux else ''}"}

    def _set_output(self, value: int) -> None:
        self._output = value
        self.a20(bool(value & 2))

    def read_port(self, port: int, size: int) -> int:
        if port == KEYBOARD_DATA:
            data, self._data = self._data, None
            self._interrupt()
            return data or 0
        status = self.STATUS_SYSTEM | self.STATUS_UNLOCKED
        status |= self.STATUS_COMMAND if self._last_was_command else 0
        if self._data is None:
            return status
        return status | self.STATUS_OUTPUT_FULL | (self.STATUS_AUX if self._aux else 0)

    def write_port(self, port: int, size: int, value: int) -> None:
        self._last_was_command = port == KEYBOARD_COMMAND
        if port == KEYBOARD_DATA:
            command, self._argument_of = self._argument_of, None
            if command is not None:
                self._take(command, value)
        else:
            self._argument_of = value if value in self.TAKES_ARGUMENT else None
            self._command(value)
        self._interrupt()

    def _command(self, value: int) -> None:
        if value >= 0xF0:  # pulse the output lines whose bit is 0; line 0 is the reset
            if not value & 1:
                self.machine_reset()
        elif value == self.READ_COMMAND_BYTE:
            self._answer(self._command_byte)
        elif value in (self.A20_OFF, self.A20_ON):
            self._set_output(self._output & ~2 | value & 2)
        elif value == self.READ_OUTPUT:
            self._answer(self._output)
        elif value == self.SELF_TEST:
            self._answer(0x55)
        elif value in (self.PORT_TEST, self.AUX_TEST):
            self._answer(0x00)
        elif value == self.DISABLE_AUX:
            self._command_byte |= self.AUX_OFF
        elif value == self.ENABLE_AUX:
            self._command_byte &= ~self.AUX_OFF
        elif value == self.DISABLE_KEYBOARD:
            self._command_byte |= self.KEYBOARD_OFF
        elif value == self.ENABLE_KEYBOARD:
            self._command_byte &= ~self.KEYBOARD_OFF

    def _take(self, command: int, value: int) -> None:
        """The argument of a command."""
        if command == self.WRITE_COMMAND_BYTE:
            self._command_byte = value
        elif command == self.WRITE_OUTPUT:
            self._set_output(value)
            if not value & 1:
                self.machine_reset()
        elif command == self.WRITE_KEYBOARD_BUFFER:
            self._answer(value)
        elif command == self.WRITE_AUX_BUFFER:
            self._answer(value, aux=True)

    def _answer(self, value: int, *, aux: bool = False) -> None:
        self._data, self._aux = value, aux

    def _interrupt(self) -> None:
        """A full output buffer holds the line of its side up, where the command byte lets it."""
        full = self._data is not None
        self.keyboard_irq(full and not self._aux and bool(self._command_byte & self.KEYBOARD_INTERRUPT))
        self.aux_irq(full and self._aux and bool(self._command_byte & self.AUX_INTERRUPT))
