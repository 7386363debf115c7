"""Finding VMCBs in physical memory that nothing else is known of: no symbols, no registers.

Two passes. Every page is compared with what a VMCB must be, many pages at a time. What is left, hardly more than the VMCBs, is
then judged: each piece of evidence has points, and its reason in words.

The page at VM_HSAVE_PA is the processor's own, of a layout that the manual leaves open (APM2 15.30.4). Emulators give it that of a
VMCB's state-save area; such pages are found, those of real processors are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from introspect.exits import ExitCode, exit_name
from introspect.layout import bits
from introspect.paging import ENTRY, Access, Nested, PagingState, Translation, translate
from introspect.permissions import IOPM_SIZE, MSRPM_SIZE
from introspect.registers import ATTRIB, CR0, CR4, EFER, RFLAGS
from introspect.rules import Processor, violations
from introspect.sources import Memory, Unreadable, data_ranges
from introspect.vmcb import INT_STATE, MISC_CTL, SAVE_AREA, VMCB, VMCB_SIZE

__all__ = ["MOST", "THRESHOLD", "Area", "Evidence", "Found", "Progress", "Scan", "judge_hsave", "judge_vmcb", "scan"]

PAGE = 0x1000
CHUNK = 4 << 20
MOST = 4096
"""Pages that are judged: a dump that is full of what looks like VMCBs was made to be."""
THRESHOLD = 60
"""Points out of 100 from which on a page is taken for what it looks like."""

Words: TypeAlias = npt.NDArray[np.uint64]
Pages: TypeAlias = npt.NDArray[np.intp]
Progress: TypeAlias = Callable[[float], bool]
"""Told which share is done; says whether to go on."""


def _reserved(first: int, end: int) -> list[int]:
    """Indices of the 8-byte words within a stretch of the VMCB that no field has a part of."""
    used = {at // 8 for field in VMCB for at in range(field.offset, field.offset + field.size)}
    return [word for word in range(first // 8, end // 8) if word not in used]


_HOST_USE = 0x3E0
"""What lies from here up to the save area is software's (APM2 appendix B)."""
_CONTROL_RESERVED = np.array(_reserved(0, _HOST_USE))
_SAVE_RESERVED = _reserved(SAVE_AREA, VMCB.offset_of("spec_ctrl"))
_SVM_ALWAYS = bits(63, 32) | RFLAGS.ones | 1 << 3 | 1 << 5 | 1 << 15


def _word(name: str) -> int:
    return VMCB.offset_of(name) // 8


@dataclass(frozen=True, slots=True)
class Evidence:
    """Something that speaks for a page being what it looks like, or against it."""

    points: int
    """As many of `most` as it is worth here; none if it speaks against it."""
    most: int
    text: str


@dataclass(frozen=True, slots=True)
class Area:
    """A structure that a VMCB leads to."""

    kind: str
    """"IOPM", "MSRPM" or "nested root"."""
    spa: int
    text: str


@dataclass(frozen=True, slots=True)
class Found:
    """A page that looks like a VMCB or a host save area."""

    kind: str
    """"VMCB" or "HSAVE"."""
    spa: int
    evidence: tuple[Evidence, ...]
    areas: tuple[Area, ...] = ()
    inside: int | None = None
    """The VMCB whose nested tables map this page as memory of its guest: the guest's hypervisor made it."""
    runs_as: int | None = None
    """Of a VMCB inside a guest: that which the hypervisor outside runs in its place, if one has the same state."""

    @property
    def score(self) -> int:
        """Of 100."""
        most = sum(one.most for one in self.evidence)
        return 100 * sum(one.points for one in self.evidence) // most if most else 0


@dataclass(frozen=True, slots=True)
class Scan:
    """What a search found, by address."""

    found: tuple[Found, ...]
    doubtful: tuple[Found, ...]
    """Pages that have the form of a VMCB, but too little speaks for them."""
    bytes_read: int
    ended: str = ""
    """Why it did not look at everything, if it did not."""

    @property
    def vmcbs(self) -> tuple[Found, ...]:
        return tuple(one for one in self.found if one.kind == "VMCB")


# The first pass


