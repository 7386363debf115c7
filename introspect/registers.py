"""Flag tables of the AMD64 control, debug and segment registers (APM2 3.1, 4.8, 13.1, 15.5.1)."""

from functools import lru_cache

from introspect.layout import Bits, bit, bits

__all__ = ["ATTRIB", "CR0", "CR4", "DBGCTL", "DR6", "DR7", "EFER", "RFLAGS", "describe_segment", "memory_types"]


class CR0(Bits):
    PE = bit(0)
    MP = bit(1)
    EM = bit(2)
    TS = bit(3)
    ET = bit(4)
    NE = bit(5)
    WP = bit(16)
    AM = bit(18)
    NW = bit(29)
    CD = bit(30)
    PG = bit(31)


class CR4(Bits):
    VME = bit(0)
    PVI = bit(1)
    TSD = bit(2)
    DE = bit(3)
    PSE = bit(4)
    PAE = bit(5)
    MCE = bit(6)
    PGE = bit(7)
    PCE = bit(8)
    OSFXSR = bit(9)
    OSXMMEXCPT = bit(10)
    UMIP = bit(11)
    LA57 = bit(12)
    FSGSBASE = bit(16)
    PCIDE = bit(17)
    OSXSAVE = bit(18)
    SMEP = bit(20)
    SMAP = bit(21)
    PKE = bit(22)
    CET = bit(23)


class EFER(Bits):
    SCE = bit(0)
    LME = bit(8)
    LMA = bit(10)
    NXE = bit(11)
    SVME = bit(12)
    LMSLE = bit(13)
    FFXSR = bit(14)
    TCE = bit(15)
    MCOMMIT = bit(17)
    INTWB = bit(18)
    UAIE = bit(20)
    AIBRSE = bit(21)


class RFLAGS(Bits):
    CF = bit(0)
    PF = bit(2)
    AF = bit(4)
    ZF = bit(6)
    SF = bit(7)
    TF = bit(8)
    IF = bit(9)
    DF = bit(10)
    OF = bit(11)
    IOPL = bits(13, 12)
    NT = bit(14)
    RF = bit(16)
    VM = bit(17)
    AC = bit(18)
    VIF = bit(19)
    VIP = bit(20)
    ID = bit(21)

    ones = bit(1)


class DR6(Bits):
    B0 = bit(0)
    B1 = bit(1)
    B2 = bit(2)
    B3 = bit(3)
    BD = bit(13)
    BS = bit(14)
    BT = bit(15)

    ones = bits(31, 16) | bits(11, 4)  # bit 11, BLD, is active low


_BREAK_ON = {0: "execute", 1: "write", 2: "io", 3: "access"}
_BREAK_LENGTH = {0: "1", 1: "2", 2: "8", 3: "4"}


class DR7(Bits):
    L0 = bit(0)
    G0 = bit(1)
    L1 = bit(2)
    G1 = bit(3)
    L2 = bit(4)
    G2 = bit(5)
    L3 = bit(6)
    G3 = bit(7)
    LE = bit(8)
    GE = bit(9)
    GD = bit(13)
    RW0 = bits(17, 16)
    LEN0 = bits(19, 18)
    RW1 = bits(21, 20)
    LEN1 = bits(23, 22)
    RW2 = bits(25, 24)
    LEN2 = bits(27, 26)
    RW3 = bits(29, 28)
    LEN3 = bits(31, 30)

    ones = bit(10)

    meanings = {  # noqa: RUF012 - declared ClassVar in Bits
        **{f"RW{n}": _BREAK_ON for n in range(4)},
        **{f"LEN{n}": _BREAK_LENGTH for n in range(4)},
    }


class DBGCTL(Bits):
    LBR = bit(0)
    BTF = bit(1)
    PB0 = bit(2)
    PB1 = bit(3)
    PB2 = bit(4)
    PB3 = bit(5)


class ATTRIB(Bits):
    """A VMCB segment attribute word: descriptor bits 55:52 and 47:40, packed (APM2 15.5.1)."""

    TYPE = bits(3, 0)
    S = bit(4)
    DPL = bits(6, 5)
    P = bit(7)
    AVL = bit(8)
    L = bit(9)
    DB = bit(10)
    G = bit(11)


_SYSTEM_TYPES = {1: "16-bit TSS", 2: "LDT", 3: "16-bit busy TSS", 9: "TSS", 11: "busy TSS"}


def describe_segment(attrib: int) -> str:
    """An attribute word in words: "64-bit code rx, DPL 0" or "not present"."""
    kind = attrib & ATTRIB.TYPE
    if not attrib & ATTRIB.S:
        words = _SYSTEM_TYPES.get(kind, f"system type {kind}")
    elif kind & 8:
        width = "64-bit" if attrib & ATTRIB.L else "32-bit" if attrib & ATTRIB.DB else "16-bit"
        words = f"{width} {'conforming ' if kind & 4 else ''}code {'rx' if kind & 2 else 'x'}"
    else:
        width = "32-bit" if attrib & ATTRIB.DB else "16-bit"
        words = f"{width} {'expand-down ' if kind & 4 else ''}data {'rw' if kind & 2 else 'r'}"
    if not attrib & ATTRIB.P:
        return f"not present ({words})" if attrib else "not present"
    return f"{words}, DPL {ATTRIB.get(attrib, 'DPL')}"


_PAT_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB", 7: "UC-"}


@lru_cache(64)
def memory_types(pat: int) -> tuple[str | None, ...]:
    """The eight memory types of a PAT register, PA0 first; None for an encoding the manual reserves (APM2 7.8.1)."""
    return tuple(_PAT_TYPES.get(pat >> shift & 0xFF) for shift in range(0, 64, 8))
