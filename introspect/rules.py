"""The checks VMRUN makes before it enters a guest, each with its reason (APM2 15.5.1, 15.20, 15.25.3, 15.25.4).

A violated rule that is `fatal` makes VMRUN exit at once with VMEXIT_INVALID; the others are mistakes the processor
does not report. `first_violation` is for an emulator's every VMRUN: one unpack, then comparisons of plain ints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from introspect.exits import EVENT, ExitCode, exception_name
from introspect.layout import Bits, Buffer, bit, bits
from introspect.paging import pdpte_reserved
from introspect.permissions import IOPM_SIZE, MSRPM_SIZE
from introspect.registers import ATTRIB, CR0, CR4, EFER, memory_types
from introspect.sources import Memory, Unreadable
from introspect.vmcb import AVIC_PHYSICAL, MISC_CTL, V_INTR, VMCB

__all__ = [
    "FEATURE_SECTIONS", "RULES", "SVM_FEATURES", "Processor", "Rule", "Violation", "first_violation", "host_violation",
    "violations",
]  # fmt: skip


class SVM_FEATURES(Bits):
    """CPUID 8000_000A EDX."""

    NP = bit(0)
    LBRV = bit(1)
    SVML = bit(2)
    NRIPS = bit(3)
    TscRateMsr = bit(4)
    VmcbClean = bit(5)
    FlushByAsid = bit(6)
    DecodeAssists = bit(7)
    PmcVirt = bit(8)
    PauseFilter = bit(10)
    PauseFilterThreshold = bit(12)
    AVIC = bit(13)
    V_VMSAVE_VMLOAD = bit(15)
    vGIF = bit(16)
    GMET = bit(17)
    x2AVIC = bit(18)
    SSSCheck = bit(19)
    V_SPEC_CTRL = bit(20)
    ROGPT = bit(21)
    HOST_MCE_OVERRIDE = bit(23)
    TlbiCtl = bit(24)
    VNMI = bit(25)
    IbsVirt = bit(26)
    ExtLvtAvicAccessChg = bit(27)
    NestedVirtVmcbAddrChk = bit(28)
    BusLockThreshold = bit(29)
    IdleHlt = bit(30)


FEATURE_SECTIONS = {
    "NP": "15.25", "LBRV": "15.23", "SVML": "15.31", "NRIPS": "15.7.1", "TscRateMsr": "15.30.5", "VmcbClean": "15.15",
    "FlushByAsid": "15.16", "DecodeAssists": "15.8", "PauseFilter": "15.14.4", "PauseFilterThreshold": "15.14.4",
    "AVIC": "15.29", "V_VMSAVE_VMLOAD": "15.33.1", "vGIF": "15.33.2", "GMET": "15.25.13", "x2AVIC": "15.29",
    "SSSCheck": "15.25.14", "V_SPEC_CTRL": "15.37.1", "ROGPT": "15.25.5", "HOST_MCE_OVERRIDE": "15.12.18", "VNMI": "15.21.10",
    "IbsVirt": "15.38", "ExtLvtAvicAccessChg": "15.29.3.1", "BusLockThreshold": "15.14.5", "IdleHlt": "15.9",
}  # fmt: skip
"""SVM_FEATURES that APM2 has a section about."""


@dataclass(frozen=True, slots=True)
class Processor:
    """What VMRUN knows besides the VMCB: the processor's abilities, and the host's registers at VMRUN."""

    maxphyaddr: int = 48
    features: int = SVM_FEATURES.defined
    """CPUID 8000_000A EDX: see SVM_FEATURES."""
    host_cr0: int = CR0.PE | CR0.PG
    host_cr4: int = CR4.PAE
    host_efer: int = EFER.SVME | EFER.LME | EFER.LMA
    long_mode: bool = True
    cr4_valid: int = CR4.defined
    """The CR4 bits this processor implements."""
    efer_valid: int = EFER.defined
    absent: frozenset[str] = frozenset()
    """Features of CPUID, by the manual's names, that it is known not to claim: their instructions are undefined."""
    counters: int = 6
    """Performance counters that RDPMC reads."""


