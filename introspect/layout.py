"""Structures and bit-fields as declarations: one table drives decode, encode, dump, diff and the command line.

A register is a class whose attributes are masks, so code tests `cr0 & CR0.WP` and a reader sees the manual's table:

    class CR0(Bits):
        PE = bit(0)
        IOPL = bits(13, 12)

A structure is a `Structure` over `Field`s; it reads and writes any object with the buffer protocol, little-endian.
"""

import difflib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, TypeAlias

__all__ = ["Bits", "Buffer", "Field", "Structure", "UnknownField", "WritableBuffer", "bit", "bits"]

Buffer: TypeAlias = bytes | bytearray | memoryview
WritableBuffer: TypeAlias = bytearray | memoryview

_CODECS = {1: struct.Struct("<B"), 2: struct.Struct("<H"), 4: struct.Struct("<I"), 8: struct.Struct("<Q")}


def bit(position: int) -> int:
    """The mask of one bit."""
    return 1 << position


def bits(high: int, low: int) -> int:
    """The mask of bits high..low, both included, in the manual's order (31:16 is `bits(31, 16)`)."""
    return (1 << high + 1) - (1 << low)


class Bits:
    """Base of all bit-field tables: every public int attribute of a subclass is the mask of one field.

    A table that has another's fields and more is a subclass of that one.
    """

    fields: ClassVar[Mapping[str, int]] = {}
    defined: ClassVar[int] = 0
    meanings: ClassVar[Mapping[str, Mapping[int, str]]] = {}
    """Names of a field's values, where the manual gives some: {field: {value: name}}."""
    ones: ClassVar[int] = 0
    """Reserved bits that always read as one: not worth a word when set."""

    def __init_subclass__(cls) -> None:
        own = vars(cls).items()
        cls.fields = {
            **cls.fields, **{name: mask for name, mask in own if isinstance(mask, int) and name not in ("defined", "ones")}
        }  # fmt: skip
        cls.defined = cls.ones
        for mask in cls.fields.values():
            cls.defined |= mask

    @classmethod
    def get(cls, value: int, name: str) -> int:
        """The field `name` of `value`, shifted down to bit 0."""
        mask = cls.fields[name]
        return (value & mask) // (mask & -mask)

    @classmethod
    def make(cls, **values: int) -> int:
        """A register value with these fields set and all others 0; ValueError if one does not fit."""
        result = 0
        for name, value in values.items():
            mask = cls.fields[name]
            placed = value * (mask & -mask)
            if placed & ~mask:
                raise ValueError(f"{cls.__name__}.{name}: {value:#x} does not fit the {mask.bit_count()}-bit field")
            result |= placed
        return result

    @classmethod
    def names(cls, value: int) -> list[str]:
        """What is set: flags by name, wider fields as name=value, bits of no field as reserved=mask."""
        words = []
        for name, mask in cls.fields.items():
            if value & mask:
                if mask.bit_count() == 1:
                    words.append(name)
                else:
                    number = cls.get(value, name)
                    words.append(f"{name}={cls.meanings.get(name, {}).get(number, f'{number:#x}')}")
        if stray := value & ~cls.defined:
            words.append(f"reserved={stray:#x}")
        return words

    @classmethod
    def describe(cls, value: int) -> str:
        """`names(value)` as one line; empty for 0."""
        return " ".join(cls.names(value))


@dataclass(frozen=True, slots=True)
class Field:
    """One member of a structure; `offset` and `size` in bytes. `clean` is the VMCB clean bit that covers it, if any."""

    name: str
    offset: int
    size: int
    bits: type[Bits] | None = None
    group: str = ""
    clean: int | None = None
    short: str = ""
    """What people type instead of the name, where that is another word."""


