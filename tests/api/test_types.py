# SPDX-License-Identifier: GPL-2.0-or-later
"""Arguments of wrong types: one line that names the value, what it is, and what to give, whatever is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vmdbg
from tests.api.conftest import BUILD, IMAGE
from vmdbg import Machine
from vmdbg.api import options
from vmdbg.api.errors import WrongType

NOT_HERE = frozenset(("close", "on", "save", "snapshot_save", "save_core", "dump", "load", "restart"))
"""What would end the machine, or writes files by names that make sense."""
BUILT_IN = (list, int, MutableMapping)
"""What these have of Python is Python's."""


class Odd:
    """Nothing that anybody expects."""

    def __repr__(self) -> str:
        return "an odd\nthing"


WRONG = st.sampled_from(
    [None, True, 1.5, float("nan"), b"bytes", "", "text", "\0", -1, 1 << 70, 3j, [], [1], (None,), {1: 2}, {"a"}, set(), Odd(), Odd,
     len, range(3), slice(1), memoryview(b"x"), object()]
)  # fmt: skip


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    if not IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    with Machine(IMAGE, memory="64M", symbols={2: BUILD / "guest64.elf"}, fingerprint=True) as made:
        made.run(until="2:tick")
        yield made


def objects(machine: Machine) -> list[object]:
    guest = machine.guest(2)
    return [
        machine, machine.commands, machine.host, guest, machine.guests, guest.registers, guest.vmcb, machine.thread,
        machine.breakpoint("2:work"), machine.watch("2:counter"), machine.catch("vmexit npf"), machine.snapshot(),
        machine.record(), guest.vmcb.v_intr, machine.exits(),
    ]  # fmt: skip


def methods(one: object) -> Iterator[tuple[str, Callable[..., object]]]:
    """What may be called of an object, items and settable properties included."""
    for name in dir(type(one)):
        dunder = name in ("__getitem__", "__setitem__", "__contains__")
        inherited = any(isinstance(one, base) and getattr(type(one), name) is getattr(base, name, None) for base in BUILT_IN)
        if name in NOT_HERE or inherited or (name.startswith("_") and not dunder):
            continue
        member = inspect.getattr_static(type(one), name)
        if isinstance(member, property) and member.fset is not None:
            yield f"{name} =", partial(setattr, one, name)
        elif inspect.isfunction(member):
            yield name, getattr(one, name)


def arguments(data: st.DataObject, call: Callable[..., object]) -> tuple[list[object], dict[str, object]]:
    """One for each that it must have, and for some that it may have."""
    if isinstance(call, partial):
        return [data.draw(WRONG)], {}
    positional, named = [], {}
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is parameter.empty:
            positional.append(data.draw(WRONG))
        elif data.draw(st.booleans()):
            named[parameter.name] = data.draw(WRONG)
    return positional, named


class Calls(list[tuple[str, str, Callable[..., object]]]):
    """Class, name and what may be called."""

    def __repr__(self) -> str:
        return f"{len(self)} calls"


@pytest.fixture(scope="module")
def calls(machine: Machine) -> Calls:
    return Calls((type(one).__name__, name, call) for one in objects(machine) for name, call in methods(one))


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_wrong_argument_is_an_error_of_ours(
    data: st.DataObject, machine: Machine, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Or it means something: then nothing is said against it."""
    monkeypatch.chdir(tmp_path)
    kind, name, call = data.draw(st.sampled_from(calls))
    positional, named = arguments(data, call)
    kept = machine.snapshot()
    ours = (vmdbg.Error, KeyError) if (kind, name) == ("Registers", "__getitem__") else vmdbg.Error  # as of any mapping
    said = ""
    try:
        call(*positional, **named)
    except ours as error:
        said = str(error)
    finally:
        assert "\n" not in said
        if machine.time != kept.time:
            machine.restore(kept)
        for points in (machine.breakpoints, machine.watchpoints, machine.catchpoints):
            for point in points[1:]:
                point.delete()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(options.actions())), value=WRONG)
def test_any_wrong_option_is_an_error_of_ours(name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(vmdbg.Error) as caught:
        Machine.with_options("/nonexistent", {name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image", [5, b"image", 1.5, [], Odd(), object()])
def test_an_image_of_a_wrong_type(image: Any) -> None:
    with pytest.raises(vmdbg.OptionError, match=r"image=.* give the name of a file, or a path"):
        Machine(image)


def test_what_is_said(machine: Machine) -> None:
    """It is a TypeError, too."""
    guest: Any = machine.guest(2)
    anyhow: Any = machine
    cases: dict[Callable[[], object], str] = {
        lambda: guest.read(b"counter", 4): "address=b'counter': it is a bytes; give an int or a str",
        lambda: guest.read("counter", "4"): "length='4': it is a str; give an int",
        lambda: guest.write("counter", "abc"): "data='abc': it is a str; give a bytes",
        lambda: guest.registers.__setitem__("rax", 1.5): "value=1.5: it is a float; give an int",
        lambda: setattr(guest.vmcb, "guest_asid", "1"): "value='1': it is a str; give an int",
        lambda: anyhow.run(ticks=1.5): "ticks=1.5: it is a float; give an int or None",
        lambda: anyhow.watch("2:counter", 8): "access=8: it is an int; give 'w' or 'r' or 'a' or 'rw'",
        lambda: anyhow.exits(where=Odd()): "where=an odd thing: it is an Odd; give a function or None",
    }
    for use, words in cases.items():
        with pytest.raises(WrongType) as caught:
            use()
        assert str(caught.value) == words
        assert isinstance(caught.value, vmdbg.CommandFailed)
        assert isinstance(caught.value, TypeError)


def test_what_is_close_enough_is_taken(machine: Machine) -> None:
    guest: Any = machine.guest(2)
    kept = guest.read("counter", 8)
    for data in (bytearray(kept), memoryview(kept)):
        guest.write("counter", data)
    assert guest.read(guest.vmcb.rip * 0 + guest.address_of("counter"), True) == kept[:1]
    assert 5 not in guest.registers
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        guest.finish(1)
