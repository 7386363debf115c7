"""#VMEXIT codes and what EXITCODE, EXITINFO1 and 2 and EXITINTINFO say (APM2 15.7 to 15.9, 15.25.6, appendix C)."""

from enum import IntEnum

from introspect.avic import EOI, EXIT_WRITE, IncompleteIpi, register
from introspect.decode import DS, ES, STRING_IO, Instruction
from introspect.layout import Bits, bit, bits

__all__ = [
    "EVENT", "EXCEPTION_BASE", "INTERCEPT_CODES", "IOIO", "NPF_INFO", "PF_ERROR", "SMI_INFO", "ExitCode", "describe_event",
    "describe_exit", "describe_page_fault", "exception_name", "exit_details", "exit_name", "exit_section", "port_info",
    "smi_info",
]  # fmt: skip

INTERCEPT_CODES = 6 * 32
"""Exit codes below this are intercept bits: code = 32 * word + bit of the six intercept words."""

EXCEPTION_BASE = 0x40


class ExitCode(IntEnum):
    """Every exit code with its description. This is also the table of intercepts: see INTERCEPT_CODES."""

    description: str

    # The default only lets mypy accept the look-up ExitCode(0x72).
    def __new__(cls, code: int, description: str = "") -> "ExitCode":
        member = int.__new__(cls, code)
        member._value_ = code
        member.description = description
        return member

    _ignore_ = ["n", "vector"]  # noqa: RUF012 - Enum reads this name and removes it
    CR0_READ = 0x00, "read of CR0"
    CR0_WRITE = 0x10, "write of CR0"
    DR0_READ = 0x20, "read of DR0"
    DR0_WRITE = 0x30, "write of DR0"
    CR0_WRITE_TRAP = 0x90, "after a write of CR0"
    for n in range(1, 16):
        vars()[f"CR{n}_READ"] = 0x00 + n, f"read of CR{n}"
        vars()[f"CR{n}_WRITE"] = 0x10 + n, f"write of CR{n}"
        vars()[f"DR{n}_READ"] = 0x20 + n, f"read of DR{n}"
        vars()[f"DR{n}_WRITE"] = 0x30 + n, f"write of DR{n}"
        vars()[f"CR{n}_WRITE_TRAP"] = 0x90 + n, f"after a write of CR{n}"

    EXCP_DE = 0x40, "divide error"
    EXCP_DB = 0x41, "debug"
    EXCP_NMI = 0x42, "vector 2"
    EXCP_BP = 0x43, "breakpoint"
    EXCP_OF = 0x44, "overflow"
    EXCP_BR = 0x45, "bound range"
    EXCP_UD = 0x46, "invalid opcode"
    EXCP_NM = 0x47, "device not available"
    EXCP_DF = 0x48, "double fault"
    EXCP_TS = 0x4A, "invalid TSS"
    EXCP_NP = 0x4B, "segment not present"
    EXCP_SS = 0x4C, "stack fault"
    EXCP_GP = 0x4D, "general protection"
    EXCP_PF = 0x4E, "page fault"
    EXCP_MF = 0x50, "x87 floating point"
    EXCP_AC = 0x51, "alignment check"
    EXCP_MC = 0x52, "machine check"
    EXCP_XF = 0x53, "SIMD floating point"
    EXCP_CP = 0x55, "control protection"
    EXCP_HV = 0x5C, "hypervisor injection"
    EXCP_VC = 0x5D, "VMM communication"
    EXCP_SX = 0x5E, "security"
    for vector in (9, 15, 20, 22, 23, 24, 25, 26, 27, 31):
        vars()[f"EXCP_{vector}"] = 0x40 + vector, f"reserved vector {vector}"

    INTR = 0x60, "physical interrupt"
    NMI = 0x61, "physical NMI"
    SMI = 0x62, "system management interrupt"
    INIT = 0x63, "INIT signal"
    VINTR = 0x64, "guest ready for a virtual interrupt"
    CR0_SEL_WRITE = 0x65, "write of CR0 bits other than TS and MP"
    IDTR_READ = 0x66, "SIDT"
    GDTR_READ = 0x67, "SGDT"
    LDTR_READ = 0x68, "SLDT"
    TR_READ = 0x69, "STR"
    IDTR_WRITE = 0x6A, "LIDT"
    GDTR_WRITE = 0x6B, "LGDT"
    LDTR_WRITE = 0x6C, "LLDT"
    TR_WRITE = 0x6D, "LTR"
    RDTSC = 0x6E, "RDTSC"
    RDPMC = 0x6F, "RDPMC"
    PUSHF = 0x70, "PUSHF"
    POPF = 0x71, "POPF"
    CPUID = 0x72, "CPUID"
    RSM = 0x73, "RSM"
    IRET = 0x74, "IRET"
    SWINT = 0x75, "INT n"
    INVD = 0x76, "INVD"
    PAUSE = 0x77, "PAUSE"
    HLT = 0x78, "HLT"
    INVLPG = 0x79, "INVLPG"
    INVLPGA = 0x7A, "INVLPGA"
    IOIO = 0x7B, "port access that the IOPM intercepts"
    MSR = 0x7C, "MSR access that the MSRPM intercepts"
    TASK_SWITCH = 0x7D, "task switch"
    FERR_FREEZE = 0x7E, "processor freeze for FERR"
    SHUTDOWN = 0x7F, "shutdown (triple fault)"

    VMRUN = 0x80, "VMRUN"
    VMMCALL = 0x81, "VMMCALL"
    VMLOAD = 0x82, "VMLOAD"
    VMSAVE = 0x83, "VMSAVE"
    STGI = 0x84, "STGI"
    CLGI = 0x85, "CLGI"
    SKINIT = 0x86, "SKINIT"
    RDTSCP = 0x87, "RDTSCP"
    ICEBP = 0x88, "INT1"
    WBINVD = 0x89, "WBINVD or WBNOINVD"
    MONITOR = 0x8A, "MONITOR or MONITORX"
    MWAIT = 0x8B, "MWAIT or MWAITX"
    MWAIT_COND = 0x8C, "MWAIT or MWAITX with the monitor armed"
    XSETBV = 0x8D, "XSETBV"
    RDPRU = 0x8E, "RDPRU"
    EFER_WRITE_TRAP = 0x8F, "after a write of EFER"

    INVLPGB = 0xA0, "INVLPGB"
    INVLPGB_ILLEGAL = 0xA1, "illegal INVLPGB"
    INVPCID = 0xA2, "INVPCID"
    MCOMMIT = 0xA3, "MCOMMIT"
    TLBSYNC = 0xA4, "TLBSYNC"
    BUSLOCK = 0xA5, "bus lock"
    IDLE_HLT = 0xA6, "HLT with no virtual interrupt pending"

    NPF = 0x400, "nested page fault"
    AVIC_INCOMPLETE_IPI = 0x401, "AVIC could not deliver an IPI"
    AVIC_NOACCEL = 0x402, "APIC access that AVIC does not accelerate"
    VMGEXIT = 0x403, "VMGEXIT"
    INVALID = 0xFFFF_FFFF_FFFF_FFFF, "VMRUN refused: illegal guest state"
    BUSY = 0xFFFF_FFFF_FFFF_FFFE, "VMSA in use"
    IDLE_REQUIRED = 0xFFFF_FFFF_FFFF_FFFD, "sibling thread not idle"
    INVALID_PMC = 0xFFFF_FFFF_FFFF_FFFC, "illegal performance counter state"


