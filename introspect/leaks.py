"""State that VMRUN and #VMEXIT do not switch, and that a hypervisor must: what one guest, or the host, leaves to another.

Two ways to find out.  `possible` reads a VMCB and its MSR map, in a dump as well: which of that state the guest reaches without
the hypervisor hearing of it.  `LeakLog` is told what processors hold at each world switch, and finds values that came through:
the evidence is a number of one guest in the registers of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from introspect.exits import ExitCode
from introspect.layout import Buffer
from introspect.permissions import msrpm_intercepts
from introspect.sources import Memory
from introspect.vmcb import VMCB

__all__ = ["GENERAL", "ITEMS", "NAMES", "Evidence", "Leak", "LeakLog", "Possible", "possible"]

GENERAL = ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16)))
"""General registers that VMRUN does not switch: all but rAX and rSP."""
_PAT_RESET = 0x0007_0406_0007_0406


class Item(NamedTuple):
    """Some registers that are alike.  `usual`: values which say nothing about where they come from."""

    names: tuple[str, ...]
    section: str
    remedy: str
    usual: frozenset[int] = frozenset((0,))
    switched: Callable[[Buffer], bool] = lambda vmcb: False
    """Whether this VMCB has VMRUN switch them all the same."""
    field: bool = False
    """The VMCB has fields of these names, which VMLOAD loads."""


def _bit(name: str, mask: int) -> Callable[[Buffer], bool]:
    return lambda vmcb: bool(VMCB.read(vmcb, name) & mask)


_VMLOAD = (
    *(f"{name}.{part}" for name in ("fs", "gs", "ldtr", "tr") for part in ("selector", "base")),
    "star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip",
)  # fmt: skip
_FLOATING = "FXSAVE or XSAVE behind #VMEXIT and the reverse before VMRUN, or set CR0.TS and intercept #NM"
_BRANCHES = ("debugctl", "br_from", "br_to", "last_excp_from", "last_excp_to")
ITEMS = {
    "general registers": Item(
        GENERAL, "15.5.1", "save them behind #VMEXIT and load the guest's own before VMRUN",
        frozenset((*range(256), (1 << 32) - 1, (1 << 64) - 1)),
    ),
    "debug registers": Item(
        ("dr0", "dr1", "dr2", "dr3"), "15.5.1", "intercept the guest's accesses, or save and load DR0 to DR3 around VMRUN"
    ),
    "VMLOAD": Item(_VMLOAD, "15.5.2", "VMLOAD the guest's VMCB before VMRUN, VMSAVE behind #VMEXIT", field=True),
    "x87": Item(
        (*(f"st{n}" for n in range(8)), "fctrl", "fstat", "ftag"), "15.5.1", _FLOATING, frozenset((0, 0x40, 0x37F, 0xFFFF))
    ),
    "SSE": Item((*(f"xmm{n}" for n in range(16)), "mxcsr"), "15.5.1", _FLOATING, frozenset((0, 0x1F80))),
    "XCR0": Item(("xcr0",), "15.5.1", "intercept XSETBV, or XSETBV the guest's value before VMRUN", frozenset((0, 1))),
    "TSC_AUX": Item(("tsc_aux",), "15.5.1", "intercept the MSR and RDTSCP, or load the guest's value before VMRUN"),
    "PAT": Item(
        ("pat",), "15.25.2", "intercept the MSR: without nested paging there is one PAT for host and guests",
        frozenset((_PAT_RESET,)), _bit("misc_ctl", 1),
    ),
    "branch records": Item(
        _BRANCHES, "15.23", "turn LBR virtualization on (VMCB offset B8h, bit 0), or intercept DebugCtl and save it",
        switched=_bit("misc_ctl2", 1),
    ),
    "TPR": Item(("cr8",), "15.21.2", "set V_INTR_MASKING, or intercept CR8", switched=_bit("v_intr", 1 << 24 | 1 << 31)),
}  # fmt: skip
NAMES = tuple(name for item in ITEMS.values() for name in item.names)
"""All registers that `LeakLog` is to be told."""
_ITEM_OF = {name: kind for kind, item in ITEMS.items() for name in item.names}


# What may leak, by a VMCB


@dataclass(frozen=True, slots=True)
class Possible:
    """State that the guest of a VMCB reaches directly although VMRUN does not switch it."""

    kind: str
    what: str
    section: str
    remedy: str


_HOST_MSRS = {
    0x1B: "APIC_BASE", 0x200: "MTRRphysBase0", 0x201: "MTRRphysMask0", 0x250: "MTRRfix64K_00000", 0x2FF: "MTRRdefType",
    0xC0000080: "EFER", 0xC0000103: "TSC_AUX", 0xC0010010: "SYSCFG", 0xC0010015: "HWCR", 0xC001001A: "TOP_MEM",
    0xC001001D: "TOP_MEM2", 0xC0010111: "SMM_BASE", 0xC0010114: "VM_CR", 0xC0010117: "VM_HSAVE_PA", 0x48: "SPEC_CTRL",
    0xC0000104: "TSC_RATIO", 0x10: "TSC", 0xC0010200: "PERF_CTL0", 0xC0010000: "PerfEvtSel0",
}  # fmt: skip
"""MSRs whose writes by a guest change the host's machine."""
_OPTIONAL_MSRS = {0x277: ("PAT", "misc_ctl", 1), 0x1D9: ("DebugCtl", "misc_ctl2", 1)}
"""Those that VMRUN switches if a bit of the VMCB says so."""


