"""The ACPI tables: checksums, and what Intel's own disassembler and compiler say of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from struct import unpack_from

import pytest

from tests.patience import PATIENCE
from vmdbg.machine import Config, Machine
from vmdbg.platform import acpi, aml

IASL = pytest.mark.skipif(shutil.which("iasl") is None, reason="no iasl; apt install acpica-tools")
BOARD = acpi.Board(range(4), (0x400000000, 0x7FFFFFFFF), True, True)


def tables(memory: bytes) -> dict[str, bytes]:
    """By signature, as software finds them from the RSDP on."""
    assert memory[:8] == b"RSD PTR "
    assert sum(memory[:20]) & 0xFF == sum(memory[:36]) & 0xFF == 0
    xsdt = at(memory, unpack_from("<Q", memory, 24)[0])
    found = [at(memory, address) for (address,) in (unpack_from("<Q", xsdt, 36 + 8 * n) for n in range((len(xsdt) - 36) // 8))]
    fadt = next(one for one in found if one[:4] == b"FACP")
    facs, dsdt = unpack_from("<II", fadt, 36)
    assert unpack_from("<QQ", fadt, 132) == (facs, dsdt)
    found += [at(memory, dsdt), xsdt]
    for one in found:
        assert sum(one) & 0xFF == 0, one[:4]
    assert facs % 64 == 0
    return {one[:4].decode(): one for one in found} | {"FACS": at(memory, facs)}


def at(memory: bytes, address: int) -> bytes:
    start = address - acpi.BASE
    return memory[start : start + unpack_from("<I", memory, start + 4)[0]]


def test_they_are_found_from_the_rsdp() -> None:
    found = tables(acpi.build(BOARD, [acpi.table(b"IVRS", 2, bytes(12))]))
    assert set(found) == {"FACP", "FACS", "APIC", "MCFG", "HPET", "TPM2", "DSDT", "XSDT", "IVRS"}


def test_a_machine_has_them_in_memory() -> None:
    machine = Machine(b"\xf4", Config(memory=16 << 20, cpus=3, flat_address=0x1000, mode="real"))
    try:
        madt = tables(machine.ram.read(acpi.BASE, acpi.LIMIT - acpi.BASE))["APIC"]
        assert [madt[44 + 8 * n + 3] for n in range(3)] == [0, 1, 2]
    finally:
        machine.close()


@IASL
@pytest.mark.parametrize("board", [BOARD, acpi.Board([0])], ids=["four", "one"])
def test_they_disassemble_and_compile_again(board: acpi.Board, tmp_path: Path) -> None:
    for name, data in tables(acpi.build(board)).items():
        if name == "XSDT":
            continue
        (tmp_path / f"{name}.aml").write_bytes(data)
        taken = subprocess.run(["iasl", "-d", f"{name}.aml"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=True)
        source = (tmp_path / f"{name}.dsl").read_text()
        for complaint in ("Error", "Invalid", "Unknown", "Warning", "Could not"):
            assert complaint not in taken.stdout + taken.stderr, taken.stdout + taken.stderr
            assert complaint not in source or name == "DSDT"
        made = subprocess.run(["iasl", "-p", "again", f"{name}.dsl"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
        assert made.returncode == 0, made.stdout + made.stderr
        assert "0 Errors, 0 Warnings" in made.stdout or name != "DSDT", made.stdout
    assert "PNP0A08" in (tmp_path / "DSDT.dsl").read_text()


def test_integers_and_lengths() -> None:
    assert [aml.integer(value) for value in (0, 1, 2, 0x100, 0x10000, 1 << 32)] == [
        b"\0", b"\1", b"\x0a\2", b"\x0b\0\1", b"\x0c\0\0\1\0", b"\x0e\0\0\0\0\1\0\0\0",
    ]  # fmt: skip
    assert aml.return_(aml.path("\\_SB.PCI0")) == b"\xa4\\\x2e_SB_PCI0"
    for size in (0, 62, 63, 4094, 4093, 1 << 19):
        encoded = aml.scope("A", bytes(size))[1:]
        follow = encoded[0] >> 6
        length = encoded[0] & (0x3F if not follow else 0xF)
        for n in range(follow):
            length |= encoded[1 + n] << 4 + 8 * n
        assert length == len(encoded)
    with pytest.raises(ValueError, match="64 bits"):
        aml.integer(1 << 64)
