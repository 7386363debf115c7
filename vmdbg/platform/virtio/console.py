"""virtio-console with its one port (virtio 1.2, 5.3): a second serial line, /dev/hvc0 in Linux."""

from __future__ import annotations

from struct import pack

from vmdbg.platform.clock import Clock
from vmdbg.platform.serial import FileSerial, NullSerial, Serial
from vmdbg.platform.virtio.transport import VirtioDevice

SIZE, EMERGENCY_WRITE = 1 << 0, 1 << 2
"""Features: the terminal's size, and a register for output before any queue is there."""
COLUMNS, ROWS = 80, 25
RECEIVE, TRANSMIT = 0, 1
MOST_INPUT = 1 << 16
"""Bytes of input that wait for the driver; more is dropped."""


class Console(VirtioDevice):
    kind, title = "virtio-console", "a serial line"
    class_code = 0x078000
    type, queue_count, config_size = 3, 2, 12

    def __init__(self, clock: Clock, serial: Serial | None = None) -> None:
        super().__init__(clock)
        self.serial = serial or NullSerial()
        self._input = bytearray()

    def device_features(self) -> int:
        return SIZE | EMERGENCY_WRITE

    def device_config(self) -> bytes:
        return pack("<HHII", COLUMNS, ROWS, 1, 0)

    def write_device_config(self, offset: int, size: int, value: int) -> None:
        if offset == 8:
            self.serial.write(bytes([value & 0xFF]))

    def poll(self) -> bool:
        """Take what came in since the last time."""
        data = self.serial.receive()
        self._input += data[: max(MOST_INPUT - len(self._input), 0)]
        if data:
            self.on_input(self.name, data)
            self.wake(RECEIVE)
        return bool(data)

    @property
    def hears(self) -> bool:
        return not isinstance(self.serial, NullSerial | FileSerial)

    def started(self) -> None:
        self.wake(RECEIVE)

    def close(self) -> None:
        self.serial.close()

    def serve(self, number: int) -> None:
        if number == TRANSMIT:
            while (chain := self.take(TRANSMIT)) is not None:
                self.serial.write(self.queues[TRANSMIT].data(chain))
                self.give_back(TRANSMIT, chain)
            return
        while self._input and (chain := self.take(RECEIVE)) is not None:
            piece = bytes(self._input[: chain.room])
            del self._input[: len(piece)]
            self.queues[RECEIVE].put(chain, piece)
            self.give_back(RECEIVE, chain)
