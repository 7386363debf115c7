"""What goes into the core of a machine or of a guest: its memory, where page tables map it, registers, notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from introspect.commands.context import Context, GuestView, HostView, threads_of
from introspect.corefile import CoreError, CoreSize, Loads, plan_loads, whole_pages, write_core
from introspect.guest_memory import GuestMemory
from introspect.paging import Access, Nested, Translation, translate
from introspect.registers import ATTRIB, EFER
from introspect.runs import Runs
from introspect.sources import Memory, Unreadable, memory_ranges
from introspect.sources.notes import Annotations, GuestNote, make_own, make_prstatus, make_qemu
from introspect.tables import AddressSpace, NestedSpace
from introspect.vmcb import VMCB_SIZE
from introspect.vmcoreinfo import find_vmcoreinfo, make_vmcoreinfo

__all__ = ["MOST_ALIASES", "Saved", "guest_memory", "save_core"]

MOST_ALIASES = 4
"""How many times the machine's memory a guest's may be."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A core that was written."""

    path: str
    owner: str
    threads: int
    headers: int
    left_out: int
    """Stretches of linear addresses that are not in the core, as it would have too many program headers: the smallest."""
    memory: int
    size: CoreSize
    vmcoreinfo: bool


def guest_memory(context: Context, guest: GuestView) -> GuestMemory | None:
    """A guest's physical memory; None without nested paging, where it is the machine's.

    That of a guest's guest is the one that its own hypervisor made, if that is known: composed tables may fill on demand.
    """
    parent = next((one for one in context.guests if one.number == guest.parent), None)
    if guest.inner is not None and parent is not None and parent is not guest:
        outer, host, processor = guest_memory(context, parent), context.host.paging, context.processor
        try:
            contents = context.memory.read(guest.inner, VMCB_SIZE)
        except Unreadable:
            contents = b""
        nested = Nested.from_vmcb(contents, host.cr4, host.efer, processor.maxphyaddr) if contents else None
        if outer is not None and nested is not None:
            return GuestMemory(outer, nested)
    return None if guest.nested is None else GuestMemory(context.memory, guest.nested)


def _linear_rip(registers: Mapping[str, int]) -> Mapping[str, int]:
    """Debuggers know no segments: outside 64-bit code they take the linear address."""
    if registers.get("efer", EFER.LMA) & EFER.LMA and registers.get("cs.attrib", ATTRIB.L) & ATTRIB.L:
        return registers
    return {**registers, "rip": registers.get("cs.base", 0) + registers.get("rip", 0) & 0xFFFF_FFFF}


def _canonical(space: AddressSpace, runs: Runs) -> Runs:
    """Linear addresses as software writes them."""
    if space.width <= 32:
        return runs
    upper = np.uint64((1 << 64) - (1 << space.width))
    return runs._replace(start=np.where(runs.start >> np.uint64(space.width - 1) != 0, runs.start | upper, runs.start))


def save_core(
    path: Path, context: Context, owner: GuestView | HostView, progress: Callable[[float], object] = lambda part: None
) -> Saved:
    """Write the core of the machine (`owner` the host) or of one guest. OSError if the file cannot be written, CoreError."""
    guest = owner if isinstance(owner, GuestView) else None
    memory: Memory = context.memory
    inner = guest_memory(context, guest) if guest is not None else None
    if inner is not None:
        memory = inner
        nested = NestedSpace(inner.memory, inner.nested)
        space = AddressSpace(inner.memory, owner.paging, nested)
        mapped = space.guest_runs
    else:
        space = AddressSpace(memory, owner.paging)
        mapped = space.runs
    ranges = whole_pages(memory_ranges(memory))
    if inner is not None:
        _check_size(ranges, whole_pages(memory_ranges(context.memory)))
    loads = plan_loads(ranges, _canonical(space, mapped))
    if guest is not None and inner is None:
        # Without nested paging the machine's memory is not its own: what its page tables reach is.
        ranges, loads = _reached(loads, ranges)

    def translated(linear: int) -> int | None:
        found = translate(memory, owner.paging.privileged(), linear, Access(), set_ad=False)
        return int(found.gpa) if isinstance(found, Translation) else None

    information = find_vmcoreinfo(memory, translated, lambda part: progress(part / 4))
    threads = threads_of(context, owner.number)
    # By QEMU's note drgn takes it for a kernel's dump, which without VMCOREINFO it refuses.
    notes = b"".join([
        *(make_prstatus(_linear_rip(registers), number) for number, registers in enumerate(threads, 1)),
        *(make_qemu(registers) for registers in threads if information),
        make_vmcoreinfo(information) if information else b"",
        make_own(_annotations(context, guest, threads)),
    ])  # fmt: skip
    size = write_core(path, memory, ranges, loads, notes, lambda part: progress(0.25 + part * 3 / 4))
    total = sum(end - first for first, end in ranges)
    return Saved(str(path), str(owner), len(threads), len(loads) + 1, loads.left_out, total, size, bool(information))


def _check_size(ranges: Sequence[tuple[int, int]], known: Sequence[tuple[int, int]]) -> None:
    """Pages of a guest may be the same memory, but tables that lead in circles are no reason to fill a disk."""
    guest, machine = (sum(end - first for first, end in one) for one in (ranges, known))
    if guest > MOST_ALIASES * machine:
        rule = f"its nested page tables map {guest:#x} bytes to a machine with {machine:#x} bytes of memory"
        raise CoreError(f"{rule}: they lead in circles, `npt` shows where")


def _reached(loads: Loads, ranges: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], Loads]:
    mapped = [(physical, physical + length) for linear, physical, length in zip(
        loads.linear.tolist(), loads.physical.tolist(), loads.length.tolist(), strict=True) if linear >> 62 != 1]  # fmt: skip
    kept = np.array([linear >> 62 != 1 for linear in loads.linear.tolist()], np.bool_)
    chosen = Loads(loads.linear[kept], loads.physical[kept], loads.length[kept], loads.flags[kept], loads.left_out)
    return whole_pages(sorted(mapped)), chosen


def _annotations(context: Context, guest: GuestView | None, threads: Sequence[Mapping[str, int]]) -> Annotations:
    processor = context.processor
    cpus = tuple(dict(registers) for registers in threads)
    views = [guest] if guest is not None else context.guests
    guests = tuple(
        GuestNote(
            view.number, view.name, view.vmcbs, view.parent,
            () if guest is not None else tuple(dict(registers) for registers in threads_of(context, view.number)), view.inner,
            view.ncr3,
        )
        for view in views
    )  # fmt: skip
    of = None if guest is None else guest.number
    return Annotations(cpus, guests, of, processor.maxphyaddr, processor.features, context.host.image if guest is None else ())