_SECTIONS = (
    (0x00, 0x3F, "15.9"), (0x40, 0x5F, "15.12"), (0x60, 0x60, "15.13.1"), (0x61, 0x61, "15.13.2"), (0x62, 0x62, "15.13.3"),
    (0x63, 0x63, "15.13.4"), (0x64, 0x64, "15.13.5"), (0x65, 0x7A, "15.9"), (0x7B, 0x7B, "15.10"), (0x7C, 0x7C, "15.11"),
    (0x7D, 0x7D, "15.14.1"), (0x7E, 0x7E, "15.14.2"), (0x7F, 0x7F, "15.14.3"), (0x80, 0x8E, "15.9"), (0x8F, 0x9F, "15.35.10"),
    (0xA0, 0xA4, "15.9"), (0xA5, 0xA5, "15.14.5"), (0xA6, 0xA6, "15.9"), (0x400, 0x400, "15.25.6"), (0x401, 0x402, "15.29"),
    (0x403, 0x403, "15.35"), (0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF, "15.5.1"),
)  # fmt: skip


def exit_section(code: int) -> str:
    """The section of APM2 about an exit code: "15.9"; "C", the appendix that lists them, where none is."""
    return next((section for first, last, section in _SECTIONS if first <= code <= last), "C")


_BY_CODE: dict[int, ExitCode] = {member.value: member for member in ExitCode}


