"""A device in the hands of one guest, by the IOMMU: examples/assignment on its own, and under gdb."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, run, vmdbg
from tests.gdbstub.gdb import Gdb

MACHINE = ("--memory", "6G", "--iommu", "on")
SAID = [
    "hypervisor: guest 1 (driver): 512 KiB at spa 140000000, ASID 1, nCR3 806000",
    "hypervisor: device 18 belongs to guest 1",
    "guest 1: driver: 4096 bytes to the device and back, at addresses of this guest",
    "guest 1: driver: has tried to write to the hypervisor",
    "guest 1: driver: has tried to write to the neighbour",
    "guest 2: neighbour: all memory is as it was",
    "hypervisor: IOMMU event 2: a write by device 18 of domain 1 at 800000: blocked",
    "hypervisor: all well",
]


@pytest.fixture(scope="session")
def assignment(examples: Path) -> Path:
    return examples / "assignment/build/assignment.elf"


@pytest.mark.parametrize(
    ("mask", "options"),
    [(28, ()), (40, ()), (28, ("--iommu-cache", "strict")), (28, ("--runtime", "python")), (40, ("--iommu", "2"))], ids=str,
)  # fmt: skip
def test_a_guest_drives_its_device(assignment: Path, tmp_path: Path, mask: int, options: tuple[str, ...]) -> None:
    """28 bits in a machine with memory above 4 GiB, or enough to name the neighbour's memory: then that is what is blocked."""
    found = run(assignment, tmp_path, *MACHINE, "--device", f"edu,slot=03.0,dma-mask={mask}", *options)
    lines = found.serial.decode().splitlines()
    assert found.status == 1, lines
    assert [line for line in lines if line in SAID] == SAID
    neighbour = 0x140400000 & (1 << mask) - 1
    assert f"hypervisor: IOMMU event 2: a write by device 18 of domain 1 at {neighbour:x}: blocked" in lines


def test_without_an_iommu_it_says_so(assignment: Path) -> None:
    done = vmdbg("run", str(assignment), "--memory", "6G", "--device", "edu,slot=03.0", "--serial", "stdio")
    assert done.returncode == 3
    assert "there is no AMD IOMMU" in done.stdout


def test_a_run_repeats_exactly(assignment: Path, tmp_path: Path) -> None:
    options = (*MACHINE, "--device", "edu,slot=03.0")
    assert run(assignment, tmp_path, *options) == run(assignment, tmp_path, *options)


def test_gdb_sees_the_errant_writes(gdb: Gdb, serve: Callable[..., Served], assignment: Path, tmp_path: Path) -> None:
    options = (*MACHINE, "--device", "edu,slot=03.0")
    undebugged = run(assignment, tmp_path, *options)
    served = serve(assignment, *options)
    served.connect(gdb)
    gdb("monitor catch iommu-fault 00:03.0 w")
    for address in ("0x800000", "0x400000"):
        assert re.search(rf"IO_PAGE_FAULT of edu 00:03\.0 at {address}: PR is 0", gdb("continue"))
    gdb("monitor catch delete all")
    served.ends_as(gdb, undebugged)


def test_a_watchpoint_in_the_guest_names_the_device(
    gdb: Gdb, serve: Callable[..., Served], assignment: Path
) -> None:
    """Guest 1's buffer, wherever the tables put it."""
    served = serve(assignment, *MACHINE, "--device", "edu,slot=03.0")
    served.connect(gdb)
    gdb("monitor catch dma 00:03.0 w")
    found = re.search(r"DMA write of 0x1000 bytes at (0x[0-9a-f]+) by edu 00:03\.0", gdb("continue"))
    assert found is not None
    assert int(found[1], 16) < 512 << 10, "a guest-physical address"
