"""The second pass of a search: what speaks for a page that has the form of a VMCB or a host's saved state, and what against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from introspect.exits import ExitCode, exit_name
from introspect.layout import bits
from introspect.paging import ENTRY, Access, Nested, PagingState, Translation, translate
from introspect.permissions import IOPM_SIZE, MSRPM_SIZE
from introspect.registers import ATTRIB, CR0, EFER
from introspect.rules import Processor, violations
from introspect.scan.pages import SAVE_RESERVED
from introspect.scan.results import Area, Evidence, Found
from introspect.sources import Memory, Unreadable
from introspect.vmcb import VMCB

__all__ = ["contents_of", "judge_hsave", "judge_vmcb"]

PAGE = 0x1000


def _yes(fact: bool, points: int, good: str, bad: str) -> Evidence:
    return Evidence(points if fact else 0, points, good if fact else bad)


def contents_of(memory: Memory, spa: int, length: int = PAGE) -> bytes | None:
    """None where there is no memory."""
    try:
        return memory.read(spa, length)
    except Unreadable:
        return None


def _root(memory: Memory, spa: int | None, entry_size: int) -> tuple[bool, str]:
    """Whether a page looks like the top of page tables."""
    if spa is None:
        return False, "paging is off"
    data = contents_of(memory, spa & -PAGE, PAGE)
    if data is None:
        return False, f"no memory at {spa:#x}"
    entries = np.frombuffer(data, np.uint8)[::entry_size]
    present = int(np.count_nonzero(entries & ENTRY.P))
    return present > 0, f"the table at {spa:#x} has {present or 'no'} present entr{'y' if present == 1 else 'ies'}"


def _segments(vmcb: bytes) -> bool:
    """Whether CS is present code (or, in real mode, data), and the task register a task's or empty."""
    cs, tr = VMCB.read(vmcb, "cs.attrib"), VMCB.read(vmcb, "tr.attrib")
    return bool(cs & ATTRIB.P and cs & ATTRIB.S) and (not tr & ATTRIB.P or tr & 0x1F in (1, 3, 9, 11))


def judge_vmcb(memory: Memory, spa: int, contents: bytes, processor: Processor) -> Found:
    """What speaks for a page that has the form of a VMCB."""
    read = VMCB.read
    efer, cr0, rip = (read(contents, name) for name in ("efer", "cr0", "rip"))
    evidence = [Evidence(20, 20, "VMRUN is intercepted, EFER.SVME is set, the ASID is not 0, reserved parts are 0")]
    fatal = [one.rule for one in violations(contents, processor, memory) if one.rule.fatal]
    evidence.append(_yes(not fatal, 15, "VMRUN accepts it", f"VMRUN refuses it: {'; '.join(rule.text for rule in fatal[:2])}"))
    save = np.frombuffer(contents, np.uint64)[SAVE_RESERVED]
    evidence.append(_yes(not save.any(), 5, "what its save area reserves is 0", "reserved words of its save area are not 0"))
    code = read(contents, "exitcode")
    known = code in list(ExitCode)
    evidence.append(_yes(known, 10, f"its last exit is {exit_name(code)}", f"its exit code {code:#x} does not exist"))
    evidence.append(_yes(_segments(contents), 10, "CS and TR are what they load", "CS or TR are nothing that can be loaded"))
    areas = []
    maps = []
    for name, kind, size, bit in (("iopm_base_pa", "IOPM", IOPM_SIZE, 27), ("msrpm_base_pa", "MSRPM", MSRPM_SIZE, 28)):
        base = read(contents, name) & bits(51, 12)
        if read(contents, "intercept_misc1") >> bit & 1:
            data = contents_of(memory, base, size) if base else None
            maps.append(data is not None)
            if data is not None:
                areas.append(Area(kind, base, f"{sum(byte.bit_count() for byte in data)} bits set"))
    missing = "its permission maps lie where there is no memory"
    evidence.append(_yes(all(maps), 10, "its permission maps lie in memory" if maps else "it uses no permission maps", missing))
    nested = Nested.from_vmcb(contents, processor.host_cr4, processor.host_efer, processor.maxphyaddr)
    state = PagingState.from_vmcb(contents, processor.maxphyaddr)
    if nested is not None:
        good, text = _root(memory, nested.ncr3 & nested.format.base, nested.format.entry_size)
        evidence.append(_yes(good, 15, f"nCR3: {text}", f"nCR3: {text}"))
        if good:
            areas.append(Area("nested root", nested.ncr3 & nested.format.base, text))
    elif state.format is not None:
        good, text = _root(memory, state.root, state.format.entry_size)
        evidence.append(_yes(good, 15, f"CR3: {text}", f"CR3: {text}"))
    long_mode = bool(efer & EFER.LMA and read(contents, "cs.attrib") & ATTRIB.L)
    linear = rip if long_mode else read(contents, "cs.base") + rip & 0xFFFF_FFFF
    access = Access(execute=True, user=read(contents, "cpl") == 3)
    reached = translate(memory, state, linear, access, nested, set_ad=False)
    there = isinstance(reached, Translation) and contents_of(memory, reached.spa, 1) is not None
    where = f"CS:RIP, {linear:#x},"
    evidence.append(_yes(there, 15, f"{where} can be executed", f"{where} leads to no memory"))
    if cr0 & CR0.PE and not there and nested is None and not cr0 & CR0.PG:
        evidence.append(Evidence(0, 5, "without paging of any kind it would run on the host's own addresses"))
    return Found("VMCB", spa, tuple(evidence), tuple(areas))


def judge_hsave(memory: Memory, spa: int, contents: bytes, processor: Processor) -> Found:
    """What speaks for a page that has the form of a host's saved state."""
    state = replace(PagingState.from_vmcb(contents, processor.maxphyaddr), cpl=0)
    rip, rsp = VMCB.read(contents, "rip"), VMCB.read(contents, "rsp")
    evidence = [Evidence(30, 30, "it holds EFER.SVME, paging and RFLAGS of a host, and nothing where a VMCB has its controls")]
    save = np.frombuffer(contents, np.uint64)[SAVE_RESERVED]
    evidence.append(_yes(not save.any(), 10, "what a save area reserves is 0", "reserved words of a save area are not 0"))
    good, text = _root(memory, state.root, state.format.entry_size if state.format else 8)
    evidence.append(_yes(good, 20, f"CR3: {text}", f"CR3: {text}"))
    for name, linear, access in (("RIP", rip, Access(execute=True)), ("RSP", rsp - 1 & bits(63, 0), Access())):
        reached = translate(memory, state, linear, access, set_ad=False)
        there = isinstance(reached, Translation) and contents_of(memory, reached.spa, 1) is not None
        evidence.append(_yes(there, 20, f"{name}, {linear:#x}, leads to memory", f"{name}, {linear:#x}, leads to no memory"))
    return Found("HSAVE", spa, tuple(evidence))
