"""Register descriptions: one declarative list makes target.xml, the layout of `g` and the numbers of `p`.

Names and types are those GDB's i386 features require (GDB manual, appendix G.5.6); the system registers stand in the
core feature, where QEMU's users expect them. Fields are named as the AMD64 manual names them (APM2 3.1, APM1 4.2.2).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias
from xml.sax.saxutils import quoteattr

__all__ = ["Description", "Enum", "Feature", "Field", "Flags", "Register", "x86"]

MAX_ENUM = (1 << 31) - 1
"""GDB refuses a description with a larger value in an enum."""


@dataclass(frozen=True, slots=True)
class Enum:
    """A register type whose values have names; those beyond `MAX_ENUM` are left out, and shown as numbers."""

    id: str
    size: int
    values: Mapping[int, str]

    def xml(self) -> str:
        values = (
            f'<evalue name={quoteattr(name)} value="{value}"/>' for value, name in self.values.items() if value <= MAX_ENUM
        )
        return f'<enum id={quoteattr(self.id)} size="{self.size}">{"".join(values)}</enum>'


Field: TypeAlias = int | tuple[int, int] | tuple[int, int, Enum]
"""A bit, or the lowest and the highest bit of a field, whose values may have names."""


@dataclass(frozen=True, slots=True)
class Flags:
    """A register type of bit-fields, by name.  `size` is in bytes, as that of an enum."""

    id: str
    size: int
    fields: Mapping[str, Field]

    @property
    def enums(self) -> list[Enum]:
        """The types of its fields."""
        return [bits[2] for bits in self.fields.values() if isinstance(bits, tuple) and len(bits) == 3]

    def xml(self) -> str:
        out = [f'<flags id={quoteattr(self.id)} size="{self.size}">']
        for name, bits in self.fields.items():
            start, end = (bits[0], bits[1]) if isinstance(bits, tuple) else (bits, bits)
            kind = f" type={quoteattr(bits[2].id)}" if isinstance(bits, tuple) and len(bits) == 3 else ""
            out.append(f'<field name={quoteattr(name)} start="{start}" end="{end}"{kind}/>')
        return "".join([*out, "</flags>"])


@dataclass(frozen=True, slots=True)
class Register:
    """`type` is a predefined GDB type, or one the feature declares; `bits` a multiple of 8."""

    name: str
    bits: int
    type: str | Flags | Enum = "int"
    group: str = ""

    def xml(self) -> str:
        kind = self.type if isinstance(self.type, str) else self.type.id
        group = f" group={quoteattr(self.group)}" if self.group else ""
        return f'<reg name={quoteattr(self.name)} bitsize="{self.bits}" type={quoteattr(kind)}{group}/>'


@dataclass(frozen=True, slots=True)
class Feature:
    """Registers under one name. With `block` false they are not part of `g` and read one by one when asked for:
    right for registers that are many or dear. `types` is XML of further types."""

    name: str
    registers: tuple[Register, ...]
    block: bool = True
    types: str = ""

    def xml(self) -> str:
        kinds: dict[str, Flags | Enum] = {}  # an enum before the flags that use it
        for register in self.registers:
            if isinstance(kind := register.type, Flags):
                kinds |= {enum.id: enum for enum in kind.enums}
            if not isinstance(kind, str):
                kinds[kind.id] = kind
        body = [self.types, *(kind.xml() for kind in kinds.values()), *(r.xml() for r in self.registers)]
        return f"<feature name={quoteattr(self.name)}>{''.join(body)}</feature>"


@dataclass(frozen=True)
class Description:
    """The registers of an inferior, numbered in order.

    architecture
        As GDB names it: "i386:x86-64", "i386", "i8086".
    triple, pointer_size
        The same for lldb.
    pc
        Name of the program counter.
    expedite
        Names of block registers that every stop reply carries, so that clients need not ask.

    Raises ValueError if a name occurs twice, a width is not whole bytes, or a feature of the block follows one that
    is not.
    """

    architecture: str
    features: tuple[Feature, ...]
    triple: str
    pointer_size: int
    pc: str
    expedite: tuple[str, ...] = ()
    registers: tuple[Register, ...] = field(init=False, repr=False)
    numbers: Mapping[str, int] = field(init=False, repr=False)
    offsets: tuple[int, ...] = field(init=False, repr=False)
    expedited: tuple[tuple[int, int, int], ...] = field(init=False, repr=False)  # number, start and end in the block
    block_size: int = field(init=False)
    block_count: int = field(init=False)
    xml: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        registers = tuple(register for feature in self.features for register in feature.registers)
        if any(later.block and not earlier.block for earlier, later in pairwise(self.features)):
            raise ValueError("a feature of the block follows one that is not: put the features with block=False last")
        for register in registers:
            if register.bits <= 0 or register.bits % 8:
                raise ValueError(f"register {register.name} has {register.bits} bits: use a multiple of 8")
        numbers = {register.name: number for number, register in enumerate(registers)}
        if len(numbers) != len(registers):
            raise ValueError("two registers of one description have the same name: rename one")
        offsets = [0]
        for register in registers:
            offsets.append(offsets[-1] + register.bits // 8)
        count = sum(len(feature.registers) for feature in self.features if feature.block)
        xml = (
            '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">'
            f"<architecture>{self.architecture}</architecture>{''.join(f.xml() for f in self.features)}</target>"
        )
        derived = {
            "registers": registers,
            "numbers": numbers,
            "offsets": tuple(offsets[:-1]),
            "expedited": tuple((n, offsets[n], offsets[n + 1]) for n in (numbers[name] for name in self.expedite)),
            "block_size": offsets[count],
            "block_count": count,
            "xml": xml.replace("><", ">\n<").encode(),  # GDB copies it into trace files, whose lines it wants short
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def alike(self, other: "Description") -> bool:
        """Whether a client may read the block of one as that of the other."""
        count = self.block_count
        return (self.architecture, self.registers[:count]) == (other.architecture, other.registers[: other.block_count])

    def size(self, number: int) -> int:
        """Bytes of a register."""
        return self.registers[number].bits // 8


# fmt: off
_EFLAGS: dict[str, Field] = {
    "CF": 0, "PF": 2, "AF": 4, "ZF": 6, "SF": 7, "TF": 8, "IF": 9, "DF": 10, "OF": 11, "IOPL": (12, 13), "NT": 14,
    "RF": 16, "VM": 17, "AC": 18, "VIF": 19, "VIP": 20, "ID": 21,
}
_MXCSR: dict[str, Field] = {
    "IE": 0, "DE": 1, "ZE": 2, "OE": 3, "UE": 4, "PE": 5, "DAZ": 6, "IM": 7, "DM": 8, "ZM": 9, "OM": 10, "UM": 11,
    "PM": 12, "RC": (13, 14), "FZ": 15, "MM": 17,
}
_CR0 = {"PE": 0, "MP": 1, "EM": 2, "TS": 3, "ET": 4, "NE": 5, "WP": 16, "AM": 18, "NW": 29, "CD": 30, "PG": 31}
_CR4 = {
    "VME": 0, "PVI": 1, "TSD": 2, "DE": 3, "PSE": 4, "PAE": 5, "MCE": 6, "PGE": 7, "PCE": 8, "OSFXSR": 9,
    "OSXMMEXCPT": 10, "UMIP": 11, "LA57": 12, "FSGSBASE": 16, "PCIDE": 17, "OSXSAVE": 18, "SMEP": 20, "SMAP": 21,
    "PKE": 22, "CET": 23,
}
_EFER = {
    "SCE": 0, "LME": 8, "LMA": 10, "NXE": 11, "SVME": 12, "LMSLE": 13, "FFXSR": 14, "TCE": 15, "MCOMMIT": 17,
    "INTWB": 18, "UAIE": 20, "AIBRSE": 21,
}
# fmt: on

_VECTOR_TYPES = (
    '<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/>'
    '<vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/>'
    '<vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/>'
    '<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>'
    '<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/>'
    '<field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union>'
)


def x86(architecture: str = "i386:x86-64", extra: Iterable[Feature] = ()) -> Description:
    """The description of an "i386:x86-64", "i386" or "i8086" inferior; `extra` features follow (say, VMCB fields).

    i8086 has the registers of i386: GDB then disassembles 16-bit code. It has no notion of segments, so the target
    gives eip, and takes breakpoints, as linear addresses (CS base + IP).
    """
    wide = architecture == "i386:x86-64"
    if not wide and architecture not in ("i386", "i8086"):
        raise ValueError(f"no description of architecture {architecture!r}: use i386:x86-64, i386 or i8086")
    bits = 64 if wide else 32
    integer, letter = f"int{bits}", "r" if wide else "e"
    if wide:
        order = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16))]
    else:
        order = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"]
    stack = {letter + "sp", letter + "bp"}
    flags = "x64" if wide else "i386"
    core = (
        *(Register(name, bits, "data_ptr" if name in stack else integer, "general") for name in order),
        Register(letter + "ip", bits, "code_ptr", "general"),
        Register("eflags", 32, Flags("i386_eflags", 4, _EFLAGS), "general"),
        *(Register(name, 32, "int32", "general") for name in ("cs", "ss", "ds", "es", "fs", "gs")),
        *(Register(name, bits, integer, "system") for name in ("fs_base", "gs_base", "k_gs_base")),
        Register("cr0", bits, Flags(flags + "_cr0", bits // 8, _CR0), "system"),
        Register("cr2", bits, integer, "system"),
        Register("cr3", bits, Flags(flags + "_cr3", bits // 8, {"PWT": 3, "PCD": 4, "PDBR": (12, bits - 1)}), "system"),
        Register("cr4", bits, Flags(flags + "_cr4", bits // 8, _CR4), "system"),
        Register("cr8", bits, Flags(flags + "_cr8", bits // 8, {"TPR": (0, 3)}), "system"),
        Register("efer", 64, Flags("x64_efer", 8, _EFER), "system"),
        *(Register(f"st{n}", 80, "i387_ext", "float") for n in range(8)),
        *(Register(name, 32, "int", "float") for name in ("fctrl", "fstat", "ftag", "fiseg")),
        *(Register(name, 32, "int", "float") for name in ("fioff", "foseg", "fooff", "fop")),
    )
    sse = (
        *(Register(f"xmm{n}", 128, "vec128", "vector") for n in range(16 if wide else 8)),
        Register("mxcsr", 32, Flags("i386_mxcsr", 4, _MXCSR), "vector"),
    )
    return Description(
        architecture=architecture,
        features=(
            Feature("org.gnu.gdb.i386.core", core),
            Feature("org.gnu.gdb.i386.sse", sse, types=_VECTOR_TYPES),
            *extra,
        ),
        triple="x86_64-unknown-unknown" if wide else "i386-unknown-unknown",
        pointer_size=bits // 8,
        pc=letter + "ip",
        expedite=(letter + "ip", letter + "sp", letter + "bp"),
    )
