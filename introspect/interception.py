"""Instructions that a hypervisor may intercept: by which bit, and what comes before and behind that (APM2 15.7 to 15.14).

One table, `form_of`, by opcode. The checks that come before an intercept stand in the manual's order (table 15-7); each says what
it looks at, so that an answer can be read as the processor would go through it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from introspect.decode import STRING_IO
from introspect.exits import ExitCode
from introspect.msrs import HWCR
from introspect.paging import Access, Fault, PagingState, translate
from introspect.registers import ATTRIB, CR0, CR4, DR7, EFER, RFLAGS
from introspect.subject import NestedRefusal, Raised, Refused, Subject

__all__ = [
    "BP", "MNEMONICS", "OF", "OPTIONAL", "PORT", "UD", "VIRTUAL_IOPL", "Check", "Form", "control_register",
    "form_of", "port_of", "port_size",
]  # fmt: skip

DB, BP, OF, UD, NM, SS, GP, PF, AC = 1, 3, 4, 6, 7, 12, 13, 14, 17
_MEMORY = frozenset((SS, GP, PF, AC))
"""What an access to memory may raise."""
_TABLE = "table 15-7"

OPTIONAL = frozenset(("ALT_MOV_CR8", "INVLPGB", "INVPCID", "MCOMMIT", "MONITOR", "MONITORX", "RDPRU", "RDTSCP", "SKINIT"))
"""Features of CPUID that instructions of these depend on: see `Processor.absent`."""


# Checks


class Check(NamedTuple):
    """One thing that the processor looks at. `value` puts into words what it sees, `test` gives what is raised."""

    what: str
    section: str
    value: Callable[[Subject], str]
    test: Callable[[Subject], Raised | None]
    vector: int
    """What it may raise: that of `test`."""


def _check(what: str, section: str, value: Callable[[Subject], str], bad: Callable[[Subject], object], raised: Raised) -> Check:
    return Check(what, section, value, lambda g: raised if bad(g) else None, raised.vector)


def _refusable(test: Callable[[Subject], Raised | None], g: Subject) -> Raised | None:
    try:
        return test(g)
    except Refused as refused:
        return refused.raised


_GP0, _UD = Raised(GP, 0), Raised(UD)
NO_LOCK = _check("no LOCK prefix", "APM3 1.2.5", lambda g: "LOCK" if g.locked else "none", lambda g: g.locked, _UD)
CPL_0 = _check("CPL is 0", _TABLE, lambda g: f"CPL {g.cpl}", lambda g: g.cpl, _GP0)
SVME = _check("EFER.SVME is 1", "15.4", lambda g: f"EFER {g.need('efer'):#x}", lambda g: not g.need("efer") & EFER.SVME, _UD)
SVME_OR_SKINIT = _check(
    "EFER.SVME is 1, or CPUID claims SKINIT", "15.4", lambda g: f"EFER {g.need('efer'):#x}",
    lambda g: not g.need("efer") & EFER.SVME and "SKINIT" in g.processor.absent, _UD,
)  # fmt: skip
PROTECTED = _check(
    "protected mode", _TABLE, lambda g: "yes" if g.protected else "real or virtual-8086 mode", lambda g: not g.protected, _UD
)
TSD = _check(
    "CPL is 0 or CR4.TSD is 0", _TABLE, lambda g: f"CPL {g.cpl}, CR4.TSD {CR4.get(g.need('cr4'), 'TSD')}",
    lambda g: g.cpl and g.need("cr4") & CR4.TSD, _GP0,
)  # fmt: skip
PCE = _check(
    "CPL is 0 or CR4.PCE is 1", _TABLE, lambda g: f"CPL {g.cpl}, CR4.PCE {CR4.get(g.need('cr4'), 'PCE')}",
    lambda g: g.cpl and not g.need("cr4") & CR4.PCE, _GP0,
)  # fmt: skip
COUNTER = _check(
    "ECX names a counter", "APM3 RDPMC", lambda g: f"ECX {g.need('rcx') & 0xFFFFFFFF:#x}",
    lambda g: g.need("rcx") & 0xFFFFFFFF >= g.processor.counters, _GP0,
)  # fmt: skip
OSXSAVE = _check(
    "CR4.OSXSAVE is 1", "APM3 XSETBV", lambda g: f"CR4 {g.need('cr4'):#x}", lambda g: not g.need("cr4") & CR4.OSXSAVE, _UD
)
UMIP = _check(
    "CPL is 0 or CR4.UMIP is 0", "3.1.3", lambda g: f"CPL {g.cpl}, CR4.UMIP {CR4.get(g.need('cr4'), 'UMIP')}",
    lambda g: g.cpl and g.need("cr4") & CR4.UMIP, _GP0,
)  # fmt: skip


def _claimed(feature: str) -> Check:
    return _check(
        f"CPUID claims {feature}", "APM3 E", lambda g: "no" if feature in g.processor.absent else "yes",
        lambda g: feature in g.processor.absent, _UD,
    )  # fmt: skip


def _no_monitor(g: Subject) -> bool:
    return bool(g.cpl and not g.need("hwcr") & HWCR.MonMwaitUserEn) or bool(g.registers.get("hwcr", 0) & HWCR.MonMwaitDis)


MONITOR_ALLOWED = _check(
    "HWCR allows it at this CPL", "APM3 MONITOR",
    lambda g: f"CPL {g.cpl}, HWCR {g.registers['hwcr']:#x}" if "hwcr" in g.registers else f"CPL {g.cpl}, HWCR unknown",
    _no_monitor, _UD,
)  # fmt: skip
EXTENSIONS = _check(
    "ECX asks for no extension", "APM3 MONITOR", lambda g: f"ECX {g.need('rcx') & 0xFFFFFFFF:#x}",
    lambda g: g.need("rcx") & 0xFFFFFFFF, _GP0,
)  # fmt: skip


def _vmcb_operand(g: Subject) -> int:
    return g.need("rax") & (1 << g.insn.address) - 1


def _vmcb_refused(writes: bool, g: Subject) -> Raised | None:
    address = _vmcb_operand(g)
    if address & 0xFFF or address >> g.processor.maxphyaddr:
        return _GP0
    nested = g.nested
    if g.virtual_vmload and nested is not None:
        found = translate(g.memory, PagingState(0, 0, 0, 0), address & 0xFFFFFFFF, Access(writes), nested, set_ad=False)
        if address >> 32 == 0 and isinstance(found, Fault):
            raise NestedRefusal(found.code, found.address)
    return None


def _vmcb_page(writes: bool) -> Check:
    return Check("rAX may be a VMCB's page", "15.5.1", lambda g: f"rAX {_vmcb_operand(g):#x}", partial(_vmcb_refused, writes), GP)


# MOV to and from CR and DR (APM2 3.1, 13.1.1)

_CRS = (0, 2, 3, 4, 8)


def _cr(g: Subject) -> int:
    """Its number: LOCK makes CR8 of CR0 (APM3 MOV CRn)."""
    return 8 if g.insn.reg == 0 and g.locked and "ALT_MOV_CR8" not in g.processor.absent else g.insn.reg


CR_EXISTS = _check("the register exists", "3.1", lambda g: f"CR{_cr(g)}", lambda g: _cr(g) not in _CRS, _UD)
CR_LOCK = _check(
    "no LOCK prefix but for CR8", "APM3 MOV CRn", lambda g: "LOCK" if g.locked else "none",
    lambda g: g.locked and _cr(g) != 8, _UD,
)  # fmt: skip


def _refused_cr0(g: Subject, value: int) -> bool:
    old, efer = g.need("cr0"), g.need("efer")
    if value >> 32 or (value & CR0.NW and not value & CR0.CD) or (value & CR0.PG and not value & CR0.PE):
        return True
    if not (value ^ old) & CR0.PG:
        return False
    if value & CR0.PG:
        return bool(efer & EFER.LME and (not g.need("cr4") & CR4.PAE or g.need("cs.attrib") & ATTRIB.L))
    return g.bits == 64


_REFUSED: Mapping[int, Callable[[Subject, int], object]] = {
    0: _refused_cr0,
    3: lambda g, value: g.long_mode and value >> g.processor.maxphyaddr,
    4: lambda g, value: value & ~g.processor.cr4_valid or (g.long_mode and not value & CR4.PAE),
    8: lambda g, value: value >> 4,
}
_CR_SECTIONS = {0: "3.1.1", 3: "3.1.2", 4: "3.1.3", 8: "3.1.4"}


def _value_check(number: int) -> Check:
    return _check(
        f"CR{number} can take the value", _CR_SECTIONS[number], lambda g: f"{g.moved:#x}",
        lambda g: _REFUSED[number](g, g.moved), _GP0,
    )  # fmt: skip


def _dr(g: Subject) -> int:
    return g.insn.reg


DR_EXISTS = _check(
    "the register exists", "13.1.1", lambda g: f"DR{_dr(g)}, CR4.DE {CR4.get(g.need('cr4'), 'DE')}",
    lambda g: _dr(g) > 7 or (_dr(g) in (4, 5) and g.need("cr4") & CR4.DE), _UD,
)  # fmt: skip
DR_GD = _check(
    "DR7.GD is 0", "13.1.1.4", lambda g: f"DR7 {g.need('dr7'):#x}", lambda g: g.need("dr7") & DR7.GD, Raised(DB)
)
DR_VALUE = _check(
    "DR6 or DR7 can take the value", "13.1.1", lambda g: f"{g.moved:#x}" if _dr(g) & ~2 in (4, 5) else "any",
    lambda g: _dr(g) & ~2 in (4, 5) and g.moved >> 32, _GP0,
)  # fmt: skip


# Ports (APM2 12.2.5)


def port_of(g: Subject) -> int:
    opcode = g.insn.opcode
    return g.insn.immediate & 0xFF if 0xE4 <= opcode <= 0xE7 else g.need("rdx") & 0xFFFF


def port_size(g: Subject) -> int:
    return min(g.insn.operand, 32) // 8 if g.insn.opcode & 1 else 1


def _port_refused(g: Subject) -> Raised | None:
    if not g.need("cr0") & CR0.PE:
        return None
    flags = g.need("rflags")
    if g.cpl <= RFLAGS.get(flags, "IOPL") and not flags & RFLAGS.VM:
        return None
    limit, base = g.need("tr.limit"), g.need("tr.base")
    if not g.need("tr.attrib") & 8 or limit < 103:
        return _GP0
    port = port_of(g)
    at = g.read(base + 102, 2) + port // 8
    if at + 1 > limit:
        return _GP0
    return _GP0 if g.read(base + at, 2) >> (port & 7) & (1 << port_size(g)) - 1 else None


def _port_value(g: Subject) -> str:
    return f"CPL {g.cpl}, IOPL {RFLAGS.get(g.need('rflags'), 'IOPL')}{', virtual-8086 mode' * bool(g.need('rflags') & RFLAGS.VM)}"


PORT = Check("IOPL or the TSS's map permits the port", "12.2.5", _port_value, partial(_refusable, _port_refused), GP)


def _below_iopl(g: Subject) -> bool:
    flags = g.need("rflags")
    return bool(g.need("cr0") & CR0.PE and flags & RFLAGS.VM and not g.need("cr4") & CR4.VME and RFLAGS.get(flags, "IOPL") < 3)


VIRTUAL_IOPL = _check(
    "IOPL is 3 in virtual-8086 mode", "APM3 PUSHF", lambda g: f"IOPL {RFLAGS.get(g.need('rflags'), 'IOPL')}", _below_iopl, _GP0
)
"""Behind the intercepts of PUSHF, POPF, IRET and INT."""


# Forms


@dataclass(frozen=True, slots=True)
class Form:
    """An instruction as intercepts see it."""

    name: str
    code: int | None
    """Its intercept, if one bit decides; else `introspect.would_exit` knows what does, by `special`."""
    before: tuple[Check, ...] = ()
    """What comes before the intercept, in order."""
    special: str = ""
    after: Raised | None = None
    """What it raises if nothing intercepts it."""
    may: frozenset[int] = frozenset()
    """Vectors that it may raise behind the intercept."""


def _form(
    name: str, code: int | None, *before: Check, special: str = "", after: Raised | None = None, may: frozenset[int] = frozenset()
) -> Form:
    return Form(name, code, (NO_LOCK, *before), special, after, may)


_C = ExitCode
_DESCRIPTOR_LOAD = frozenset((*_MEMORY, 11))
_TRANSFER = frozenset((10, 11, *_MEMORY))
_SYSTEM_TABLES = {
    0: _form("SGDT", _C.GDTR_READ, UMIP, may=_MEMORY), 1: _form("SIDT", _C.IDTR_READ, UMIP, may=_MEMORY),
    2: _form("LGDT", _C.GDTR_WRITE, CPL_0, may=_MEMORY), 3: _form("LIDT", _C.IDTR_WRITE, CPL_0, may=_MEMORY),
    4: _form("SMSW", _C.CR0_READ, UMIP, may=_MEMORY), 6: _form("LMSW", None, CPL_0, special="cr0", may=_MEMORY),
    7: _form("INVLPG", _C.INVLPG, CPL_0, special="invlpg"),
}  # fmt: skip
"""0F 01 with a memory operand, by ModRM.reg."""
_SVM_ONLY = (SVME, PROTECTED, CPL_0)
_BY_MODRM = {
    0xC8: _form("MONITOR", _C.MONITOR, _claimed("MONITOR"), MONITOR_ALLOWED, EXTENSIONS, may=_MEMORY),
    0xC9: _form("MWAIT", None, _claimed("MONITOR"), MONITOR_ALLOWED, EXTENSIONS, special="mwait"),
    0xD1: _form("XSETBV", _C.XSETBV, OSXSAVE, may=frozenset((GP,))),
    0xD8: _form("VMRUN", _C.VMRUN, *_SVM_ONLY, _vmcb_page(False)),
    0xD9: _form("VMMCALL", _C.VMMCALL, SVME, after=_UD),
    0xDA: _form("VMLOAD", _C.VMLOAD, *_SVM_ONLY, _vmcb_page(False), special="vmload"),
    0xDB: _form("VMSAVE", _C.VMSAVE, *_SVM_ONLY, _vmcb_page(True), special="vmload"),
    0xDC: _form("STGI", _C.STGI, SVME_OR_SKINIT, PROTECTED, CPL_0), 0xDD: _form("CLGI", _C.CLGI, *_SVM_ONLY),
    0xDE: _form("SKINIT", _C.SKINIT, SVME_OR_SKINIT, PROTECTED, CPL_0),
    0xDF: _form("INVLPGA", _C.INVLPGA, *_SVM_ONLY),
    0xF9: _form("RDTSCP", _C.RDTSCP, _claimed("RDTSCP"), TSD),
    0xFA: _form("MONITORX", _C.MONITOR, _claimed("MONITORX"), EXTENSIONS, may=_MEMORY),
    0xFB: _form("MWAITX", None, _claimed("MONITORX"), EXTENSIONS, special="mwait"),
    0xFD: _form("RDPRU", _C.RDPRU, _claimed("RDPRU"), TSD),
    0xFE: _form("INVLPGB", _C.INVLPGB, _claimed("INVLPGB"), CPL_0, may=frozenset((GP,))),
    0xFF: _form("TLBSYNC", _C.TLBSYNC, _claimed("INVLPGB"), CPL_0),
}  # fmt: skip
"""0F 01 with these bytes behind it."""
_MCOMMIT = _form("MCOMMIT", _C.MCOMMIT, _claimed("MCOMMIT"))
_INVPCID = _form("INVPCID", _C.INVPCID, _claimed("INVPCID"), CPL_0, may=_MEMORY)
_TASK_TABLES = {
    0: _form("SLDT", _C.LDTR_READ, PROTECTED, UMIP, may=_MEMORY), 1: _form("STR", _C.TR_READ, PROTECTED, UMIP, may=_MEMORY),
    2: _form("LLDT", _C.LDTR_WRITE, PROTECTED, CPL_0, may=_DESCRIPTOR_LOAD),
    3: _form("LTR", _C.TR_WRITE, PROTECTED, CPL_0, may=_DESCRIPTOR_LOAD),
}  # fmt: skip
"""0F 00 by ModRM.reg."""
_IN_OUT = Form("IN or OUT", None, (NO_LOCK, PORT), "port")
_STRING = Form("INS or OUTS", None, (NO_LOCK, PORT), "port", may=_MEMORY)
_BY_OPCODE = {
    0x0F06: _form("CLTS", None, CPL_0, special="cr0"), 0x0F08: _form("INVD", _C.INVD, CPL_0),
    0x0F09: _form("WBINVD", _C.WBINVD, CPL_0), 0x0F0B: Form("UD2", None, after=_UD),
    0x0F30: _form("WRMSR", None, CPL_0, special="msr", may=frozenset((GP,))),
    0x0F31: _form("RDTSC", _C.RDTSC, TSD),
    0x0F32: _form("RDMSR", None, CPL_0, special="msr", may=frozenset((GP,))),
    0x0F33: _form("RDPMC", _C.RDPMC, PCE, COUNTER),
    0x0FA2: _form("CPUID", _C.CPUID), 0x0FAA: _form("RSM", _C.RSM, special="rsm"),
    0x9C: _form("PUSHF", _C.PUSHF, may=_MEMORY), 0x9D: _form("POPF", _C.POPF, may=_MEMORY),
    0xCF: _form("IRET", _C.IRET, may=_TRANSFER), 0xCD: _form("INT", _C.SWINT, special="int", may=_TRANSFER),
    0xCC: Form("INT3", None, (NO_LOCK,), after=Raised(BP)), 0xCE: Form("INTO", None, (NO_LOCK,), special="into"),
    0xF1: _form("INT1", _C.ICEBP, special="icebp", may=_TRANSFER), 0xF4: _form("HLT", _C.HLT, CPL_0, special="hlt"),
    **dict.fromkeys((*range(0xE4, 0xE8), *range(0xEC, 0xF0)), _IN_OUT), **dict.fromkeys(STRING_IO, _STRING),
}  # fmt: skip
_PAUSE = Form("PAUSE", _C.PAUSE, special="pause")
_MOV_FROM_DR = _form("MOV from DR", None, CPL_0, DR_EXISTS, DR_GD, special="dr")
_MOV_TO_DR = _form("MOV to DR", None, CPL_0, DR_EXISTS, DR_GD, DR_VALUE, special="dr")


def _mov_cr(g: Subject, writes: bool) -> Form:
    number = _cr(g)
    before = [CR_LOCK, CPL_0, CR_EXISTS]
    if writes and number in _REFUSED:
        before.append(_value_check(number))
    # Without nested paging a load of CR3 in PAE mode reads PDPEs behind the intercept (APM2 15.9).
    may = frozenset((GP,)) if writes and number in (0, 3, 4) and not g.long_mode else frozenset()
    return Form(f"MOV {'to' if writes else 'from'} CR{number}", None, tuple(before), "cr0" if writes and not number else "cr",
                may=may)  # fmt: skip


MNEMONICS: Mapping[str, bytes] = {
    "cpuid": b"\x0f\xa2", "rdtsc": b"\x0f\x31", "rdtscp": b"\x0f\x01\xf9", "rdpmc": b"\x0f\x33", "rdpru": b"\x0f\x01\xfd",
    "rdmsr": b"\x0f\x32", "wrmsr": b"\x0f\x30", "hlt": b"\xf4", "pause": b"\xf3\x90", "monitor": b"\x0f\x01\xc8",
    "mwait": b"\x0f\x01\xc9", "invd": b"\x0f\x08", "wbinvd": b"\x0f\x09", "invlpg": b"\x0f\x01\x3f", "invlpga": b"\x0f\x01\xdf",
    "invpcid": b"\x66\x0f\x38\x82\x07", "invlpgb": b"\x0f\x01\xfe", "tlbsync": b"\x0f\x01\xff", "mcommit": b"\xf3\x0f\x01\xfa",
    "xsetbv": b"\x0f\x01\xd1", "sgdt": b"\x0f\x01\x07", "sidt": b"\x0f\x01\x0f", "lgdt": b"\x0f\x01\x17",
    "lidt": b"\x0f\x01\x1f", "sldt": b"\x0f\x00\xc0", "str": b"\x0f\x00\xc8", "lldt": b"\x0f\x00\xd0", "ltr": b"\x0f\x00\xd8",
    "smsw": b"\x0f\x01\xe0", "lmsw": b"\x0f\x01\xf0", "clts": b"\x0f\x06", "pushf": b"\x9c", "popf": b"\x9d", "iret": b"\xcf",
    "int1": b"\xf1", "int3": b"\xcc", "into": b"\xce", "rsm": b"\x0f\xaa", "ud2": b"\x0f\x0b", "vmrun": b"\x0f\x01\xd8",
    "vmmcall": b"\x0f\x01\xd9", "vmload": b"\x0f\x01\xda", "vmsave": b"\x0f\x01\xdb", "stgi": b"\x0f\x01\xdc",
    "clgi": b"\x0f\x01\xdd", "skinit": b"\x0f\x01\xde", "in": b"\xec", "out": b"\xee", "insb": b"\x6c", "outsb": b"\x6e",
}  # fmt: skip
"""Encodings for who asks by name; with an operand in memory that of rDI, or BX."""


def control_register(g: Subject) -> int:
    """Number of the CR that a MOV moves."""
    return _cr(g)


def form_of(g: Subject) -> Form | None:
    """What an instruction is to intercepts; None for one that no intercept of instructions concerns."""
    insn = g.insn
    opcode, reg = insn.opcode, insn.modrm >> 3 & 7
    if opcode in (0x0F20, 0x0F22):
        return _mov_cr(g, opcode == 0x0F22)
    if opcode in (0x0F21, 0x0F23):
        return _MOV_TO_DR if opcode == 0x0F23 else _MOV_FROM_DR
    if opcode == 0x0F01:
        if insn.modrm == 0xFA and insn.rep == 0xF3:
            return _MCOMMIT
        return _SYSTEM_TABLES.get(reg) if insn.memory or reg in (4, 6) else _BY_MODRM.get(insn.modrm)
    if opcode == 0x0F00:
        return _TASK_TABLES.get(reg)
    if opcode == 0x0F3882:
        return _INVPCID
    if opcode == 0x90:
        return _PAUSE if insn.rep == 0xF3 else None
    if opcode == 0xCE and g.bits == 64:
        return None
    return _BY_OPCODE.get(opcode)
