"""What CPUID claims, the processor does: an instruction of each feature runs, and one of each feature not claimed is #UD."""

from __future__ import annotations

import pytest

from tests.engine.rig import DATA, Rig
from vmdbg.machine import NOT_EMULATED
from vmdbg.platform.cpuid import DEFAULT_FEATURES

SSE = "movq %cr4, %rax; orq $0x600, %rax; movq %rax, %cr4"
"""OSFXSR and OSXMMEXCPT."""
OSXSAVE = "movq %cr4, %rax; btsq $18, %rax; movq %rax, %cr4; movl $3, %eax; xorl %edx, %edx"

PROGRAMS = {
    "FPU": "fninit; fld1; fstps {data}",
    "TSC": "rdtsc",
    "MSR": "movl $0x10, %ecx; rdmsr",
    "CMPXCHG8B": "xorl %eax, %eax; xorl %edx, %edx; cmpxchg8b {data}",
    "CMPXCHG16B": "xorl %eax, %eax; xorl %edx, %edx; cmpxchg16b {data}",
    "CMOV": "cmovzl %eax, %ebx",
    "CLFSH": "clflush {data}",
    "CLFLUSHOPT": "clflushopt {data}",
    "MMX": "pxor %mm0, %mm0; emms",
    "FXSR": f"{SSE}; fxsave {{data}}; fxrstor {{data}}",
    "SSE": f"{SSE}; xorps %xmm0, %xmm0; ldmxcsr mxcsr; jmp 1f; mxcsr: .long 0x1f80; 1:",
    "SSE2": f"{SSE}; pxor %xmm0, %xmm0; mfence; lfence",
    "SSE3": f"{SSE}; haddps %xmm0, %xmm1",
    "SSSE3": f"{SSE}; pshufb %xmm0, %xmm1",
    "SSE41": f"{SSE}; pminsb %xmm0, %xmm1; ptest %xmm0, %xmm1",
    "SSE42": f"{SSE}; pcmpgtq %xmm0, %xmm1; crc32l %eax, %ebx",
    "SSE4A": f"{SSE}; extrq $4, $8, %xmm0; insertq %xmm0, %xmm1",
    "PCLMULQDQ": f"{SSE}; pclmulqdq $0, %xmm0, %xmm1",
    "AES": f"{SSE}; aesenc %xmm0, %xmm1; aeskeygenassist $1, %xmm0, %xmm1",
    "MOVBE": "movbe {data}, %eax; movbe %eax, {data}",
    "POPCNT": "popcnt %eax, %ebx",
    "ABM": "lzcnt %eax, %ebx",
    "BMI1": "andn %eax, %ebx, %ecx; tzcnt %eax, %ebx; blsr %eax, %ebx",
    "BMI2": "mulx %eax, %ebx, %ecx; pdep %eax, %ebx, %ecx; rorx $3, %eax, %ebx; shlx %eax, %ebx, %ecx",
    "ADX": "adcx %eax, %ebx; adox %eax, %ebx",
    "ERMS": "movl $4, %ecx; movl ${data}, %edi; rep stosb",
    "FSGSBASE": "movq %cr4, %rax; btsq $16, %rax; movq %rax, %cr4; rdfsbase %rax; wrgsbase %rax",
    "LAHF_SAHF": "lahf; sahf",
    "ALT_MOV_CR8": "movq %cr8, %rax",
    "PREFETCH3DNOW": "prefetchw {data}",
    "MMXEXT": "pminub %mm0, %mm1; emms",
    "RDTSCP": "rdtscp",
    "MONITOR": "monitor; incb (%rax); mwait",
    "XSAVE": f"{OSXSAVE}; xorl %ecx, %ecx; xgetbv; xsetbv; xsave {{data}}; xrstor {{data}}",
    "XSAVEOPT": f"{OSXSAVE}; xsaveopt {{data}}",
    "XGETBV1": f"{OSXSAVE}; movl $1, %ecx; xgetbv",
    "RDPRU": ".byte 0x0f, 0x01, 0xfd",
    "EFF_FREQ": "movl $0xe7, %ecx; rdmsr; wrmsr; movl $0xe8, %ecx; rdmsr; wrmsr",
    "TSC_ADJUST": "movl $0x3b, %ecx; rdmsr; wrmsr",
    "TSC_DEADLINE": "movl $0x6e0, %ecx; rdmsr",
    "MTRR": "movl $0xfe, %ecx; rdmsr; movl $0x2ff, %ecx; rdmsr; wrmsr",
    "PAT": "movl $0x277, %ecx; rdmsr; wrmsr",
    "MCA": "movl $0x179, %ecx; rdmsr",
    "X2APIC": "movl $0x1b, %ecx; rdmsr; orl $0xc00, %eax; wrmsr; movl $0x802, %ecx; rdmsr",
    "SVM": "movl $0xc0000080, %ecx; rdmsr; orl $0x1000, %eax; wrmsr; clgi; stgi",
    "SKINIT": "stgi",
}
"""Features whose presence an instruction or register shows.  Modes and paging features are tested where they matter."""

ELSEWHERE = frozenset((
    "DE", "PSE", "PAE", "MCE", "APIC", "SYSENTER", "PGE", "PSE36", "ARAT", "SMEP", "SMAP", "TOPOLOGY_EXTENSIONS", "SYSCALL", "NX",
    "PAGE1GB", "LM", "TSC_INVARIANT", "EFER_LMSLE_UNSUPPORTED",
))  # fmt: skip

ABSENT = {
    "AVX": f"{OSXSAVE}; vxorps %ymm0, %ymm1, %ymm2",
    "RDRAND": "rdrand %eax",
    "RDSEED": "rdseed %eax",
    "SHA": f"{SSE}; sha1msg1 %xmm0, %xmm1",
    "XSAVEC": f"{OSXSAVE}; xsavec {{data}}",
    "XSAVES": f"{OSXSAVE}; xsaves {{data}}",
    "INVPCID": "invpcid {data}, %rax",
}


def test_every_claim_is_looked_at() -> None:
    claimed = DEFAULT_FEATURES - NOT_EMULATED
    assert claimed == PROGRAMS.keys() & claimed | ELSEWHERE & claimed
    assert not ABSENT.keys() & claimed


@pytest.mark.parametrize("feature", PROGRAMS)
def test_claimed(feature: str) -> None:
    rig = Rig(PROGRAMS[feature].format(data=f"{DATA:#x}" if "${data}" in PROGRAMS[feature] else DATA) + "\nend: hlt", "long")
    rig.run()
    assert rig.cpu.halted
    assert rig.rip == rig.labels["end"] + 1


@pytest.mark.parametrize("feature", ABSENT)
def test_not_claimed(feature: str) -> None:
    rig = Rig(ABSENT[feature].format(data=DATA) + "\nend: hlt", "long")
    rig.run()
    assert rig.rip != rig.labels["end"] + 1
