from functools import partial

from vmdbg.platform.system_ports import (
    KEYBOARD_COMMAND,
    KEYBOARD_DATA,
    PORT_A,
    SMI_COMMAND,
    KeyboardController,
    PortA,
    SmiPort,
)


def test_port_a_resets_on_the_rising_edge() -> None:
    log: list[str] = []
    port = PortA(lambda: log.append("reset"))
    assert port.read_port(PORT_A, 1) == 2
    port.write_port(PORT_A, 1, 0x02)
    assert log == []
    port.write_port(PORT_A, 1, 0xFF)
    port.write_port(PORT_A, 1, 0x03)
    assert (log, port.read_port(PORT_A, 1)) == (["reset"], 3)


class Keyboard(KeyboardController):
    """One whose resets are counted and whose lines can be looked at."""

    def __init__(self) -> None:
        self.resets = 0
        self.lines = {1: False, 12: False}
        super().__init__(self._count, partial(self.lines.__setitem__, 1), partial(self.lines.__setitem__, 12))

    def _count(self) -> None:
        self.resets += 1

    def ask(self, command: int, argument: int | None = None) -> int | None:
        """What a command answers; with bit 8 set if it comes from the auxiliary port."""
        self.write_port(KEYBOARD_COMMAND, 1, command)
        if argument is not None:
            self.write_port(KEYBOARD_DATA, 1, argument)
        status = self.read_port(KEYBOARD_COMMAND, 1)
        return self.read_port(KEYBOARD_DATA, 1) | status << 3 & 0x100 if status & 1 else None


def test_keyboard_controller() -> None:
    device = Keyboard()
    assert [device.ask(command) for command in (0xAA, 0xAB, 0x20, 0xD0, 0xAE)] == [0x55, 0, 0x34, 3, None]
    assert device.read_port(KEYBOARD_COMMAND, 1) & 3 == 0, "never busy"
    device.ask(0x60, 0x47)
    device.write_port(KEYBOARD_DATA, 1, 0xED)
    assert device.ask(0x20) == 0x47
    device.ask(0xD1, 0xDF)
    assert device.resets == 0
    device.write_port(KEYBOARD_COMMAND, 1, 0xFF)
    assert device.resets == 0
    device.write_port(KEYBOARD_COMMAND, 1, 0xFE)
    device.ask(0xD1, 0xDE)
    assert device.resets == 2


def test_auxiliary_port() -> None:
    """What a driver looks for before it believes that there is one."""
    device = Keyboard()
    assert device.ask(0xA9) == 0
    assert device.ask(0xD3, 0xA5) == 0x1A5
    assert device.ask(0xD2, 0x5A) == 0x5A
    assert device.ask(0xD4, 0xF2) is None, "no mouse answers"
    for off, on, bit in ((0xA7, 0xA8, 0x20), (0xAD, 0xAE, 0x10)):
        device.ask(on)
        assert device.ask(0x20) is not None
        assert (device.ask(0x20) or 0) & bit == 0
        device.ask(off)
        assert (device.ask(0x20) or 0) & bit == bit


def test_a_full_output_buffer_interrupts_where_the_command_byte_lets_it() -> None:
    device = Keyboard()
    for interrupts in (0, 3):
        device.ask(0x60, 0x34 | interrupts)
        for command, line in ((0xD2, 1), (0xD3, 12)):
            device.write_port(KEYBOARD_COMMAND, 1, command)
            assert device.lines == {1: False, 12: False}
            device.write_port(KEYBOARD_DATA, 1, 7)
            assert device.lines == {1: False, 12: False, line: bool(interrupts)}
            assert device.read_port(KEYBOARD_DATA, 1) == 7
            assert device.lines == {1: False, 12: False}


def test_smi_port() -> None:
    log: list[str] = []
    device = SmiPort(lambda: log.append("smi"))
    device.write_port(SMI_COMMAND + 1, 1, 0x77)
    assert log == []
    device.write_port(SMI_COMMAND, 1, 0x5A)
    assert log == ["smi"]
    assert [device.read_port(SMI_COMMAND + n, 1) for n in range(2)] == [0x5A, 0x77]
