"""What is mapped around a linear address, in stretches as long as they are alike: lldb asks for region after region."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gdbstub.target import MemoryRegion
from introspect.paging import Access, Fault, Nested, PagingState, Step, Translation, Walk, translate, walk
from vmdbg.contexts import Context
from vmdbg.engine.memory import Ram

_PAGE = 4096
_END = 1 << 64
_NARROW = 1 << 32
_MOST = 512
"""Pages and holes that one answer puts together, before the address and behind it: asked again, the next takes over."""
_READ = Access()

Stretch = tuple[int, int, str]
"""First address, end, and permissions ("" for a hole)."""


def region(ram: Ram, context: Context, address: int) -> MemoryRegion:
    """The stretch around an address. Memory that only devices answer for is a hole: a debugger does not read it."""
    state, nested = replace(context.paging(), cpl=0, rflags_ac=True), context.nested()

    def around(at: int) -> Stretch:
        return _around(ram, state, nested, at)

    start, end, permissions = around(address)
    start = _extended(start, permissions, around, lambda found: found[0], -1)
    end = _extended(end, permissions, around, lambda found: found[1], 0)
    return MemoryRegion(start, end - start, permissions)


def _extended(at: int, permissions: str, around: Callable[[int], Stretch], bound: Callable[[Stretch], int], step: int) -> int:
    """A bound moved as long as what lies beyond is alike."""
    for _ in range(_MOST):
        if not 0 <= at + step < _END:
            break
        found = around(at + step)
        if found[2] != permissions:
            break
        at = bound(found)
    return at


def _around(ram: Ram, state: PagingState, nested: Nested | None, address: int) -> Stretch:
    wide = state.mode in ("4-level", "5-level")
    if not wide and address >= _NARROW:
        return _NARROW, _END, ""
    found = translate(ram, state, address, _READ, nested, set_ad=False)
    if isinstance(found, Translation):
        permissions = "r" + "w" * found.writable + "x" * found.executable
        size = found.page_size or _NARROW  # nothing is translated without tables
        return _in_ram(ram, address, int(found.spa), size, permissions)
    if found.kind == "GP":
        half = 1 << (56 if state.mode == "5-level" else 47)
        return half, _END - half, ""
    size = _hole(walk(ram, state, address, _READ, nested), state, nested, found)
    start = address & -size
    return start, start + size, ""


def _in_ram(ram: Ram, address: int, spa: int, size: int, permissions: str) -> Stretch:
    """The part of a page that is RAM, or that is not, around one of its addresses."""
    start, shift = address & -size, address - spa
    first, end, kind = 0, _END, ""
    for low, high in ram.ranges:
        if low <= spa < high:
            first, end, kind = low, high, permissions
            break
        if high <= spa:
            first = high
        elif spa < low:
            end = low
            break
    return max(start, first + shift), min(start + size, end + shift), kind


def _hole(found: Walk, state: PagingState, nested: Nested | None, fault: Fault) -> int:
    """How much the entry that ends a walk leaves unmapped, in bytes."""

    def reach(step: Step) -> int:
        form = nested.format if step.nested and nested is not None else state.format
        return next((1 << level.shift for level in form.levels if level.number == step.level), _PAGE) if form else _PAGE

    guest = [step for step in found.steps if not step.nested]
    if state.format is None:
        return reach(found.steps[-1]) if found.steps else _PAGE
    if not guest:
        return 1 << state.format.levels[0].shift  # not even the topmost table is there
    if fault.kind == "PF" or not guest[-1].leaf:
        return reach(guest[-1])  # of a nested fault: the table below it cannot be reached
    return min(reach(guest[-1]), reach(found.steps[-1]) if found.steps[-1].nested else _PAGE)