def possible(memory: Memory, vmcb: Buffer) -> tuple[Possible, ...]:
    """By intercepts and the MSR map: what a hypervisor has to switch itself, or should intercept."""
    found = []
    words = {name: VMCB.read(vmcb, name) for name in ("intercept_dr_write", "intercept_misc1", "intercept_misc2", "v_intr")}
    if open_ := [f"DR{n}" for n in range(4) if not words["intercept_dr_write"] >> n & 1]:
        item = ITEMS["debug registers"]
        found.append(Possible("debug registers", f"writes of {', '.join(open_)} do not exit", item.section, item.remedy))
    cr_write = VMCB.read(vmcb, "intercept_cr_write")
    if not cr_write >> 8 & 1 and not ITEMS["TPR"].switched(vmcb):
        found.append(Possible("TPR", "writes of CR8 change the host's TPR", ITEMS["TPR"].section, ITEMS["TPR"].remedy))
    if not words["intercept_misc2"] >> 13 & 1:
        found.append(Possible("XCR0", "XSETBV does not exit", ITEMS["XCR0"].section, ITEMS["XCR0"].remedy))
    uses_map = bool(words["intercept_misc1"] >> 28 & 1)
    base = VMCB.read(vmcb, "msrpm_base_pa")

    def passes(number: int) -> bool:
        return not (uses_map and msrpm_intercepts(memory, base, number, True))

    msrs = dict(_HOST_MSRS)
    msrs |= {number: name for number, (name, field, mask) in _OPTIONAL_MSRS.items() if not VMCB.read(vmcb, field) & mask}
    if names := [f"{name} ({number:#x})" for number, name in sorted(msrs.items()) if passes(number)]:
        why = "" if uses_map else " (the MSR intercept is clear)"
        what = f"writes of {', '.join(names)} do not exit{why}"
        found.append(Possible("MSRs", what, "15.11", "set their bits in the MSR permission map"))
    return tuple(found)


# What did leak, by what was seen


@dataclass(frozen=True, slots=True)
class Evidence:
    """A register at a VMRUN: `value` was there, where `own` is what the guest had at its last #VMEXIT, None if there was none."""

    name: str
    value: int
    own: int | None
    time: int
    after: int
    """Number of the #VMEXIT that left the value; 0 where it is the host's."""


@dataclass(frozen=True, slots=True)
class Leak:
    """What one guest found of another's, or of the host's, in registers of one kind."""

    kind: str
    guest: int
    source: int
    """The guest whose value it was; 1 for the host."""
    section: str
    remedy: str
    times: int
    evidence: tuple[Evidence, ...]
    """The first of each register."""


class _Left(NamedTuple):
    """What a processor held when a guest left."""

    guest: int
    number: int
    code: int
    values: Mapping[str, int]


