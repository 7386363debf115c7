# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole state of a machine but its memory, as a tree, and back into a machine of the same making.

Most of it are the parts' attributes, by the inventory.  The rest is here: registers in the engine's form, what lies behind
addresses that C has, and what is made anew: the engine's tables, its translations and its intercepts follow from the state
and change nothing that a guest can see.
"""

from __future__ import annotations

import ctypes
import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vmdbg.cpu.processor import Processor
from vmdbg.engine import layout
from vmdbg.engine.memory import PAGE
from vmdbg.engine.physical import WATCH_READ, WATCH_WRITE, Physical, Shadow
from vmdbg.engine.runtime import RING_SLOTS, Branch, Runtime
from vmdbg.engine.state import HF2_GIF, HF2_NMI, HF_INHIBIT_IRQ, CpuState
from vmdbg.svm import world
from vmdbg.svm.ring import RECORD_SIZE, Ring

from .allowed import FINGERPRINT, INPUTS, shapes
from .forms import number
from .inventory import NAMES, PARTS, parts, states
from .judging import judge
from .shapes import Shape, same
from .tree import Loader, Malformed, Saver, SnapshotError, Tree, parsed

if TYPE_CHECKING:
    from vmdbg.machine import Machine

_X87_ROUNDING, _X87_PRECISION, _MMX_ROUNDING = 817, 819, 841
"""Bytes of the engine's floating-point units, which ends with the process for modes that there are not."""
_CONTEXT = (
    slice(layout.REGS, layout.EFLAGS + 8),  # general registers, RIP, flags
    slice(layout.CC_SRC, layout.CC_SRC + 8),  # arithmetic flags, between operands of the last arithmetic, which are dead
    slice(layout.CC_OP, layout.A20_MASK),  # segments, control registers
    slice(layout.EFER, layout.SYSENTER_CS),  # EFER, x87, MXCSR, XMM
    slice(layout.SYSENTER_CS, layout.XCR0 + 8),
    slice(layout.PAT, layout.PAT + 8),
)
"""What of a context is the processor's.  The rest is the engine's configuration, which each machine has, and pointers."""
_CONTEXT_SIZE = sum(part.stop - part.start for part in _CONTEXT)
_SHARE = 4
"""What part of a state the run's inputs and checkpoints may be."""
_TOP_OF_STACK = layout.FPU // 4
_BRANCH_BYTES = ctypes.sizeof(Branch) * RING_SLOTS


def state(machine: Machine) -> Tree:
    """All that is state, but RAM.  Nothing in the machine changes."""
    found = parts(machine)
    saver = Saver(NAMES, list(found.values()))
    kept: list[Tree] = []
    for path, part in found.items():
        attributes = states(part)
        kept.append([path, type(part).__qualname__, [*attributes], [saver.tree(value) for value in attributes.values()]])
    cpus = [_processor(machine, cpu, saver) for cpu in machine.cpus]
    return [kept, cpus, _engine(machine), _run(machine), _translations(machine)]


def restore(machine: Machine, tree: Tree) -> None:
    """Make it the state of a machine made of the same configuration.  `Malformed` if it is none; the machine is of no use then.

    RAM must be restored already.
    """
    kept, cpus, engine, run, translations = _list(tree, 5)
    machine.history.collect()
    before_tables(machine)
    found = parts(machine)
    loader = Loader(NAMES, list(found.values()), machine)
    if [_list(one, 4)[:2] for one in _list(kept)] != [[path, type(part).__qualname__] for path, part in found.items()]:
        raise Malformed("it has other parts")
    for part, one in zip(found.values(), _list(kept), strict=True):
        _, _, names, values = _list(one, 4)
        present = states(part)
        if _list(names) != [*present]:
            raise Malformed(f"{type(part).__qualname__} has other attributes")
        for (name, old), value in zip(present.items(), _list(values, len(present)), strict=True):
            pour(part, name, old, loader.value(value))
    wrong = judge(found.values(), machine)
    if wrong:
        raise Malformed(wrong)
    _restore_engine(machine, engine)
    for cpu, one in zip(machine.cpus, _list(cpus, len(machine.cpus)), strict=True):
        _restore_processor(machine, cpu, one, loader)
    _restore_run(machine, run)
    after(machine)
    _restore_translations(machine, translations)  # at last: nothing may make a processor flush them


def _run(machine: Machine) -> str:
    """What came in from outside so far, and what the run did: it goes on with both."""
    fingerprint = machine.fingerprint
    return json.dumps([machine.identity.inputs.state(), fingerprint.state() if fingerprint is not None else None])


def _restore_run(machine: Machine, tree: Tree) -> None:
    try:
        inputs, fingerprint = parsed(tree if isinstance(tree, str) else "", _SHARE)
    except (TypeError, ValueError, RecursionError):
        raise Malformed("what it says of the run is none") from None
    machine.identity.inputs.restore(**_members(inputs, INPUTS, "what came in"))
    if machine.fingerprint is not None and fingerprint is not None:
        machine.fingerprint.restore(**_members(fingerprint, FINGERPRINT, "the fingerprint"))
    if machine.fingerprint is not None and fingerprint is None:
        raise SnapshotError(
            "the snapshot is of a run without --fingerprint, whose beginning has no trace. Save it from a run with that option, "
            "or go on without"
        )


