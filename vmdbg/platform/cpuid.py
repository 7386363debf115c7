"""CPUID of an AMD family 17h processor (APM3 appendix E).

What it claims is what the engine implements: SSE4.2-class, no AVX, no random numbers, unless listed in `features`.
"""

from dataclasses import dataclass
from functools import lru_cache
from struct import unpack
from typing import NamedTuple

from introspect.cpuid import FEATURES, SHARED_EDX, Output

MAX_RDPRU = 1
"""The last register that RDPRU reads: MPERF, APERF."""

_DEFAULT = """
    FPU DE PSE TSC MSR PAE MCE CMPXCHG8B APIC SYSENTER MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2
    SSE3 PCLMULQDQ MONITOR SSSE3 CMPXCHG16B SSE41 SSE42 X2APIC MOVBE POPCNT TSC_DEADLINE AES XSAVE XSAVEOPT XGETBV1
    ARAT EFF_FREQ FSGSBASE TSC_ADJUST BMI1 SMEP BMI2 ERMS ADX SMAP CLFLUSHOPT
    LAHF_SAHF SVM SKINIT ALT_MOV_CR8 ABM SSE4A PREFETCH3DNOW TOPOLOGY_EXTENSIONS
    SYSCALL NX MMXEXT PAGE1GB RDTSCP LM TSC_INVARIANT RDPRU EFER_LMSLE_UNSUPPORTED
"""
DEFAULT_FEATURES = frozenset(_DEFAULT.split())

VENDOR = b"AuthenticAMD"
SIGNATURE = 0x00830F10
"""Family 17h, model 31h, stepping 0."""
CLFLUSH_QUADWORDS = 8
MONITOR_LINE = 64
MAX_EXTENDED_LEAF = 0x8000001E


@dataclass(frozen=True, slots=True)
class CpuidConfig:
    """`svm_features` is Fn8000_000A_EDX; `asids` the number of ASIDs, that of the host included."""

    cpus: int = 1
    physical_bits: int = 48
    svm_features: int = 0
    svm_revision: int = 1
    asids: int = 32768
    brand: str = "vmdbg AMD64 processor with SVM"
    features: frozenset[str] = DEFAULT_FEATURES

    def __post_init__(self) -> None:
        known = {name for bits in FEATURES.values() for name in bits}
        if unknown := self.features - known:
            raise ValueError(f"CPUID features {sorted(unknown)} are unknown; known are {sorted(known)}")
        if not 1 <= self.cpus <= 255:
            raise ValueError(f"{self.cpus} CPUs are not 1 to 255")
        if not 36 <= self.physical_bits <= 52:
            raise ValueError(f"{self.physical_bits} physical address bits are not 36 to 52")
        if len(self.brand.encode()) > 47:
            raise ValueError(f"processor name {self.brand!r} is longer than 47 bytes")


class Registers(NamedTuple):
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


class Dynamic(NamedTuple):
    """State that CPUID reflects: CR4.OSXSAVE and APIC_BASE.AE."""

    osxsave: bool
    apic: bool


def cpuid(config: CpuidConfig, cpu_index: int, leaf: int, subleaf: int, dynamic: Dynamic) -> Registers:
    """What CPUID returns for EAX = `leaf`, ECX = `subleaf`.  Leaves that do not exist return zeros, as on AMD."""
    registers = _leaf(config, cpu_index, leaf, subleaf)
    if leaf == 0x00000001:
        ecx = registers.ecx | (1 << 27 if dynamic.osxsave and "XSAVE" in config.features else 0)
        registers = registers._replace(ecx=ecx, edx=registers.edx & _apic_mask(dynamic))
    elif leaf == 0x80000001:
        registers = registers._replace(edx=registers.edx & _apic_mask(dynamic))
    return registers


def _apic_mask(dynamic: Dynamic) -> int:
    return ~0 if dynamic.apic else ~(1 << 9)


def feature_bits(config: CpuidConfig, leaf: int, output: Output) -> int:
    """The bits of a feature register that `config.features` sets."""
    names = FEATURES.get((leaf, output), {})
    return sum(1 << bit for name, bit in names.items() if name in config.features)


