# SPDX-License-Identifier: GPL-2.0-or-later
"""Arguments of the wrong type are refused where a script gives them: by the annotations of the method, in its words.

An annotation is read when its method is called first.  How many arguments there are is Python's business, and so are keyword
arguments that a method passes on.
"""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from introspect.commands.binding import shown
from vmdbg.api.errors import WrongType

__all__ = ["checked", "fits"]

_Class = TypeVar("_Class", bound=type)
_P = ParamSpec("_P")
_R = TypeVar("_R")

_ITEMS = ("__getitem__", "__setitem__", "__delitem__")
_WIDER: Mapping[object, tuple[type, ...]] = {float: (float, int), bytes: (bytes, bytearray, memoryview)}
"""What an annotation takes besides (PEP 484)."""


def checked(cls: _Class) -> _Class:
    """Have a class's public methods, its items and what may be set of its properties look at the types of their arguments."""
    for name, member in list(vars(cls).items()):
        if name.startswith("_") and name not in _ITEMS:
            continue
        if isinstance(member, types.FunctionType):
            setattr(cls, name, _checking(member))
        elif isinstance(member, classmethod):
            setattr(cls, name, classmethod(_checking(member.__func__)))
        elif isinstance(member, property) and member.fset is not None:
            setattr(cls, name, member.setter(_checking(member.fset)))
    return cls


def _checking(function: Callable[_P, _R]) -> Callable[_P, _R]:
    signature = inspect.signature(function)
    own = [name for name, one in signature.parameters.items() if one.kind != one.VAR_KEYWORD][1:]

    @cache
    def hints() -> Mapping[str, object]:
        from vmdbg import api

        taken = types.SimpleNamespace(__annotations__={name: signature.parameters[name].annotation for name in own})
        return get_type_hints(taken, inspect.unwrap(function).__globals__, {name: getattr(api, name) for name in api.__all__})

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # too few or too many: Python says so when it is called
        for name in own:
            if name in given and name in hints() and not fits(given[name], hints()[name]):
                raise _wrong(name, given[name], hints()[name])
        return function(*args, **kwargs)

    return call


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of an annotation's type, as far as that can be seen of it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str)  # which of them, the method itself says
    if kind is Any or isinstance(kind, TypeVar):
        return True
    if kind is None or kind is types.NoneType:
        return value is None
    plain = origin or kind
    if plain is Callable:
        return callable(value)
    if plain is os.PathLike:
        return isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    if plain is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(fits(one, inner[0]) for one in value)
    return isinstance(value, _WIDER.get(plain, plain))


def _wrong(name: str, value: object, kind: object) -> WrongType:
    return WrongType(f"{name}={shown(value)}", f"it is {_article(type(value).__name__)}", f"give {' or '.join(_words(kind))}")


def _article(noun: str) -> str:
    return f"{'an' if noun[:1] in 'aeiouAEIOU' else 'a'} {noun}"


def _words(kind: Any) -> list[str]:
    """An annotation's types, each with its article."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return list(dict.fromkeys(word for one in inner for word in _words(one)))
    if origin is Literal:
        return [repr(one) for one in inner]
    if kind is None or kind is types.NoneType:
        return ["None"]
    plain = origin or kind
    named = {Callable: "a function", os.PathLike: "a path", Sequence: "a list of these"}
    return [named.get(plain) or _article(plain.__name__)]