def exit_name(code: int) -> str:
    """The name of an exit code, or the code in hexadecimal if the manual defines none."""
    member = _BY_CODE.get(code)
    return member.name if member is not None else f"{code:#x}"


def exception_name(vector: int) -> str:
    """"#PF" for 14; "vector 32" for anything that is no architectural exception."""
    name = exit_name(EXCEPTION_BASE + vector).removeprefix("EXCP_") if 0 <= vector < 32 else ""
    return f"#{name}" if name.isalpha() else f"vector {vector}"


class EVENT(Bits):
    """EVENTINJ and EXITINTINFO (APM2 15.7.2, 15.20)."""

    vector = bits(7, 0)
    type = bits(10, 8)
    ev = bit(11)
    v = bit(31)
    error_code = bits(63, 32)

    meanings = {"type": {0: "INTR", 2: "NMI", 3: "EXCEPTION", 4: "SOFT_INT"}}  # noqa: RUF012 - ClassVar in Bits


class PF_ERROR(Bits):
    """The #PF error code (APM2 8.4.2)."""

    P = bit(0)
    W = bit(1)
    U = bit(2)
    RSV = bit(3)
    ID = bit(4)
    PK = bit(5)
    SS = bit(6)
    RMP = bit(31)


class NPF_INFO(Bits):
    """EXITINFO1 of a nested page fault (APM2 15.25.6)."""

    P = bit(0)
    W = bit(1)
    U = bit(2)
    RSV = bit(3)
    ID = bit(4)
    SS = bit(6)
    RMP = bit(31)
    FINAL = bit(32)
    TABLE = bit(33)
    ENC = bit(34)
    SIZEM = bit(35)
    VMPL = bit(36)
    SSS = bit(37)


class IOIO(Bits):
    """EXITINFO1 of a port access (APM2 15.10.2)."""

    IN = bit(0)
    STR = bit(2)
    REP = bit(3)
    SZ8 = bit(4)
    SZ16 = bit(5)
    SZ32 = bit(6)
    A16 = bit(7)
    A32 = bit(8)
    A64 = bit(9)
    SEG = bits(12, 10)
    PORT = bits(31, 16)

    meanings = {"SEG": dict(enumerate(("ES", "CS", "SS", "DS", "FS", "GS")))}  # noqa: RUF012 - ClassVar in Bits


def port_info(insn: Instruction, port: int, size: int) -> int:
    """EXITINFO1 of an access of `size` bytes by IN, OUT, INS or OUTS (APM2 15.10.2)."""
    low = insn.opcode & 0xFF
    info = port << 16 | {1: IOIO.SZ8, 2: IOIO.SZ16, 4: IOIO.SZ32}[size]
    info |= {16: IOIO.A16, 32: IOIO.A32, 64: IOIO.A64}[insn.address]
    if not low & 2:
        info |= IOIO.IN
    segment = DS
    if low in STRING_IO:
        info |= IOIO.STR
        if insn.rep:
            info |= IOIO.REP
        segment = ES if not low & 2 else insn.segment if insn.segment is not None else DS
    return info | segment << 10


