"""The state-save area of system-management mode, at SMBASE + FE00h (APM2 10.2.3, table 10-1)."""

from introspect.layout import Bits, Field, Structure, bit, bits
from introspect.registers import CR0, CR4, DR6, DR7, EFER, RFLAGS

__all__ = ["SMM_IO", "SMM_SAVE", "SMM_SAVE_OFFSET"]

SMM_SAVE_OFFSET = 0xFE00
"""Of the area from SMBASE."""


class SMM_IO(Bits):
    """The I/O instruction that an SMI followed (APM2 10.2.5)."""

    IN = bit(0)
    VALID = bit(1)
    STR = bit(2)
    REP = bit(3)
    SZ8 = bit(4)
    SZ16 = bit(5)
    SZ32 = bit(6)
    PORT = bits(31, 16)


class SVM_STATE(Bits):
    guest = bit(1)
    nested_paging = bit(2)


def _segment(name: str, offset: int) -> list[Field]:
    """A segment register; the attributes are bits 23:8 of the descriptor's upper half, without the limit in them."""
    return [
        Field(f"{name}.selector", offset, 2),
        Field(f"{name}.attrib", offset + 2, 2),
        Field(f"{name}.limit", offset + 4, 4),
        Field(f"{name}.base", offset + 8, 8),
    ]


def _table(name: str, offset: int) -> list[Field]:
    return [Field(f"{name}.limit", offset + 4, 2), Field(f"{name}.base", offset + 8, 8)]


SMM_SAVE = Structure("SMM save area", 0x200, [
    *(field for number, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs")) for field in _segment(name, 16 * number)),
    *_table("gdtr", 0x60),
    *_segment("ldtr", 0x70),
    *_table("idtr", 0x80),
    *_segment("tr", 0x90),
    Field("io_rip", 0x0A0, 8),
    Field("io_rcx", 0x0A8, 8),
    Field("io_rsi", 0x0B0, 8),
    Field("io_rdi", 0x0B8, 8),
    Field("io", 0x0C0, 4, SMM_IO),
    Field("io_restart", 0x0C8, 1),
    Field("auto_halt_restart", 0x0C9, 1),
    Field("efer", 0x0D0, 8, EFER),
    Field("svm_state", 0x0D8, 8, SVM_STATE),
    Field("vmcb", 0x0E0, 8),
    Field("v_intr", 0x0E8, 8),
    Field("revision", 0x0FC, 4),
    Field("smbase", 0x100, 4),
    Field("g_pat", 0x120, 8),
    Field("host_efer", 0x128, 8, EFER),
    Field("host_cr4", 0x130, 8, CR4),
    Field("n_cr3", 0x138, 8),
    Field("host_cr0", 0x140, 8, CR0),
    Field("cr4", 0x148, 8, CR4),
    Field("cr3", 0x150, 8),
    Field("cr0", 0x158, 8, CR0),
    Field("dr7", 0x160, 8, DR7),
    Field("dr6", 0x168, 8, DR6),
    Field("rflags", 0x170, 8, RFLAGS),
    Field("rip", 0x178, 8),
    *(Field(f"r{number}", 0x180 + 8 * (15 - number), 8) for number in range(8, 16)),
    *(Field(name, 0x1C0 + 8 * number, 8) for number, name in
      enumerate(("rdi", "rsi", "rbp", "rsp", "rbx", "rdx", "rcx", "rax"))),
])  # fmt: skip
