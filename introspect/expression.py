"""Expressions over registers, exit information, VMCB fields and memory, compiled once to closures.

Operators and precedence are C's.  All values are unsigned 64-bit numbers: what overflows wraps, and -1 is the largest.

    gpa >= 0xfee00000 && gpa < 0xfee01000        facts, registers, VMCB fields and exit codes by name
    $rax & 0xff, u32[$rsp + 8], u8[gpa:0x1000]   `$` means a register; u8 u16 u32 u64 read memory
    host:counter, u64[2:gva:0xffff8000]          of another: the hypervisor's symbol, guest 2's memory

An address is `owner:space:offset`.  The owner is `host`, a guest's number, or a device as 00:03.0; names in the offset are
then its own.  The space is gva (linear, through the owner's tables), gpa, spa or iova.  Both may be left out.  A symbol's
value is its address.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from introspect.exits import ExitCode

__all__ = [
    "HOST", "MAX_DEPTH", "MAX_LENGTH", "Address", "Expression", "ExpressionError", "Names", "NoNames", "NoValue", "Place",
    "Scope", "Space", "UnknownName", "parse", "parse_address",
]  # fmt: skip

MAX_LENGTH = 4096
"""Characters of an expression."""
MAX_DEPTH = 32
"""How deep parentheses, brackets and the parts of ?: may lie in each other."""
HOST = "host"
"""The owner that is the hypervisor; guests are named by the digits of their number, PCI devices as 00:03.0."""

_MASK = (1 << 64) - 1


class ExpressionError(ValueError):
    """An expression that cannot be taken or evaluated: the offending part, the rule it breaks, and what to do instead.

    `position` counts characters from 0.
    """

    def __init__(self, value: str, position: int, rule: str, remedy: str) -> None:
        super().__init__(f"{value} (column {position + 1}): {rule}; {remedy}")
        self.value, self.position, self.rule, self.remedy = value, position, rule, remedy


class NoValue(ExpressionError):
    """A name has no value at this moment, as the guest-physical address of an exit that is no nested page fault."""


class UnknownName(ExpressionError):
    """A name that nobody knows; `owner` is whose it was said to be, None for the expression's own."""

    def __init__(self, value: str, position: int, remedy: str, owner: str | None) -> None:
        super().__init__(value, position, "there is no such name", remedy)
        self.owner = owner


class Space(StrEnum):
    """What an offset counts in."""

    GVA = "gva"
    GPA = "gpa"
    SPA = "spa"
    IOVA = "iova"


class Names(Protocol):
    """The names that an expression may use, asked when it is compiled."""

    def variable(self, name: str) -> bool:
        """Whether a scope may be asked for the value of this name (in lower case)."""

    def constant(self, name: str, owner: str | None) -> int | None:
        """The value of a name that never changes, as a symbol; of one owner, or of the expression's own (None)."""

    def known(self) -> Iterable[str]:
        """Names of variables, for who has mistyped one."""

    def constants(self, owner: str | None) -> Iterable[str]:
        """Names of an owner's constants, for the same; none where there are too many to look through."""


class Scope(Protocol):
    """Where an expression is evaluated: one thread at one moment."""

    def value(self, name: str) -> int | None:
        """Of a name that is `Names.variable`; None if it has none now."""

    def read(self, space: Space, address: int, size: int) -> bytes:
        """Memory without side effects, as much as can be read of it."""

    def of(self, owner: str) -> Scope | None:
        """That of another owner, None if there is no such."""


class NoNames:
    """Exit codes are the only names."""

    def variable(self, name: str) -> bool:
        return False

    def constant(self, name: str, owner: str | None) -> int | None:
        return None

    def known(self) -> Iterable[str]:
        return ()

    def constants(self, owner: str | None) -> Iterable[str]:
        return ()


