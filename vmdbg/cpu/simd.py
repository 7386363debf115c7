"""The exceptions of SSE arithmetic (APM1 4.10): which flags of MXCSR an instruction raises, of each that may raise one.

The engine computes the results, and knows no exceptions.  What is here is asked only while one is unmasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from .floats import (
    DAZ,
    DE,
    DOUBLE,
    IE,
    NAN,
    PE,
    SINGLE,
    TRUNCATE,
    ZE,
    Format,
    Kind,
    Number,
    decode,
    infinite,
    integral,
    root,
    rounded,
    rounding,
    unmasked,
)

Found = tuple[int, Fraction | Number]
"""Pre-computation flags, and the result: exact, or where that is none or not a number, what it is."""
INT32, INT64 = 32, 64


def _nan(numbers: tuple[Number, ...]) -> Found | None:
    """What comes of operands that are no numbers: a quiet one silences all but the invalid operation of a signaling one."""
    if any(n.kind is Kind.SIGNALING for n in numbers):
        return IE, NAN
    return (0, NAN) if any(n.kind is Kind.QUIET for n in numbers) else None


def _denormal(*numbers: Number) -> int:
    return DE if any(n.denormal for n in numbers) else 0


def _add(a: Number, b: Number) -> Found:
    if a.kind is Kind.INFINITE or b.kind is Kind.INFINITE:
        if a.kind is b.kind and a.value != b.value:
            return IE, NAN
        return _denormal(a, b), a if a.kind is Kind.INFINITE else b
    return _denormal(a, b), a.value + b.value


def _subtract(a: Number, b: Number) -> Found:
    return _add(a, b._replace(value=-b.value))


def _multiply(a: Number, b: Number) -> Found:
    if a.kind is Kind.INFINITE or b.kind is Kind.INFINITE:
        return (_denormal(a, b), infinite(a.value * b.value)) if a.value and b.value else (IE, NAN)
    return _denormal(a, b), a.value * b.value


def _divide(a: Number, b: Number) -> Found:
    if a.kind is Kind.INFINITE or b.kind is Kind.INFINITE:
        if a.kind is b.kind:
            return IE, NAN
        return _denormal(a, b), infinite(a.value) if a.kind is Kind.INFINITE else Fraction(0)
    if not b.value:
        return (ZE, infinite(1)) if a.value else (IE, NAN)
    return _denormal(a, b), a.value / b.value


def _root(a: Number) -> Found:
    if a.value < 0:
        return IE, NAN
    return _denormal(a), a if a.kind is Kind.INFINITE else root(a.value)


def _copy(a: Number) -> Found:
    """A conversion: of what it is, nothing changes."""
    return _denormal(a), a if a.kind is Kind.INFINITE else a.value


def _ordered(a: Number, b: Number) -> int:
    """Comparisons that a quiet NaN, too, makes invalid: MIN, MAX, COMI, and half of CMP's predicates."""
    return IE if a.nan or b.nan else _denormal(a, b)


def _quiet(a: Number, b: Number) -> int:
    found = _nan((a, b))
    return _denormal(a, b) if found is None else found[0]


def _to_integer(a: Number, bits: int, rc: int) -> tuple[int, int]:
    """Flags before and after a conversion: no integer of that size, or not the same number."""
    if a.kind is not Kind.FINITE:
        return IE, 0
    value = integral(a.value, rc)
    if not -1 << bits - 1 <= value < 1 << bits - 1:
        return IE, 0
    return 0, PE if value != a.value else 0


class Form(NamedTuple):
    """An instruction that may raise SIMD exceptions.

    `of` is what its second operand holds, in so many lanes from bit 0 on: a format, or the bits of an integer.  `rule` gives
    flags before and after the computation, from both operands, MXCSR and the immediate byte.
    """

    of: Format | int
    lanes: int
    rule: Callable[[Form, int, int, int, int], tuple[int, int]]
    mmx: bool = False
    """Its second operand is an MMX register, if one."""

    @property
    def element(self) -> int:
        """Bits of an element."""
        return self.of if isinstance(self.of, int) else self.of.bits

    @property
    def size(self) -> int:
        """Bytes of the second operand."""
        return self.element * self.lanes // 8

    def numbers(self, operand: int, mxcsr: int) -> list[Number]:
        of, mask = self.of, (1 << self.element) - 1
        parts = [operand >> self.element * n & mask for n in range(self.lanes)]
        if isinstance(of, int):
            return [Number(Kind.FINITE, Fraction(part - (part >> of - 1 << of))) for part in parts]
        return [decode(part, of, mxcsr) for part in parts]


def _all(found: Iterator[tuple[int, int]]) -> tuple[int, int]:
    """Of an instruction, from those of its elements."""
    pre = post = 0
    for before, after in found:
        pre, post = pre | before, post | after
    return pre, post


