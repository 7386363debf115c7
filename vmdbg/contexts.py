"""A debugger's view of one thread: registers and memory of a CPU or vCPU, whether it is on a processor or not.

A thread that is running owns the processor's registers.  One that is not lives in its save area: a guest's VMCB, or for
the hypervisor under a running guest the page at VM_HSAVE_PA, which has the same layout.  Nothing here has side effects:
translations leave no accessed bits, devices are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple, Protocol

from introspect.memo import Place
from introspect.memtypes import Caching, Mtrrs
from introspect.paging import Nested, NestedTranslation, PagingState, nested_translate
from introspect.registers import CR0
from introspect.vmcb import VMCB
from vmdbg.cpu.control import read_tpr, write_tpr
from vmdbg.cpu.processor import Processor
from vmdbg.engine import layout
from vmdbg.engine.memory import Ram
from vmdbg.engine.state import ATTRIB_DB, CS, DS, ES, FS, GS, SS, CpuState
from vmdbg.history import Vcpu
from vmdbg.platform.msrs import MTRR_DEF_TYPE, MTRR_FIXED, MTRR_VARIABLE
from vmdbg.svm import world

GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
"""General registers in the order of their encoding."""
_SAVED = {
    "eflags": "rflags", "k_gs_base": "kernel_gs_base", "fs_base": "fs.base", "gs_base": "gs.base",
    **{name: name for name in ("cr0", "cr2", "cr3", "cr4", "efer")},
}  # fmt: skip
"""Registers that a save area has fields for, by gdb's names."""
_SHARED = frozenset(("fs", "gs", "fs_base", "gs_base", "k_gs_base", "cr2", "cr8"))
"""What VMRUN does not save for the host: while a guest runs the processor has it, whoever loaded it last."""
NUMBERS = {name: number for number, name in enumerate(GENERAL)} | {
    "e" + name[1:]: number for number, name in enumerate(GENERAL[:8])
}
SEGMENTS = {"es": ES, "cs": CS, "ss": SS, "ds": DS, "fs": FS, "gs": GS}
_FPSTT, _FPUS, _FPUC, _FPTAGS, _FPREGS = (layout.FPU + at for at in (4, 8, 10, 12, 24))
_MTRRS = itemgetter(MTRR_DEF_TYPE, *MTRR_FIXED, *(number + mask for number in MTRR_VARIABLE for mask in (0, 1)))
_PAGE = 4096
_UNPAGED = 1 << 32
"""Without paging linear addresses have 32 bits and are the physical ones."""


class Context(Protocol):
    """Registers by gdb's names; `read` gives None for what this thread has no value of now."""

    def read(self, name: str) -> int | None: ...

    def write(self, name: str, value: int) -> bool:
        """False if the register cannot be written here."""

    def code32(self) -> bool:
        """Whether code outside 64-bit mode is 32-bit by default."""

    def paging(self) -> PagingState: ...

    def nested(self) -> Nested | None: ...

    def caching(self) -> Caching: ...


def host_pat(cpu: Processor) -> int:
    """The host's PAT, also while a guest with one of its own runs on its processor."""
    return cpu.guest.host_pat if cpu.guest is not None and cpu.guest.np else cpu.state.field("pat")


def host_cd(cpu: Processor) -> bool:
    """The host's CR0.CD, of which a guest has a copy of its own (APM2 15.25.2)."""
    cr0 = cpu.cr0 if cpu.guest is None else VMCB.read(world.hsave(cpu), "cr0")
    return bool(cr0 & CR0.CD)


@lru_cache(64)
def _mtrrs(def_type: int, *others: int) -> Mtrrs:
    """They hardly ever change."""
    fixed, variable = others[: len(MTRR_FIXED)], others[len(MTRR_FIXED) :]
    return Mtrrs(def_type, fixed, tuple(zip(variable[::2], variable[1::2], strict=True)))


def mtrrs(cpu: Processor) -> Mtrrs:
    return _mtrrs(*_MTRRS(cpu.msrs.values))


def float_register(state: CpuState, name: str) -> int | None:
    """x87 and SSE registers: those of the processor, which world switches leave alone."""
    if name.startswith("xmm"):
        return state.xmm(int(name[3:]))
    if name == "mxcsr":
        return state.mxcsr
    b = state.bytes
    top = b[_FPSTT] & 7
    if name.startswith("st"):
        at = _FPREGS + 16 * ((top + int(name[2:])) & 7)
        return int.from_bytes(b[at : at + 10], "little")
    if name == "fctrl":
        return int.from_bytes(b[_FPUC : _FPUC + 2], "little")
    if name == "fstat":
        return int.from_bytes(b[_FPUS : _FPUS + 2], "little") & ~0x3800 | top << 11
    if name == "ftag":
        return sum((3 if b[_FPTAGS + n] else 0) << 2 * n for n in range(8))
    return 0 if name in ("fiseg", "fioff", "foseg", "fooff", "fop") else None