_Value = Callable[[Scope], int]


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression; called with a scope it gives its value, or raises `ExpressionError`."""

    text: str
    names: frozenset[str]
    """The variables that it asks for."""
    _value: _Value

    def __call__(self, scope: Scope) -> int:
        return self._value(scope)

    def holds(self, scope: Scope) -> bool:
        """Whether it is true; it is not where it asks for something that has no value."""
        try:
            return bool(self._value(scope))
        except NoValue:
            return False


class Place(NamedTuple):
    """An address that has been evaluated: in whose scope, in which space, where."""

    scope: Scope
    space: Space
    offset: int


@dataclass(frozen=True, slots=True)
class Address:
    """A compiled address.  `owner` and `space` are None where it names none."""

    text: str
    owner: str | None
    space: Space | None
    _place: Callable[[Scope], Place]

    def __call__(self, scope: Scope) -> Place:
        """Raises `ExpressionError`."""
        return self._place(scope)


def parse(text: str, names: Names | None = None) -> Expression:
    """Compile an expression.  Raises `ExpressionError`."""
    parser = _Parser(text, names or NoNames())
    value = parser.condition()
    parser.end()
    return Expression(text, frozenset(parser.used), value)


def parse_address(text: str, names: Names | None = None) -> Address:
    """Compile an address, `owner:space:offset`.  Raises `ExpressionError`."""
    if len(text) <= MAX_LENGTH and _NUMBER.fullmatch(text):  # as most are that programs ask for
        number = _number(_Token("number", text, 0))
        return Address(text, None, None, lambda scope: Place(scope, Space.GVA, number))
    parser = _Parser(text, names or NoNames())
    owner, space, place = parser.address()
    parser.end()
    return Address(text, owner, space, place)


class _Token(NamedTuple):
    kind: str
    """number, name, device, or operator; end."""
    text: str
    at: int


_TOKENS = re.compile(
    r"(?P<device>(?:[0-9a-fA-F]{4}:)?[0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7](?=:))|(?P<number>[0-9][0-9A-Za-z_]*)|(?P<name>\$?[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)"
    r"|(?P<operator><<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^~!<>?:()\[\]])"
)
_SPACES = re.compile(r"\s*")
_NUMBER = re.compile(r"(0x[0-9a-f_]+|0b[01_]+|0o[0-7_]+|0|[1-9][0-9_]*)([kmgt]?)", re.IGNORECASE)
_SCALES = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
_PLACES = frozenset(Space)

_BINARY: tuple[dict[str, Callable[[int, int], int]], ...] = (
    {"|": operator.or_},
    {"^": operator.xor},
    {"&": operator.and_},
    {"==": operator.eq, "!=": operator.ne},
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge},
    {"<<": lambda a, b: a << b & _MASK if b < 64 else 0, ">>": lambda a, b: a >> b if b < 64 else 0},
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": operator.floordiv, "%": operator.mod},
)
"""C's levels between || and && and the unary operators, the loosest first."""
_UNARY: dict[str, Callable[[int], int]] = {
    "-": operator.neg, "+": operator.pos, "~": operator.invert, "!": lambda value: not value
}  # fmt: skip


def _tokens(text: str) -> Iterator[_Token]:
    if len(text) > MAX_LENGTH:
        rule = f"an expression has at most {MAX_LENGTH} characters, not {len(text)}"
        raise ExpressionError(text[:20] + "...", MAX_LENGTH, rule, "write a shorter one")
    at = 0
    while True:
        space = _SPACES.match(text, at)
        at = space.end() if space is not None else at
        if at == len(text):
            yield _Token("end", "the end", at)
            return
        found = _TOKENS.match(text, at)
        if found is None:
            rule = "is no operator" if text[at] in "=." else "has no meaning in an expression"
            remedy = "compare with ==" if text[at] == "=" else "operators are C's; memory is u8[...] to u64[...]"
            raise ExpressionError(text[at], at, rule, remedy)
        assert found.lastgroup is not None
        yield _Token(found.lastgroup, found[0], at)
        at = found.end()