def _members(found: object, shapes: Mapping[str, Shape], what: str) -> dict[str, Any]:
    """All of a dictionary of JSON's, whose members are to be these."""
    if not isinstance(found, dict) or found.keys() != shapes.keys():
        raise Malformed(f"of {what} it says something else")
    for name, shape in shapes.items():
        wrong = shape(found[name], None)
        if wrong:
            raise Malformed(f"of {what}, {name}{wrong}")
    return found


def _list(tree: Tree, length: int | None = None) -> list[Tree]:
    if not isinstance(tree, list) or (length is not None and len(tree) != length):
        raise Malformed("its outline is another")
    return tree


def pour(part: object, name: str, old: Any, new: Any) -> None:
    """Set an attribute to what is allowed there; a container is filled, since others may hold it."""
    cls: Any = type(part)
    where = f"{cls.__qualname__}.{name}"
    if is_wiring(old):
        if old != new:
            raise Malformed(f"{where} leads elsewhere")
        return
    shape = shapes(cls)[name]
    wrong = shape(new, old)
    if wrong:
        raise Malformed(where + wrong)
    if shape is same:
        return
    if isinstance(old, bytearray | list) and new is not None:
        old[:] = new
    elif isinstance(old, dict | set) and new is not None:
        old.clear()
        old.update(new)
    elif isinstance(old, deque) and new is not None:
        old.clear()
        old.extend(new)
    else:
        setattr(part, name, new)


def is_wiring(value: object) -> bool:
    """Whether it is a part, or a container of nothing but parts: who is connected to whom never changes."""
    if isinstance(value, list | tuple | dict):
        held = value.values() if isinstance(value, dict) else value
        return bool(value) and all(type(one) in PARTS for one in held)
    return type(value) in PARTS


# The engine


def _engine(machine: Machine) -> Tree:
    """What a debugger sees of the past, and the instruction before which the engine has stopped."""
    rt = machine.engine.rt
    ring = ctypes.string_at(ctypes.addressof(rt) + Runtime.ring.offset, _BRANCH_BYTES) if rt.branches else b""
    return [bytes(rt.code[: rt.code_size]), rt.branches, rt.block_start, rt.block_size, ring, machine.history.total.value]


def _restore_engine(machine: Machine, tree: Tree) -> None:
    code, branches, start, size, ring, total = _list(tree, 6)
    rt, most = machine.engine.rt, (1 << 64) - 1
    if not isinstance(code, bytes) or len(code) > len(rt.code) or not isinstance(ring, bytes):
        raise Malformed("the engine's record is another")
    ctypes.memset(ctypes.addressof(rt) + Runtime.code.offset, 0, len(rt.code))
    rt.code[: len(code)] = list(code)
    rt.code_size = len(code)
    rt.branches = number(branches, 0, most, "the count of branches")
    rt.block_start, rt.block_size = number(start, 0, most, "a block's address"), number(size, 0, 1 << 20, "a block's size")
    if len(ring) != (_BRANCH_BYTES if rt.branches else 0):
        raise Malformed("the record of branches is not as long as it must be")
    ctypes.memmove(ctypes.addressof(rt) + Runtime.ring.offset, ring, len(ring))
    machine.history.total.value = number(total, 0, most, "the count of exits")


def _translations(machine: Machine) -> Tree:
    """What the TLB holds, without being a strict one, and of which CPU: who changes tables and does not flush depends on it."""
    engine = machine.engine
    holder = next((cpu.index for cpu in machine.cpus if cpu.state is engine.holder), None)
    return [holder, engine.held()]


def _restore_translations(machine: Machine, tree: Tree) -> None:
    holder, held = _list(tree, 2)
    if holder is not None:
        holder = number(holder, 0, len(machine.cpus) - 1, "whose translations there are")
    try:
        machine.engine.hold(None if holder is None else machine.cpus[holder].state, held if isinstance(held, bytes) else b"?")
    except ValueError as error:
        raise Malformed(f"its translations are {error}") from None


def before_tables(machine: Machine) -> None:
    """Nothing of the engine's tables is kept, nor what guards pages."""
    physical = machine.engine.physical
    for cpu in machine.cpus:
        cpu.npt = physical.host
    for shadow in physical.shadows.values():
        shadow.close()
    physical.shadows.clear()
    for mirror in physical.mirrors:
        mirror.close()
    physical.mirrors.clear()
    physical.host.clear()
    for owner in [*machine.cpus, *(cpu.debug for cpu in machine.cpus)]:
        physical.guards.pop(owner.index if isinstance(owner, Processor) else owner, None)
    physical.guard(None, {})
    physical.guards.pop(None)
    _forget_states(physical)


def _forget_states(physical: Physical) -> None:
    """Of pages, but for those that a debugger watches."""
    states = np.frombuffer(physical.ram.pages, np.uint8)
    known = np.flatnonzero(states)  # writing all would make memory of them
    states[known] &= WATCH_READ | WATCH_WRITE


# Processors