class State(NamedTuple):
    """The VMCB fields that the rules read, in order of offset."""

    intercept_misc1: int
    intercept_misc2: int
    iopm_base_pa: int
    msrpm_base_pa: int
    guest_asid: int
    tlb_control: int
    v_intr: int
    misc_ctl: int
    eventinj: int
    n_cr3: int
    avic_backing_page: int
    avic_logical_table: int
    avic_physical_table: int
    cs_attrib: int
    efer: int
    cr4: int
    cr3: int
    cr0: int
    dr7: int
    dr6: int
    g_pat: int


_FIELDS = {name: "cs.attrib" if name == "cs_attrib" else name for name in State._fields}
_UNPACK = VMCB.codec(*_FIELDS.values()).unpack


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing a VMCB must not be. `text` completes "VMRUN refuses this: ..."; `check` is true if it is violated."""

    id: str
    section: str
    text: str
    remedy: str
    fields: tuple[str, ...]
    """The VMCB fields to blame."""
    check: Callable[[State, Processor, Memory], bool]
    fatal: bool = True


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a VMCB breaks, with the values that break it: {field: value}."""

    rule: Rule
    values: dict[str, int]

    @property
    def text(self) -> str:
        """One paragraph: the values, the rule with its section, the remedy."""
        values = "; ".join(f"{name} = {_describe(name, value)}" for name, value in self.values.items())
        effect = "VMRUN refuses this" if self.rule.fatal else "VMRUN accepts this, but it is a mistake"
        return f"{values}: {self.rule.text} (APM2 {self.rule.section}; {effect}). {self.rule.remedy}."


def _describe(name: str, value: int) -> str:
    if name == "eventinj":
        return f"{value:#x} {EVENT.describe(value)} ({exception_name(value & EVENT.vector)})"
    return VMCB.describe(name, value)


def _long(s: State) -> bool:
    return bool(s.efer & EFER.LME and s.cr0 & CR0.PG)


def _nested(s: State, cpu: Processor) -> bool:
    """A processor ignores the enable bit of a feature that it does not have."""
    return bool(s.misc_ctl & _NP and cpu.features & SVM_FEATURES.NP)


def _avic(s: State, cpu: Processor) -> bool:
    """AVIC is on, with the xAPIC's registers."""
    return s.v_intr & _X2AVIC == V_INTR.avic_enable and bool(cpu.features & SVM_FEATURES.AVIC)


def _gmet(s: State, cpu: Processor) -> bool:
    return bool(s.misc_ctl & MISC_CTL.gmet_enable and cpu.features & SVM_FEATURES.GMET)


EXCEPTIONS = frozenset(
    code - ExitCode.EXCP_DE for code in ExitCode if code.name.startswith("EXCP_") and code.name[5:].isalpha()
) - {2}
"""The vectors that are exceptions, which EVENTINJ may inject as such: 2 is the NMI, and the rest below 32 are reserved."""

_NOT_IN_64_BIT_MODE = frozenset((4, 5))
"""#OF and #BR: INTO and BOUND do not exist there."""
_LONG_BITS = EFER.LME | EFER.LMA
_INJECTED_TYPES = frozenset(EVENT.meanings["type"])
_VMRUN = bit(ExitCode.VMRUN & 31)
_WRITE_TRAPS = bits(31, ExitCode.EFER_WRITE_TRAP & 31)
_NP = MISC_CTL.np_enable
_NMI = bit(ExitCode.NMI & 31)
_X2AVIC = V_INTR.x2avic_enable | V_INTR.avic_enable


def _bad_event(s: State) -> bool:
    if not s.eventinj & EVENT.v:
        return False
    kind, vector = s.eventinj >> 8 & 7, s.eventinj & 0xFF
    if kind == 3 and vector in _NOT_IN_64_BIT_MODE and _long(s) and s.cs_attrib & ATTRIB.L:
        return True
    return kind not in _INJECTED_TYPES or (kind == 3 and vector not in EXCEPTIONS)


@lru_cache(maxsize=64)
def _bad_pat(pat: int) -> bool:
    return None in memory_types(pat)