class _Parser:
    """Recursive descent; each level of precedence gives one closure, so that long chains are not deep."""

    def __init__(self, text: str, names: Names) -> None:
        self.names = names
        self.used: set[str] = set()
        self._tokens = list(_tokens(text))
        self._next = 0
        self._depth = 0
        self._owner: str | None = None
        """Whose names these are."""
        self._in_middle = False
        """Between ? and its colon, where a number before a colon is no owner."""

    # Tokens

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, *operators: str) -> str | None:
        """The next token if it is one of these operators."""
        token = self._token
        if token.kind != "operator" or token.text not in operators:
            return None
        self._next += 1
        return token.text

    def _expect(self, text: str, why: str) -> None:
        if self._take(text) is None:
            raise self._error(self._token, f"{text} is missing here", why)

    def end(self) -> None:
        """Refuse what is left."""
        if self._token.kind != "end":
            raise self._error(self._token, "an operator must stand before this", "end the expression, or say && or ||")

    @staticmethod
    def _error(token: _Token, rule: str, remedy: str) -> ExpressionError:
        return ExpressionError(token.text, token.at, rule, remedy)

    @contextmanager
    def _deeper(self, token: _Token, *, middle: bool = False) -> Iterator[None]:
        if self._depth == MAX_DEPTH:
            raise self._error(token, f"expressions nest at most {MAX_DEPTH} deep", "write a flatter one")
        before, self._in_middle = self._in_middle, middle
        self._depth += 1
        yield
        self._depth -= 1
        self._in_middle = before

    # The grammar

    def condition(self) -> _Value:
        token = self._token
        test = self._or()
        if self._take("?") is None:
            return test
        with self._deeper(token, middle=True):
            yes = self.condition()
        self._expect(":", "write a ? b : c")
        with self._deeper(token, middle=self._in_middle):
            no = self.condition()
        return lambda scope: yes(scope) if test(scope) else no(scope)

    def _or(self) -> _Value:
        parts = [self._and()]
        while self._take("||"):
            parts.append(self._and())
        return parts[0] if len(parts) == 1 else _any(parts)

    def _and(self) -> _Value:
        parts = [self._binary(0)]
        while self._take("&&"):
            parts.append(self._binary(0))
        return parts[0] if len(parts) == 1 else lambda scope: int(all(part(scope) for part in parts))

    def _binary(self, loosest: int) -> _Value:
        """Operators of this level, and of those that bind more tightly."""
        value = self._unary()
        for level in range(len(_BINARY) - 1, loosest - 1, -1):
            if self._token.kind != "operator":
                break
            operations = _BINARY[level]
            rest: list[tuple[Callable[[int, int], int], _Value, _Token]] = []
            token = self._token
            while taken := self._take(*operations):
                rest.append((operations[taken], self._binary(level + 1), token))
                token = self._token
            if rest:
                value = _chain(value, rest)
        return value

    def _unary(self) -> _Value:
        operations = []
        while taken := self._take(*_UNARY):
            operations.append(_UNARY[taken])
        value = self._primary()
        if not operations:
            return value

        def apply(scope: Scope) -> int:
            result = value(scope)
            for operation in reversed(operations):
                result = operation(result) & _MASK
            return result

        return apply

    def _primary(self) -> _Value:
        token = self._token
        if self._take("("):
            with self._deeper(token):
                value = self.condition()
            self._expect(")", "close the parenthesis")
            return value
        if token.kind not in ("number", "name", "device"):
            raise self._error(token, "a value is missing before this", "write a number, a name, u32[...] or (...)")
        if (token.text == HOST or token.kind == "device" or not self._in_middle) and (owner := self._owner_here()) is not None:
            return self._foreign(owner)
        self._next += 1
        if token.kind == "number":
            number = _number(token)
            return lambda scope: number
        if token.text in _SIZES and self._take("["):
            return self._memory(token)
        return self._name(token)

    def _owner_here(self) -> str | None:
        """The owner, if one and its colon come next: taken."""
        token, colon = self._tokens[self._next : self._next + 2] if self._token.kind != "end" else (self._token,) * 2
        named = token.text == HOST or token.kind == "device" or (token.kind == "number" and token.text.isdecimal())
        if colon.text != ":" or not named:
            return None
        self._next += 2
        return str(_number(token)) if token.kind == "number" else token.text

    def _foreign(self, owner: str) -> _Value:
        """A name of another owner, behind its colon."""
        token = self._token
        if token.kind != "name" or token.text in _PLACES or token.text in _SIZES:
            raise self._error(token, "a name must follow the owner", f"memory is u64[{owner}:gva:0x1000]")
        self._next += 1
        with self._owned(owner):
            value = self._name(token)
        return lambda scope: value(_other(scope, owner, token))

    @contextmanager
    def _owned(self, owner: str) -> Iterator[None]:
        before, self._owner = self._owner, owner
        yield
        self._owner = before

    def address(self) -> tuple[str | None, Space | None, Callable[[Scope], Place]]:
        token = self._token
        owner = self._owner_here()
        space: Space | None = None
        if self._token.text in _PLACES and self._tokens[self._next + 1].text == ":":
            space = Space(self._token.text)
            self._next += 2
        if owner is None:
            offset = self.condition()
        else:
            with self._owned(owner):
                offset = self.condition()
        kind = space or Space.GVA

        def place(scope: Scope) -> Place:
            where = scope if owner is None else _other(scope, owner, token)
            return Place(where, kind, offset(where))

        return owner, space, place

    def _memory(self, token: _Token) -> _Value:
        size = _SIZES[token.text]
        with self._deeper(token):
            place = self.address()[2]
        self._expect("]", "close the bracket")

        def load(scope: Scope) -> int:
            where, space, address = place(scope)
            data = where.read(space, address, size)
            if len(data) != size:
                rule = f"{space}:{address + len(data) & _MASK:#x} is not readable memory"
                raise self._error(token, rule, "`walk` shows why; the space before the address may be another one")
            return int.from_bytes(data, "little")

        return load

    def _name(self, token: _Token) -> _Value:
        plain, names = token.text.removeprefix("$"), self.names
        name = plain.lower()
        if names.variable(name):
            self.used.add(name)

            def value(scope: Scope) -> int:
                found = scope.value(name)
                if found is None:
                    raise NoValue(token.text, token.at, "it has no value here", "ask where it has one")
                return found & _MASK

            return value
        if plain == token.text:
            constant = names.constant(plain, self._owner)
            if constant is None and plain.upper() in ExitCode.__members__:
                constant = ExitCode[plain.upper()].value
            if constant is not None:
                number = constant & _MASK
                return lambda scope: number
        near = difflib.get_close_matches(plain, names.constants(self._owner), n=2)
        near += difflib.get_close_matches(name, [*names.known(), *(member.name.lower() for member in ExitCode)], n=3 - len(near))
        remedy = f"did you mean {', '.join(near)}?" if near else "registers, facts, vmcb.FIELD, exit codes and symbols have names"
        raise UnknownName(token.text, token.at, remedy, self._owner)