def write_float_register(state: CpuState, name: str, value: int) -> bool:
    if name.startswith("xmm"):
        state.set_xmm(int(name[3:]), value)
    elif name == "mxcsr":
        state.mxcsr = value & 0xFFFF
    elif name.startswith("st") and name[2:].isdigit():
        at = _FPREGS + 16 * (((state.bytes[_FPSTT] & 7) + int(name[2:])) & 7)
        state.bytes[at : at + 10] = value.to_bytes(10, "little")
    else:
        return name in ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
    return True


def linear_pc(cs_base: int, rip: int, *, code64: bool) -> int:
    """gdb knows no segments: its pc is the linear address (in 64-bit code they are the same)."""
    return rip if code64 else (cs_base + rip) & 0xFFFFFFFF


_SPECIAL: Mapping[str, Callable[[Processor], int]] = {
    "k_gs_base": lambda cpu: cpu.state.field("kernel_gs_base"),
    "fs_base": lambda cpu: cpu.state.base(FS),
    "gs_base": lambda cpu: cpu.state.base(GS),
    "efer": lambda cpu: cpu.state.efer,
    "eflags": lambda cpu: cpu.state.rflags,
    "rip": lambda cpu: cpu.state.linear_rip,
    "eip": lambda cpu: cpu.state.linear_rip,
    "cr8": read_tpr,
}


class LiveContext:
    """A thread that is on a processor."""

    __slots__ = ("cpu",)

    def __init__(self, cpu: Processor) -> None:
        self.cpu = cpu

    def read(self, name: str) -> int | None:
        s = self.cpu.state
        if name in NUMBERS:
            return s.reg(NUMBERS[name])
        if name in _SPECIAL:
            return _SPECIAL[name](self.cpu)
        if name in SEGMENTS:
            return s.selector(SEGMENTS[name])
        if name == "cr0":
            return self.cpu.cr0
        if name in ("cr2", "cr3", "cr4"):
            return s.cr(int(name[2]))
        return float_register(s, name)

    def write(self, name: str, value: int) -> bool:
        cpu, s = self.cpu, self.cpu.state
        before = self.read(name)
        if name in NUMBERS:
            s.set_reg(NUMBERS[name], value)
        elif name in ("rip", "eip"):
            s.rip = value if s.is_code64 else (value - s.base(CS)) & 0xFFFFFFFF
            s.shadow = False
            cpu.postponed = None  # of what it was about to do elsewhere nothing comes
        elif name == "eflags":
            s.rflags = value
            s.refresh()
        elif name in SEGMENTS:
            if value != s.selector(SEGMENTS[name]):
                return False
        elif name in ("cr0", "cr2", "cr3", "cr4"):
            s.set_cr(int(name[2]), value)
            s.refresh()
            cpu.hold_pdptes()
        elif name == "efer":
            s.efer = value
            s.refresh()
        elif name == "cr8":
            write_tpr(cpu, value & 0xF)
        elif name in ("fs_base", "gs_base", "k_gs_base"):
            s.set_field({"fs_base": "fs.base", "gs_base": "gs.base", "k_gs_base": "kernel_gs_base"}[name], value)
        else:
            return write_float_register(s, name, value)
        if self.read(name) != before:  # else not even its TLB is to be another
            cpu.flush()
        return True

    def code32(self) -> bool:
        return self.cpu.bits == 32

    def paging(self) -> PagingState:
        return self.cpu.paging

    def nested(self) -> Nested | None:
        return self.cpu.nested

    def caching(self) -> Caching:
        cpu = self.cpu
        return Caching(cpu.state.field("pat"), None if cpu.nested is None else host_pat(cpu), mtrrs(cpu), host_cd(cpu))


