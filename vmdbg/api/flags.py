# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers that know their bits."""

from __future__ import annotations

from abc import ABC, abstractmethod

from introspect.exits import ExitCode
from introspect.layout import Bits
from introspect.vmcb import NAMES
from vmdbg.api.checked import checked

__all__ = ["Fields", "Value"]

_CODES = {member.value: member for member in ExitCode}


class Value(int):
    """A field's value: a number whose bit fields, where it has some, are attributes: `vmcb.v_intr.v_tpr`."""

    _bits: type[Bits] | None

    def __new__(cls, number: int, bits: type[Bits] | None = None) -> Value:
        made = super().__new__(cls, number)
        made._bits = bits
        return made

    def __getattr__(self, name: str) -> int:
        if name.startswith("_") or self._bits is None or name not in self._bits.fields:
            known = ", ".join(self._bits.fields) if self._bits is not None else "none"
            raise AttributeError(f"{name}: no bit of this name; there are {known}")
        return self._bits.get(self, name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(self._bits.fields if self._bits is not None else ())]

    @property
    def names(self) -> list[str]:
        """What is set, in words; empty where it has no bit fields."""
        return self._bits.names(self) if self._bits is not None else []

    def __repr__(self) -> str:
        words = " ".join(self.names)
        return f"{int(self):#x}{f' ({words})' if words else ''}"

    def __str__(self) -> str:
        return int.__repr__(self)


@checked
class Fields(ABC):
    """Named numbers that are read when they are asked for.  A name that is none cannot be set, either."""

    __slots__ = ()

    @abstractmethod
    def read(self, name: str) -> int:
        """The value of a field by its name. `Error` where there is none."""

    @abstractmethod
    def write(self, name: str, value: int) -> None:
        """Set a field in memory. `Error` where it does not fit, or would be lost."""

    def _get(self, name: str) -> Value:
        return Value(self.read(name), NAMES[name].bits)

    def _code(self, name: str) -> ExitCode | int:
        code = self.read(name)
        return _CODES.get(code, code)

    def __getitem__(self, name: str) -> Value:
        field = NAMES.get(name)
        return Value(self.read(name), field.bits if field is not None else None)

    def __setitem__(self, name: str, value: int) -> None:
        self.write(name, value)