def _bad_pdptes(s: State, cpu: Processor, memory: Memory) -> bool:
    if _nested(s, cpu) or not s.cr0 & CR0.PG or not s.cr4 & CR4.PAE or s.efer & EFER.LME:
        return False
    reserved = pdpte_reserved(cpu.maxphyaddr)
    try:
        entries = [memory.read_u64((s.cr3 & 0xFFFF_FFE0) + 8 * n) for n in range(4)]
    except Unreadable:
        return True  # absent memory reads as ones
    return any(entry & 1 and entry & reserved for entry in entries)


def _bad_tlb_control(s: State, cpu: Processor) -> bool:
    if s.tlb_control in (3, 7):
        return not cpu.features & SVM_FEATURES.FlushByAsid
    return s.tlb_control not in (0, 1)


RULES: tuple[Rule, ...] = (
    Rule("svme", "15.5.1", "EFER.SVME is 0", "Set bit 12 of the VMCB's EFER, whatever the guest thinks it has",
         ("efer",), lambda s, cpu, memory: not s.efer & EFER.SVME),
    Rule("cr0-nw", "15.5.1", "CR0.NW is set while CR0.CD is clear", "Set CD as well or clear NW",
         ("cr0",), lambda s, cpu, memory: s.cr0 & (CR0.CD | CR0.NW) == CR0.NW),
    Rule("cr0-high", "15.5.1", "CR0[63:32] is not zero", "Clear the upper half of CR0",
         ("cr0",), lambda s, cpu, memory: bool(s.cr0 >> 32)),
    Rule("cr3-mbz", "15.5.1", "CR3 has bits beyond the physical address width while in long mode",
         "Put the guest-physical address of the PML4 or PML5 into CR3",
         ("cr3",), lambda s, cpu, memory: bool(s.cr3 >> cpu.maxphyaddr) and _long(s)),
    Rule("cr4-mbz", "15.5.1", "CR4 has bits set that this processor reserves",
         "Clear them, and hide their features from the guest's CPUID",
         ("cr4",), lambda s, cpu, memory: bool(s.cr4 & ~cpu.cr4_valid)),
    Rule("dr6-high", "15.5.1", "DR6[63:32] is not zero", "Clear the upper half; FFFF0FF0h is the reset value",
         ("dr6",), lambda s, cpu, memory: bool(s.dr6 >> 32)),
    Rule("dr7-high", "15.5.1", "DR7[63:32] is not zero", "Clear the upper half; 400h is the reset value",
         ("dr7",), lambda s, cpu, memory: bool(s.dr7 >> 32)),
    Rule("efer-mbz", "15.5.1", "EFER has bits set that this processor reserves", "Clear them",
         ("efer",), lambda s, cpu, memory: bool(s.efer & ~(cpu.efer_valid | _LONG_BITS))),
    Rule("efer-long", "15.5.1", "EFER.LME or LMA is set on a processor without long mode", "Clear both",
         ("efer",), lambda s, cpu, memory: not cpu.long_mode and bool(s.efer & _LONG_BITS)),
    Rule("long-pae", "15.5.1", "EFER.LME and CR0.PG are set but CR4.PAE is clear", "Set CR4.PAE, or clear LME or PG",
         ("efer", "cr0", "cr4"), lambda s, cpu, memory: _long(s) and not s.cr4 & CR4.PAE),
    Rule("long-pe", "15.5.1", "EFER.LME and CR0.PG are set but CR0.PE is clear", "Set CR0.PE, or clear LME or PG",
         ("efer", "cr0"), lambda s, cpu, memory: _long(s) and not s.cr0 & CR0.PE),
    Rule("long-cs", "15.5.1", "long mode is on and CS has both L and D set",
         "Clear D in cs.attrib (bit 10) for 64-bit code, or L (bit 9) for 32-bit code",
         ("efer", "cr0", "cr4", "cs.attrib"),
         lambda s, cpu, memory: s.cs_attrib & (ATTRIB.L | ATTRIB.DB) == ATTRIB.L | ATTRIB.DB
         and _long(s) and bool(s.cr4 & CR4.PAE)),
    Rule("vmrun-intercept", "15.5.1", "the VMRUN intercept is clear", "Set bit 0 of the intercept word at offset 010h",
         ("intercept_misc2",), lambda s, cpu, memory: not s.intercept_misc2 & _VMRUN),
    Rule("asid", "15.5.1", "the guest's ASID is 0, which is the host's own", "Give the guest an ASID from 1 up",
         ("guest_asid",), lambda s, cpu, memory: not s.guest_asid),
    Rule("msrpm-range", "15.5.1", "the MSR permission map (8 KiB) reaches beyond the physical address width",
         "Put the map's physical address into MSRPM_BASE_PA",
         ("msrpm_base_pa",), lambda s, cpu, memory: (s.msrpm_base_pa & ~0xFFF) + MSRPM_SIZE > 1 << cpu.maxphyaddr),
    Rule("iopm-range", "15.5.1", "the I/O permission map (12 KiB) reaches beyond the physical address width",
         "Put the map's physical address into IOPM_BASE_PA",
         ("iopm_base_pa",), lambda s, cpu, memory: (s.iopm_base_pa & ~0xFFF) + IOPM_SIZE > 1 << cpu.maxphyaddr),
    Rule("eventinj", "15.20",
         "the event to inject has a reserved type, or is an exception that does not exist, in this mode or at all",
         "Use type 0 (interrupt), 2 (NMI), 3 (exception, with an exception's vector; not #OF and #BR in 64-bit mode) or 4 "
         "(software interrupt)",
         ("eventinj", "efer", "cr0", "cs.attrib"), lambda s, cpu, memory: _bad_event(s)),
    Rule("np-host-paging", "15.25.3", "nested paging is on while the host has paging off (CR0.PG is 0)",
         "Turn on the host's paging before VMRUN",
         ("misc_ctl",), lambda s, cpu, memory: _nested(s, cpu) and not cpu.host_cr0 & CR0.PG),
    Rule("ncr3", "15.25.4", "nested paging is on and nCR3 has bits beyond the physical address width",
         "Put the system-physical address of the nested page table into nCR3",
         ("n_cr3",), lambda s, cpu, memory: bool(s.n_cr3 >> cpu.maxphyaddr) and _nested(s, cpu)),
    Rule("g-pat", "15.25.4", "nested paging is on and G_PAT holds a memory type that does not exist",
         "Use types 0, 1, 4, 5, 6, 7 in each byte; 0007040600070406h is the reset value",
         ("g_pat",), lambda s, cpu, memory: _nested(s, cpu) and _bad_pat(s.g_pat)),
    Rule("pdpte", "15.5.1", "a PDPE at CR3 is present and has reserved bits set (PAE paging without nested paging)",
         "Clear bits 2:1, 8:5 and those beyond the physical address width in the four entries",
         ("cr3",), _bad_pdptes),
    Rule("vnmi-intercept", "15.21.10", "virtual NMIs are on while the NMI intercept is clear",
         "Set bit 1 of the intercept word at offset 00Ch, or clear V_NMI_ENABLE",
         ("v_intr", "intercept_misc1"),
         lambda s, cpu, memory: bool(s.v_intr & V_INTR.v_nmi_enable and cpu.features & SVM_FEATURES.VNMI)
         and not s.intercept_misc1 & _NMI),
    Rule("x2avic", "15.29", "x2AVIC is on without AVIC, or on a processor without it",
         "Set AVIC enable (bit 31) as well, or clear x2AVIC enable (bit 30)",
         ("v_intr",), lambda s, cpu, memory: bool(s.v_intr & V_INTR.x2avic_enable)
         and (s.v_intr & _X2AVIC != _X2AVIC or not cpu.features & SVM_FEATURES.x2AVIC)),
    Rule("avic-index", "15.29.4.3", "AVIC_PHYSICAL_MAX_INDEX is above 255", "Put the highest guest APIC ID in use there",
         ("v_intr", "avic_physical_table"),
         lambda s, cpu, memory: _avic(s, cpu) and s.avic_physical_table & AVIC_PHYSICAL.max_index > 0xFF),
    Rule("avic-range", "15.29.4.3", "the backing page or a table of AVIC lies beyond the physical address width",
         "Put the system-physical address of a page of memory into each of the three",
         ("v_intr", "avic_backing_page", "avic_logical_table", "avic_physical_table"),
         lambda s, cpu, memory: _avic(s, cpu)
         and bool((s.avic_backing_page | s.avic_logical_table | s.avic_physical_table) >> cpu.maxphyaddr)),
    Rule("avic-np", "15.29.4.1", "AVIC is on without nested paging", "Set NP_ENABLE as well",
         ("v_intr", "misc_ctl"), lambda s, cpu, memory: _avic(s, cpu) and not _nested(s, cpu), fatal=False),
    Rule("gmet-np", "15.25.13", "GMET is on without nested paging, whose tables it is about", "Set NP_ENABLE as well",
         ("misc_ctl",), lambda s, cpu, memory: _gmet(s, cpu) and not _nested(s, cpu), fatal=False),
    Rule("write-traps", "15.35.10", "traps after writes of control registers are asked for without SEV-ES",
         "Intercept the writes: bits of intercept_cr_write, and of EFER that of the MSR permission map",
         ("intercept_misc2", "misc_ctl"),
         lambda s, cpu, memory: bool(s.intercept_misc2 & _WRITE_TRAPS) and not s.misc_ctl & MISC_CTL.sev_es_enable, fatal=False),
    Rule("sss-np", "15.25.14", "supervisor shadow stacks are checked without nested paging", "Set NP_ENABLE as well",
         ("misc_ctl",),
         lambda s, cpu, memory: bool(s.misc_ctl & MISC_CTL.sss_check_enable and cpu.features & SVM_FEATURES.SSSCheck)
         and not _nested(s, cpu)),
    Rule("cet-wp", "15.5.1", "CR4.CET is set while CR0.WP is clear", "Set CR0.WP or clear CR4.CET",
         ("cr4", "cr0"), lambda s, cpu, memory: bool(s.cr4 & CR4.CET) and not s.cr0 & CR0.WP),
    Rule("tlb-control", "15.16.1", "TLB_CONTROL is no command of this processor",
         "Use 0 or 1, or with FlushByAsid (CPUID 8000_000A EDX bit 6) 3 or 7",
         ("tlb_control",), lambda s, cpu, memory: _bad_tlb_control(s, cpu), fatal=False),
)  # fmt: skip

