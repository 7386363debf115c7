from struct import unpack

import pytest

from vmdbg.platform.bus import Bus
from vmdbg.platform.fwcfg import FW_CFG_PORT, FwCfg, FwCfgContents


class Guest:
    def __init__(self, contents: FwCfgContents) -> None:
        self.bus, device = Bus(), FwCfg(contents)
        self.bus.add_ports(FW_CFG_PORT, FW_CFG_PORT + 1, device, width=2)

    def read(self, key: int, size: int) -> bytes:
        self.bus.write_port(FW_CFG_PORT, 2, key)
        return bytes(self.bus.read_port(FW_CFG_PORT + 1, 1) for _ in range(size))


def test_items() -> None:
    guest = Guest(FwCfgContents(128 << 20, 4, "quiet", kernel=b"KERNEL", initrd=b"INITRD"))
    assert guest.read(0, 6) == b"QEMU\0\0"
    assert guest.read(1, 4) == b"\x01\0\0\0", "no DMA"
    assert unpack("<Q", guest.read(3, 8)) == (128 << 20,)
    assert (guest.read(5, 2), guest.read(0x0F, 2)) == (b"\x04\0", b"\x04\0")
    assert unpack("<I", guest.read(0x14, 4)) == (6,)
    assert guest.read(0x15, 7) == b"quiet\0\0"
    assert (guest.read(8, 1), guest.read(0x11, 6), guest.read(0x12, 6)) == (b"\x06", b"KERNEL", b"INITRD")
    assert guest.read(0x1234, 3) == bytes(3)
    assert guest.read(0x4000, 4) == b"QEMU", "the write channel reads the same"


def test_directory() -> None:
    guest = Guest(FwCfgContents(1 << 20, 1, files={"opt/b": b"second", "opt/a": b"1"}))
    (count,) = unpack(">I", guest.read(0x19, 4))
    assert count == 2
    directory = guest.read(0x19, 4 + 64 * 2)[4:]
    entries = [unpack(">IHH56s", directory[at : at + 64]) for at in (0, 64)]
    assert [(size, name.rstrip(b"\0")) for size, _, _, name in entries] == [(1, b"opt/a"), (6, b"opt/b")]
    assert guest.read(entries[1][1], 6) == b"second"


@pytest.mark.parametrize("name", ["", "x" * 56, "a\0b"])
def test_names_the_directory_cannot_hold(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 55 bytes without NUL"):
        FwCfg(FwCfgContents(1 << 20, 1, files={name: b""}))
