"""Events through the interrupt table, in every mode (APM2 8.6 real, 8.7 legacy protected, 8.8 virtual-8086, 8.9 long).

A delivery that faults leaves the state as it was, except for accessed bits.
"""

from __future__ import annotations

from struct import pack

from vmdbg.engine.state import CS, DS, ES, FS, GS, IDTR, RSP, SS, TR

from . import tasks
from .bits import CR0_PE, RFLAGS_AC, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_TF, RFLAGS_VM, canonical
from .core import Cpu
from .descriptors import (
    CONFORMING,
    DEFAULT_BIG,
    LONG,
    Descriptor,
    fetch,
    load,
    null_selector,
    require,
)  # fmt: skip
from .faults import DB, DF, GP, NP, PF, Event, Kind
from .faults import SS as STACK_FAULT
from .faults import TS as INVALID_TSS

DR7_GD = 1 << 13
MASK64 = 0xFFFFFFFFFFFFFFFF

TASK_GATE, INTERRUPT_16, TRAP_16, INTERRUPT_32, TRAP_32 = 5, 6, 7, 14, 15


def deliver(cpu: Cpu, event: Event) -> None:
    """Enter the handler of `event`.  Raises `CpuFault` or `NestedPageFault` if the delivery itself faults."""
    s = cpu.state
    if event.vector == PF and event.address is not None and event.kind == Kind.EXCEPTION:
        s.set_cr(2, event.address)
    if not s.cr(0) & CR0_PE:
        _deliver_real(cpu, event)
    elif s.is_long:
        _deliver_long(cpu, event)
    else:
        _deliver_protected(cpu, event)
    if event.vector == DB and event.kind == Kind.EXCEPTION:
        cpu.dr[7] &= ~DR7_GD
    s.shadow = False
    cpu.halted = False


def _image(cpu: Cpu, event: Event) -> int:
    """The RFLAGS image: RF is set for faults, so that an instruction breakpoint does not hit again (APM2 8.7.2)."""
    flags = cpu.state.rflags & ~RFLAGS_RF if event.software else cpu.state.rflags
    if event.kind == Kind.EXCEPTION and not event.trap and not event.software and event.vector != DF:
        flags |= RFLAGS_RF
    return flags


def _deliver_real(cpu: Cpu, event: Event) -> None:
    s = cpu.state
    entry = event.vector * 4
    require(entry + 3 <= s.limit(IDTR), GP, None)
    target = cpu.read(s.base(IDTR) + entry, 4, implicit=True)
    big = bool(s.attrib(SS) & DEFAULT_BIG)
    mask = 0xFFFFFFFF if big else 0xFFFF
    sp = s.reg(RSP)
    frame = (s.rflags & 0xFFFF, s.selector(CS), s.rip & 0xFFFF)
    writes = []
    for value in frame:
        sp = (sp & ~mask) | ((sp - 2) & mask)
        writes.append(cpu.plan(cpu.segment_address(SS, sp & mask, 2), 2, value))
    cpu.commit(writes)
    s.set_reg(RSP, sp)
    s.rflags &= ~(RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_RF)
    selector = target >> 16
    s.set_segment(CS, selector, selector << 4, s.limit(CS), s.attrib(CS))
    s.rip = target & 0xFFFF
    s.refresh()


def _target(cpu: Cpu, event: Event, selector: int) -> tuple[Descriptor, int]:
    """The handler's code segment and the privilege it runs at."""
    external = event.external
    error = selector & 0xFFFC | external
    require(not null_selector(selector), GP, external)
    code = fetch(cpu, selector, GP, external)
    require(code.is_code and code.dpl <= cpu.state.cpl, GP, error)
    require(code.present, NP, error)
    return code, cpu.state.cpl if code.type & CONFORMING else code.dpl


def _gate_error(event: Event) -> int:
    """An error code that names the IDT entry: IDT bit set (APM2 8.4.1)."""
    return event.vector << 3 | 2 | event.external


