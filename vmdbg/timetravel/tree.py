# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine state as a tree of plain values, and back: no code comes out of a tree, whatever it says.

A tree is None, a bool, an int, a str, bytes, or a list whose first element names what the rest is:

| list | for |
| --- | --- |
| `"list"`, `"tuple"`, `"deque"`, `"set"`, `"frozenset"`, items | these; a set's sorted |
| `"dict"`, key, value, key, value ... | a dict or a Counter, in its order |
| `"bytearray"`, bytes | |
| `"number"`, class, value | a member of an enumeration, or an int of a class of its own |
| `"part"`, number | a part of the machine: an object that is there from the start (inventory.py) |
| `"new"`, class, trees of its fields | an object that comes and goes |
| `"ref"`, number | the same object again, if it is one that changes: its place among those |
| `"method"`, tree, name; `"partial"`, tree, arguments; `"function"`, name | a callback, of those that may wait |
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, TypeAlias

from .shapes import Shape, printable, shown

if TYPE_CHECKING:
    from vmdbg.machine import Machine

Tree: TypeAlias = "bool | int | str | bytes | list[Tree] | None"

_PLAIN = frozenset((type(None), bool, int, str, bytes))


class SnapshotError(Exception):
    """A snapshot that cannot be taken, kept or used: one line with what, why and the remedy, whatever the file says."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class Malformed(Exception):
    """A tree that says nothing a machine can be in."""


class Unlisted(Exception):
    """Something in the machine that the inventory does not know: a defect of vmdbg, which tests/timetravel finds."""


@dataclass(frozen=True, slots=True)
class Form:
    """How objects of a class that come and go are kept.

    `fields`: names of the attributes that are.  `save` and `load` take their place where an object is more than these; `load` is
    given the trees that `save` made.
    """

    cls: type
    fields: tuple[str, ...] = ()
    save: Callable[[Saver, Any], list[Tree]] | None = None
    load: Callable[[Loader, Sequence[Tree]], object] | None = None
    shared: bool = True
    """It matters whether two are the same object, since they change.  `load` tells the loader of it (`made`)."""


@dataclass(frozen=True, slots=True)
class Names:
    """What trees may name."""

    forms: Mapping[str, Form]
    numbers: Mapping[str, type]
    functions: Mapping[str, FunctionType]
    callbacks: Mapping[type, frozenset[str]]
    """Methods that may be waited for, by the class that has them."""
    shapes: Callable[[type], Mapping[str, Shape]]
    """What the fields of an object may hold, by its class."""

    def may_call(self, owner: object, name: str) -> bool:
        return any(name in self.callbacks.get(cls, ()) for cls in type(owner).__mro__)


MOST_CONTAINERS, MOST_VALUES = 1 << 21, 1 << 23
"""Of a state, as text: about what 64 MiB of a real one have.  A text that is packed to little could have ten times as many."""


def parsed(text: str, share: int = 1) -> Any:
    """JSON.  `Malformed` if it has more in it than a state, or the `share`th part of that."""
    if (text.count("[") + text.count("{")) * share > MOST_CONTAINERS or text.count(",") * share > MOST_VALUES:
        raise Malformed("it has more state than any machine")
    return json.loads(text)


class Saver:
    """Makes trees.  Objects that it has seen must live as long as it does."""

    def __init__(self, names: Names, parts: Sequence[object]) -> None:
        self.names = names
        self._parts = {id(part): number for number, part in enumerate(parts)}
        self._seen: dict[int, int] = {}
        self._forms = {form.cls: (name, form) for name, form in names.forms.items()}
        self._functions = {function: name for name, function in names.functions.items()}

    def tree(self, value: Any) -> Tree:
        cls = type(value)
        if cls in _PLAIN:
            plain: Tree = value
            return plain
        number = self._parts.get(id(value))
        if number is not None:
            return ["part", number]
        if cls is list or cls is tuple or cls is deque:
            return [cls.__name__, *map(self.tree, value)]
        if cls is dict or cls is Counter:
            return ["dict", *(self.tree(one) for pair in value.items() for one in pair)]
        if cls is set or cls is frozenset:
            return [cls.__name__, *sorted(map(self.tree, value), key=repr)]
        if cls is bytearray:
            return ["bytearray", bytes(value)]
        if self.names.numbers.get(cls.__qualname__) is cls:
            return ["number", cls.__qualname__, self.tree(value.value if isinstance(value, Enum) else int(value))]
        if cls in self._forms:
            return self._object(value, *self._forms[cls])
        if isinstance(value, MethodType | partial | FunctionType):
            return self._callback(value)
        raise Unlisted(f"class {cls.__module__}.{cls.__qualname__}")

    def _object(self, value: Any, name: str, form: Form) -> Tree:
        if form.shared:
            known = self._seen.get(id(value))
            if known is not None:
                return ["ref", known]
            self._seen[id(value)] = len(self._seen)
        if form.save is not None:
            return ["new", name, *form.save(self, value)]
        return ["new", name, *(self.tree(getattr(value, field)) for field in form.fields)]

    def _callback(self, value: MethodType | partial[object] | FunctionType) -> Tree:
        if isinstance(value, partial):
            if value.keywords:
                raise Unlisted(f"{value}: a callback with named arguments")
            return ["partial", self.tree(value.func), *map(self.tree, value.args)]
        if isinstance(value, MethodType):
            if self.names.may_call(value.__self__, value.__name__):
                return ["method", self.tree(value.__self__), value.__name__]
        elif value in self._functions:
            return ["function", self._functions[value]]
        raise Unlisted(f"callback {value.__qualname__}")


class Loader:
    """Makes values of trees; `Malformed` for what is none."""

    def __init__(self, names: Names, parts: Sequence[object], machine: Machine) -> None:
        self.names = names
        self.parts = parts
        self.machine = machine
        self._made: list[object] = []

    def value(self, tree: Tree) -> Any:
        if not isinstance(tree, list):
            return tree
        if not tree or not isinstance(tree[0], str):
            raise Malformed("a list that does not say what it is")
        make = _MAKERS.get(tree[0])
        if make is None:
            raise Malformed(f"{shown(tree[0])} is no kind of value")
        try:
            return make(self, *tree[1:])
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            raise Malformed(f"{tree[0]} {shown(tree[1:2])}: {error}") from None

    def made(self, value: object) -> None:
        """To be told of each object before what is in it is asked for."""
        self._made.append(value)

    def _values(self, trees: Sequence[Tree]) -> Iterator[Any]:
        return map(self.value, trees)

    def _dict(self, *trees: Tree) -> dict[Any, Any]:
        return dict(zip(self._values(trees[::2]), self._values(trees[1::2]), strict=True))

    def _number(self, name: str, value: Tree) -> object:
        return self.names.numbers[name](self.value(value))

    def _part(self, number: int) -> object:
        if number < 0:
            raise Malformed(f"part {number}")
        return self.parts[number]

    def _ref(self, number: int) -> object:
        if number < 0:
            raise Malformed(f"object {number}")
        return self._made[number]

    def _new(self, name: str, *trees: Tree) -> object:
        return self.checked(self._object(name, trees))

    def checked(self, one: Any) -> Any:
        """An object that was made, if what it holds is what may be there."""
        for field, shape in self.names.shapes(type(one)).items():
            wrong = shape(getattr(one, field), None)
            if wrong:
                raise Malformed(f"{type(one).__qualname__}.{field}{wrong}")
        return one

    def _object(self, name: str, trees: Sequence[Tree]) -> object:
        form = self.names.forms[name]
        if form.load is not None:
            return form.load(self, trees)
        if len(trees) != len(form.fields):
            raise Malformed(f"{name} has {len(form.fields)} fields, not {len(trees)}")
        if issubclass(form.cls, tuple):
            return tuple.__new__(form.cls, tuple(self._values(trees)))
        one: object = form.cls.__new__(form.cls)
        if form.shared:
            self.made(one)
        for field, tree in zip(form.fields, trees, strict=True):
            object.__setattr__(one, field, self.value(tree))
        return one

    def _method(self, owner: Tree, name: str) -> object:
        found = self.value(owner)
        if not self.names.may_call(found, name):
            raise Malformed(f"{type(found).__name__}.{name} is nothing that waits")
        return getattr(found, name)

    def _partial(self, function: Tree, *arguments: Tree) -> object:
        called = self.value(function)
        if not callable(called):
            raise Malformed("a callback that cannot be called")
        return partial(called, *self._values(arguments))

    def _function(self, name: str) -> object:
        return self.names.functions[name]


_MAKERS: dict[str, Callable[..., object]] = {
    "list": lambda loader, *trees: list(loader._values(trees)),
    "tuple": lambda loader, *trees: tuple(loader._values(trees)),
    "set": lambda loader, *trees: set(loader._values(trees)),
    "frozenset": lambda loader, *trees: frozenset(loader._values(trees)),
    "deque": lambda loader, *trees: deque(loader._values(trees)),
    "bytearray": lambda loader, data: bytearray(data if isinstance(data, bytes) else b""),
    "dict": Loader._dict, "number": Loader._number, "part": Loader._part, "ref": Loader._ref, "new": Loader._new,
    "method": Loader._method, "partial": Loader._partial, "function": Loader._function,
}  # fmt: skip