class SMI_INFO(Bits):
    """EXITINFO1 of an SMI (APM2 15.13.3, figure 15-3). With VAL, its upper half and SEG say what IOIO does."""

    SMISRC = bit(0)
    """It came from outside: no I/O trap of the processor's own."""
    MCREDIR = bit(1)
    SEG = bits(12, 10)
    TYPE = bit(32)
    """1 for IN."""
    VAL = bit(33)
    STR = bit(34)
    REP = bit(35)
    SZ8 = bit(36)
    SZ16 = bit(37)
    SZ32 = bit(38)
    A16 = bit(39)
    A32 = bit(40)
    A64 = bit(41)
    TF = bit(43)
    BRP = bits(47, 44)
    PORT = bits(63, 48)


def smi_info(io: int) -> int:
    """EXITINFO1 of an SMI from outside that was asserted during an I/O instruction; `io` is what `port_info` says of it."""
    return (io & ~IOIO.SEG) << 32 | io & IOIO.SEG | SMI_INFO.VAL | SMI_INFO.SMISRC


_GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_IPI_CAUSES = {cause.value: cause.name.replace("_", " ").lower() for cause in IncompleteIpi}


def describe_event(event: int) -> str:
    """EVENTINJ or EXITINTINFO in words; "none" if its V bit is clear."""
    if not event & EVENT.v:
        return "none"
    vector, kind = EVENT.get(event, "vector"), EVENT.get(event, "type")
    error = f", error code {EVENT.get(event, 'error_code'):#x}" if event & EVENT.ev else ""
    match kind:
        case 0:
            return f"interrupt, vector {vector:#x}{error}"
        case 2:
            return f"NMI{error}"
        case 3:
            return f"exception {exception_name(vector)}{error}"
        case 4:
            return f"software interrupt {vector:#x}{error}"
    return f"reserved type {kind}, vector {vector:#x}{error}"


def describe_page_fault(code: int) -> str:
    """A #PF error code, or the same bits of a nested fault, in words."""
    what = "instruction fetch" if code & PF_ERROR.ID else "write" if code & PF_ERROR.W else "read"
    why = "reserved bit set" if code & PF_ERROR.RSV else "not permitted" if code & PF_ERROR.P else "not present"
    return f"{'user' if code & PF_ERROR.U else 'supervisor'} {what}, {why}"


def _describe_ioio(info1: int, next_rip: int) -> str:
    width = {IOIO.SZ8: 8, IOIO.SZ16: 16, IOIO.SZ32: 32}.get(info1 & (IOIO.SZ8 | IOIO.SZ16 | IOIO.SZ32))
    verb = ("IN" if info1 & IOIO.IN else "OUT") + ("S" if info1 & IOIO.STR else "")
    repeat = "REP " if info1 & IOIO.REP else ""
    size = f"{width}-bit" if width else "invalid size"
    return f"{repeat}{verb} port {IOIO.get(info1, 'PORT'):#x}, {size}, next rIP {next_rip:#x}"


def _describe_smi(info1: int, rip: int) -> str:
    where = "external" if info1 & SMI_INFO.SMISRC else "internal"
    if not info1 & SMI_INFO.VAL:
        return where
    verb = "IN" if info1 & SMI_INFO.TYPE else "OUT"
    return f"{where}, during {verb} port {SMI_INFO.get(info1, 'PORT'):#x} at rIP {rip:#x}"