def _deliver_long(cpu: Cpu, event: Event) -> None:
    s = cpu.state
    external = event.external
    error = _gate_error(event)
    entry = event.vector * 16
    require(entry + 15 <= s.limit(IDTR), GP, error)
    low = cpu.read(s.base(IDTR) + entry, 16, implicit=True)
    kind = low >> 40 & 0x1F
    require(kind in (INTERRUPT_32, TRAP_32), GP, error)
    require(not event.software or low >> 45 & 3 >= s.cpl, GP, error)
    require(bool(low >> 47 & 1), NP, error)
    selector, ist = low >> 16 & 0xFFFF, low >> 32 & 7
    offset = (low & 0xFFFF) | (low >> 32 & 0xFFFF0000) | (low >> 64 & 0xFFFFFFFF) << 32
    code, cpl = _target(cpu, event, selector)
    require(code.attrib & (LONG | DEFAULT_BIG) == LONG, GP, selector & 0xFFFC | external)
    require(canonical(offset), GP, 0)
    rsp = s.reg(RSP)
    if ist or cpl < s.cpl:
        field = 0x24 + 8 * (ist - 1) if ist else 4 + 8 * cpl
        require(field + 7 <= s.limit(TR), INVALID_TSS, s.selector(TR) & 0xFFFC | external)
        rsp = cpu.read(s.base(TR) + field, 8, implicit=True)
    require(canonical(rsp), STACK_FAULT, external)
    rsp &= ~0xF
    frame = [s.selector(SS), s.reg(RSP), _image(cpu, event), s.selector(CS), s.rip]
    if event.error is not None:
        frame.append(event.error)
    writes = _pushes(cpu, rsp, frame, external, user=cpl == 3, implicit=cpl != 3 and cpl < s.cpl)
    rsp = rsp - 8 * len(frame) & MASK64
    load(cpu, CS, code, cpl)
    cpu.commit(writes)
    if cpl < s.cpl:
        s.set_segment(SS, cpl, 0, 0, cpl << 5)
    s.set_reg(RSP, rsp)
    _clear_flags(cpu, kind == INTERRUPT_32)
    s.rip = offset
    s.refresh(cpl)


def _pushes(
    cpu: Cpu, rsp: int, frame: list[int], external: int, *, user: bool, implicit: bool
) -> list[tuple[list[tuple[int, int]], bytes]]:
    """The pushes of a frame below RSP, first value first, as stores that have been checked."""
    first = rsp - 8 & MASK64
    size = 8 * len(frame)
    if first & 4095 >= size - 8:  # in one page: what holds for the first push holds for all
        require(canonical(first), STACK_FAULT, external)
        spa = cpu.translate(first, write=True, user=user, implicit=implicit)
        return [([(spa + 8 - size, size)], pack(f"<{len(frame)}Q", *reversed(frame)))]
    writes = []
    for value in frame:
        rsp = rsp - 8 & MASK64
        require(canonical(rsp), STACK_FAULT, external)
        writes.append(cpu.plan(rsp, 8, value, user=user, implicit=implicit))
    return writes


def _clear_flags(cpu: Cpu, interrupt_gate: bool) -> None:
    clear = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM
    cpu.state.rflags &= ~(clear | RFLAGS_IF if interrupt_gate else clear)


def inner_stack(cpu: Cpu, cpl: int, external: int) -> tuple[int, int]:
    """SS and ESP for a privilege level, from the present 16- or 32-bit TSS (APM2 12.2.4)."""
    s = cpu.state
    wide = bool(s.attrib(TR) & 8)
    field, size = (4 + 8 * cpl, 4) if wide else (2 + 4 * cpl, 2)
    require(field + size + 1 <= s.limit(TR), INVALID_TSS, s.selector(TR) & 0xFFFC | external)
    esp = cpu.read(s.base(TR) + field, size, implicit=True)
    return cpu.read(s.base(TR) + field + size, 2, implicit=True), esp


