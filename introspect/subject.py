"""Who executes an instruction: the registers, the VMCB and the memory that decide what becomes of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from introspect.decode import Instruction, effective_address
from introspect.exits import exception_name
from introspect.intercepts import intercepted, words_of
from introspect.layout import Buffer
from introspect.paging import Access, Fault, Nested, PagingState, translate
from introspect.registers import ATTRIB, CR0, EFER, RFLAGS
from introspect.rules import SVM_FEATURES, Processor
from introspect.sources import Memory, Unreadable
from introspect.vmcb import MISC_CTL, MISC_CTL2, VMCB

__all__ = ["GENERAL", "NestedRefusal", "Raised", "Refused", "Subject", "Unknown", "mode_bits", "prefixes"]

GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
"""General registers in the order of their encoding."""
PF, GP = 14, 13


class Unknown(Exception):
    """Something that decides is not known: what it is, as "rcx"."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Raised(NamedTuple):
    """An exception that an instruction raises in place of what it is for; `address` is CR2 of a #PF."""

    vector: int
    error: int | None = None
    address: int | None = None

    def __str__(self) -> str:
        return exception_name(self.vector) + (f"({self.error:#x})" if self.error else "(0)" if self.error == 0 else "")


class NestedRefusal(Exception):
    """A nested page fault comes first: EXITINFO1 and 2."""

    def __init__(self, info1: int, info2: int) -> None:
        super().__init__(info1, info2)
        self.info1, self.info2 = info1, info2


@dataclass(frozen=True, slots=True)
class Subject:
    """An instruction of a guest: what it is, and what is known of who executes it.

    `registers` go by the names of the VMCB's fields, rcx to r15 and dr0 to dr3 besides; one that is missing is not known.
    `hwcr`, `monitor_armed` and `smm` may be among them.
    """

    vmcb: Buffer
    memory: Memory
    registers: Mapping[str, int]
    processor: Processor
    insn: Instruction
    code: bytes
    words: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", words_of(self.vmcb))

    def need(self, name: str) -> int:
        """A register.  Raises `Unknown`."""
        value = self.registers.get(name)
        if value is None:
            raise Unknown(name)
        return value

    def general(self, number: int) -> int:
        return self.need(GENERAL[number])

    def field(self, name: str) -> int:
        return VMCB.read(self.vmcb, name)

    def wants(self, code: int) -> bool:
        """Whether the intercept bit is set."""
        return intercepted(self.words, code)

    def has(self, feature: str) -> bool:
        """Whether the processor has a feature of SVM."""
        return bool(self.processor.features & SVM_FEATURES.fields[feature])

    @property
    def virtual_vmload(self) -> bool:
        """Whether VMLOAD and VMSAVE take guest-physical addresses (APM2 15.33.1).  A hypervisor in long mode is taken to have
        been in 64-bit mode at VMRUN."""
        asks = self.has("V_VMSAVE_VMLOAD") and self.field("misc_ctl2") & MISC_CTL2.v_vmload_vmsave
        return bool(asks and self.field("misc_ctl") & MISC_CTL.np_enable and self.processor.host_efer & EFER.LMA)

    @property
    def protected(self) -> bool:
        """Protected mode proper: neither real nor virtual-8086."""
        return bool(self.need("cr0") & CR0.PE) and not self.need("rflags") & RFLAGS.VM

    @property
    def cpl(self) -> int:
        """Real mode runs at 0, virtual-8086 mode at 3, whatever the VMCB says (APM2 15.5.1)."""
        if not self.need("cr0") & CR0.PE:
            return 0
        return 3 if self.need("rflags") & RFLAGS.VM else self.need("cpl") & 3

    @property
    def bits(self) -> int:
        return mode_bits(self.registers)

    @property
    def long_mode(self) -> bool:
        return bool(self.need("efer") & EFER.LMA)

    @property
    def moved(self) -> int:
        """The general register that a MOV to CR or DR reads."""
        value = self.general(self.insn.rm)
        return value if self.bits == 64 else value & 0xFFFFFFFF

    @property
    def locked(self) -> bool:
        return 0xF0 in self.code[: prefixes(self.code, self.bits)]

    @property
    def paging(self) -> PagingState:
        return PagingState(
            self.need("cr0"), self.need("cr3"), self.need("cr4"), self.need("efer"), self.cpl,
            bool(self.need("rflags") & RFLAGS.AC), self.processor.maxphyaddr,
        )  # fmt: skip

    @property
    def nested(self) -> Nested | None:
        processor = self.processor
        return Nested.from_vmcb(self.vmcb, processor.host_cr4, processor.host_efer, processor.maxphyaddr)

    def read(self, address: int, size: int) -> int:
        """Memory as the processor itself reads it.  Raises `Unknown`, `Refused` or `NestedRefusal`."""
        data = b""
        for at in range(address, address + size):
            access = Access(implicit_supervisor=True)
            found = translate(self.memory, self.paging, at & (1 << 64) - 1, access, self.nested, set_ad=False)
            if isinstance(found, Fault):
                if found.kind == "NPF":
                    raise NestedRefusal(found.code, found.address)
                raise Refused(Raised(PF, found.code, found.address) if found.kind == "PF" else Raised(GP, 0))
            try:
                data += self.memory.read(found.spa, 1)
            except Unreadable:
                raise Unknown(f"memory at spa {found.spa:#x}") from None
        return int.from_bytes(data, "little")

    def operand_linear(self) -> int:
        """Linear address of the memory operand, unchecked."""
        used = [self.registers.get(name) for name in GENERAL]
        values = [0 if value is None else value for value in used]
        following = self.need("rip") + self.insn.length
        segment, offset = effective_address(self.insn, values, following, self.bits)
        for number, value in enumerate(used):
            if value is None:
                other = list(values)
                other[number] = 0x1234_5678
                if effective_address(self.insn, other, following, self.bits)[1] != offset:
                    raise Unknown(GENERAL[number])
        name = ("es", "cs", "ss", "ds", "fs", "gs")[segment]
        if self.bits == 64:
            return offset + (self.need(f"{name}.base") if segment >= 4 else 0) & (1 << 64) - 1
        return offset + self.need(f"{name}.base") & 0xFFFFFFFF


class Refused(Exception):
    """An access of the processor itself raises an exception."""

    def __init__(self, raised: Raised) -> None:
        super().__init__(raised)
        self.raised = raised


def mode_bits(registers: Mapping[str, int]) -> int:
    """16, 32 or 64: the default size of the code segment."""
    attrib = registers.get("cs.attrib", 0)
    if registers.get("efer", 0) & EFER.LMA and attrib & ATTRIB.L:
        return 64
    protected = registers.get("cr0", 0) & CR0.PE and not registers.get("rflags", 0) & RFLAGS.VM
    return 32 if attrib & ATTRIB.DB and protected else 16


def prefixes(code: bytes, bits: int) -> int:
    """How many bytes of `code` are prefixes."""
    plain = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"
    at = 0
    while at < len(code) and (code[at] in plain or (bits == 64 and code[at] & 0xF0 == 0x40)):
        at += 1
    return at