def _number(token: _Token) -> int:
    found = _NUMBER.fullmatch(token.text)
    try:
        value = int(found[1], 0) << _SCALES[found[2].lower()] if found is not None else None
    except ValueError:  # underscores in a row, or more digits than Python takes
        value = None
    if value is None or value > _MASK:
        rule = "is no number" if value is None else "does not fit 64 bits"
        raise ExpressionError(token.text, token.at, rule, "write it as 4096, 0x1000, 0b1000 or 4k")
    return value


def _any(parts: list[_Value]) -> _Value:
    """|| goes on where a part has no value."""

    def value(scope: Scope) -> int:
        missing = None
        for part in parts:
            try:
                if part(scope):
                    return 1
            except NoValue as error:
                missing = missing or error
        if missing is not None:
            raise missing
        return 0

    return value


def _chain(first: _Value, rest: list[tuple[Callable[[int, int], int], _Value, _Token]]) -> _Value:
    def value(scope: Scope) -> int:
        result = first(scope)
        for operation, part, token in rest:
            operand = part(scope)
            if not operand and token.text in "/%":
                raise ExpressionError(token.text, token.at, "the divisor is zero", "test it first: n && x / n")
            result = operation(result, operand) & _MASK
        return result

    return value


def _other(scope: Scope, owner: str, token: _Token) -> Scope:
    found = scope.of(owner)
    if found is None:
        raise NoValue(f"{owner}:", token.at, "there is no such owner now", "`guests` lists them; the hypervisor is host")
    return found
