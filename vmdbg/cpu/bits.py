"""Bits of the control, flag and debug registers, and which values registers take."""

from __future__ import annotations

CR0_PE, CR0_TS, CR0_NE, CR0_WP, CR0_PG = 1 << 0, 1 << 3, 1 << 5, 1 << 16, 1 << 31
CR4_PAE, EFER_LMA = 1 << 5, 1 << 10
CR4_SUPPORTED = 0b111_1111_1100 | 1 << 16 | 1 << 20 | 1 << 21
"""TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT, FSGSBASE, SMEP, SMAP; VME, PVI, UMIP, PCIDE and others are not
claimed in CPUID."""
CR4_OSXSAVE = 1 << 18
RFLAGS_TF, RFLAGS_IF, RFLAGS_DF, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM, RFLAGS_AC = (
    1 << 8, 1 << 9, 1 << 10, 1 << 14, 1 << 16, 1 << 17, 1 << 18,
)  # fmt: skip
RFLAGS_IOPL = 3 << 12
MASK64 = (1 << 64) - 1
DR6_RESET, DR7_RESET = 0xFFFF0FF0, 0x400
XCR0_X87, XCR0_SSE = 1, 2
DR6_BS, DR6_BT = 1 << 14, 1 << 15


def dr6_value(value: int) -> int:
    """What DR6 holds after `value` is written to it (APM2 13.1.1.3)."""
    return value & 0xE00F | DR6_RESET


def dr7_value(value: int) -> int:
    return value & 0xFFFF23FF | DR7_RESET


def canonical(address: int) -> bool:
    """Whether a 64-bit address repeats bit 47 upward (APM2 5.3.1)."""
    return (address >> 47) in (0, 0x1FFFF)
