"""Where the private CPU state lies in a `uc_context` buffer of Unicorn 2.1.4 on x86-64, in one table.

`uc_context_save` copies QEMU's `CPUX86State` behind a header of 40 bytes.  Everything Unicorn's public registers do not
show (segment caches, hflags, intercepts, the nested-paging root) is read and written there.  The offsets are private to
one release: `calibrate` proves them on the engine at hand before anything is trusted to them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import unicorn
from unicorn import x86_const as x86

from .errors import EngineError

PHYSICAL_BITS = 40
"""What the engine's walker implements: CPUID claims no more (TCG_PHYS_ADDR_BITS)."""

REGS = 40
EIP = 168
EFLAGS = 176
CC_SRC = 192
CC_OP = 208
DF = 212
HFLAGS = 216
HFLAGS2 = 220
SEGMENTS = 224
"""ES CS SS DS FS GS LDTR TR GDTR IDTR, 24 bytes each: u32 selector, pad, u64 base, u32 limit, u32 flags."""
CR = 464
A20_MASK = 536
EFER = 632
FPU = 640
SSE_ROUNDING, SSE_FTZ, SSE_DAZ = 849, 852, 853
"""Bytes that follow from MXCSR."""
MXCSR = 856
XMM = 864
SYSENTER_CS = 4840
SYSENTER_ESP = 4848
SYSENTER_EIP = 4856
STAR = 4864
VM_HSAVE = 4872
LSTAR = 4880
CSTAR = 4888
SFMASK = 4896
KERNEL_GS_BASE = 4904
CODE_BASE = 4928
"""The engine's tsc_deadline, which nothing in it reads or writes: for us the base in CS while 64-bit code runs (see state.py)."""
TSC_AUX = 4936
XCR0 = 4944
PAT = 5320
ERROR_CODE = 5424
EXCEPTION_IS_INT = 5428
DR = 5440
OLD_EXCEPTION = 5536
VM_VMCB = 5544
TSC_OFFSET = 5552
INTERCEPT = 5560
INTERCEPT_CR_READ = 5568
INTERCEPT_CR_WRITE = 5570
INTERCEPT_DR_READ = 5572
INTERCEPT_DR_WRITE = 5574
INTERCEPT_EXCEPTIONS = 5576
NESTED_CR3 = 5584
NESTED_PG_MODE = 5592
V_TPR = 5596


@dataclass(frozen=True)
class Probe:
    """A value written through Unicorn's public interface that must appear at `offset`."""

    name: str
    offset: int
    register: int = -1
    msr: int = -1
    size: int = 8


PROBES = (
    Probe("rax", REGS, x86.UC_X86_REG_RAX),
    Probe("r15", REGS + 15 * 8, x86.UC_X86_REG_R15),
    Probe("rip", EIP, x86.UC_X86_REG_RIP),
    Probe("cr2", CR + 16, x86.UC_X86_REG_CR2),
    Probe("dr0", DR, x86.UC_X86_REG_DR0),
    Probe("dr7", DR + 56, x86.UC_X86_REG_DR7),
    Probe("mxcsr", MXCSR, x86.UC_X86_REG_MXCSR, size=4),
    Probe("fs base", SEGMENTS + 4 * 24 + 8, msr=0xC0000100),
    Probe("gs base", SEGMENTS + 5 * 24 + 8, msr=0xC0000101),
    Probe("star", STAR, msr=0xC0000081),
    Probe("lstar", LSTAR, msr=0xC0000082),
    Probe("cstar", CSTAR, msr=0xC0000083),
    Probe("sfmask", SFMASK, msr=0xC0000084),
    Probe("kernel_gs_base", KERNEL_GS_BASE, msr=0xC0000102),
    Probe("tsc_aux", TSC_AUX, msr=0xC0000103),
    Probe("vm_hsave_pa", VM_HSAVE, msr=0xC0010117),
    Probe("pat", PAT, msr=0x277),
    Probe("sysenter_cs", SYSENTER_CS, msr=0x174, size=4),
    Probe("sysenter_esp", SYSENTER_ESP, msr=0x175),
    Probe("sysenter_eip", SYSENTER_EIP, msr=0x176),
)


def context_bytes(context: Any) -> memoryview:
    """The bytes of a `uc_context`, shared with it, not copied."""
    address = ctypes.cast(context.context, ctypes.c_void_p).value
    assert address is not None
    return memoryview((ctypes.c_char * context.size).from_address(address)).cast("B")


def calibrate(uc: Any) -> None:
    """Prove `PROBES` on a fresh engine that does not run yet.

    Raises `EngineError` that names the wheel found and the one expected when a value is not where it should be.
    """
    saved = uc.context_save()
    for index, probe in enumerate(PROBES):
        value = 0x00006A5B4C3D0000 + index * 0x1110 if probe.size == 8 else 0x1F80 + index % 0x40
        if probe.msr >= 0:
            uc.msr_write(probe.msr, value)
        else:
            uc.reg_write(probe.register, value)
        context = uc.context_save()
        seen = int.from_bytes(context_bytes(context)[probe.offset : probe.offset + probe.size], "little")
        if seen != value:
            raise EngineError(
                f"Unicorn's CPU state has another layout than this version of vmdbg knows: {probe.name} is not at offset "
                f"{probe.offset} (found {seen:#x}, wrote {value:#x}). Found: unicorn {unicorn.__version__} from "
                f"{unicorn.__file__}; expected: the unicorn 2.1.4 wheel for x86-64 from PyPI. "
                "Remedy: pip install --force-reinstall unicorn==2.1.4"
            )
    uc.context_restore(saved)
