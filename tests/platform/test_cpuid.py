from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdbg.platform.cpuid import DEFAULT_FEATURES, CpuidConfig, Dynamic, Registers, cpuid

ON = Dynamic(osxsave=True, apic=True)
CONFIG = CpuidConfig(cpus=4, physical_bits=40, svm_features=0x1F, asids=64)


def ask(leaf: int, subleaf: int = 0, config: CpuidConfig = CONFIG, index: int = 0, dynamic: Dynamic = ON) -> Registers:
    return cpuid(config, index, leaf, subleaf, dynamic)


def test_vendor_family_and_name() -> None:
    largest, ebx, ecx, edx = ask(0)
    assert (pack("<III", ebx, edx, ecx), largest) == (b"AuthenticAMD", 0xD)
    eax = ask(1).eax
    assert (eax >> 8 & 0xF) + (eax >> 20 & 0xFF) == 0x17
    name = b"".join(pack("<IIII", *ask(leaf)) for leaf in (0x80000002, 0x80000003, 0x80000004))
    assert name.rstrip(b"\0") == CONFIG.brand.encode()
    assert ask(0x80000000)[1:] == ask(0)[1:]


@pytest.mark.parametrize(
    ("leaf", "register", "bit", "claimed"),
    [
        (1, "ecx", 0, True),  # SSE3
        (1, "ecx", 3, True),  # MONITOR
        (1, "ecx", 13, True),  # CMPXCHG16B
        (1, "ecx", 20, True),  # SSE4.2
        (1, "ecx", 21, True),  # x2APIC
        (1, "ecx", 23, True),  # POPCNT
        (1, "ecx", 24, True),  # TSC deadline
        (1, "ecx", 26, True),  # XSAVE
        (1, "ecx", 28, False),  # AVX
        (1, "ecx", 30, False),  # RDRAND
        (6, "ecx", 0, True),  # effective frequency
        (7, "ebx", 5, False),  # AVX2
        (7, "ebx", 18, False),  # RDSEED
        (0x80000001, "ecx", 2, True),  # SVM
        (0x80000001, "edx", 11, True),  # SYSCALL
        (0x80000001, "edx", 20, True),  # NX
        (0x80000001, "edx", 26, True),  # 1 GiB pages
        (0x80000001, "edx", 27, True),  # RDTSCP
        (0x80000001, "edx", 29, True),  # long mode
        (0x80000001, "edx", 6, True),  # PAE, repeated from leaf 1
        (0x80000007, "edx", 8, True),  # invariant TSC
        (0x80000008, "ebx", 4, True),  # RDPRU
    ],
)
def test_feature_bits(leaf: int, register: str, bit: int, claimed: bool) -> None:
    assert bool(getattr(ask(leaf), register) >> bit & 1) is claimed


def test_monitor_leaf() -> None:
    assert ask(5) == (64, 64, 0, 0)
    assert ask(5, config=CpuidConfig(features=DEFAULT_FEATURES - {"MONITOR"})) == (0, 0, 0, 0)


def test_svm_leaf_and_its_absence() -> None:
    assert ask(0x8000000A) == (1, 64, 0, 0x1F)
    without = CpuidConfig(features=DEFAULT_FEATURES - {"SVM"}, svm_features=0x1F)
    assert ask(0x8000000A, config=without) == (0, 0, 0, 0)


def test_address_sizes_and_topology() -> None:
    assert ask(0x80000008).eax == 0x3028
    assert ask(0x80000008).ecx == 0x2003
    assert ask(0x80000008).edx == 0x10000, "the last register of RDPRU is 1"
    assert ask(0x80000008, config=CpuidConfig(features=DEFAULT_FEATURES - {"RDPRU"})).edx == 0
    assert [ask(1, index=n).ebx >> 24 for n in range(4)] == [0, 1, 2, 3]
    assert (ask(1).edx >> 28 & 1, ask(1, config=CpuidConfig()).edx >> 28 & 1) == (1, 0)
    assert ask(0xB, 0, index=3) == (0, 1, 0x100, 3)
    assert ask(0xB, 1, index=3) == (2, 4, 0x201, 3)
    assert ask(0xB, 2, index=3) == (0, 0, 2, 3)
    assert ask(0x8000001E, index=3)[:2] == (3, 3)


def test_caches_agree_with_their_short_form() -> None:
    sizes = []
    for subleaf in range(4):
        eax, ebx, ecx, _ = ask(0x8000001D, subleaf)
        sizes.append((eax & 0x1F, (ebx >> 22) + 1, ((ebx >> 22) + 1) * ((ebx & 0xFFF) + 1) * (ecx + 1)))
    assert sizes == [(1, 8, 32 << 10), (2, 8, 32 << 10), (3, 8, 512 << 10), (3, 16, 16 << 20)]
    assert ask(0x80000006).ecx >> 16 == 512
    assert (ask(0x80000006).edx >> 18) * 512 == 16 << 10
    assert ask(0x8000001D, 4) == (0, 0, 0, 0)


def test_dynamic_bits() -> None:
    off = Dynamic(osxsave=False, apic=False)
    assert ask(1).edx & ~ask(1, dynamic=off).edx == 1 << 9
    assert ask(0x80000001).edx & ~ask(0x80000001, dynamic=off).edx == 1 << 9
    assert ask(1).ecx ^ ask(1, dynamic=off).ecx == 1 << 27


def test_xsave_leaf_and_its_absence() -> None:
    """x87 and SSE, in the area of FXSAVE and a header; XSAVEOPT, and XGETBV with ECX 1."""
    assert [ask(0xD, subleaf) for subleaf in (0, 1, 2)] == [(3, 0x240, 0x240, 0), (5, 0, 0, 0), (0, 0, 0, 0)]
    without = CpuidConfig(features=DEFAULT_FEATURES - {"XSAVE"})
    assert (ask(0, config=without).eax, ask(1, config=without).ecx >> 26 & 3) == (0xB, 0)
    assert ask(0xD, 1, config=without) == (0, 0, 0, 0)


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_every_leaf_answers_and_those_out_of_range_with_zeros(leaf: int, subleaf: int) -> None:
    registers = ask(leaf, subleaf)
    assert all(0 <= value < 1 << 32 for value in registers)
    if not (leaf <= 0xD or 0x80000000 <= leaf <= 0x8000001E):
        assert registers == (0, 0, 0, 0)


def test_wrong_configurations() -> None:
    with pytest.raises(ValueError, match=r"'SEE3'.*unknown"):
        CpuidConfig(features=frozenset({"SEE3"}))
    with pytest.raises(ValueError, match="0 CPUs are not"):
        CpuidConfig(cpus=0)
    with pytest.raises(ValueError, match="53 physical address bits are not"):
        CpuidConfig(physical_bits=53)
    with pytest.raises(ValueError, match="longer than 47"):
        CpuidConfig(brand="x" * 48)
