"""The guest's serial port under a console."""

from __future__ import annotations

from vmdbg.console.serial import ConsoleSerial


def port() -> tuple[ConsoleSerial, list[str]]:
    shown: list[str] = []
    serial = ConsoleSerial()
    serial.show = shown.append
    return serial, shown


def test_lines() -> None:
    serial, shown = port()
    serial.write(b"one\r\ntw")
    serial.write(b"o\nthr")
    assert shown == ["one", "two"]
    serial.close()
    assert shown == ["one", "two", "thr"]


def test_a_line_without_an_end_is_shown_when_nothing_follows() -> None:
    serial, shown = port()
    serial.write(b"/ #")
    serial.rest()
    serial.write(b" ")
    serial.rest()
    assert shown == []
    serial.rest()
    assert shown == ["/ # "]
    serial.rest()
    assert shown == ["/ # "]


def test_very_long_lines_and_no_text() -> None:
    serial, shown = port()
    serial.write(b"x" * 10_000 + b"\n")
    assert "".join(shown) == "x" * 10_000
    shown.clear()
    serial.write(b"\xff\xfe\n")
    assert shown == ["\ufffd\ufffd"]


def test_what_is_for_a_terminal_is_left_out() -> None:
    serial, shown = port()
    serial.write(b"\x1b[1;32mgreen\x1b[0m / # \x1b[6n\n")
    assert shown == ["green / # "]


def test_what_is_sent() -> None:
    serial, _ = port()
    serial.send(b"ls\n")
    serial.send(b"pwd\n")
    assert serial.receive() == b"ls\npwd\n"
    assert serial.receive() == b""