def _taken(pre: int, post: int, mxcsr: int) -> int:
    """Where an element raises an unmasked exception before the computation nothing is computed, and there are no flags from
    behind it, of any element."""
    return pre if pre & unmasked(mxcsr) else pre | post


def _compute(op: Callable[..., Found], to: Format, mxcsr: int, *numbers: Number) -> tuple[int, int, Number]:
    """One element: flags before and after, and the result."""
    pre, result = _nan(numbers) or op(*numbers)
    if isinstance(result, Number):
        return pre, 0, result
    post, number = rounded(result, to, mxcsr)
    return pre, post, number


def _arithmetic(op: Callable[[Number, Number], Found], count: int, of: Format) -> Form:
    def rule(form: Form, a: int, b: int, mxcsr: int, _imm: int) -> tuple[int, int]:
        pairs = zip(form.numbers(a, mxcsr), form.numbers(b, mxcsr), strict=True)
        return _all(_compute(op, of, mxcsr, *pair)[:2] for pair in pairs)

    return Form(of, count, rule)


def _convert(op: Callable[[Number], Found], count: int, of: Format | int, to: Format, *, mmx: bool = False) -> Form:
    """One operand, and results in a format: SQRT, and CVT to floating point."""

    def rule(form: Form, _a: int, b: int, mxcsr: int, _imm: int) -> tuple[int, int]:
        return _all(_compute(op, to, mxcsr, number)[:2] for number in form.numbers(b, mxcsr))

    return Form(of, count, rule, mmx)


def _compare(op: Callable[[Number, Number], int], count: int, of: Format) -> Form:
    def rule(form: Form, a: int, b: int, mxcsr: int, _imm: int) -> tuple[int, int]:
        pairs = zip(form.numbers(a, mxcsr), form.numbers(b, mxcsr), strict=True)
        return _all((op(*pair), 0) for pair in pairs)

    return Form(of, count, rule)


def _predicate(count: int, of: Format) -> Form:
    """CMP: LT, LE and their negations are `_ordered`."""

    def rule(form: Form, a: int, b: int, mxcsr: int, imm: int) -> tuple[int, int]:
        return _compare(_ordered if imm & 3 in (1, 2) else _quiet, count, of).rule(form, a, b, mxcsr, imm)

    return Form(of, count, rule)


def _integers(count: int, of: Format, bits: int, *, truncate: bool) -> Form:
    def rule(form: Form, _a: int, b: int, mxcsr: int, _imm: int) -> tuple[int, int]:
        rc = TRUNCATE if truncate else rounding(mxcsr)
        return _all(_to_integer(number, bits, rc) for number in form.numbers(b, mxcsr))

    return Form(of, count, rule)


def _round(count: int, of: Format) -> Form:
    """ROUND: bit 3 of the immediate byte suppresses the inexact result, bit 2 takes MXCSR's rounding."""

    def one(number: Number, mxcsr: int, imm: int) -> tuple[int, int]:
        found = _nan((number,))
        if found is not None or number.kind is Kind.INFINITE:
            return (found or (0,))[0], 0
        inexact = integral(number.value, rounding(mxcsr) if imm & 4 else imm & 3) != number.value
        return 0, PE if inexact and not imm & 8 else 0

    def rule(form: Form, _a: int, b: int, mxcsr: int, imm: int) -> tuple[int, int]:
        return _all(one(number, mxcsr, imm) for number in form.numbers(b, mxcsr))

    return Form(of, count, rule)


def _horizontal(op: Callable[[Number, Number], Found], count: int, of: Format) -> Form:
    def rule(form: Form, a: int, b: int, mxcsr: int, _imm: int) -> tuple[int, int]:
        found = [*form.numbers(a, mxcsr), *form.numbers(b, mxcsr)]
        return _all(_compute(op, of, mxcsr, *found[n : n + 2])[:2] for n in range(0, 2 * count, 2))

    return Form(of, count, rule)


def _alternate(count: int, of: Format) -> Form:
    """ADDSUB: differences in the even elements, sums in the odd ones."""

    def rule(form: Form, a: int, b: int, mxcsr: int, _imm: int) -> tuple[int, int]:
        pairs = zip(form.numbers(a, mxcsr), form.numbers(b, mxcsr), strict=True)
        return _all(_compute((_subtract, _add)[n & 1], of, mxcsr, *pair)[:2] for n, pair in enumerate(pairs))

    return Form(of, count, rule)


def _dot(count: int, of: Format) -> Form:
    """DPPS and DPPD: products of the elements that the immediate byte selects, added by twos; each step is rounded, and one that
    raises an unmasked exception is the last."""

    def rule(form: Form, a: int, b: int, mxcsr: int, imm: int) -> tuple[int, int]:
        terms = list(zip(form.numbers(a, mxcsr), form.numbers(b, mxcsr), strict=True))
        found = [
            _compute(_multiply, of, mxcsr, *pair) if imm >> 4 + n & 1 else (0, 0, Number(Kind.FINITE))
            for n, pair in enumerate(terms)
        ]
        flags = _taken(*_all(step[:2] for step in found), mxcsr)
        while len(found) > 1 and not flags & unmasked(mxcsr):
            sums = [number._replace(value=Fraction(0), denormal=False) if number.denormal and mxcsr & DAZ else number
                    for _, _, number in found]  # fmt: skip
            found = [_compute(_add, of, mxcsr, *sums[n : n + 2]) for n in range(0, len(sums), 2)]
            flags |= _taken(*_all(step[:2] for step in found), mxcsr)
        return flags, 0

    return Form(of, count, rule)


