"""What CPUID returns, in words (APM3 appendix E): one table of feature bits, one of numbers."""

import struct
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from introspect.rules import SVM_FEATURES

__all__ = ["FEATURES", "LEAVES", "OUTPUTS", "SHARED_EDX", "Output", "features", "meanings", "subleaves"]

Output = Literal["eax", "ebx", "ecx", "edx"]

FEATURES: dict[tuple[int, Output], dict[str, int]] = {
    (0x00000001, "ecx"): {
        "SSE3": 0,
        "PCLMULQDQ": 1,
        "MONITOR": 3,
        "SSSE3": 9,
        "FMA": 12,
        "CMPXCHG16B": 13,
        "SSE41": 19,
        "SSE42": 20,
        "X2APIC": 21,
        "MOVBE": 22,
        "POPCNT": 23,
        "TSC_DEADLINE": 24,
        "AES": 25,
        "XSAVE": 26,
        "AVX": 28,
        "F16C": 29,
        "RDRAND": 30,
        "HYPERVISOR": 31,
    },
    (0x00000001, "edx"): {
        "FPU": 0,
        "VME": 1,
        "DE": 2,
        "PSE": 3,
        "TSC": 4,
        "MSR": 5,
        "PAE": 6,
        "MCE": 7,
        "CMPXCHG8B": 8,
        "APIC": 9,
        "SYSENTER": 11,
        "MTRR": 12,
        "PGE": 13,
        "MCA": 14,
        "CMOV": 15,
        "PAT": 16,
        "PSE36": 17,
        "CLFSH": 19,
        "MMX": 23,
        "FXSR": 24,
        "SSE": 25,
        "SSE2": 26,
    },
    (0x00000006, "eax"): {"ARAT": 2},
    (0x00000006, "ecx"): {"EFF_FREQ": 0},
    (0x00000007, "ebx"): {
        "FSGSBASE": 0,
        "TSC_ADJUST": 1,
        "BMI1": 3,
        "AVX2": 5,
        "SMEP": 7,
        "BMI2": 8,
        "ERMS": 9,
        "INVPCID": 10,
        "RDSEED": 18,
        "ADX": 19,
        "SMAP": 20,
        "CLFLUSHOPT": 23,
        "CLWB": 24,
        "SHA": 29,
    },
    (0x00000007, "ecx"): {"UMIP": 2, "PKU": 3, "LA57": 16, "RDPID": 22},
    (0x0000000D, "eax"): {"XSAVEOPT": 0, "XGETBV1": 2},
    (0x80000001, "ecx"): {
        "LAHF_SAHF": 0,
        "SVM": 2,
        "EXTAPIC": 3,
        "ALT_MOV_CR8": 4,
        "ABM": 5,
        "SSE4A": 6,
        "MISALIGN_SSE": 7,
        "PREFETCH3DNOW": 8,
        "OSVW": 9,
        "IBS": 10,
        "SKINIT": 12,
        "WDT": 13,
        "TCE": 17,
        "TOPOLOGY_EXTENSIONS": 22,
        "PERFCTR_EXT_CORE": 23,
    },
    (0x80000001, "edx"): {
        "SYSCALL": 11,
        "NX": 20,
        "MMXEXT": 22,
        "FFXSR": 25,
        "PAGE1GB": 26,
        "RDTSCP": 27,
        "LM": 29,
    },
    (0x80000007, "edx"): {"TSC_INVARIANT": 8},
    (0x80000008, "ebx"): {"CLZERO": 0, "RDPRU": 4, "WBNOINVD": 9, "EFER_LMSLE_UNSUPPORTED": 20},
}
"""Feature names by leaf, register and bit; of leaf D, it is subleaf 1.  OSXSAVE, HTT and CMP_LEGACY follow from state and the
number of CPUs."""

OUTPUTS: tuple[Output, ...] = ("eax", "ebx", "ecx", "edx")
SHARED_EDX = 0x0183F3FF
"""Fn8000_0001_EDX repeats these bits of Fn0000_0001_EDX."""
_DERIVED: dict[tuple[int, Output], dict[str, int]] = {
    (0x00000001, "ecx"): {"OSXSAVE": 27}, (0x00000001, "edx"): {"HTT": 28}, (0x80000001, "ecx"): {"CMP_LEGACY": 1},
}  # fmt: skip
"""Bits that follow from the state and the number of CPUs."""

LEAVES = {
    0x00000000: "largest standard leaf, vendor", 0x00000001: "family, model, features", 0x00000005: "MONITOR and MWAIT",
    0x00000006: "power management", 0x00000007: "structured extended features", 0x0000000B: "extended topology",
    0x0000000D: "XSAVE", 0x80000000: "largest extended leaf, vendor", 0x80000001: "extended features",
    0x80000002: "name", 0x80000003: "name", 0x80000004: "name", 0x80000005: "L1 caches and TLBs",
    0x80000006: "L2 and L3 caches and TLBs", 0x80000007: "advanced power management", 0x80000008: "address sizes, cores",
    0x8000000A: "SVM", 0x80000019: "TLBs for 1 GiB pages", 0x8000001A: "performance", 0x8000001B: "instruction-based sampling",
    0x8000001D: "cache properties", 0x8000001E: "APIC ID, core, node", 0x8000001F: "memory encryption",
}  # fmt: skip
_MANY = {0x0000000B: 2, 0x0000000D: 3, 0x8000001D: 4}
"""Leaves with several subleaves, and how many are worth asking for."""