@lru_cache(1024)  # bounded: the guest chooses leaf and subleaf
def _leaf(config: CpuidConfig, index: int, leaf: int, subleaf: int) -> Registers:
    xsave = "XSAVE" in config.features
    id_bits = (config.cpus - 1).bit_length()
    features = Registers(*(feature_bits(config, leaf, output) for output in ("eax", "ebx", "ecx", "edx")))
    several = config.cpus > 1
    if leaf in (0x00000000, 0x80000000):
        largest = (0xD if xsave else 0xB) if leaf == 0 else MAX_EXTENDED_LEAF
        ebx, edx, ecx = unpack("<III", VENDOR)
        return Registers(largest, ebx, ecx, edx)
    if leaf == 0x00000001:
        ebx = index << 24 | config.cpus << 16 | CLFLUSH_QUADWORDS << 8
        return features._replace(eax=SIGNATURE, ebx=ebx, edx=features.edx | several << 28)
    if leaf == 0x00000005 and "MONITOR" in config.features:
        return Registers(MONITOR_LINE, MONITOR_LINE)  # no extensions
    if leaf == 0x00000007 and subleaf:
        return Registers()
    if leaf == 0x0000000B:
        levels = ((0, 1, 1 << 8), (id_bits, config.cpus, 2 << 8))  # shift, processors, level type: thread, core
        eax, ebx, kind = levels[subleaf] if subleaf < 2 else (0, 0, 0)
        return Registers(eax, ebx, kind | subleaf & 0xFF, index)
    if leaf == 0x0000000D and xsave:
        avx = "AVX" in config.features
        size = 0x340 if avx else 0x240
        if subleaf == 0:
            return Registers(7 if avx else 3, size, size, 0)
        if subleaf == 1:
            return features
        return Registers(0x100, 0x240, 0, 0) if subleaf == 2 and avx else Registers()
    if leaf == 0x0000000D:
        return Registers()
    if leaf == 0x80000001:
        edx = features.edx | feature_bits(config, 0x00000001, "edx") & SHARED_EDX
        return features._replace(eax=SIGNATURE, ebx=0x40000000, ecx=features.ecx | several << 1, edx=edx)
    if 0x80000002 <= leaf <= 0x80000004:
        name = config.brand.encode().ljust(48, b"\0")
        return Registers(*unpack("<IIII", name[16 * (leaf - 0x80000002) :][:16]))
    if leaf == 0x80000008:
        edx = MAX_RDPRU << 16 if "RDPRU" in config.features else 0
        return features._replace(eax=48 << 8 | config.physical_bits, ecx=id_bits << 12 | config.cpus - 1, edx=edx)
    if leaf == 0x8000000A and "SVM" in config.features:
        return Registers(config.svm_revision, config.asids, 0, config.svm_features)
    if leaf == 0x8000001D:
        return _cache_properties(config, subleaf)
    if leaf == 0x8000001E:
        return Registers(index, index, 0, 0)
    return _CONSTANT.get(leaf, features)


_CONSTANT = {
    0x80000005: Registers(0xFF40FF40, 0xFF40FF40, 0x20080140, 0x20080140),  # L1: 64-entry TLBs, 32 KiB 8-way caches
    0x80000006: Registers(0x26006400, 0x66006400, 0x02006140, 0x00808140),  # L2 512 KiB 8-way, L3 16 MiB 16-way
    0x80000019: Registers(0xF040F040, 0xF0400000, 0, 0),  # 1 GiB page TLBs
}


def _cache_properties(config: CpuidConfig, subleaf: int) -> Registers:
    """Fn8000_001D: (type, level, shared by, ways, sets, inclusive) of each cache."""
    caches = (
        (1, 1, 1, 8, 64, 0),
        (2, 1, 1, 8, 64, 0),
        (3, 2, 1, 8, 1024, 2),
        (3, 3, config.cpus, 16, 16384, 0),
    )
    if subleaf >= len(caches) or "TOPOLOGY_EXTENSIONS" not in config.features:
        return Registers()
    kind, level, sharing, ways, sets, inclusive = caches[subleaf]
    self_initialising = 1 << 8
    eax = kind | level << 5 | self_initialising | sharing - 1 << 14
    return Registers(eax, ways - 1 << 22 | 63, sets - 1, inclusive)
