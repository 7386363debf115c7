# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine with an IOMMU and a DEV: devices reach what both let pass, and so say audits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from introspect.dev import DEV_BASE_LO, DEV_CR, DEV_MAP, DevFunction
from introspect.iommu.registers import CONTROL, REGISTERS
from introspect.iommu.space import IoSpace
from introspect.iommu.structures import DTE, PTE, encode_dte
from introspect.pci import RequesterId
from vmdbg.debugger import Debugger
from vmdbg.iommu.config import IommuConfig
from vmdbg.machine import Config, Machine
from vmdbg.monitor import Monitor
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.platform.pci.dma import Attributes, DmaError

TABLE, ROOT, DATA, BITMAP, OTHER_BITMAP = 0x200000, 0x500000, 0x800000, 0x600000, 0x620000
RW = PTE.PR | PTE.IR | PTE.IW
DEVICE, OTHER = RequesterId.make(0, 3, 0), RequesterId.make(0, 4, 0)
DTE_OF_BOTH = DTE.make(V=1, TV=1, Mode=1, PageTableRoot=ROOT >> 12, IR=1, IW=1, DomainID=7)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    devices = tuple(DeviceSpec.parse(f"edu,slot={slot}") for slot in ("03.0", "04.0"))
    config = Config(
        memory=16 << 20, flat_address=0x80000, mode="real", devices=devices, iommu=IommuConfig(1, False), dev="coherent",
    )  # fmt: skip
    machine = Machine(b"\xf4", config)
    assert machine.chipset.iommus is not None
    unit = machine.chipset.iommus.units[0]
    unit.write_mmio(REGISTERS["device_table_base"].offset, 8, TABLE | 0x1FF)
    unit.write_mmio(REGISTERS["control"].offset, 8, CONTROL.IommuEn)
    closed = encode_dte(DTE.make(V=1, TV=1))
    for function in machine.chipset.root.functions:
        machine.ram.write(TABLE + int(function.requester) * 32, closed)
    for device in (DEVICE, OTHER):
        machine.ram.write(TABLE + device * 32, encode_dte(DTE_OF_BOTH))
    yield machine
    machine.close()


@pytest.fixture
def commands(machine: Machine) -> Monitor:
    """iova 2000 leads to data, 3000 to the device table; device 3 is in DEV domain 0, device 4 in 1; nothing is denied."""
    machine.ram.write(ROOT, bytes(0x1000))
    for iova, spa in ((0x2000, DATA), (0x3000, TABLE)):
        machine.ram.write_u64(ROOT + (iova >> 9), spa | RW)
    for bitmap in (BITMAP, OTHER_BITMAP):
        machine.ram.write(bitmap, bytes(0x20000))
    dev = machine.late_launch.dev
    assert dev is not None
    for function, index, value in (
        (DevFunction.BASE_LO, 0, BITMAP | DEV_BASE_LO.VALID), (DevFunction.BASE_LO, 1, OTHER_BITMAP | DEV_BASE_LO.VALID),
        (DevFunction.MAP, 0, DEV_MAP.make(UNIT0=4, VALID0=1, DOMAIN0=1)), (DevFunction.CR, 0, DEV_CR.DEVEN),
    ):  # fmt: skip
        dev.write(function, index, value)
    machine.late_launch.protection.end()
    return Debugger(machine).monitor_commands


def say(commands: Monitor, line: str) -> str:
    return commands.registry.answer(commands, line)[0]


def deny(machine: Machine, spa: int, *, bitmap: int = BITMAP) -> None:
    at = bitmap + (spa >> 15)
    machine.ram.write(at, bytes([machine.ram.read(at, 1)[0] | 1 << (spa >> 12 & 7)]))


def findings(commands: Monitor, who: str) -> list[str]:
    """What the audit says of a device that it names so."""
    return [line for line in say(commands, "audit isolation").splitlines() if who in line]


FIRST, SECOND = "device 00:03.0 (edu) (domain 0x7, DEV domain 0)", "device 00:04.0 (edu) (domain 0x7, DEV domain 1)"


