from vmdbg.platform.system_ports import KEYBOARD_COMMAND, KEYBOARD_DATA, PORT_A, SMI_COMMAND, KeyboardController, PortA, SmiPort


def test_port_a_resets_on_the_rising_edge() -> None:
    log: list[str] = []
    port = PortA(lambda: log.append("reset"))
    assert port.read_port(PORT_A, 1) == 2
    port.write_port(PORT_A, 1, 0x02)
    assert log == []
    port.write_port(PORT_A, 1, 0xFF)
    port.write_port(PORT_A, 1, 0x03)
    assert (log, port.read_port(PORT_A, 1)) == (["reset"], 3)


def test_keyboard_controller() -> None:
    log: list[str] = []
    device = KeyboardController(lambda: log.append("reset"))

    def ask(command: int) -> int | None:
        device.write_port(KEYBOARD_COMMAND, 1, command)
        full = device.read_port(KEYBOARD_COMMAND, 1) & 1
        return device.read_port(KEYBOARD_DATA, 1) if full else None

    assert [ask(command) for command in (0xAA, 0xAB, 0x20, 0xD0, 0xAE)] == [0x55, 0, 0x34, 3, None]
    assert device.read_port(KEYBOARD_COMMAND, 1) & 3 == 0, "never busy"
    device.write_port(KEYBOARD_COMMAND, 1, 0x60)
    device.write_port(KEYBOARD_DATA, 1, 0x47)
    device.write_port(KEYBOARD_DATA, 1, 0xED)
    assert ask(0x20) == 0x47
    device.write_port(KEYBOARD_COMMAND, 1, 0xD1)
    device.write_port(KEYBOARD_DATA, 1, 0xDF)
    assert log == []
    device.write_port(KEYBOARD_COMMAND, 1, 0xFF)
    assert log == []
    device.write_port(KEYBOARD_COMMAND, 1, 0xFE)
    device.write_port(KEYBOARD_COMMAND, 1, 0xD1)
    device.write_port(KEYBOARD_DATA, 1, 0xDE)
    assert log == ["reset", "reset"]


def test_smi_port() -> None:
    log: list[str] = []
    device = SmiPort(lambda: log.append("smi"))
    device.write_port(SMI_COMMAND + 1, 1, 0x77)
    assert log == []
    device.write_port(SMI_COMMAND, 1, 0x5A)
    assert log == ["smi"]
    assert [device.read_port(SMI_COMMAND + n, 1) for n in range(2)] == [0x5A, 0x77]
