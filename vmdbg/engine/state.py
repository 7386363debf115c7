"""One CPU's state in the engine's own form: a `uc_context`, read and written in place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import layout

ES, CS, SS, DS, FS, GS, LDTR, TR, GDTR, IDTR = range(10)
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)

HF_INHIBIT_IRQ = 1 << 3
HF_CS32, HF_SS32, HF_ADDSEG, HF_PE = 1 << 4, 1 << 5, 1 << 6, 1 << 7
HF_LMA, HF_CS64 = 1 << 14, 1 << 15
HF_SVME, HF_GUEST, HF_OSFXSR, HF_SMAP, HF_IOBPT = 1 << 20, 1 << 21, 1 << 22, 1 << 23, 1 << 24
HF_AM, HF_XM, HF_LET = 1 << 27, 1 << 28, 1 << 29
"""Not the engine's: CR0.AM, an unmasked exception in MXCSR, and neither to be heeded (see attention.py)."""
HF2_GIF, HF2_NMI, HF2_NPT = 1 << 0, 1 << 2, 1 << 6

# The engine's segment flags are the high dword of a descriptor without the base: G D/B L AVL at 23:20, the rest at 15:8.
ATTRIB_DB, ATTRIB_L = 1 << 10, 1 << 9

CODE_BASE_KEPT = 1 << 0
"""In CS's flags, with a base of 0: 64-bit code ignores its base (APM2 4.8.1), which CS holds all the same, and the engine would
add.  It is kept in `layout.CODE_BASE`.  Flags of a descriptor have bits of the base there, which are 0 if that is."""

_Q_REGS = layout.REGS // 8
_Q_EIP = layout.EIP // 8
_Q_EFLAGS = layout.EFLAGS // 8
_I_HFLAGS = layout.HFLAGS // 4
_I_HFLAGS2 = layout.HFLAGS2 // 4
_I_SELECTOR = layout.SEGMENTS // 4
_Q_BASE = (layout.SEGMENTS + 8) // 8
_I_LIMIT = (layout.SEGMENTS + 16) // 4
_I_CS_FLAGS = (layout.SEGMENTS + 24 * CS + 20) // 4
_Q_CODE_BASE = layout.CODE_BASE // 8
_Q_CR = layout.CR // 8
_Q_EFER = layout.EFER // 8
_Q_DR = layout.DR // 8
_H_CR_READ = layout.INTERCEPT_CR_READ // 2

CR0_AM = 1 << 18
_AC = 1 << 18
MXCSR_MASKS, MXCSR_DEFAULT = 0x1F80, 0x1F80
MXCSR_RESERVED = 0xFFFF0000
MXCSR_ATTENTION = MXCSR_MASKS | MXCSR_RESERVED
"""Where an MXCSR differs from the default here, its load is ours."""

MSR_FIELDS = {
    "star": layout.STAR, "lstar": layout.LSTAR, "cstar": layout.CSTAR, "sfmask": layout.SFMASK,
    "kernel_gs_base": layout.KERNEL_GS_BASE, "tsc_aux": layout.TSC_AUX, "sysenter_esp": layout.SYSENTER_ESP,
    "sysenter_eip": layout.SYSENTER_EIP, "pat": layout.PAT, "vm_hsave": layout.VM_HSAVE,
    "fs.base": layout.SEGMENTS + FS * 24 + 8, "gs.base": layout.SEGMENTS + GS * 24 + 8,
}  # fmt: skip
"""64-bit fields of the context that MSRs name, by offset."""

HIDDEN_SWITCHED = 10


