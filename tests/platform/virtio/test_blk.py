"""virtio-blk, and the images behind it."""

from __future__ import annotations

import errno
from pathlib import Path
from struct import pack
from tempfile import NamedTemporaryFile
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.platform.pci.board import Board
from tests.platform.virtio.driver import Driver
from tests.platform.virtio.qcow2 import CLUSTER, qcow2
from vmdbg.platform.pci.catalogue import DeviceError
from vmdbg.platform.virtio.blk import FLUSH, READ_ONLY, Blk
from vmdbg.platform.virtio.disk import SECTOR, DiskError, Overlay, open_disk
from vmdbg.platform.virtio.transport import STATUS

SECTORS = 64


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([number]) * SECTOR for number in range(SECTORS)))
    return path


def disk(image: Path, options: str = "") -> Driver:
    driver = Driver(f"virtio-blk,slot=03.0,file={image}{options}")
    driver.start()
    return driver


def head(kind: int, sector: int = 0) -> bytes:
    return pack("<IIQ", kind, 0, sector)


def read(driver: Driver, sector: int, count: int = 1) -> tuple[int, bytes]:
    found = driver.request(0, [head(0, sector)], [count * SECTOR, 1])
    return found[-1], found[:-1]


def write(driver: Driver, sector: int, data: bytes) -> int:
    return driver.request(0, [head(1, sector), data], [1])[0]


def test_configuration(image: Path) -> None:
    driver = disk(image)
    assert driver.config(0, 8) == SECTORS
    assert driver.config(20, 4) == SECTOR
    assert driver.features & FLUSH
    assert not driver.features & READ_ONLY
    assert driver.device.state()["sectors"] == SECTORS


def test_reads_and_writes(image: Path) -> None:
    driver = disk(image)
    before = image.read_bytes()
    assert read(driver, 5, 2) == (0, b"\5" * SECTOR + b"\6" * SECTOR)
    assert write(driver, 5, b"x" * 2 * SECTOR) == 0
    assert read(driver, 4, 4) == (0, b"\4" * SECTOR + b"x" * 2 * SECTOR + b"\7" * SECTOR)
    assert driver.request(0, [head(4)], [1]) == b"\0"
    assert image.read_bytes() == before, "a guest never changes the user's file"
    assert read(disk(image), 5) == (0, b"\5" * SECTOR), "and another run finds it as it was"


def test_the_overlay_outlives_a_reset_of_the_device(image: Path) -> None:
    driver = disk(image)
    write(driver, 5, b"x" * SECTOR)
    driver.next, driver.seen = [0], [0]
    driver.board.ram.write(driver.ring(0), bytes(0x9000))
    driver.start()
    assert read(driver, 5) == (0, b"x" * SECTOR)


def test_the_file_itself_if_asked(image: Path) -> None:
    driver = disk(image, ",write=on")
    assert write(driver, 63, b"y" * SECTOR) == 0
    assert driver.request(0, [head(4)], [1]) == b"\0"
    driver.device.close()
    assert image.read_bytes()[-SECTOR:] == b"y" * SECTOR


def test_what_is_refused(image: Path) -> None:
    driver = disk(image)
    assert read(driver, 64)[0] == 1, "beyond the end"
    assert read(driver, 63, 2)[0] == 1
    assert write(driver, 1 << 60, b"x" * SECTOR) == 1
    assert write(driver, 0, b"x" * 100) == 1, "no whole sector"
    assert driver.request(0, [head(99)], [1]) == b"\2"
    assert driver.request(0, [head(8)], [20, 1]) == b"vmdbg".ljust(20, b"\0") + b"\0"
    guarded = disk(image, ",readonly=on,serial=S1")
    assert guarded.features & READ_ONLY
    assert write(guarded, 0, b"x" * SECTOR) == 1
    assert guarded.request(0, [head(8)], [20, 1])[:2] == b"S1"


