"""Expressions: against Python's own arithmetic, in C's precedence, and whatever a user may type."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from introspect.exits import ExitCode
from introspect.expression import (
    MAX_DEPTH,
    MAX_LENGTH,
    ExpressionError,
    NoValue,
    Scope,
    Space,
    parse,
    parse_address,
)

MASK = (1 << 64) - 1


class Names:
    def __init__(self, variables: Iterable[str], constants: Mapping[tuple[str | None, str], int]) -> None:
        self.variables, self.values = frozenset(variables), constants

    def variable(self, name: str) -> bool:
        return name in self.variables

    def constant(self, name: str, owner: str | None) -> int | None:
        return self.values.get((owner, name))

    def known(self) -> Iterable[str]:
        return self.variables

    def constants(self, owner: str | None) -> Iterable[str]:
        return [name for whose, name in self.values if whose == owner]


class Thread:
    """A scope with others beside it; memory is the low byte of each address, up to a limit."""

    def __init__(self, values: Mapping[str, int | None], others: Mapping[str, Scope] | None = None, mark: int = 0) -> None:
        self.values, self.others, self.mark = values, others or {}, mark

    def value(self, name: str) -> int | None:
        return self.values[name]

    def read(self, space: Space, address: int, size: int) -> bytes:
        bias = {Space.GVA: 0, Space.GPA: 1, Space.SPA: 2, Space.IOVA: 3}[space] + self.mark
        return bytes(at + bias & 0xFF for at in range(address, min(address + size, 0x10000)))

    def of(self, owner: str) -> Scope | None:
        return self.others.get(owner)


HOST = Thread({"rax": 100, "rsp": 0x700, "gpa": None, "vmcb.asid": 7, "cs_base": 0}, mark=0x10)
GUEST = Thread({"rax": 2, "rsp": 0x20, "gpa": 0xFEE00030, "vmcb.asid": 1, "cs_base": 16}, {"host": HOST}, mark=0x20)
HERE = Thread({"rax": 5, "rsp": 0x40, "gpa": None, "vmcb.asid": 9, "cs_base": 0}, {"host": HOST, "2": GUEST})
NAMES = Names(
    HERE.values,
    {(None, "counter"): 0x30, ("2", "counter"): 0x80, ("host", "main"): 0x1234, ("2", "npf"): 77, (None, "a.part.0"): 1},
)


def value(text: str) -> int:
    return parse(text, NAMES)(HERE)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("0", 0), ("4096", 4096), ("0x1_000", 4096), ("0b1010", 10), ("0o17", 15), ("4k", 4096), ("0x10K", 16384),
        ("1m", 1 << 20), ("2G", 2 << 30), ("0xffffffffffffffff", MASK), ("1 + 2 * 3", 7), ("(1 + 2) * 3", 9),
        ("1 << 2 + 1", 8), ("1 | 2 ^ 3 & 2", 1), ("5 & 4 == 4", 1), ("1 < 2 == 1", 1), ("1 || 0 && 0", 1), ("-1", MASK),
        ("~0 >> 63", 1), ("!5", 0), ("!!5", 1), ("- - 3", 3), ("10 - 2 - 3", 5), ("100 / 7 % 4", 2), ("1 << 64", 0),
        ("1 >> 64", 0), ("0 ? 1 : 2", 2), ("1 ? 0 ? 3 : 4 : 5", 4), ("0 ? 1 : 0 ? 2 : 3", 3), ("0 - 1 > 0", 1),
        ("rax", 5), ("$RAX + 1", 6), ("vmcb.asid", 9), ("npf", 0x400), ("NPF == ExCp_pf", 0), ("counter", 0x30),
        ("a.part.0", 1), ("invalid == -1", 1),
    ],
)  # fmt: skip
def test_values(text: str, result: int) -> None:
    assert value(text) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("u8[5]", 5), ("u16[5]", 0x0605), ("u32[$rsp + 1]", 0x44434241), ("u64[0]", 0x0706050403020100), ("u8[gpa:5]", 6),
        ("u8[spa:5]", 7), ("u8[iova:5]", 8), ("u8[2:5]", 0x25), ("u8[2:gpa:5]", 0x26), ("u8[host:spa:5]", 0x17),
        ("u8[u8[7] + 1]", 8), ("u8[2:rsp]", 0x40), ("u8[2:u8[host:0]]", 0x30), ("u8[counter]", 0x30), ("u8[2:counter]", 0xA0),
        ("u8 [ 1 ] + 1", 2), ("u8[rax == 5 ? 2 : 3]", 2), ("rax == 5 ? u8[2:3] : 4", 0x23),
    ],
)  # fmt: skip
def test_memory(text: str, result: int) -> None:
    assert value(text) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("host:main", 0x1234), ("2:counter + 1", 0x81), ("2:rax", 2), ("2:$rax * host:rax", 200), ("2:npf", 77),
        ("0 ? host:rax : 2:rax", 2), ("1 ? host:rax : 2", 100), ("0 ? 1 : 2:rax", 2), ("1 ? (2:rax) : 7", 2), ("1 ? 2:rax", 2),
    ],
)  # fmt: skip
def test_names_of_others(text: str, result: int) -> None:
    """Between ? and its colon a number is no owner, but in parentheses."""
    if text == "1 ? 2:rax":
        assert value(text) == 2
        assert value("0 ? 2:rax") == 5
    else:
        assert value(text) == result


@pytest.mark.parametrize(
    ("text", "owner", "space", "place"),
    [
        ("0x1000", None, None, (HERE, Space.GVA, 0x1000)), ("2:gva:0xffff8000", "2", Space.GVA, (GUEST, Space.GVA, 0xFFFF8000)),
        ("2:gpa:0x1000", "2", Space.GPA, (GUEST, Space.GPA, 0x1000)), ("spa:0xfee00000", None, Space.SPA, (HERE, Space.SPA, 0xFEE00000)),
        ("host:main", "host", None, (HOST, Space.GVA, 0x1234)), ("2:counter+0x10", "2", None, (GUEST, Space.GVA, 0x90)),
        ("2:rsp", "2", None, (GUEST, Space.GVA, 0x20)), ("rax == 5 ? 1 : 2", None, None, (HERE, Space.GVA, 1)),
    ],
)  # fmt: skip
def test_addresses(text: str, owner: str | None, space: Space | None, place: tuple[Thread, Space, int]) -> None:
    address = parse_address(text, NAMES)
    assert (address.owner, address.space) == (owner, space)
    assert tuple(address(HERE)) == place


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "a value is missing"), ("1 +", 3, "a value is missing"), ("1 2", 2, "an operator must stand before"),
        ("(1", 2, ") is missing"), ("u8[1", 4, "] is missing"), ("1 ? 2", 5, ": is missing"), ("1 = 2", 2, "compare with =="),
        ("rax @ 1", 4, "no meaning"), ("0x", 0, "is no number"), ("010", 0, "is no number"), ("12ab", 0, "is no number"),
        ("1__0", 0, "is no number"), ("0x1ffffffffffffffff", 0, "does not fit 64 bits"), ("16g * 99999999999g", 6, "does not fit"),
        ("rbx", 0, "did you mean rax"), ("gpq == 1", 0, "did you mean gpa"), ("$counter", 0, "no such name"), ("2:countre", 2, "did you mean counter?"), ("$npf", 0, "no such name"),
        ("u8", 0, "no such name"), ("2:", 2, "a name must follow"), ("2:gpa:5", 2, "u64[2:gva:0x1000]"), ("host", 0, "no such name"),
        ("gpa:5", 3, "an operator must stand before"), ("u8[gpa:gpa:1]", 10, "] is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_where(text: str, position: int, words: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse(text, NAMES)
    assert caught.value.position == position
    assert words in str(caught.value)
    assert f"(column {position + 1})" in str(caught.value)


def test_what_cannot_be_evaluated() -> None:
    for text, words in (("1 / (rax - 5)", "divisor is zero"), ("7 % 0", "divisor is zero"), ("u32[0xfffe]", "gva:0x10000 is not readable")):
        with pytest.raises(ExpressionError, match=words):
            value(text)
        with pytest.raises(ExpressionError, match=words):  # a condition does not pass it over in silence
            parse(text, NAMES).holds(HERE)


def test_a_name_without_a_value_makes_a_condition_false_but_not_its_alternatives() -> None:
    for text in ("gpa == 1", "gpa != 1", "!gpa", "gpa || rax == 4", "rax == 5 && gpa", "3:rax == 1", "u8[3:0] == 1"):
        assert not parse(text, NAMES).holds(HERE)
        with pytest.raises(NoValue):
            value(text)
    assert parse("gpa || rax == 5", NAMES).holds(HERE)
    assert parse("rax == 5 || gpa", NAMES).holds(HERE)
    assert not parse("rax == 4 && gpa", NAMES)(HERE)
    assert parse("gpa == 0xfee00030", NAMES).holds(GUEST)


def test_a_part_that_decides_leaves_the_others_alone() -> None:
    assert value("0 && 1 / 0") == 0
    assert value("1 || 1 / 0") == 1
    assert value("0 ? 1 / 0 : 3") == 3


def test_the_names_that_it_asks_for() -> None:
    assert parse("$rax + vmcb.asid + npf + counter + u8[2:rsp]", NAMES).names == {"rax", "vmcb.asid", "rsp"}


# Against Python

_OPERATIONS: dict[str, tuple[int, Callable[[int, int], int]]] = {
    "||": (0, lambda a, b: int(bool(a) or bool(b))), "&&": (1, lambda a, b: int(bool(a) and bool(b))), "|": (2, operator.or_),
    "^": (3, operator.xor), "&": (4, operator.and_), "==": (5, operator.eq), "!=": (5, operator.ne), "<": (6, operator.lt),
    "<=": (6, operator.le), ">": (6, operator.gt), ">=": (6, operator.ge), "<<": (7, lambda a, b: a << b if b < 64 else 0),
    ">>": (7, lambda a, b: a >> b if b < 64 else 0), "+": (8, operator.add), "-": (8, operator.sub), "*": (9, operator.mul),
    "/": (9, lambda a, b: a // b if b else 0), "%": (9, lambda a, b: a % b if b else 0),
}  # fmt: skip
_NUMBERS = st.one_of(st.integers(0, 70), st.integers(0, MASK), st.sampled_from([0, 1, 1 << 31, 1 << 63, MASK]))
Tree = tuple[str, int, int]
"""Text, precedence (10: unary, 11: a value) and what Python makes of it."""


def _joined(left: Tree, name: str, right: Tree, spaces: str) -> Tree:
    level, operation = _OPERATIONS[name]
    if name in "/%" and not right[2]:
        name, (level, operation) = "+", _OPERATIONS["+"]
    a = left[0] if left[1] >= level else f"({left[0]})"
    b = right[0] if right[1] > level else f"({right[0]})"
    return f"{a}{spaces}{name}{spaces}{b}", level, int(operation(left[2], right[2])) & MASK


def _signed(name: str, tree: Tree) -> Tree:
    result = {"-": -tree[2], "~": ~tree[2], "!": int(not tree[2]), "+": tree[2]}[name] & MASK
    return f"{name}{tree[0]}" if tree[1] >= 10 else f"{name}({tree[0]})", 10, result


_TREES: st.SearchStrategy[Tree] = st.recursive(
    _NUMBERS.flatmap(lambda n: st.sampled_from([(str(n), 11, n), (hex(n), 11, n)])),
    lambda trees: st.one_of(
        st.builds(_joined, trees, st.sampled_from(list(_OPERATIONS)), trees, st.sampled_from(["", " ", "  "])),
        st.builds(_signed, st.sampled_from("-~!+"), trees),
    ),
    max_leaves=30,
)


@given(_TREES)
def test_arithmetic_is_pythons_in_64_bits(tree: Tree) -> None:
    text, _, result = tree
    assert parse(text)(HERE) == result


# Whatever is typed

_PIECES = st.sampled_from([
    "(", ")", "[", "]", "u8[", "u64[", "?", ":", "&&", "||", "1", "0x10", "rax", "$rsp", "gpa", "host:", "2:", "spa:", "vmcb.asid",
    "npf", "-", "!", "~", "*", "/", "%", "<<", ">=", "counter", "=", " ", "0b", ".", "é", "\0", "9" * 30,
])  # fmt: skip


@given(st.one_of(st.text(max_size=60), st.lists(_PIECES, max_size=40).map("".join), st.lists(_PIECES, max_size=40).map(" ".join)))
@example("u8[" * 2000)
@example("(" * 4000)
@example("1?" * 2000)
@example("1+" * 2000 + "1")
@example("-" * 4000 + "1")
@example("1||1&&1|1^1&1==1<1<<1+1*(" * 100)
@example("9" * 4096)
@example("x" * 5000)
def test_nothing_but_its_own_error(text: str) -> None:
    for compiler in (parse, parse_address):
        with suppress(ExpressionError):
            compiler(text, NAMES)(HERE)


def test_bounds() -> None:
    assert value("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) == 1
    with pytest.raises(ExpressionError, match=f"nest at most {MAX_DEPTH} deep"):
        value("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1))
    longest = "1+" * (MAX_LENGTH // 2 - 1) + "11"
    assert value(longest) == MAX_LENGTH // 2 - 1 + 11
    with pytest.raises(ExpressionError, match=f"at most {MAX_LENGTH} characters"):
        value(longest + "1")
    level = "1||1&&1|1^1&1==1<1<<1+1*u8[1?"  # every level of precedence, a bracket and a condition, as deep as may be
    deep = level * (MAX_DEPTH // 2) + "1" + ":0]" * (MAX_DEPTH // 2)
    assert value(deep) == 1


def test_every_exit_code_has_its_name() -> None:
    for code in ExitCode:
        assert parse(code.name.lower())(HERE) == code.value
