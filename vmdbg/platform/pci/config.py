"""Configuration space of one function: bytes, and for each bit how software may write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from introspect.layout import Structure

SIZE = 4096
CONVENTIONAL = 256
"""What is reached by port 0xcf8, and all that a function without PCI Express has."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A register: its value after reset, the bits that software writes, and those it clears by writing ones (RW1C)."""

    value: int = 0
    writable: int = 0
    clears: int = 0


class ConfigSpace:
    """All that no rule names reads as zero and cannot be written."""

    def __init__(self) -> None:
        self.bytes = bytearray(SIZE)
        self._initial = bytearray(SIZE)
        self._writable = bytearray(SIZE)
        self._clears = bytearray(SIZE)

    def define(self, structure: Structure, rules: Mapping[str, Rule], base: int = 0) -> None:
        """Lay out the named fields of a structure at `base`."""
        for name, rule in rules.items():
            field = structure[name]
            self.define_at(base + field.offset, field.size, rule)

    def define_at(self, offset: int, size: int, rule: Rule) -> None:
        for target, value in (
            (self._initial, rule.value), (self.bytes, rule.value), (self._writable, rule.writable), (self._clears, rule.clears),
        ):  # fmt: skip
            target[offset : offset + size] = value.to_bytes(size, "little")

    def reset(self) -> None:
        self.bytes[:] = self._initial

    def get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """The device's own side: no rule applies."""
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Software's side."""
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            writable, clears = self._writable[at], self._clears[at] & byte
            self.bytes[at] = (self.bytes[at] & ~writable | byte & writable) & ~clears & 0xFF