HOST = 1
_NEAR, _LOW = 1 << 12, 1 << 16
"""Bytes around an address of the host's that are taken for the same stack or structure; numbers too small to be addresses."""
_KEPT = frozenset(("debug registers", "x87", "SSE"))
"""What nobody but the guest has reason to change, but for the exits of `_DR_WRITES`."""
_DR_WRITES = range(0x30, 0x40)
_RESULTS = {
    int(ExitCode.CPUID): ("rbx", "rcx", "rdx"), int(ExitCode.MSR): ("rdx",), int(ExitCode.RDTSC): ("rdx",),
    int(ExitCode.RDPMC): ("rdx",), int(ExitCode.RDTSCP): ("rcx", "rdx"), int(ExitCode.XSETBV): ("xcr0",),
}  # fmt: skip
"""Registers that a hypervisor sets when it has executed the instruction for a guest: the same for one guest as for another."""


class LeakLog:
    """Told of world switches; keeps the first evidence of each leak."""

    def __init__(self, ran: Iterable[int] = (), hosts: Mapping[int, Mapping[str, int]] | None = None) -> None:
        """`ran`: VMCBs whose guests have run before, unseen: what they had then is not known.  `hosts`: by CPU, what those hold
        that are in the host."""
        self.switches = 0
        self._ran = set(ran)
        self._by_cpu = {cpu: _Left(HOST, 0, 0, dict(values)) for cpu, values in (hosts or {}).items()}
        self._by_vmcb: dict[int, _Left] = {}
        self._found: dict[tuple[str, int, int], Leak] = {}

    @property
    def leaks(self) -> tuple[Leak, ...]:
        return tuple(leak for _, leak in sorted(self._found.items()))

    def leaves(self, guest: int, vmcb: int, cpu: int, number: int, code: int, values: Mapping[str, int]) -> None:
        """#VMEXIT `number` with this EXITCODE: what the processor holds of `NAMES`."""
        self.switches += 1
        self._by_cpu[cpu] = self._by_vmcb[vmcb] = _Left(guest, number, code, dict(values))

    def enters(
        self, guest: int, vmcb: int, cpu: int, time: int, values: Mapping[str, int], contents: Buffer, host: Iterable[int] = ()
    ) -> None:
        """VMRUN: what the processor holds, which is what the guest is going to see; the VMCB's contents; and addresses that are
        the host's own business (its stack, its save area, the VMCB)."""
        self.switches += 1
        last, own = self._by_cpu.get(cpu), self._by_vmcb.get(vmcb)
        if own is None and vmcb in self._ran:
            return
        private, results = tuple(host), _RESULTS.get(own.code, ()) if own is not None else ()
        for kind, item in ITEMS.items():
            if item.switched(contents):
                continue
            for name in item.names:
                value = values.get(name)
                mine = own.values.get(name) if own is not None else None
                if value is None or value in item.usual or value == mine or name in results:
                    continue
                if item.field and value == _field(contents, name):
                    continue
                source = self._source(kind, name, value, guest, last, own, private)
                if source is not None:
                    left = (one for one in (last, *self._by_vmcb.values()) if one is not None and one.guest == source)
                    number = next((one.number for one in left if one.values.get(name) == value), 0)
                    self._note(kind, item, guest, source, Evidence(name, value, mine, time, number))

    def _source(
        self, kind: str, name: str, value: int, guest: int, last: _Left | None, own: _Left | None, private: tuple[int, ...]
    ) -> int | None:
        """Whose value it is, if that can be told."""
        if last is not None and last.values.get(name) == value:
            return last.guest if last.guest != guest else None
        if kind == "general registers":
            # The host may put anything there for the guest, but not addresses of its own.
            return HOST if value >= _LOW and any(abs(value - address) < _NEAR for address in private) else None
        for left in self._by_vmcb.values():
            if left.guest != guest and left.values.get(name) == value:
                return left.guest
        if ITEMS[kind].field:
            return HOST  # VMLOAD would have replaced it
        lost = own is not None and kind in _KEPT and own.code not in _DR_WRITES
        return HOST if lost else None

    def _note(self, kind: str, item: Item, guest: int, source: int, evidence: Evidence) -> None:
        known = self._found.get((kind, guest, source))
        if known is None:
            self._found[kind, guest, source] = Leak(kind, guest, source, item.section, item.remedy, 1, (evidence,))
            return
        new = () if any(one.name == evidence.name for one in known.evidence) else (evidence,)
        self._found[kind, guest, source] = replace(known, times=known.times + 1, evidence=(*known.evidence, *new))


def _field(contents: Buffer, name: str) -> int:
    return VMCB.read(contents, name)
