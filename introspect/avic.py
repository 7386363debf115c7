"""AVIC: which accesses to a guest's APIC the processor makes itself, and the tables behind it (APM2 15.29)."""

from dataclasses import dataclass
from enum import IntEnum, auto

from introspect.layout import Bits, Buffer, bit, bits

__all__ = [
    "APIC_ADDRESS", "BROADCAST", "DFR", "EOI", "EXIT_WRITE", "ICR", "ICRH", "ICRL", "ID", "IRR", "ISR", "LOGICAL_ENTRIES",
    "LOGICAL_ENTRY", "PHYSICAL_ENTRY", "PPR", "REGISTERS", "TMR", "TPR", "IncompleteIpi", "Register", "Rule", "dword",
    "logical_indices", "logical_name", "register", "vectors",
]  # fmt: skip

APIC_ADDRESS = bits(51, 12)
"""The bits of AVIC_APIC_BAR and of the pointers that count."""
BROADCAST = 0xFF
"""The destination that is every APIC; as a physical ID it does not exist."""
ID, VERSION, TPR, APR, PPR, EOI, RRR, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICRL, ICRH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310

EXIT_WRITE = bit(32)
"""In EXITINFO1 of AVIC_NOACCEL: a write was attempted."""


class Rule(IntEnum):
    """What becomes of an access to a register."""

    ALLOWED = auto()
    """It reads or writes the backing page."""
    ACCELERATED = auto()
    """It writes the backing page, and the processor does what the register is for."""
    TRAP = auto()
    """It writes the backing page, and AVIC_NOACCEL follows behind the instruction."""
    FAULT = auto()
    """AVIC_NOACCEL comes before it."""


@dataclass(frozen=True, slots=True)
class Register:
    name: str
    read: Rule
    write: Rule


def _bank(name: str, offset: int, read: Rule, write: Rule, count: int = 8) -> dict[int, Register]:
    return {offset + 16 * n: Register(f"{name}{n}", read, write) for n in range(count)}


REGISTERS: dict[int, Register] = {
    ID: Register("ID", Rule.ALLOWED, Rule.TRAP),
    VERSION: Register("VERSION", Rule.ALLOWED, Rule.FAULT),
    TPR: Register("TPR", Rule.ALLOWED, Rule.ACCELERATED),
    APR: Register("APR", Rule.FAULT, Rule.FAULT),
    PPR: Register("PPR", Rule.ALLOWED, Rule.FAULT),
    EOI: Register("EOI", Rule.ALLOWED, Rule.ACCELERATED),
    RRR: Register("RRR", Rule.ALLOWED, Rule.TRAP),
    LDR: Register("LDR", Rule.ALLOWED, Rule.TRAP),
    DFR: Register("DFR", Rule.ALLOWED, Rule.TRAP),
    SVR: Register("SVR", Rule.ALLOWED, Rule.TRAP),
    **_bank("ISR", ISR, Rule.ALLOWED, Rule.FAULT),
    **_bank("TMR", TMR, Rule.ALLOWED, Rule.FAULT),
    **_bank("IRR", IRR, Rule.ALLOWED, Rule.FAULT),
    ESR: Register("ESR", Rule.ALLOWED, Rule.TRAP),
    ICRL: Register("ICRL", Rule.ALLOWED, Rule.ACCELERATED),
    ICRH: Register("ICRH", Rule.ALLOWED, Rule.ALLOWED),
    0x320: Register("LVT_TIMER", Rule.ALLOWED, Rule.TRAP),
    0x330: Register("LVT_THERMAL", Rule.ALLOWED, Rule.TRAP),
    0x340: Register("LVT_PERFORMANCE", Rule.ALLOWED, Rule.TRAP),
    0x350: Register("LVT_LINT0", Rule.ALLOWED, Rule.TRAP),
    0x360: Register("LVT_LINT1", Rule.ALLOWED, Rule.TRAP),
    0x370: Register("LVT_ERROR", Rule.ALLOWED, Rule.TRAP),
    0x380: Register("INITIAL_COUNT", Rule.ALLOWED, Rule.TRAP),
    0x390: Register("CURRENT_COUNT", Rule.FAULT, Rule.FAULT),
    0x3E0: Register("DIVIDE", Rule.ALLOWED, Rule.TRAP),
    0x400: Register("EXT_FEATURE", Rule.FAULT, Rule.FAULT),
    0x410: Register("EXT_CONTROL", Rule.FAULT, Rule.FAULT),
    0x420: Register("SEOI", Rule.FAULT, Rule.FAULT),
    **_bank("IER", 0x480, Rule.FAULT, Rule.FAULT),
    **_bank("EXT_LVT", 0x500, Rule.FAULT, Rule.FAULT, 4),
}
"""APM2 table 15-22, by offset in the page; without ExtLvtAvicAccessChg."""
_UNDEFINED = Register("", Rule.ALLOWED, Rule.ALLOWED)
_RESERVED = Register("", Rule.FAULT, Rule.FAULT)
_FIRST_RESERVED = 0x540


def register(offset: int) -> Register:
    """The register at an offset in the APIC page; one without a name where the manual defines none."""
    return _RESERVED if offset >= _FIRST_RESERVED else REGISTERS.get(offset & ~0xF, _UNDEFINED)


class ICR(Bits):
    """ICRL; the destination is in bits 31:24 of ICRH (APM2 16.5)."""

    vector = bits(7, 0)
    message_type = bits(10, 8)
    logical = bit(11)
    level = bit(15)
    shorthand = bits(19, 18)


class PHYSICAL_ENTRY(Bits):
    """An entry of the physical APIC ID table, 8 bytes, by guest physical APIC ID (APM2 15.29.5.2)."""

    host_apic_id = bits(11, 0)
    backing_page = APIC_ADDRESS
    is_running = bit(62)
    valid = bit(63)


class LOGICAL_ENTRY(Bits):
    """An entry of the logical APIC ID table, 4 bytes (APM2 15.29.5.3)."""

    guest_apic_id = bits(7, 0)
    valid = bit(31)


LOGICAL_ENTRIES = 60
"""Of the logical table in cluster mode: cluster 15 is reserved, and nothing covers it (APM2 figure 15-21)."""


class IncompleteIpi(IntEnum):
    """EXITINFO2[63:32] of AVIC_INCOMPLETE_IPI (APM2 table 15-27)."""

    INVALID_TYPE = 0
    TARGET_NOT_RUNNING = 1
    INVALID_TARGET = 2
    INVALID_BACKING_PAGE = 3
    INVALID_VECTOR = 4


def dword(page: Buffer, offset: int) -> int:
    """The 32 bits at an offset."""
    return int.from_bytes(page[offset : offset + 4], "little")


def vectors(page: Buffer, bank: int) -> int:
    """ISR, TMR or IRR as one number, bit n for vector n."""
    return sum(dword(page, bank + 16 * n) << 32 * n for n in range(8))


def logical_indices(destination: int, dfr: int) -> list[int]:
    """The entries of the logical table that an 8-bit logical destination names, in flat or cluster mode by DFR."""
    if dfr >> 28 == 0xF:
        return [n for n in range(8) if destination >> n & 1]
    return [(destination >> 4) * 4 + n for n in range(4) if destination >> n & 1]


def logical_name(index: int, dfr: int) -> int:
    """The logical ID whose entry this is."""
    return 1 << index if dfr >> 28 == 0xF else index // 4 << 4 | 1 << index % 4