def _candidates(words: Words) -> tuple[Pages, Pages]:
    """Pages (rows of 512 words) that may be VMCBs, and that may be host save areas."""
    efer, rflags = words[:, _word("efer")], words[:, _word("rflags")]
    state = efer & (EFER.SVME | ~EFER.defined & bits(63, 0)) == EFER.SVME
    state &= rflags & _SVM_ALWAYS == RFLAGS.ones
    near = np.flatnonzero(state)
    if not len(near):
        return near, near
    page = words[near]
    state = page[:, _word("cr0")] >> 32 == 0
    state &= page[:, _word("cr4")] & (~CR4.defined & bits(63, 0)) == 0
    state &= page[:, _word("cr3")] >> 52 == 0
    run = state & (page[:, _word("intercept_misc2")] & 1 == 1) & (page[:, _word("guest_asid")] & bits(31, 0) != 0)
    run &= (page[:, _CONTROL_RESERVED] == 0).all(axis=1)
    run &= page[:, _word("int_state")] & (~INT_STATE.defined & bits(63, 0)) == 0
    run &= (page[:, _word("dr6")] | page[:, _word("dr7")]) >> 32 == 0
    save = state & (page[:, : SAVE_AREA // 8] == 0).all(axis=1)
    save &= page[:, _word("cr0")] & (CR0.PE | CR0.PG) == CR0.PE | CR0.PG
    return near[run], near[save]


def _pages(memory: Memory, first: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Whole pages as far as they can be read: (address of the first, their bytes)."""
    at, step = first & -PAGE, CHUNK
    while at < end:
        count = min(step, (end - at + PAGE - 1) & -PAGE)
        try:
            data, following = memory.read(at, count), at + count
            step = CHUNK
        except Unreadable as error:
            data = error.readable_prefix[: len(error.readable_prefix) & -PAGE]
            following = max(error.address & -PAGE, at) + PAGE
        if data:
            yield at, data
        elif count > PAGE and following - at == PAGE:
            step = PAGE  # a page of a large stretch that is not there: look at what follows alone
        at = following


def _look(memory: Memory, progress: Progress | None) -> tuple[list[int], list[int], int, str]:
    stretches = list(data_ranges(memory))
    total = sum(end - first for first, end in stretches) or 1
    done, seen = 0, -1
    vmcbs: list[int] = []
    saves: list[int] = []
    for first, end in stretches:
        for at, data in _pages(memory, max(first, seen), end):
            words = np.frombuffer(data, np.uint64).reshape(-1, PAGE // 8)
            for into, pages in zip((vmcbs, saves), _candidates(words), strict=True):
                into += (at + pages * PAGE).tolist()
            seen = at + len(data)
            done += len(data)
            if len(vmcbs) + len(saves) > MOST:
                return vmcbs, saves, done, f"more than {MOST} pages look like VMCBs: those from {seen:#x} on were not looked at"
            if progress is not None and not progress(min(done / total, 1.0)):
                return vmcbs, saves, done, f"ended on request at {seen:#x}"
    return vmcbs, saves, done, ""


# The second pass


def _yes(fact: bool, points: int, good: str, bad: str) -> Evidence:
    return Evidence(points if fact else 0, points, good if fact else bad)


def _has(memory: Memory, spa: int, length: int) -> bytes | None:
    try:
        return memory.read(spa, length)
    except Unreadable:
        return None


def _root(memory: Memory, spa: int | None, entry_size: int) -> tuple[bool, str]:
    """Whether a page looks like the top of page tables."""
    if spa is None:
        return False, "paging is off"
    data = _has(memory, spa & -PAGE, PAGE)
    if data is None:
        return False, f"no memory at {spa:#x}"
    entries = np.frombuffer(data, np.uint32 if entry_size == 4 else np.uint64)
    present = entries[entries & ENTRY.P != 0]
    if not len(present):
        return False, f"the table at {spa:#x} has no present entry"
    return True, f"the table at {spa:#x} has {len(present)} present entries"


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
    save = np.frombuffer(contents, np.uint64)[_SAVE_RESERVED]
    evidence.append(_yes(not save.any(), 5, "what is reserved in its save area is 0", "reserved words of its save area are not 0"))
    code = read(contents, "exitcode")
    known = code in list(ExitCode)
    evidence.append(_yes(known, 10, f"its last exit is {exit_name(code)}", f"its exit code {code:#x} does not exist"))
    evidence.append(_yes(_segments(contents), 10, "CS and TR are what they load", "CS or TR are nothing that can be loaded"))
    areas = []
    maps = []
    for name, kind, size, bit in (("iopm_base_pa", "IOPM", IOPM_SIZE, 27), ("msrpm_base_pa", "MSRPM", MSRPM_SIZE, 28)):
        base = read(contents, name) & bits(51, 12)
        if read(contents, "intercept_misc1") >> bit & 1:
            data = _has(memory, base, size) if base else None
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
    there = isinstance(reached, Translation) and _has(memory, reached.spa, 1) is not None
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
    save = np.frombuffer(contents, np.uint64)[_SAVE_RESERVED]
    evidence.append(_yes(not save.any(), 10, "what is reserved in a save area is 0", "reserved words of its save area are not 0"))
    good, text = _root(memory, state.root, state.format.entry_size if state.format else 8)
    evidence.append(_yes(good, 20, f"CR3: {text}", f"CR3: {text}"))
    for name, linear, access in (("RIP", rip, Access(execute=True)), ("RSP", rsp - 1 & bits(63, 0), Access())):
        reached = translate(memory, state, linear, access, set_ad=False)
        there = isinstance(reached, Translation) and _has(memory, reached.spa, 1) is not None
        evidence.append(_yes(there, 20, f"{name}, {linear:#x}, leads to memory", f"{name}, {linear:#x}, leads to no memory"))
    return Found("HSAVE", spa, tuple(evidence))


def scan(memory: Memory, processor: Processor | None = None, progress: Progress | None = None) -> Scan:
    """Search all memory. `processor`: what is known of it; a 48-bit one in long mode otherwise."""
    cpu = processor or Processor()
    pages, saves, done, ended = _look(memory, progress)
    judged = []
    for judge, addresses in ((judge_hsave, saves), (judge_vmcb, pages)):
        for spa in addresses:
            contents = _has(memory, spa, VMCB_SIZE)
            if contents is not None:
                judged.append(judge(memory, spa, contents, cpu))
    judged.sort(key=lambda one: one.spa)
    found = [one for one in judged if one.score >= THRESHOLD]
    doubtful = [one for one in judged if one.score < THRESHOLD]
    return Scan(tuple(found), tuple(doubtful), done, ended)
