"""Where software finds IOMMUs: the PCI capability, the IVRS, and which device is behind which."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from struct import unpack_from

import pytest

from introspect.iommu.registers import CONTROL
from introspect.pci import RequesterId
from tests.iommu.rig import DATA, Bench
from tests.patience import PATIENCE
from tests.platform.pci.board import Board
from tests.platform.test_acpi import tables
from vmdbg.iommu.config import IommuConfig, Reserved
from vmdbg.iommu.registers import FEATURES_BUILT
from vmdbg.iommu.translator import BASE
from vmdbg.machine import Config, Machine
from vmdbg.platform import acpi
from vmdbg.platform.chipset import IOAPIC_REQUESTER
from vmdbg.platform.pci.dma import DmaError

DEVICES = ("edu,slot=03.0", "bridge,slot=04.0,id=port", "edu,bus=port", "pci-bridge,slot=05.0,id=old", "edu,bus=old,slot=07.0")


def board(units: int = 1, reserved: tuple[str, ...] = ()) -> Board:
    return Board(*DEVICES, iommu=IommuConfig(units, reserved=tuple(map(Reserved.parse, reserved))))


def ivrs(made: Board) -> bytes:
    made.chipset.leave_tables([0])
    return tables(made.ram.read(acpi.BASE, acpi.LIMIT - acpi.BASE))["IVRS"]


def blocks(table: bytes) -> list[bytes]:
    at, found = 48, []
    while at < len(table):
        (length,) = unpack_from("<H", table, at + 2)
        found.append(table[at : at + length])
        at += length
    return found


def entries(block: bytes) -> list[tuple[int, bytes]]:
    at, found = 24 if block[0] == 0x10 else 40, []
    while at < len(block):
        length = 4 << (block[at] >> 6)
        found.append((block[at], block[at : at + length]))
        at += length
    return found


def test_the_function_and_its_capability() -> None:
    made = board()
    assert made.read("00:00.2", 0) == 0x14191022
    assert made.read("00:00.2", 8) >> 8 == 0x080600
    at = made.capability("00:00.2", 0x0F)
    assert made.read("00:00.2", at) >> 16 & 7 == 3
    assert made.read("00:00.2", at + 4) == BASE | 1
    assert made.read("00:00.0", 0x0E, 1) & 0x80, "the host bridge's device has several functions"


def test_what_the_table_says_of_all() -> None:
    """IVinfo, table 88: EFRSup, no DMA remapping before the system starts, addresses of 57, 52 and 64 bits."""
    made = board()
    table = ivrs(made)
    assert (table[8], unpack_from("<IQ", table, 36)) == (2, (1 | 3 << 5 | 52 << 8 | 64 << 15, 0))


def test_memory_of_devices_behind_another_iommu() -> None:
    made = board(2, ("00:04.0,0x200000-0x200fff",))
    assert [block[0] for block in blocks(ivrs(made))] == [0x10, 0x10, 0x21, 0x11, 0x11, 0x21, 0x40, 0x40, 0x21]


def test_the_base_is_locked() -> None:
    made = board()
    at = made.capability("00:00.2", 0x0F)
    made.write("00:00.2", at + 4, 0xF0000000)
    made.write("00:00.2", at + 8, 1)
    assert (made.read("00:00.2", at + 4), made.read("00:00.2", at + 8)) == (BASE | 1, 0)


def test_every_type_of_ivhd_says_the_same() -> None:
    found = [block for block in blocks(ivrs(board())) if block[0] in (0x10, 0x11, 0x40)]
    assert [block[0] for block in found] == [0x10, 0x11, 0x40]
    for block in found:
        device, _, base, segment = unpack_from("<HHQH", block, 4)
        assert (device, base, segment) == (2, BASE, 0)
        assert entries(block) == entries(found[0])
        if block[0] != 0x10:
            assert unpack_from("<Q", block, 24) == (FEATURES_BUILT,)


def test_all_devices_the_io_apic_and_aliases() -> None:
    """What has an alias is in no other range (5.2.2.1)."""
    found = entries(blocks(ivrs(board()))[0])
    assert [entry for kind, entry in found if kind in (2, 3, 4)] == [
        bytes([3, 8, 0, 0]), bytes([4, 0xFF, 1, 0]), bytes([3, 0, 3, 0]), bytes([4, 0xFF, 0xFF, 0]), bytes([4, 0xFF, 2, 0]),
    ]  # fmt: skip
    special = next(entry for kind, entry in found if kind == 0x48)
    assert (unpack_from("<H", special, 5), special[7]) == ((IOAPIC_REQUESTER,), 1)
    alias = next(entry for kind, entry in found if kind == 0x43)
    assert (unpack_from("<H", alias, 1), unpack_from("<H", alias, 5)) == ((0x200,), (5 << 3,))


def test_memory_that_is_reserved() -> None:
    made = board(reserved=("all,0x100000-0x1fffff", "00:03.0,0x200000-0x200fff,r", "00:03.0-00:05.7,0x300000-0x300fff,exclusion"))
    every = blocks(ivrs(made))
    assert [block[0] for block in every] == [kind for ivhd in (0x10, 0x11, 0x40) for kind in (ivhd, 0x20, 0x21, 0x22)]
    found = every[1:4]
    assert every[5:8] == every[9:12] == found, "an IVMD is about the IVHD before it (5.2.2)"
    assert [(block[0], block[1], *unpack_from("<HH", block, 4), *unpack_from("<QQ", block, 16)) for block in found] == [
        (0x20, 7, 0, 0, 0x100000, 0x100000), (0x21, 3, 0x18, 0, 0x200000, 0x1000), (0x22, 8, 0x18, 0x2F, 0x300000, 0x1000),
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", ["", "all", "all,0x1000-0x1fff,x", "00:03.0,0x1001-0x1fff", "x,0x1000-0x1fff", "all,0x2000-0xfff"])
def test_reserved_memory_that_is_none(wrong: str) -> None:
    with pytest.raises(ValueError, match="write"):
        Reserved.parse(wrong)


def test_several_share_the_devices() -> None:
    """In turn by slots of the root bus, with the buses behind; each translates for its own and for no other."""
    made = board(2)
    assert made.chipset.iommus is not None
    first, second = made.chipset.iommus.units
    assert [entry for kind, entry in entries(blocks(ivrs(made))[1]) if kind in (3, 4)] == [
        bytes([3, 0x20, 0, 0]), bytes([4, 0x27, 0, 0]), bytes([3, 0, 1, 0]), bytes([4, 0xFF, 1, 0]),
    ]  # fmt: skip
    owners = {str(function.address): made.chipset.iommus.unit_for(function.requester) for function in made.root.functions}
    assert owners == {
        "00:00.0": None, "00:00.2": None, "00:00.3": None, "00:03.0": first, "00:04.0": second, "01:00.0": second,
        "00:05.0": first, "02:07.0": first,
    }  # fmt: skip


def test_each_has_its_own_registers_and_tables() -> None:
    bench = Bench(*DEVICES, units=2, number=1)
    behind = RequesterId.make(1, 0, 0)
    bench.give({0x1000: DATA}, device=behind)
    bench.dma.write(behind, 0x1000, b"second")
    bench.dma.write(RequesterId.make(0, 3, 0), 0x2000, b"first is off")
    assert bench.ram.read(DATA, 6) == b"second"
    assert bench.ram.read(0x2000, 12) == b"first is off"
    with pytest.raises(DmaError):
        bench.dma.read(behind, 0x2000, 4)
    assert len(bench.events()) == 1
    assert bench.bus.read_mmio(BASE + 0x18, 8) == CONTROL.Coherent


def test_devices_behind_a_conventional_bridge_are_the_bridge() -> None:
    bench = Bench(*DEVICES)
    bench.give({0x1000: DATA}, device=5 << 3)
    edu = bench.function("edu", 2)
    bench.command("00:05.0")
    bench.command("02:07.0")
    edu.dma_write(0x1000, b"old")
    assert bench.ram.read(DATA, 3) == b"old"


@pytest.mark.skipif(shutil.which("iasl") is None, reason="no iasl; apt install acpica-tools")
@pytest.mark.parametrize("units", [1, 3])
def test_iasl_reads_it(units: int, tmp_path: Path) -> None:
    """Type 40h, of later date, it does not know."""
    iommus = board(units, ("all,0x100000-0x1fffff", "00:03.0,0x200000-0x200fff,r")).chipset.iommus
    assert iommus is not None
    data = iommus.acpi_table(IOAPIC_REQUESTER, (0x10, 0x11))
    (tmp_path / "IVRS.aml").write_bytes(data)
    taken = subprocess.run(["iasl", "-d", "IVRS.aml"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=True)
    source = (tmp_path / "IVRS.dsl").read_text()
    for complaint in ("Error", "Invalid", "Unknown", "Warning", "Could not"):
        assert complaint not in taken.stdout + taken.stderr + source
    assert source.count("Hardware Definition Block") == 2 * units
    made = subprocess.run(["iasl", "-p", "again", "IVRS.dsl"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert made.returncode == 0, made.stdout + made.stderr
    assert (tmp_path / "again.aml").read_bytes()[36:] == data[36:]


def test_a_machine_with_two() -> None:
    machine = Machine(b"\xf4", Config(memory=16 << 20, flat_address=0x1000, mode="real", iommu=IommuConfig(2)))
    try:
        assert "IVRS" in tables(machine.ram.read(acpi.BASE, acpi.LIMIT - acpi.BASE))
        assert machine.bus.read_mmio(BASE + 0x4030, 8) == FEATURES_BUILT
    finally:
        machine.close()
