"""Every structure and every register that introspect declares is read as it is written, field by field."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import introspect
from introspect.layout import Bits, Structure

MODULES = [import_module(found.name) for found in pkgutil.walk_packages(introspect.__path__, "introspect.")]


def _registers(base: type[Bits] = Bits) -> Iterator[type[Bits]]:
    for made in base.__subclasses__():
        if made.__module__.startswith("introspect."):
            yield made
        yield from _registers(made)


STRUCTURES = {name: one for module in MODULES for name, one in vars(module).items() if isinstance(one, Structure)}
REGISTERS = sorted(set(_registers()), key=lambda one: f"{one.__module__}.{one.__qualname__}")


def test_none_is_forgotten() -> None:
    """What the modules' sources declare is what was found."""
    sources = [Path(module.__file__ or "") for module in MODULES if module.__name__ != "introspect.layout"]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    assert sum(text.count("Structure(") for text in texts) == len(STRUCTURES) > 4
    assert sum(text.count("(Bits):") for text in texts) <= len(REGISTERS)


@pytest.mark.parametrize("name", STRUCTURES)
@given(data=st.data())
def test_a_structure(name: str, data: st.DataObject) -> None:
    structure = STRUCTURES[name]
    contents = bytearray(Random(data.draw(st.integers(0, 1 << 64))).randbytes(structure.size))
    values = structure.decode(contents)
    assert list(values) == [field.name for field in structure]
    written = structure.encode(values)
    for field in structure:
        own = slice(field.offset, field.offset + field.size)
        assert written[own] == contents[own]
        assert structure.read(contents, field.name) == values[field.name] == int.from_bytes(contents[own], "little")
    assert structure.decode(written) == values
    assert structure.diff(contents, written) == {}


@pytest.mark.parametrize("name", STRUCTURES)
@given(data=st.data())
def test_a_field_is_written_alone(name: str, data: st.DataObject) -> None:
    structure = STRUCTURES[name]
    field = data.draw(st.sampled_from(list(structure)))
    value = data.draw(st.integers(0, (1 << 8 * field.size) - 1))
    written = structure.encode({})
    structure.write(written, field.name, value)
    assert structure.diff(structure.encode({}), written) == ({field.name: (0, value)} if value else {})
    assert structure.describe(field.name, value).startswith(f"{value:#x}")


@pytest.mark.parametrize("register", REGISTERS, ids=lambda register: f"{register.__module__}.{register.__qualname__}")
@given(data=st.data())
def test_a_register(register: type[Bits], data: st.DataObject) -> None:
    value = data.draw(st.integers(0, (1 << max(64, register.defined.bit_length())) - 1))
    fields = {name: register.get(value, name) for name in register.fields}
    made = 0
    for name, number in fields.items():
        one = register.make(**{name: number})
        assert one == value & register.fields[name]
        assert register.get(one, name) == number
        made |= one
    assert made | (value & register.ones) == value & register.defined
    if "describe" not in vars(register) and "names" not in vars(register):  # else it says itself what it leaves out
        assert register.describe(value).count("reserved=") == bool(value & ~register.defined)


@pytest.mark.parametrize("register", REGISTERS, ids=lambda register: f"{register.__module__}.{register.__qualname__}")
def test_fields_are_whole_and_named_values_fit(register: type[Bits]) -> None:
    for name, mask in register.fields.items():
        assert mask // (mask & -mask) == (1 << mask.bit_count()) - 1, f"{name} has a hole"
    for name, meanings in register.meanings.items():
        assert max(meanings) < 1 << register.fields[name].bit_count()
