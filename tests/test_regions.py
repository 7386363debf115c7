"""Regions of memory, as lldb asks for them, against what can be read byte by byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random

import pytest

from gdbstub.target import MemoryRegion, ThreadId
from tests.subjects import BOOT_TICKS, IMAGE
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine

END = 1 << 64


@pytest.fixture(scope="module")
def debugger() -> Iterator[Debugger]:
    """The example hypervisor with its guests: 64-bit, PAE, real mode under a shadow table, and without paging."""
    if not IMAGE.exists():
        pytest.skip("the example hypervisor is not built: make examples")
    machine = Machine(str(IMAGE), Config(memory=32 << 20))
    machine.run(BOOT_TICKS)
    yield Debugger(machine)
    machine.close()


def regions(debugger: Debugger, pid: int) -> list[MemoryRegion]:
    found, at = [], 0
    while at < END:
        region = debugger.memory_region(ThreadId(pid, 1), at)
        assert region.start <= at < region.start + region.length <= END
        found.append(region)
        at = region.start + region.length
    return found


@pytest.mark.parametrize("pid", [1, 2, 3, 4, 5])
def test_a_region_is_what_can_be_read(debugger: Debugger, pid: int) -> None:
    thread, random = ThreadId(pid, 1), Random(pid)
    found = regions(debugger, pid)
    assert len(found) < 200
    assert any(region.permissions for region in found)
    for region in found:
        last = region.start + region.length - 1
        for address in (region.start, last, *(random.randint(region.start, last) for _ in range(20))):
            if pid > 2 and address >= 1 << 32:
                continue  # no address of such a guest; reading wraps
            assert bool(debugger.read_memory(thread, address, 1)) == bool(region.permissions), (region, hex(address))


def test_neighbours_differ(debugger: Debugger) -> None:
    for pid in (1, 2, 3, 4, 5):
        found = regions(debugger, pid)
        alike = [pair for pair in itertools.pairwise(found) if pair[0].permissions == pair[1].permissions]
        # One answer puts together 512 pages and holes at most.
        assert all(pair[0].length >= 512 * 4096 for pair in alike), alike


def test_permissions_are_those_of_both_dimensions(debugger: Debugger) -> None:
    kinds = {region.permissions for pid in (1, 2, 3) for region in regions(debugger, pid)}
    assert {"", "rwx"} <= kinds <= {"", "r", "rx", "rw", "rwx"}