NONE, DATA, REPZ, REPNZ = 0, 0x66, 0xF3, 0xF2
PACKED: dict[int, tuple[int, Format]] = {NONE: (4, SINGLE), DATA: (2, DOUBLE)}
EVERY = {**PACKED, REPZ: (1, SINGLE), REPNZ: (1, DOUBLE)}

FORMS: dict[tuple[int, int], Form] = {
    **{(0x0F51, prefix): _convert(_root, *form, form[1]) for prefix, form in EVERY.items()},
    **{
        (opcode, prefix): _arithmetic(op, *form)
        for opcode, op in ((0x0F58, _add), (0x0F59, _multiply), (0x0F5C, _subtract), (0x0F5E, _divide))
        for prefix, form in EVERY.items()
    },
    **{(opcode, prefix): _compare(_ordered, *form) for opcode in (0x0F5D, 0x0F5F) for prefix, form in EVERY.items()},
    **{(0x0FC2, prefix): _predicate(*form) for prefix, form in EVERY.items()},
    **{(opcode, prefix): _compare(op, 1, of) for opcode, op in ((0x0F2E, _quiet), (0x0F2F, _ordered))
       for prefix, of in ((NONE, SINGLE), (DATA, DOUBLE))},
    (0x0F2A, NONE): _convert(_copy, 2, INT32, SINGLE, mmx=True),
    (0x0F2A, REPZ): _convert(_copy, 1, INT32, SINGLE),
    (0x0F2A, REPNZ): _convert(_copy, 1, INT32, DOUBLE),
    **{(opcode, prefix): _integers(lanes, of, INT32, truncate=opcode == 0x0F2C) for opcode in (0x0F2C, 0x0F2D)
       for prefix, (lanes, of) in {**EVERY, NONE: (2, SINGLE)}.items()},
    (0x0F5A, NONE): _convert(_copy, 2, SINGLE, DOUBLE),
    (0x0F5A, DATA): _convert(_copy, 2, DOUBLE, SINGLE),
    (0x0F5A, REPZ): _convert(_copy, 1, SINGLE, DOUBLE),
    (0x0F5A, REPNZ): _convert(_copy, 1, DOUBLE, SINGLE),
    (0x0F5B, NONE): _convert(_copy, 4, INT32, SINGLE),
    (0x0F5B, DATA): _integers(4, SINGLE, INT32, truncate=False),
    (0x0F5B, REPZ): _integers(4, SINGLE, INT32, truncate=True),
    (0x0FE6, DATA): _integers(2, DOUBLE, INT32, truncate=True),
    (0x0FE6, REPNZ): _integers(2, DOUBLE, INT32, truncate=False),
    **{(opcode, prefix): _horizontal(op, *form) for opcode, op in ((0x0F7C, _add), (0x0F7D, _subtract))
       for prefix, form in ((DATA, (2, DOUBLE)), (REPNZ, (4, SINGLE)))},
    (0x0FD0, DATA): _alternate(2, DOUBLE),
    (0x0FD0, REPNZ): _alternate(4, SINGLE),
    (0x3A08, DATA): _round(4, SINGLE), (0x3A09, DATA): _round(2, DOUBLE),
    (0x3A0A, DATA): _round(1, SINGLE), (0x3A0B, DATA): _round(1, DOUBLE),
    (0x3A40, DATA): _dot(4, SINGLE), (0x3A41, DATA): _dot(2, DOUBLE),
}  # fmt: skip
"""By opcode, 0F xx or 3A xx behind 0F, and prefix."""

WIDE: dict[tuple[int, int], Form] = {
    (0x0F2A, REPZ): _convert(_copy, 1, INT64, SINGLE),
    (0x0F2A, REPNZ): _convert(_copy, 1, INT64, DOUBLE),
    **{(opcode, prefix): _integers(1, of, INT64, truncate=opcode == 0x0F2C) for opcode in (0x0F2C, 0x0F2D)
       for prefix, of in ((REPZ, SINGLE), (REPNZ, DOUBLE))},
}  # fmt: skip
"""Those that REX.W makes another one: with a general register of 64 bits."""


def raised(form: Form, first: int, second: int, mxcsr: int, immediate: int = 0) -> int:
    """The flags of MXCSR that an instruction with these operands raises."""
    return _taken(*form.rule(form, first, second, mxcsr, immediate), mxcsr)
