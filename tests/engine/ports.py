"""A port that answers with numbers in sequence and remembers what it was asked."""

from __future__ import annotations

from vmdbg.platform.bus import Bus

PORT = 0x5000


class Ports:
    """At `PORT`, up to four bytes wide: the n-th byte read from it is n."""

    def __init__(self, bus: Bus) -> None:
        self.log: list[tuple[int, int, int | None]] = []
        """(port, bytes, value written or None)."""
        self.next = 1
        bus.add_ports(PORT, PORT + 3, self, width=4)

    def read_port(self, port: int, size: int) -> int:
        self.log.append((port, size, None))
        data = bytes(range(self.next, self.next + size))
        self.next += size
        return int.from_bytes(data, "little")

    def write_port(self, port: int, size: int, value: int) -> None:
        self.log.append((port, size, value))