def test_either_is_enough_to_keep_a_device_away(machine: Machine, commands: Monitor) -> None:
    assert any("writes device table of IOMMU 0" in line for line in findings(commands, FIRST))
    assert any("writes device table of IOMMU 0" in line for line in findings(commands, SECOND))
    deny(machine, TABLE)
    assert not any("device table" in line for line in findings(commands, FIRST)), "the DEV keeps it away"
    assert any("device table" in line for line in findings(commands, SECOND)), "it is in another domain"
    assert FIRST not in say(commands, f"who-maps {TABLE:#x}")
    assert SECOND in say(commands, f"who-maps {TABLE:#x}")
    assert f"{FIRST}  iova 0x2000" in say(commands, f"who-maps {DATA:#x}")
    machine.ram.write_u64(ROOT + (0x3000 >> 9), 0)
    assert not any("device table" in line for line in findings(commands, SECOND)), "the IOMMU keeps it away"
    assert "mapped by nobody" not in say(commands, f"who-maps {DATA:#x}")
    dev = machine.late_launch.dev
    assert dev is not None
    dev.write(DevFunction.CR, 0, 0)
    assert "(domain 0x7, the DEV is off)" in say(commands, f"who-maps {DATA:#x}")


def test_what_two_devices_share_is_what_both_reach(machine: Machine, commands: Monitor) -> None:
    assert any(f"{FIRST}, {SECOND}" in line for line in findings(commands, "both write"))
    for spa in (DATA, TABLE):
        deny(machine, spa, bitmap=OTHER_BITMAP)
    assert findings(commands, "both write") == []


def test_a_protected_block_is_out_of_reach(machine: Machine, commands: Monitor) -> None:
    machine.late_launch.protect(DATA)
    assert "device 00" not in say(commands, f"who-maps {DATA:#x}")
    assert "4 KiB more are mapped and out of reach: `dev` says why" in say(commands, "iommu map 00:03.0")


def test_map_lists_what_both_let_pass(machine: Machine, commands: Monitor) -> None:
    assert "8 KiB mapped" in say(commands, "iommu map 00:03.0")
    deny(machine, TABLE)
    lines = say(commands, "iommu map 0x7").splitlines()
    assert lines[0].startswith("00:03.0, domain 0x7, DEV domain 0: 4 KiB mapped")
    assert "  4 KiB more are mapped and out of reach: `dev` says why" in lines
    assert next(line for line in lines if line.startswith("00:04.0")).startswith("00:04.0, domain 0x7, DEV domain 1: 8 KiB mapped")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 15), st.sampled_from((PTE.IR, PTE.IW, PTE.IR | PTE.IW))), min_size=8, max_size=8),
    st.sets(st.integers(0, 15)), st.none() | st.just(DATA),
)  # fmt: skip
def test_reach_is_what_dma_does(
    machine: Machine, commands: Monitor, pages: list[tuple[int, int]], denied: set[int], block: int | None
) -> None:
    """Of random tables, bitmaps and blocks: an access gets through if and only if the listing has it."""
    machine.ram.write(BITMAP, bytes(0x1000))
    for page in denied:
        deny(machine, DATA + 0x8000 + (page << 12))
    if block is None:
        machine.late_launch.protection.end()
    else:
        machine.late_launch.protect(block)
    for index, (page, rights) in enumerate(pages):
        machine.ram.write_u64(ROOT + index * 8, DATA + 0x8000 + (page << 12) | PTE.PR | rights)
    iommu, barrier = commands.iommus[0], commands.barrier
    runs = IoSpace(machine.ram, iommu, DTE_OF_BOTH, left=barrier.left(barrier.domain_of(DEVICE))).runs
    for index in range(len(pages) + 1):
        iova = index << 12
        which = np.flatnonzero((runs.start <= iova) & (runs.end > iova))
        for write in (False, True):
            try:
                spa = int(machine.chipset.dma.locate(DEVICE, iova, 1, write)[0].spa)
            except DmaError:
                spa = -1
            (found,) = runs.take(which).rows() if len(which) else ((0, 0, -1, 0),)
            allowed = found[2] >= 0 and bool(found[3] & 2 if write else not found[3] & 1 << 62)
            assert spa == (found[2] + iova - found[0] if allowed else -1), (index, write)


def test_translated_addresses_are_denied_alike(commands: Monitor, machine: Machine) -> None:
    """A device that says it has translated them passes the IOMMU, and neither the DEV nor SKINIT's protection."""
    translated, dma = Attributes(translated=True), machine.chipset.dma
    machine.ram.write(TABLE + DEVICE * 32, encode_dte(DTE_OF_BOTH | DTE.I))
    try:
        dma.write(DEVICE, DATA, b"let through", translated)
        assert machine.ram.read(DATA, 11) == b"let through"
        deny(machine, DATA)
        with pytest.raises(DmaError, match="DEV"):
            dma.write(DEVICE, DATA, b"x", translated)
        machine.late_launch.protection.protect(DATA & -0x10000)
        with pytest.raises(DmaError, match="SKINIT"):
            dma.read(DEVICE, DATA + 0x8000, 1, translated)
    finally:
        machine.late_launch.protection.end()
        machine.ram.write(TABLE + DEVICE * 32, encode_dte(DTE_OF_BOTH))