class CpuState:
    """Registers of one CPU.  Indices of `regs` are those of the instruction encoding (RAX RCX RDX RBX RSP ...)."""

    def __init__(self, uc: Any) -> None:
        self.context = uc.context_save()
        self.bytes = layout.context_bytes(self.context)
        self.q = self.bytes.cast("Q")
        self.i = self.bytes.cast("I")
        self.h = self.bytes.cast("H")
        address = ctypes.cast(self.context.context, ctypes.c_void_p).value
        assert address is not None
        self.address = address
        self.strict = False
        """Its translations are those of a strict TLB, which has intercepts of its own."""
        self.salt = 0
        """By which its code differs from that of others in a fingerprint."""
        self.cr_reads = 0
        """Control registers, a bit each, whose reads stop the engine because a debugger waits for them."""
        self.root: int | None = None
        """The engine's CR3 where it is another than software's: that of PDPTEs which are kept."""

    @contextmanager
    def rooted(self) -> Iterator[None]:
        """For a run of the engine: `root` in place of CR3, and a stop where software reads that."""
        q, h, root = self.q, self.h, self.root
        assert root is not None
        own, q[_Q_CR + 3], self.root = q[_Q_CR + 3], root, None
        reads = h[_H_CR_READ]
        h[_H_CR_READ] |= 1 << 3
        try:
            yield
        finally:
            h[_H_CR_READ] = reads
            if q[_Q_CR + 3] == root:  # else the engine has switched tasks, and with them CR3
                q[_Q_CR + 3], self.root = own, root

    def reg(self, number: int) -> int:
        return self.q[_Q_REGS + number]

    def set_reg(self, number: int, value: int) -> None:
        self.q[_Q_REGS + number] = value & 0xFFFFFFFFFFFFFFFF

    @property
    def rip(self) -> int:
        return self.q[_Q_EIP]

    @rip.setter
    def rip(self, value: int) -> None:
        self.q[_Q_EIP] = value & 0xFFFFFFFFFFFFFFFF

    def skip(self, length: int) -> None:
        """RIP moves on by an instruction's length, out of an interrupt shadow."""
        i, q = self.i, self.q
        flags = i[_I_HFLAGS]
        q[_Q_EIP] = q[_Q_EIP] + length & (0xFFFFFFFFFFFFFFFF if flags & HF_CS64 else 0xFFFFFFFF)
        i[_I_HFLAGS] = flags & ~HF_INHIBIT_IRQ

    @property
    def rflags(self) -> int:
        return self.q[_Q_EFLAGS] | 2

    @rflags.setter
    def rflags(self, value: int) -> None:
        # The engine keeps arithmetic flags apart while it runs, and takes them from here when it is entered.
        self.q[_Q_EFLAGS] = value | 2

    @property
    def hflags(self) -> int:
        return self.i[_I_HFLAGS]

    @hflags.setter
    def hflags(self, value: int) -> None:
        self.i[_I_HFLAGS] = value

    @property
    def cpl(self) -> int:
        return self.i[_I_HFLAGS] & 3

    def paging(self) -> tuple[int, int, int, int, int, bool]:
        """CR0, CR3, CR4, EFER, CPL and RFLAGS.AC: what decides about translations, at once."""
        q = self.q
        return (
            q[_Q_CR], q[_Q_CR + 3], q[_Q_CR + 4], q[_Q_EFER], self.i[_I_HFLAGS] & 3, bool(q[_Q_EFLAGS] & _AC)
        )  # fmt: skip

    @property
    def shadow(self) -> bool:
        """Interrupts are inhibited until the next instruction has run (STI, MOV SS; APM2 15.21.5)."""
        return bool(self.i[_I_HFLAGS] & HF_INHIBIT_IRQ)

    @shadow.setter
    def shadow(self, value: bool) -> None:
        flags = self.i[_I_HFLAGS] & ~HF_INHIBIT_IRQ
        self.i[_I_HFLAGS] = flags | HF_INHIBIT_IRQ if value else flags

    @property
    def gif(self) -> bool:
        """The global interrupt flag: the engine itself executes STGI and CLGI where they are not intercepted."""
        return bool(self.i[_I_HFLAGS2] & HF2_GIF)

    @gif.setter
    def gif(self, value: bool) -> None:
        flags = self.i[_I_HFLAGS2] & ~HF2_GIF
        self.i[_I_HFLAGS2] = flags | HF2_GIF if value else flags

    @property
    def nmi_blocked(self) -> bool:
        return bool(self.i[_I_HFLAGS2] & HF2_NMI)

    @nmi_blocked.setter
    def nmi_blocked(self, value: bool) -> None:
        flags = self.i[_I_HFLAGS2] & ~HF2_NMI
        self.i[_I_HFLAGS2] = flags | HF2_NMI if value else flags

    def cr(self, number: int) -> int:
        return self.q[_Q_CR + number]

    def set_cr(self, number: int, value: int) -> None:
        """Store a control register; `refresh` afterwards if it changes the mode."""
        self.q[_Q_CR + number] = value

    @property
    def efer(self) -> int:
        return self.q[_Q_EFER]

    @efer.setter
    def efer(self, value: int) -> None:
        self.q[_Q_EFER] = value

    def selector(self, segment: int) -> int:
        return self.i[_I_SELECTOR + 6 * segment] & 0xFFFF

    def base(self, segment: int) -> int:
        base = self.q[_Q_BASE + 3 * segment]
        if segment == CS and not base and self.i[_I_CS_FLAGS] & CODE_BASE_KEPT:
            return self.q[_Q_CODE_BASE]
        return base

    def limit(self, segment: int) -> int:
        return self.i[_I_LIMIT + 6 * segment]

    def attrib(self, segment: int) -> int:
        """Attributes in the VMCB's form: descriptor bits 47:40 and 55:52 packed (APM2 15.5.1)."""
        flags = self.i[_I_LIMIT + 6 * segment + 1]
        return (flags >> 8 & 0xFF) | (flags >> 12 & 0xF00)

    def set_segment(self, segment: int, selector: int, base: int, limit: int, attrib: int) -> None:
        """Load the hidden part of a segment register; `refresh` afterwards."""
        self.i[_I_SELECTOR + 6 * segment] = selector
        self.q[_Q_BASE + 3 * segment] = base
        self.i[_I_LIMIT + 6 * segment] = limit
        self.i[_I_LIMIT + 6 * segment + 1] = (attrib & 0xFF) << 8 | (attrib & 0xF00) << 12

    def set_table(self, table: int, base: int, limit: int) -> None:
        """Load GDTR or IDTR."""
        self.q[_Q_BASE + 3 * table] = base
        self.i[_I_LIMIT + 6 * table] = limit

    @property
    def error_code(self) -> int:
        return self.i[layout.ERROR_CODE // 4]

    @error_code.setter
    def error_code(self, value: int) -> None:
        self.i[layout.ERROR_CODE // 4] = value

    @property
    def is_long(self) -> bool:
        return bool(self.i[_I_HFLAGS] & HF_LMA)

    @property
    def is_code64(self) -> bool:
        return bool(self.i[_I_HFLAGS] & HF_CS64)

    @property
    def linear_rip(self) -> int:
        if self.i[_I_HFLAGS] & HF_CS64:
            return self.q[_Q_EIP]
        return (self.q[_Q_BASE + 3] + self.q[_Q_EIP]) & 0xFFFFFFFF

    def field(self, name: str) -> int:
        """A register that MSRs name: see MSR_FIELDS, and efer, sysenter_cs."""
        if name == "efer":
            return self.efer
        if name == "sysenter_cs":
            return self.i[layout.SYSENTER_CS // 4]
        return self.q[MSR_FIELDS[name] // 8]

    def set_field(self, name: str, value: int) -> None:
        if name == "efer":
            self.efer = value
        elif name == "sysenter_cs":
            self.i[layout.SYSENTER_CS // 4] = value & 0xFFFFFFFF
        else:
            self.q[MSR_FIELDS[name] // 8] = value & 0xFFFFFFFFFFFFFFFF

    def xmm(self, number: int) -> int:
        at = layout.XMM + 64 * number
        return int.from_bytes(self.bytes[at : at + 16], "little")

    def set_xmm(self, number: int, value: int) -> None:
        at = layout.XMM + 64 * number
        self.bytes[at : at + 16] = value.to_bytes(16, "little")

    @property
    def xcr0(self) -> int:
        return self.q[layout.XCR0 // 8]

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        self.q[layout.XCR0 // 8] = value

    @property
    def mxcsr(self) -> int:
        return self.i[layout.MXCSR // 4]

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        self.i[layout.MXCSR // 4] = value
        b = self.bytes
        b[layout.SSE_ROUNDING], b[layout.SSE_FTZ], b[layout.SSE_DAZ] = value >> 13 & 3, value >> 15 & 1, value >> 6 & 1
        self.heed()

    def heed(self) -> None:
        """Have the engine's mode flags follow MXCSR, and heed them."""
        flags = self.i[_I_HFLAGS] & ~(HF_XM | HF_LET)
        self.i[_I_HFLAGS] = flags if self.mxcsr & MXCSR_MASKS == MXCSR_MASKS else flags | HF_XM

    def refresh(self, cpl: int | None = None) -> None:
        """Derive the engine's mode flags from CR0, CR4, EFER, RFLAGS and the segments, as loading each would have.

        `cpl` None keeps the privilege level.  EFER.LMA follows CR0.PG and EFER.LME (APM2 14.6.1).
        """
        i, q = self.i, self.q
        cr0, cr4, efer = q[_Q_CR], q[_Q_CR + 4], q[_Q_EFER]
        old = i[_I_HFLAGS]
        flags = (old & (HF_INHIBIT_IRQ | HF_XM | HF_LET)) | HF_GUEST | HF_IOBPT | (old & 3 if cpl is None else cpl)
        flags |= (cr0 & 1) << 7 | (cr0 & 0xE) << 8
        if cr0 & CR0_AM:
            flags |= HF_AM
        if efer & 0x400:
            flags |= HF_LMA
        if efer & 0x1000:
            flags |= HF_SVME
        if cr4 & 0x200:
            flags |= HF_OSFXSR
        if cr4 & 0x200000:
            flags |= HF_SMAP
        cs_flags = i[_I_CS_FLAGS]
        if efer & 0x400 and cs_flags & (1 << 21):
            flags |= HF_CS32 | HF_SS32 | HF_CS64
            if q[_Q_BASE + 3 * CS]:
                q[_Q_CODE_BASE], q[_Q_BASE + 3 * CS] = q[_Q_BASE + 3 * CS], 0
                i[_I_CS_FLAGS] = cs_flags | CODE_BASE_KEPT
        else:
            if cs_flags & (1 << 22):
                flags |= HF_CS32
            if i[_I_LIMIT + 6 * SS + 1] & (1 << 22):
                flags |= HF_SS32
            bases = q[_Q_BASE + 3 * DS] | q[_Q_BASE + 3 * ES] | q[_Q_BASE + 3 * SS]
            if not cr0 & 1 or q[_Q_EFLAGS] & 0x20000 or not cs_flags & (1 << 22) or bases:
                flags |= HF_ADDSEG
        i[_I_HFLAGS] = flags