class _Number(NamedTuple):
    name: str
    output: Output
    high: int
    low: int


_NUMBERS: dict[int, tuple[_Number, ...]] = {
    0x00000001: (
        _Number("stepping", "eax", 3, 0), _Number("CLFLUSH quadwords", "ebx", 15, 8), _Number("processors", "ebx", 23, 16),
        _Number("APIC ID", "ebx", 31, 24),
    ),
    0x00000005: (_Number("smallest line", "eax", 15, 0), _Number("largest line", "ebx", 15, 0)),
    0x00000007: (_Number("largest subleaf", "eax", 31, 0),),
    0x0000000B: (
        _Number("shift", "eax", 4, 0), _Number("processors", "ebx", 15, 0), _Number("level type", "ecx", 15, 8),
        _Number("x2APIC ID", "edx", 31, 0),
    ),
    0x0000000D: (_Number("size now", "ebx", 31, 0), _Number("largest size", "ecx", 31, 0)),
    0x80000008: (
        _Number("physical bits", "eax", 7, 0), _Number("linear bits", "eax", 15, 8), _Number("cores - 1", "ecx", 7, 0),
        _Number("APIC ID bits", "ecx", 15, 12), _Number("largest RDPRU", "edx", 31, 16),
    ),
    0x8000000A: (_Number("revision", "eax", 7, 0), _Number("ASIDs", "ebx", 31, 0)),
    0x8000001D: (
        _Number("type", "eax", 4, 0), _Number("level", "eax", 7, 5), _Number("ways - 1", "ebx", 31, 22),
        _Number("sets - 1", "ecx", 31, 0),
    ),
    0x8000001E: (_Number("APIC ID", "eax", 31, 0), _Number("core", "ebx", 7, 0), _Number("node", "ecx", 7, 0)),
}  # fmt: skip


def _vendor(registers: Sequence[int]) -> str:
    eax, ebx, ecx, edx = registers
    return f"largest {eax:#x}, {_text((ebx, edx, ecx))}"


def _text(registers: Sequence[int]) -> str:
    raw = struct.pack(f"<{len(registers)}I", *registers).rstrip(b"\0")
    return '"' + "".join(chr(byte) if 32 <= byte < 127 else "." for byte in raw) + '"'


def _family(registers: Sequence[int]) -> str:
    eax = registers[0]
    base, model = eax >> 8 & 0xF, eax >> 4 & 0xF
    family = base + (eax >> 20 & 0xFF if base == 0xF else 0)
    return f"family {family:#x}, model {model | (eax >> 12 & 0xF0 if base == 0xF else 0):#x}"


_WORDS: dict[int, Callable[[Sequence[int]], str]] = {
    0x00000000: _vendor, 0x80000000: _vendor, 0x00000001: _family,
    **dict.fromkeys((0x80000002, 0x80000003, 0x80000004), _text),
}  # fmt: skip


def features(leaf: int, subleaf: int, output: Output, value: int) -> tuple[list[str], int]:
    """Names of the feature bits that are set in one register, and the set bits that have no name: all of them where the
    register holds numbers."""
    if leaf == 0x8000000A and output == "edx":
        names = {name: mask.bit_length() - 1 for name, mask in SVM_FEATURES.fields.items()}
    elif leaf == 0xD and subleaf != 1:
        names = {}
    else:
        names = {**FEATURES.get((leaf, output), {}), **_DERIVED.get((leaf, output), {})}
    if leaf == 0x80000001 and output == "edx":
        names = {**{name: n for name, n in FEATURES[1, "edx"].items() if SHARED_EDX >> n & 1}, **names}
    found = [name for name, position in names.items() if value >> position & 1]
    return found, value & ~sum(1 << position for position in set(names.values()))


def meanings(leaf: int, subleaf: int, registers: Sequence[int]) -> str:
    """The numbers of a leaf in words; empty where the table has none. `registers` are EAX to EDX."""
    words = [_WORDS[leaf](registers)] if leaf in _WORDS else []
    by_name = dict(zip(OUTPUTS, registers, strict=True))
    for one in _NUMBERS.get(leaf, ()) if leaf not in (7, 0xD) or not subleaf else ():
        words.append(f"{one.name} {by_name[one.output] >> one.low & (1 << one.high - one.low + 1) - 1}")
    return ", ".join(words)


def subleaves(leaf: int) -> int:
    """How many subleaves of a leaf are worth asking for."""
    return _MANY.get(leaf, 1)
