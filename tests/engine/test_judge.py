"""Memory as C reads it for conditions and tracepoints: the same bytes as through introspect, in every mode, nested or not."""

from __future__ import annotations

import ctypes
from random import Random

import pytest

from introspect.memtypes import Caching
from introspect.paging import Nested, PagingState
from tests.engine.rig import TABLES, Rig
from tests.engine.test_translation import (
    GUEST_TABLES,
    HOST,
    MODES,
    TARGET,
    address_of,
    nested_tables,
    random_tables,
    registers,
)  # fmt: skip
from vmdbg import judge
from vmdbg.contexts import read_memory
from vmdbg.engine.state import CpuState

native = judge.native
pytestmark = pytest.mark.skipif(native is None, reason="the native evaluation was not built: there is no compiler")


class Registers:
    """The paging registers of nobody in particular."""

    def __init__(self, state: PagingState, nested: Nested | None) -> None:
        self._state, self._nested = state, nested

    def read(self, name: str) -> int | None:
        return None

    def write(self, name: str, value: int) -> bool:
        return False

    def code32(self) -> bool:
        return True

    def paging(self) -> PagingState:
        return self._state

    def nested(self) -> Nested | None:
        return self._nested

    def caching(self) -> Caching:
        raise NotImplementedError


class View:
    """One view of a rig's memory."""

    def __init__(self, rig: Rig) -> None:
        judge.function()
        self.state = judge.State()
        self.state.ram = rig.ram.address
        for index, bound in enumerate(bound for pair in rig.ram.ranges for bound in pair):
            self.state.ranges[index] = bound

    def read(self, state: PagingState, nested: Nested | None, address: int, length: int) -> bytes:
        judge.set_space(self.state.view[0].space, state.cr3, state, nested)
        assert native is not None
        found: bytes = native.read(ctypes.addressof(self.state), 0, address, length)
        return found


@pytest.mark.parametrize("host", [None, *HOST])
@pytest.mark.parametrize("mode", MODES)
def test_random_tables(mode: str, host: str | None) -> None:
    rig = Rig("nop", mode)  # type: ignore[arg-type]
    root = TABLES + (0x1000 if mode == "pae" else 0)
    view = View(rig)
    rig.ram.write(TARGET - TARGET % 4096, bytes(range(256)) * 32)
    found = []
    for seed in range(400):
        random = Random(seed)
        state = registers(rig, random, mode)
        state = PagingState(state.cr0, state.cr3, state.cr4, state.efer, maxphyaddr=state.maxphyaddr)
        random_tables(rig, random, mode, GUEST_TABLES, address_of(mode), root)
        nested = nested_tables(rig, random, host) if host is not None else None
        for address, length in ((address_of(mode), 8), (address_of(mode) | 0xFFC, 8), (address_of(mode) & -4096, 9000)):
            expected = read_memory(rig.ram, Registers(state, nested), address, length)
            assert view.read(state, nested, address, length) == expected, (seed, hex(address))
            found.append(len(expected))
    assert 8 in found
    assert 0 in found


@pytest.mark.parametrize("address", [0, 0xFFFFFFFFFFFFFFF8, 0x8000000000000000, 0x7FFFFFFFFFFC, 0xFFFFFFFF, 0xFFFFFFFFFFFF])
@pytest.mark.parametrize("mode", ["protected32", *MODES])
def test_edges(mode: str, address: int) -> None:
    """The ends of the address space, and of memory."""
    rig = Rig("nop", mode)  # type: ignore[arg-type]
    s: CpuState = rig.state
    state = PagingState(s.cr(0), s.cr(3), s.cr(4), s.efer)
    for at in (address, rig.ram.size - 4):
        expected = read_memory(rig.ram, Registers(state, None), at, 16)
        assert View(rig).read(state, None, at, 16) == expected[:16]
