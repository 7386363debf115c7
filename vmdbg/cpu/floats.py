"""Binary floating point by exact arithmetic: what an operand is, what a result becomes, and the exceptions on the way.

Flags are those of MXCSR (APM1 4.10.2), whose settings the functions take.  Signs of zeros are not kept: no flag depends on one.
"""

from __future__ import annotations

from enum import Enum, auto
from fractions import Fraction
from math import isqrt
from typing import NamedTuple

IE, DE, ZE, OE, UE, PE = 1, 2, 4, 8, 16, 32
FLAGS = 63
DAZ, FTZ = 1 << 6, 1 << 15
NEAREST, DOWN, UP, TRUNCATE = range(4)
"""MXCSR.RC."""


def unmasked(mxcsr: int) -> int:
    """The flags whose exceptions are not masked."""
    return ~mxcsr >> 7 & FLAGS


def rounding(mxcsr: int) -> int:
    return mxcsr >> 13 & 3


class Format(NamedTuple):
    """Bits of a number, of its fraction, and the bias of its exponent."""

    bits: int
    fraction: int
    bias: int


SINGLE, DOUBLE = Format(32, 23, 127), Format(64, 52, 1023)


class Kind(Enum):
    FINITE = auto()
    INFINITE = auto()
    QUIET = auto()
    SIGNALING = auto()


class Number(NamedTuple):
    """`value` is that of a finite number, and the sign of an infinity."""

    kind: Kind
    value: Fraction = Fraction(0)
    denormal: bool = False

    @property
    def nan(self) -> bool:
        return self.kind in (Kind.QUIET, Kind.SIGNALING)


NAN = Number(Kind.QUIET)


def infinite(sign: int | Fraction) -> Number:
    return Number(Kind.INFINITE, Fraction(-1 if sign < 0 else 1))


def decode(bits: int, form: Format, mxcsr: int) -> Number:
    """A number from its bits; with DAZ a denormal is zero."""
    fraction = bits & (1 << form.fraction) - 1
    exponent = bits >> form.fraction & (1 << form.bits - form.fraction - 1) - 1
    sign = -1 if bits >> form.bits - 1 else 1
    if exponent == 2 * form.bias + 1:
        if not fraction:
            return infinite(sign)
        return NAN if fraction >> form.fraction - 1 else Number(Kind.SIGNALING)
    if not exponent:
        if not fraction or mxcsr & DAZ:
            return Number(Kind.FINITE)
        return Number(Kind.FINITE, sign * fraction * power(1 - form.bias - form.fraction), denormal=True)
    return Number(Kind.FINITE, sign * (fraction | 1 << form.fraction) * power(exponent - form.bias - form.fraction))


def power(exponent: int) -> Fraction:
    """Of two."""
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def integral(value: Fraction, rc: int) -> int:
    """Rounded to an integer; halves to the even one with NEAREST."""
    if rc == NEAREST:
        return round(value)
    down = value.numerator // value.denominator
    if rc == DOWN or down == value or (rc == TRUNCATE and value > 0):
        return down
    return down + 1


def root(value: Fraction) -> Fraction:
    """The square root, or where that is not rational a number that every format here rounds as it."""
    scale = 1 << 2 * (value.denominator.bit_length() + 80)  # at least 64 bits of any root of a double are left
    scaled = value * scale
    found = isqrt(scaled.numerator // scaled.denominator)
    exact = found * found == scaled
    return Fraction(2 * found + (not exact), 2 * isqrt(scale))


def rounded(value: Fraction, form: Format, mxcsr: int) -> tuple[int, Number]:
    """An exact result in a format: post-computation flags, and what it is where they are masked (APM1 4.10.3).

    Tininess is detected after rounding.  Where an overflow or underflow is unmasked there is no result, and inexact is one that
    would not be exact with any exponent.
    """
    if not value:
        return 0, Number(Kind.FINITE)
    rc, size = rounding(mxcsr), abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if power(exponent) > size:
        exponent -= 1
    least = 1 - form.bias
    unit = power(exponent - form.fraction)
    result = integral(value / unit, rc) * unit
    inexact = PE if result != value else 0
    if abs(result) < power(least):
        if unmasked(mxcsr) & UE:
            return UE | inexact, NAN
        if mxcsr & FTZ:
            return UE | PE, Number(Kind.FINITE)
        unit = power(least - form.fraction)
        result = integral(value / unit, rc) * unit
        return UE | PE if result != value else 0, Number(Kind.FINITE, result, bool(result) and abs(result) < power(least))
    if abs(result) >= power(form.bias + 1):
        if unmasked(mxcsr) & OE:
            return OE | inexact, NAN
        up = rc == NEAREST or rc == (DOWN if value < 0 else UP)
        largest = (2 - power(-form.fraction)) * power(form.bias)
        return OE | PE, infinite(value) if up else Number(Kind.FINITE, -largest if value < 0 else largest)
    return inexact, Number(Kind.FINITE, result)
