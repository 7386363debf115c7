"""virtio-console."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.platform.pci.board import Board
from tests.platform.virtio.driver import Driver
from vmdbg.platform.pci.catalogue import DeviceError
from vmdbg.platform.serial import BufferSerial, NullSerial
from vmdbg.platform.virtio.console import MOST_INPUT, RECEIVE, TRANSMIT, Console


def console() -> tuple[Driver, BufferSerial, Console]:
    driver = Driver("virtio-console,slot=03.0")
    serial, device = BufferSerial(), driver.device
    assert isinstance(device, Console)
    device.serial = serial
    driver.start()
    return driver, serial, device


def test_output() -> None:
    driver, serial, _ = console()
    driver.request(TRANSMIT, [b"hello ", b"world\n"])
    assert serial.output == b"hello world\n"
    driver.board.bus.write_mmio(driver.bar + 0x2008, 4, ord("!"))
    assert serial.output == b"hello world\n!", "the emergency register"
    assert driver.config(0, 4) == 25 << 16 | 80


def test_input_waits_for_buffers() -> None:
    driver, serial, device = console()
    assert not device.poll()
    serial.input += b"typed"
    assert device.poll()
    driver.board.pass_time(100_000)
    places = driver.chain(RECEIVE, [], [3])
    places += driver.chain(RECEIVE, [], [10], first=1)
    driver.kick(RECEIVE)
    assert driver.used(RECEIVE) == [(0, 3), (1, 2)]
    assert driver.board.ram.read(places[0], 3) + driver.board.ram.read(places[1], 2) == b"typed"
    serial.input += b"x" * (MOST_INPUT + 100)
    device.poll()
    assert len(device._input) == MOST_INPUT


def test_where_it_leads(tmp_path: Path) -> None:
    board = Board(f"virtio-console,slot=03.0,chardev=file:{tmp_path / 'out'}")
    driver = Driver(board=board)
    driver.start()
    driver.request(TRANSMIT, [b"to a file"])
    assert not board.chipset.hears
    board.chipset.close()
    assert (tmp_path / "out").read_bytes() == b"to a file"
    listening = Board("virtio-console,chardev=tcp:0")
    assert listening.chipset.hears
    assert not listening.chipset.poll_input()
    listening.chipset.close()
    with pytest.raises(DeviceError, match="serial backend"):
        Board("virtio-console,chardev=frob")
    assert not Console(board.clock, NullSerial()).hears