class SavedContext:
    """A thread that lives in a save area of the VMCB's layout at `view`."""

    def __init__(
        self, cpu: Processor, view: memoryview, vcpu: Vcpu | None, change: Callable[[Vcpu, int, int], None] | None = None
    ) -> None:
        """`change` is how a general register of the vCPU is set; without it none is."""
        self.cpu = cpu
        self.change = change
        """Whose x87 and SSE registers and, for the hypervisor, general registers are shown."""
        self.view = view
        self.vcpu = vcpu

    def _get(self, name: str) -> int:
        return VMCB.read(self.view, name)

    def _code64(self) -> bool:
        return bool(self._get("efer") & 0x400 and self._get("cs.attrib") & 0x200)

    def read(self, name: str) -> int | None:
        number = NUMBERS.get(name)
        if number is not None:
            if number in (0, 4):
                return self._get(GENERAL[number])
            if self.vcpu is None:
                return self.cpu.state.reg(number)
            if number in self.vcpu.changed:
                return self.vcpu.changed[number]
            return self.vcpu.registers[number]
        if self.vcpu is None and name in _SHARED:
            return self.cpu.lapic.cr8 if name == "cr8" else LiveContext(self.cpu).read(name)
        if name in ("rip", "eip"):
            return linear_pc(self._get("cs.base"), self._get("rip"), code64=self._code64())
        if name in _SAVED:
            return self._get(_SAVED[name])
        if name in SEGMENTS:
            return self._get(name + ".selector")
        if name == "cr8":
            return self._get("v_intr") & 0xF
        return float_register(self.cpu.state, name)

    def write(self, name: str, value: int) -> bool:
        number = NUMBERS.get(name)
        if self.vcpu is None and name in _SHARED:
            return value == self.read(name)
        if number is not None and number not in (0, 4):
            if self.vcpu is None or self.change is None:
                return False
            self.change(self.vcpu, number, value)
            return True
        if name in ("rip", "eip"):
            field, value = "rip", value if self._code64() else (value - self._get("cs.base")) & 0xFFFFFFFF
        elif number is not None:
            field = GENERAL[number]
        elif name in SEGMENTS:
            return value == self._get(name + ".selector")
        else:
            if name not in _SAVED:
                return write_float_register(self.cpu.state, name, value)
            field = _SAVED[name]
        VMCB.write(self.view, field, value)
        return True

    def code32(self) -> bool:
        return bool(self._get("cs.attrib") & ATTRIB_DB)

    def paging(self) -> PagingState:
        return PagingState.from_vmcb(self.view, self.cpu.physical_bits)

    def nested(self) -> Nested | None:
        if self.vcpu is None:
            return None
        return Nested.from_vmcb(self.view, self.vcpu.host_cr4, self.vcpu.host_efer, self.cpu.physical_bits)

    def caching(self) -> Caching:
        host = host_pat(self.cpu)
        nested = self.nested() is not None
        return Caching(self._get("g_pat") if nested else host, host if nested else None, mtrrs(self.cpu), host_cd(self.cpu))


def lookup(ram: Ram, context: Context, address: int) -> Place | None:
    """A linear address in a thread's own two-dimensional translation; None if it leads nowhere."""
    return ram.memo.find(context.paging(), address, context.nested())


def locate(ram: Ram, context: Context, address: int) -> int | None:
    """System-physical address of a linear one in RAM; None if there is none."""
    found = lookup(ram, context, address)
    return found.spa if found is not None and ram.contains(found.spa) else None


class Space(NamedTuple):
    """An address space, and what one linear address names in it."""

    root: int | None
    """Guest-physical address of the page tables; None while paging is off."""
    page: int | None
    """Guest-physical address of the page; None if the address is not mapped."""


def space(ram: Ram, context: Context, address: int) -> Space:
    """Where a linear address leads for a thread now."""
    found = lookup(ram, context, address)
    return Space(context.paging().root, found.gpa & -_PAGE if found is not None else None)


def locate_gpa(ram: Ram, context: Context, gpa: int) -> int | None:
    """System-physical address of a thread's guest-physical one; None if there is none."""
    nested = context.nested()
    if nested is not None:
        found = nested_translate(ram, nested, gpa, write=False, execute=False, set_ad=False)
        if not isinstance(found, NestedTranslation):
            return None
        gpa = int(found.spa)
    return gpa if ram.contains(gpa) else None


def stretches(ram: Ram, context: Context, address: int, length: int) -> Iterator[tuple[int, int]]:
    """(spa, bytes) of a linear range, as far as it leads to RAM, a mapped page of any size or more at a time."""
    state, nested = context.paging(), context.nested()
    while length > 0:
        address &= 0xFFFFFFFFFFFFFFFF
        found = ram.memo.find(state, address, nested)
        if found is None:
            return
        page = found.page_size or _UNPAGED
        size = min(length, page - (address & (page - 1)))
        here = ram.extent(found.spa, size)
        if not here:
            return
        yield found.spa, here
        address += here
        length -= here


def read_memory(ram: Ram, context: Context, address: int, length: int) -> bytes:
    """The readable prefix of a linear range."""
    view = ram.view
    return b"".join([view[spa : spa + size] for spa, size in stretches(ram, context, address, length)])


def write_memory(ram: Ram, context: Context, address: int, data: bytes) -> int | None:
    """Write all of `data`, past write protection, or nothing: then the address that is not mapped is returned."""
    pieces = list(stretches(ram, context, address, len(data)))
    mapped = sum(size for _, size in pieces)
    if mapped < len(data):
        return address + mapped & 0xFFFFFFFFFFFFFFFF
    done = 0
    for spa, size in pieces:
        ram.write(spa, data[done : done + size])
        done += size
    return None