def _describe_npf(info1: int, gpa: int) -> str:
    what = "instruction fetch" if info1 & NPF_INFO.ID else "write" if info1 & NPF_INFO.W else "read"
    if not info1 & NPF_INFO.U:
        what = f"supervisor {what}"  # only GMET tells them apart
    why = "reserved bit set" if info1 & NPF_INFO.RSV else "not permitted" if info1 & NPF_INFO.P else "not present"
    where = "of a guest page table" if info1 & NPF_INFO.TABLE else "of the final address"
    if not info1 & (NPF_INFO.TABLE | NPF_INFO.FINAL):
        where = "(neither final nor table bit set)"
    extra = info1 & ~(bits(4, 0) | NPF_INFO.FINAL | NPF_INFO.TABLE)
    return f"{what} {where}, gpa {gpa:#x}, {why}{f', {NPF_INFO.describe(extra)}' if extra else ''}"


def _describe_task_switch(info1: int, info2: int) -> str:
    cause = "IRET" if info2 & bit(36) else "far JMP" if info2 & bit(38) else "CALL or event"
    error = f", error code {info2 & 0xFFFF_FFFF:#x}" if info2 & bit(44) else ""
    return f"to TSS selector {info1 & 0xFFFF:#x} by {cause}{error}"


def _describe_apic_access(info1: int, info2: int) -> str:
    offset, write = info1 & 0xFF0, bool(info1 & EXIT_WRITE)
    name = register(offset).name
    vector = f", vector {info2 & 0xFF:#x}" if write and offset == EOI else ""
    return f"{'write' if write else 'read'} of APIC register {offset:#x}{f' ({name})' if name else ''}{vector}"


def exit_details(code: int, info1: int, info2: int) -> str:
    """What the exit information adds to the name; empty where it says nothing."""
    if code < 0x20 and info1 & bit(63):
        return f"MOV with {_GPRS[info1 & 15]}"
    if 0x20 <= code < 0x40:
        return f"MOV with {_GPRS[info1 & 15]}"
    match code:
        case ExitCode.EXCP_PF:
            return f"{describe_page_fault(info1)}, address {info2:#x}, error code {info1:#x}"
        case ExitCode.EXCP_DF | ExitCode.EXCP_TS | ExitCode.EXCP_NP | ExitCode.EXCP_SS | ExitCode.EXCP_GP | \
                ExitCode.EXCP_AC | ExitCode.EXCP_CP | ExitCode.EXCP_VC | ExitCode.EXCP_SX:  # fmt: skip
            return f"error code {info1:#x}"
        case ExitCode.SMI:
            return _describe_smi(info1, info2)
        case ExitCode.SWINT:
            return f"vector {info1 & 0xFF:#x}"
        case ExitCode.INVLPG:
            return f"address {info1:#x}"
        case ExitCode.IOIO:
            return _describe_ioio(info1, info2)
        case ExitCode.MSR:
            return "WRMSR" if info1 & 1 else "RDMSR"
        case ExitCode.TASK_SWITCH:
            return _describe_task_switch(info1, info2)
        case ExitCode.NPF:
            return _describe_npf(info1, info2)
        case ExitCode.AVIC_INCOMPLETE_IPI:
            cause = _IPI_CAUSES.get(info2 >> 32, f"cause {info2 >> 32}")
            return f"ICR {info1:#x}, {cause}, index {info2 & 0xFFF:#x}"
        case ExitCode.AVIC_NOACCEL:
            return _describe_apic_access(info1, info2)
    return f"EXITINFO1 {info1:#x}, EXITINFO2 {info2:#x}" if info1 or info2 else ""


def describe_exit(code: int, info1: int, info2: int) -> str:
    """One line: the name, what it means, and what the exit information adds. Takes any three 64-bit values."""
    member = _BY_CODE.get(code)
    if member is None:
        head = f"undefined exit code {code:#x}"
    else:
        head = member.name if member.description == member.name else f"{member.name} ({member.description})"
    details = exit_details(code, info1, info2)
    return f"{head}: {details}" if details else head