class UnknownField(KeyError):
    """A field name that the structure does not have."""

    def __init__(self, structure: str, name: str, known: Iterable[str]) -> None:
        near = difflib.get_close_matches(name, list(known), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        self.text = f"{structure} has no field {name!r}{hint}"
        super().__init__(self.text)

    def __str__(self) -> str:  # KeyError would show the repr
        return self.text


class Structure:
    """A named, sized, little-endian table of fields."""

    def __init__(self, name: str, size: int, fields: Iterable[Field]) -> None:
        self.name = name
        self.size = size
        self.fields = {field.name: field for field in sorted(fields, key=lambda field: field.offset)}
        end = 0
        for field in self:
            if field.offset < end or field.offset + field.size > size:
                raise ValueError(f"{name}.{field.name} at {field.offset:#x} overlaps its neighbour or leaves {size:#x}")
            end = field.offset + field.size

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields.values())

    def __getitem__(self, name: str) -> Field:
        """The field; UnknownField (a KeyError) with near misses otherwise."""
        try:
            return self.fields[name]
        except KeyError:
            raise UnknownField(self.name, name, self.fields) from None

    def offset_of(self, name: str) -> int:
        """Bytes from the start of the structure."""
        return self[name].offset

    def size_of(self, name: str) -> int:
        """Bytes."""
        return self[name].size

    def read(self, buffer: Buffer, name: str) -> int:
        """The field's unsigned value. The buffer starts at the structure; struct.error if it is too short."""
        field = self[name]
        codec = _CODECS.get(field.size)
        if codec is None:
            return int.from_bytes(buffer[field.offset : field.offset + field.size], "little")
        value: int = codec.unpack_from(buffer, field.offset)[0]
        return value

    def write(self, buffer: WritableBuffer, name: str, value: int) -> None:
        """Store an unsigned value; ValueError if it does not fit the field."""
        field = self[name]
        if value < 0 or value >> 8 * field.size:
            raise ValueError(f"{self.name}.{name}: {value:#x} does not fit {field.size} bytes; pass an unsigned value")
        codec = _CODECS.get(field.size)
        if codec is None:
            buffer[field.offset : field.offset + field.size] = value.to_bytes(field.size, "little")
        else:
            codec.pack_into(buffer, field.offset, value)

    def decode(self, buffer: Buffer) -> dict[str, int]:
        """Every field by name, in order of offset."""
        return {name: self.read(buffer, name) for name in self.fields}

    def encode(self, values: Mapping[str, int]) -> bytearray:
        """A buffer of the whole structure with these fields set and all else 0."""
        buffer = bytearray(self.size)
        for name, value in values.items():
            self.write(buffer, name, value)
        return buffer

    def diff(self, old: Buffer, new: Buffer) -> dict[str, tuple[int, int]]:
        """The fields that differ: {name: (old value, new value)}."""
        pairs = ((name, self.read(old, name), self.read(new, name)) for name in self.fields)
        return {name: (before, after) for name, before, after in pairs if before != after}

    def describe(self, name: str, value: int) -> str:
        """The value in hexadecimal, then its flags by name where the field has any."""
        field = self[name]
        flags = field.bits.describe(value) if field.bits else ""
        return f"{value:#x} {flags}".rstrip()

    @cache  # noqa: B019 - structures are module constants and live for ever
    def codec(self, *names: str) -> "Codec":
        """A compiled reader of just these fields, for hot paths."""
        return Codec(self, names)


class Codec:
    """Unpacks a fixed choice of fields in one `struct` call. `unpack(buffer)` gives ints in the order of `names`."""

    def __init__(self, structure: Structure, names: tuple[str, ...]) -> None:
        fields = [structure[name] for name in names]
        if sorted(fields, key=lambda field: field.offset) != fields:
            raise ValueError(f"{structure.name}: name the fields of a codec in order of offset, not {names}")
        form, at = "<", 0
        for field in fields:
            form += f"{field.offset - at}x" + {1: "B", 2: "H", 4: "I", 8: "Q"}[field.size]
            at = field.offset + field.size
        self.names = names
        self.unpack = struct.Struct(form).unpack_from
