"""The six intercept words at the start of a VMCB (APM2 15.9, appendix B): all derived from the exit-code table."""

import struct
from collections.abc import Sequence

from introspect.exits import INTERCEPT_CODES, ExitCode
from introspect.layout import Bits, Buffer

__all__ = ["intercepted", "list_intercepts", "word_bits", "words_of"]

_UNPACK_WORDS = struct.Struct("<6I").unpack_from
_INTERCEPTS = sorted(code for code in ExitCode if code < INTERCEPT_CODES)
_NAMES = {code.value: code.name for code in _INTERCEPTS}


def words_of(buffer: Buffer) -> tuple[int, ...]:
    """The six 32-bit intercept words of a VMCB."""
    return _UNPACK_WORDS(buffer, 0)


def intercepted(words: Sequence[int], code: int) -> bool:
    """Whether the six words intercept this exit code; False for codes that no intercept bit controls (NPF, INVALID).

    IOIO and MSR depend on the permission map besides: see `introspect.permissions`.
    """
    return 0 <= code < INTERCEPT_CODES and bool(words[code >> 5] >> (code & 31) & 1)


def list_intercepts(buffer: Buffer) -> list[str]:
    """Names of all intercepts that a VMCB sets, in order of exit code; bits without a meaning as "word W bit B"."""
    names = []
    for number, word in enumerate(words_of(buffer)):
        while word:
            lowest = word & -word
            word ^= lowest
            code = 32 * number + lowest.bit_length() - 1
            names.append(_NAMES.get(code, f"word {number} bit {code & 31}"))
    return names


def word_bits(name: str, first: int, count: int) -> type[Bits]:
    """The bit table of the intercept field whose bit 0 is exit code `first`."""
    masks = {code.name: 1 << code - first for code in _INTERCEPTS if first <= code < first + count}
    return type(name, (Bits,), masks)