def _deliver_protected(cpu: Cpu, event: Event) -> None:
    s = cpu.state
    external = event.external
    error = _gate_error(event)
    entry = event.vector * 8
    require(entry + 7 <= s.limit(IDTR), GP, error)
    gate = cpu.read(s.base(IDTR) + entry, 8, implicit=True)
    kind = gate >> 40 & 0x1F
    require(kind in (TASK_GATE, INTERRUPT_16, TRAP_16, INTERRUPT_32, TRAP_32), GP, error)
    require(not event.software or gate >> 45 & 3 >= s.cpl, GP, error)
    require(bool(gate >> 47 & 1), NP, error)
    selector = gate >> 16 & 0xFFFF
    if kind == TASK_GATE:
        tasks.switch(cpu, selector, tasks.GATE, event)
        return
    wide = kind >= INTERRUPT_32
    size = 4 if wide else 2
    offset = (gate & 0xFFFF) | (gate >> 32 & 0xFFFF0000 if wide else 0)
    code, cpl = _target(cpu, event, selector)
    virtual = bool(s.rflags & RFLAGS_VM)
    flags = _image(cpu, event)
    frame = [flags, s.selector(CS), s.rip]
    stack: Descriptor | None = None
    if cpl < s.cpl:
        require(not virtual or cpl == 0, GP, selector & 0xFFFC | external)
        ss, sp = inner_stack(cpu, cpl, external)
        stack = stack_segment(cpu, ss, cpl, external)
        frame = [s.selector(SS), s.reg(RSP), *frame]
        if virtual:
            frame = [s.selector(GS), s.selector(FS), s.selector(DS), s.selector(ES), *frame]
        base, limit, attrib = stack.base, stack.limit, stack.attrib
        stack_error = ss & 0xFFFC | external
    else:
        require(not virtual, GP, selector & 0xFFFC | external)
        sp = s.reg(RSP)
        base, limit, attrib, stack_error = s.base(SS), s.limit(SS), s.attrib(SS), external
    if event.error is not None:
        frame.append(event.error)
    mask = 0xFFFFFFFF if attrib & DEFAULT_BIG else 0xFFFF
    user = cpl == 3
    writes = []
    for value in frame:
        sp = (sp & ~mask) | ((sp - size) & mask)
        require(within(sp & mask, size, limit, attrib), STACK_FAULT, stack_error)
        address = (base + (sp & mask)) & 0xFFFFFFFF
        writes.append(cpu.plan(address, size, value, user=user, implicit=not user and cpl < s.cpl))
    require(offset <= code.limit, GP, 0)
    load(cpu, CS, code, cpl)
    if stack is not None:
        load(cpu, SS, stack, cpl)
        if virtual:
            for register in (ES, DS, FS, GS):
                s.set_segment(register, 0, 0, 0, 0)
    cpu.commit(writes)
    s.set_reg(RSP, sp if attrib & DEFAULT_BIG else (s.reg(RSP) & ~0xFFFF if stack is None else 0) | (sp & 0xFFFF))
    _clear_flags(cpu, kind in (INTERRUPT_16, INTERRUPT_32))
    s.rip = offset
    s.refresh(cpl)


def within(offset: int, size: int, limit: int, attrib: int) -> bool:
    """The limit check of a data segment, expand-down included (APM2 4.7.2)."""
    if attrib & 0x0C == 0x04:
        top = 0xFFFFFFFF if attrib & DEFAULT_BIG else 0xFFFF
        return offset > limit and offset + size - 1 <= top
    return offset + size - 1 <= limit


def stack_segment(cpu: Cpu, selector: int, cpl: int, external: int) -> Descriptor:
    """The stack segment of an inner privilege level, checked as an interrupt checks it."""
    error = selector & 0xFFFC | external
    require(not null_selector(selector), INVALID_TSS, error)
    stack = fetch(cpu, selector, INVALID_TSS, external)
    writable = stack.is_segment and not stack.is_code and bool(stack.type & 2)
    require(writable and selector & 3 == cpl and stack.dpl == cpl, INVALID_TSS, error)
    require(stack.present, STACK_FAULT, error)
    return stack


