"""Descriptor tables and task state segments (APM2 4.7, 4.8, 12.2): what their bytes say, in every mode."""

from collections.abc import Iterator
from typing import NamedTuple

from introspect.layout import Bits, Field, Structure, bit, bits
from introspect.registers import ATTRIB, describe_segment

__all__ = [
    "GATE", "SEGMENT", "TSS16", "TSS32", "TSS64", "Descriptor", "Vector", "decode", "io_ports", "table", "task_state", "vectors",
]  # fmt: skip


class SEGMENT(Bits):
    """A segment descriptor, or that of a TSS or LDT. In long mode the latter have 16 bytes, and `base_upper`."""

    limit_low = bits(15, 0)
    base_low = bits(39, 16)
    type = bits(43, 40)
    S = bit(44)
    DPL = bits(46, 45)
    P = bit(47)
    limit_high = bits(51, 48)
    AVL = bit(52)
    L = bit(53)
    DB = bit(54)
    G = bit(55)
    base_high = bits(63, 56)
    base_upper = bits(95, 64)


class GATE(Bits):
    """A gate descriptor. Call gates of legacy mode have a `count` of parameters, interrupt and trap gates of long mode an `ist`;
    in long mode all have 16 bytes, and `offset_upper`."""

    offset_low = bits(15, 0)
    selector = bits(31, 16)
    ist = bits(34, 32)
    count = bits(36, 32)
    type = bits(43, 40)
    S = bit(44)
    DPL = bits(46, 45)
    P = bit(47)
    offset_high = bits(63, 48)
    offset_upper = bits(95, 64)


class _System(NamedTuple):
    name: str
    kind: str
    """table (of an LDT), tss, gate."""
    bits: int
    long: bool
    """Whether long mode has it, too."""


_SYSTEM = {
    1: _System("16-bit TSS", "tss", 16, False), 2: _System("LDT", "table", 0, True),
    3: _System("16-bit busy TSS", "tss", 16, False), 4: _System("16-bit call gate", "gate", 16, False),
    5: _System("task gate", "gate", 0, False), 6: _System("16-bit interrupt gate", "gate", 16, False),
    7: _System("16-bit trap gate", "gate", 16, False), 9: _System("TSS", "tss", 32, True),
    11: _System("busy TSS", "tss", 32, True), 12: _System("call gate", "gate", 32, True),
    14: _System("interrupt gate", "gate", 32, True), 15: _System("trap gate", "gate", 32, True),
}  # fmt: skip
"""System descriptors by type (APM2 tables 4-5 and 4-6)."""


class Descriptor(NamedTuple):
    """One descriptor. What it has none of is None."""

    raw: int
    size: int
    """Bytes that it takes: 8, or 16."""
    name: str
    """"64-bit code rx", "interrupt gate", "null", "reserved type 0"."""
    present: bool
    dpl: int
    base: int | None = None
    limit: int | None = None
    """In bytes, granularity applied."""
    selector: int | None = None
    """Of a gate's target."""
    offset: int | None = None
    ist: int | None = None
    parameters: int | None = None
    """That a call gate copies."""


def decode(raw: int, long: bool) -> Descriptor:
    """A descriptor of `raw`'s 16 bytes, of which all but those of long mode's system segments use 8."""
    low = raw & (1 << 64) - 1
    present, dpl = bool(low & SEGMENT.P), SEGMENT.get(low, "DPL")
    if not low:
        return Descriptor(low, 8, "null", False, 0)
    kind = SEGMENT.get(low, "type")
    if low & SEGMENT.S:
        base = SEGMENT.get(low, "base_low") | SEGMENT.get(low, "base_high") << 24
        words = describe_segment(_attrib(low) | ATTRIB.P)
        name = words.partition(", DPL")[0]
        flat = long and kind & 8 and low & SEGMENT.L
        return Descriptor(low, 8, name, present, dpl, None if flat else base, None if flat else _limit(low))
    system = _SYSTEM.get(kind)
    if system is None or (long and not system.long):
        return Descriptor(low, 8, f"reserved type {kind}", present, dpl)
    size = 16 if long else 8
    whole = raw if long else low
    if system.kind != "gate":
        base = SEGMENT.get(whole, "base_low") | SEGMENT.get(whole, "base_high") << 24 | SEGMENT.get(whole, "base_upper") << 32
        return Descriptor(whole, size, f"64-bit {system.name}" if long and system.kind == "tss" else system.name, present, dpl,
                          base, _limit(low))  # fmt: skip
    offset = GATE.get(whole, "offset_low")
    if system.bits == 32:
        offset |= GATE.get(whole, "offset_high") << 16 | GATE.get(whole, "offset_upper") << 32
    call = kind & 7 == 4
    return Descriptor(
        whole, size, system.name, present, dpl, None, None, GATE.get(whole, "selector"), None if kind == 5 else offset,
        GATE.get(whole, "ist") if long and not call else None, GATE.get(whole, "count") if call and not long else None,
    )  # fmt: skip