def _processor(machine: Machine, cpu: Processor, saver: Saver) -> Tree:
    state, crossing = cpu.state, cpu.crossing
    context = b"".join(bytes(state.bytes[part]) for part in _CONTEXT)
    return [
        context, list(cpu.dr), saver.tree(cpu.npt if isinstance(cpu.npt, Shadow) else None), state.root is not None,
        [crossing.host_rip, crossing.entered, crossing.last_number, *_place(machine, crossing.last or 0)],
    ]  # fmt: skip


def _restore_processor(machine: Machine, cpu: Processor, tree: Tree, loader: Loader) -> None:
    context, dr, npt, rooted, crossing = _list(tree, 5)
    physical, state = machine.engine.physical, cpu.state
    if not isinstance(context, bytes) or len(context) != _CONTEXT_SIZE:
        raise Malformed(f"the registers of CPU {cpu.index} are not {_CONTEXT_SIZE} bytes")
    _restore_context(state, context)
    cpu.dr[:] = [number(value, 0, (1 << 64) - 1, "a debug register") for value in _list(dr, 8)]
    table = loader.value(npt)
    if table is not None and not isinstance(table, Shadow):
        raise Malformed(f"CPU {cpu.index} runs on no nested table")
    cpu.npt = physical.host if table is None else table
    if (cpu.guest is not None and cpu.guest.np) != (table is not None) and cpu.smm is None:
        raise Malformed(f"CPU {cpu.index} has a guest without its table, or a table without a guest")
    if rooted is not False and (rooted is not True or len(cpu._pdptes) != 4):
        raise Malformed(f"CPU {cpu.index} keeps PDPTEs, and there are none")
    state.root = physical.hold_pdptes(cpu.index, cpu._pdptes) if rooted else None
    host_rip, entered, last, guest, slot = (number(one, 0, (1 << 64) - 1, "a world switch") for one in _list(crossing, 5))
    c = cpu.crossing
    c.host_rip, c.entered, c.last_number, c.last = host_rip, entered, last, _address(machine, guest, slot)
    world.set_intercepts(state, cpu.guest)
    if cpu.task_guard is not None:
        physical.guard(cpu.index, {number(cpu.task_guard, 0, machine.ram.end // PAGE - 1, "a TSS's page"): WATCH_WRITE})
    debug = cpu.debug
    moved, pages = debug.moved, debug._pages
    debug._pages = {}
    debug.update()
    debug.moved = moved
    debug._guard(pages)


def _restore_context(state: CpuState, data: bytes) -> None:
    at = 0
    configured = state.i[layout.HFLAGS2 // 4]
    for part in _CONTEXT:
        length = part.stop - part.start
        state.bytes[part] = data[at : at + length]
        at += length
    flags = state.hflags
    state.i[layout.HFLAGS2 // 4] = configured & ~(HF2_GIF | HF2_NMI) | state.i[layout.HFLAGS2 // 4] & (HF2_GIF | HF2_NMI)
    state.hflags = flags & (3 | HF_INHIBIT_IRQ)
    state.refresh(flags & 3)
    state.mxcsr = state.mxcsr & 0xFFFF
    rounding = max(state.bytes[_X87_ROUNDING], state.bytes[_MMX_ROUNDING])
    if state.i[_TOP_OF_STACK] > 7 or rounding > 3 or state.bytes[_X87_PRECISION] not in (32, 64, 80):
        raise Malformed("no x87 unit is in that state")


def _rings(machine: Machine) -> Iterator[tuple[int, Ring]]:
    return ((guest.number, guest.ring) for guest in machine.history.guests.values())


def _place(machine: Machine, address: int) -> tuple[int, int]:
    """Whose exit ring an address is in, and at which slot; 0, 0 if in none."""
    for guest, ring in _rings(machine):
        if ring.start <= address < ring.start + len(ring.view):
            return guest, (address - ring.start) // RECORD_SIZE
    return 0, 0


def _address(machine: Machine, guest: int, slot: int) -> int:
    ring = dict(_rings(machine)).get(guest)
    return ring.start + slot * RECORD_SIZE if ring is not None and slot < ring.capacity else 0


# What follows


def after(machine: Machine) -> None:
    """What others have found out of the state before."""
    engine, physical = machine.engine, machine.engine.physical
    for cpu in machine.cpus:
        switcher = cpu.switcher
        if switcher is not None:
            switcher.restart(inside=cpu.guest is not None)
        cpu.accepted.clear()
        cpu._paging_key = None
    tlbs = [cpu.tlb for cpu in machine.cpus if cpu.tlb is not None]
    for tlb in tlbs:
        tlb.show_anew()
    if tlbs:
        held = (one for tlb in tlbs for space in tlb.spaces.values() for level in (space.linear, space.nested) for one in level)
        tlbs[0].tables.relearn(held)
    machine.chipset.root.changed()
    for unit in machine.chipset.iommus.units if machine.chipset.iommus is not None else ():
        unit.forget_view()
    machine.history.restored()
    engine.flush_code()
    engine.flush()
    physical.mixed = physical.mixed or not physical.nx
    engine.rt.mixed = physical.mixed
