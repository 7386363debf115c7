"""QEMU's firmware configuration device (qemu docs/specs/fw_cfg), port interface; DMA is not advertised."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import pack

from vmdbg.platform.bus import State

FW_CFG_PORT = 0x510
"""Selector: 16-bit writes here.  Data: byte reads at the next port."""

SIGNATURE, ID, RAM_SIZE, NB_CPUS, MAX_CPUS, FILE_DIR, FILE_FIRST = 0x00, 0x01, 0x03, 0x05, 0x0F, 0x19, 0x20
KERNEL_ADDR, KERNEL_SIZE, INITRD_ADDR, INITRD_SIZE, KERNEL_ENTRY = 0x07, 0x08, 0x0A, 0x0B, 0x10
KERNEL_DATA, INITRD_DATA, CMDLINE_ADDR, CMDLINE_SIZE, CMDLINE_DATA = 0x11, 0x12, 0x13, 0x14, 0x15
MAX_NAME = 55


@dataclass(frozen=True, slots=True)
class FwCfgContents:
    """What the guest finds.  `command_line` is stored with its NUL; kernel and initrd only where a loader set them."""

    ram_size: int
    cpus: int
    command_line: str = ""
    kernel: bytes = b""
    initrd: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)


class FwCfg:
    """Items by key; each read takes the next byte of the selected item, zeros after its end.

    ValueError for a file name the directory cannot hold.
    """

    name, title = "fw-cfg", "QEMU's firmware configuration"

    def __init__(self, contents: FwCfgContents) -> None:
        command_line = contents.command_line.encode("utf-8", "surrogateescape") + b"\0"
        self._items = {
            SIGNATURE: b"QEMU",
            ID: pack("<I", 1),  # the traditional interface, no DMA
            RAM_SIZE: pack("<Q", contents.ram_size),
            NB_CPUS: pack("<H", contents.cpus),
            MAX_CPUS: pack("<H", contents.cpus),
            KERNEL_ADDR: pack("<I", 0),
            KERNEL_ENTRY: pack("<I", 0),
            KERNEL_SIZE: pack("<I", len(contents.kernel)),
            KERNEL_DATA: contents.kernel,
            INITRD_ADDR: pack("<I", 0),
            INITRD_SIZE: pack("<I", len(contents.initrd)),
            INITRD_DATA: contents.initrd,
            CMDLINE_ADDR: pack("<I", 0),
            CMDLINE_SIZE: pack("<I", len(command_line)),
            CMDLINE_DATA: command_line,
        }
        directory = pack(">I", len(contents.files))
        for key, (name, data) in enumerate(sorted(contents.files.items()), FILE_FIRST):
            encoded = name.encode()
            if not encoded or len(encoded) > MAX_NAME or b"\0" in encoded:
                raise ValueError(f"fw_cfg file name {name!r} is not 1 to {MAX_NAME} bytes without NUL; shorten it")
            directory += pack(">IHH56s", len(data), key, 0, encoded)
            self._items[key] = data
        self._items[FILE_DIR] = directory
        self.reset()

    def reset(self) -> None:
        self._selected, self._offset = b"", 0

    def state(self) -> State:
        key = next((key for key, data in self._items.items() if data is self._selected), None)
        item = "none" if key is None else f"{key:#x}"
        return {"items": len(self._items), "selected": item, "offset": self._offset, "size": len(self._selected)}

    def read_port(self, port: int, size: int) -> int:
        """At the data port, one byte; the selector port reads as zero."""
        if port == FW_CFG_PORT or self._offset >= len(self._selected):
            return 0
        value = self._selected[self._offset]
        self._offset += 1
        return value

    def write_port(self, port: int, size: int, value: int) -> None:
        """A word at the selector port chooses an item; bit 14, the write channel, is obsolete.  The rest is ignored."""
        if port == FW_CFG_PORT and size == 2:
            self._selected, self._offset = self._items.get(value & ~0x4000, b""), 0