_FATAL = tuple((rule.check, rule) for rule in RULES if rule.fatal)
_HOSTS = frozenset((
    "cr0-nw", "cr0-high", "cr3-mbz", "cr4-mbz", "efer-mbz", "efer-long", "long-pae", "long-pe", "long-cs", "cet-wp",
))  # fmt: skip
"""The rules that what #VMEXIT reloads of the host must keep, too."""


def _violation(rule: Rule, vmcb: Buffer) -> Violation:
    return Violation(rule, {name: VMCB.read(vmcb, name) for name in rule.fields})


def violations(vmcb: Buffer, processor: Processor, memory: Memory) -> list[Violation]:
    """Every rule that the VMCB breaks, fatal or not, in the order of `RULES`. `memory` is read for PAE's PDPEs."""
    state = State._make(_UNPACK(vmcb, 0))
    return [_violation(rule, vmcb) for rule in RULES if rule.check(state, processor, memory)]


def first_violation(vmcb: Buffer, processor: Processor, memory: Memory) -> Violation | None:
    """The first fatal rule that the VMCB breaks; None if VMRUN enters the guest."""
    state = State._make(_UNPACK(vmcb, 0))
    for check, rule in _FATAL:
        if check(state, processor, memory):
            return _violation(rule, vmcb)
    return None


def host_violation(area: Buffer, processor: Processor, memory: Memory) -> Violation | None:
    """The first rule that a host save area, of a VMCB's layout, breaks: #VMEXIT shuts the processor down then (APM2 15.6)."""
    state = State._make(_UNPACK(area, 0))
    for check, rule in _FATAL:
        if rule.id in _HOSTS and check(state, processor, memory):
            return _violation(rule, area)
    return None