def _attrib(low: int) -> int:
    """The packed form that VMCBs have."""
    return low >> 40 & 0xFF | low >> 44 & 0xF00


def _limit(low: int) -> int:
    limit = SEGMENT.get(low, "limit_low") | SEGMENT.get(low, "limit_high") << 16
    return limit << 12 | 0xFFF if low & SEGMENT.G else limit


def table(data: bytes, long: bool) -> Iterator[tuple[int, Descriptor]]:
    """(offset, descriptor) of a GDT or LDT, of all that are not null. One that the table's end cuts is left out."""
    at = 0
    while at + 8 <= len(data):
        found = decode(int.from_bytes(data[at : at + 16], "little"), long)
        if at + found.size > len(data):
            return
        if found.raw:
            yield at, found
        at += found.size


class Vector(NamedTuple):
    """One vector of an interrupt table; `descriptor` is None in real mode."""

    number: int
    selector: int
    offset: int | None
    descriptor: Descriptor | None


def vectors(data: bytes, long: bool, real: bool) -> Iterator[Vector]:
    """Those of an IDT, or of real mode's interrupt vector table, that are not zero."""
    size = 4 if real else 16 if long else 8
    for number in range(min(len(data) // size, 256)):
        raw = int.from_bytes(data[number * size : (number + 1) * size], "little")
        if not raw:
            continue
        if real:
            yield Vector(number, raw >> 16, raw & 0xFFFF, None)
            continue
        found = decode(raw, long)
        yield Vector(number, found.selector or 0, found.offset, found)


def _fields(names: str, size: int, start: int, stride: int = 0, group: str = "") -> list[Field]:
    return [Field(name, start + n * (stride or size), size, None, group) for n, name in enumerate(names.split())]


TSS64 = Structure("TSS", 0x68, [
    *_fields("rsp0 rsp1 rsp2", 8, 0x04, group="stacks"), *_fields("ist1 ist2 ist3 ist4 ist5 ist6 ist7", 8, 0x24, group="stacks"),
    *_fields("iopb", 2, 0x66),
])  # fmt: skip
"""Long mode's (APM2 12.2.5). `iopb` is the offset of the I/O permission bitmap."""

TSS32 = Structure("TSS", 0x68, [
    *_fields("link", 2, 0x00), *_fields("esp0 esp1 esp2", 4, 0x04, 8, "stacks"), *_fields("ss0 ss1 ss2", 2, 0x08, 8, "stacks"),
    *_fields("cr3 eip eflags eax ecx edx ebx esp ebp esi edi", 4, 0x1C, group="task"),
    *_fields("es cs ss ds fs gs ldtr", 2, 0x48, 4, "task"), *_fields("trap iopb", 2, 0x64),
])  # fmt: skip
"""Legacy mode's (APM2 12.2.4)."""

TSS16 = Structure("16-bit TSS", 0x2C, [
    *_fields("link", 2, 0x00), *_fields("sp0 sp1 sp2", 2, 0x02, 4, "stacks"), *_fields("ss0 ss1 ss2", 2, 0x04, 4, "stacks"),
    *_fields("ip flags ax cx dx bx sp bp si di es cs ss ds ldtr", 2, 0x0E, group="task"),
])  # fmt: skip


def task_state(attrib: int, long: bool) -> Structure:
    """The layout of the TSS that TR with these attributes names."""
    if long:
        return TSS64
    return TSS32 if attrib & ATTRIB.TYPE & 8 else TSS16


def io_ports(bitmap: bytes) -> list[tuple[int, int]]:
    """Ports that an I/O permission bitmap lets through, first..last: its clear bits. What lies behind its end is not."""
    found: list[tuple[int, int]] = []
    for at, byte in enumerate(bitmap[:0x2000]):
        if byte == 0xFF:
            continue
        for port in (8 * at + n for n in range(8) if not byte >> n & 1):
            if found and found[-1][1] == port - 1:
                found[-1] = found[-1][0], port
            else:
                found.append((port, port))
    return found