@pytest.mark.parametrize(("out", "into"), [([b"short"], [1]), ([head(0)], []), ([], [1])])
def test_requests_that_are_none(image: Path, out: list[bytes], into: list[int]) -> None:
    driver = disk(image)
    driver.chain(0, out, into)
    driver.kick(0)
    assert driver.status & STATUS.NEEDS_RESET


def test_a_file_that_fails(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = disk(image)
    assert isinstance(driver.device, Blk)

    def fail(offset: int, length: int) -> NoReturn:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(driver.device.disk, "read", fail)
    assert read(driver, 0)[0] == 1


def test_qcow2(tmp_path: Path) -> None:
    pytest.importorskip("dissect.hypervisor")
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2(4 * CLUSTER, {1: b"one" * SECTOR, 3: b"three"}))
    before = path.read_bytes()
    driver = disk(path)
    assert driver.config(0, 8) == 4 * CLUSTER // SECTOR
    assert read(driver, 0) == (0, bytes(SECTOR))
    assert read(driver, CLUSTER // SECTOR) == (0, (b"one" * SECTOR)[:SECTOR])
    assert write(driver, 3 * CLUSTER // SECTOR, b"new" + bytes(SECTOR - 3)) == 0
    assert read(driver, 3 * CLUSTER // SECTOR)[1][:5] == b"new\0\0"
    assert path.read_bytes() == before


def test_qcow2_names_no_other_file(tmp_path: Path) -> None:
    """An image from elsewhere must not make the host's files the guest's."""
    pytest.importorskip("dissect.hypervisor")
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2(CLUSTER, {}, "/etc/passwd"))
    with pytest.raises(DiskError, match="needs another file, /etc/passwd"):
        open_disk(str(path))


@given(st.binary(max_size=200))
def test_any_qcow2_header(data: bytes) -> None:
    pytest.importorskip("dissect.hypervisor")
    with NamedTemporaryFile() as file:
        file.write(b"QFI\xfb" + data)
        file.flush()
        with pytest.raises(DiskError):
            open_disk(file.name)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("", "file=disk.img"), (",file=/no/such", "No such file"), (",file=/", "Is a directory"), (",file=/dev/null", "neither"),
        (",file={image},write=on,readonly=on", "exclude"), (",file={empty}", "is empty"), (",file={qcow2},write=on", "only read"),
        (",file={qcow2}", "no qcow2 image"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_used(image: Path, tmp_path: Path, options: str, error: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "broken").write_bytes(b"QFI\xfb")
    with pytest.raises(DeviceError, match=error):
        Board(f"virtio-blk{options.format(image=image, empty=tmp_path / 'empty', qcow2=tmp_path / 'broken')}")


def test_without_the_library_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dissect.hypervisor.disk.qcow2", None)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2(CLUSTER, {}))
    with pytest.raises(DiskError, match=r"pip install 'vmdbg\[qcow2\]'"):
        open_disk(str(path))


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.size
        return self.data[offset : offset + length]

    def write(self, offset: int, data: bytes) -> NoReturn:
        raise AssertionError("an overlay does not write through")

    def flush(self) -> None: ...

    def close(self) -> None: ...


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(1, 40), st.booleans(), st.integers(0, 255)), max_size=30))
def test_an_overlay_is_a_disk(accesses: list[tuple[int, int, bool, int]]) -> None:
    """Compared with plain bytes."""
    plain = bytearray(number % 251 for number in range(40 * SECTOR))
    overlay = Overlay(Bytes(bytes(plain)))
    for sector, count, is_write, byte in accesses:
        offset, length = sector * SECTOR, min(count, 40 - sector) * SECTOR
        if is_write:
            overlay.write(offset, bytes([byte]) * length)
            plain[offset : offset + length] = bytes([byte]) * length
        assert overlay.read(offset, length) == plain[offset : offset + length]
    assert overlay.read(0, 40 * SECTOR) == plain
