"""Memory types: what the page tables of each dimension and the MTRRs say of an address, and what it comes to (APM2 7.4 to 7.8).

Types go by the manual's names: UC, UC- (in a PAT only), WC, WP, WT, WB; and CD and WC+, which come of combining others.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from introspect.layout import Bits, bit, bits
from introspect.paging import ENTRY, Step, Translation, Walk
from introspect.registers import memory_types

__all__ = ["COMBINED_PAT", "EFFECTIVE", "MTRR_DEF_TYPE", "Caching", "MemoryType", "Mtrrs", "memory_type"]


def _table(text: str) -> dict[str, dict[str, str]]:
    heads, *rows = (line.split() for line in text.strip().splitlines())
    return {name: dict(zip(heads, cells, strict=True)) for name, *cells in rows}


COMBINED_PAT = _table("""
          UC   UC-  WC   WP   WT   WB
    UC    UC   UC   UC   UC   UC   UC
    UC-   UC   UC-  WC   UC   UC   UC
    WC    WC   WC   WC   WC+  WC+  WC+
    WP    UC   UC   UC   WP   UC   WP
    WT    UC   UC   UC   UC   WT   WT
    WB    UC   UC   WC   WP   WT   WB
""")
"""By the guest's PAT type (rows) and the host's, from the nested page (APM2 15.25.8, table 15-19)."""

EFFECTIVE = _table("""
          UC   WC   WP   WT   WB
    UC    UC   CD   CD   CD   CD
    UC-   UC   WC   CD   CD   CD
    WC    WC   WC   WC   WC   WC
    WC+   WC   WC   WC+  WC+  WC+
    WP    UC   CD   WP   CD   WP
    WT    UC   CD   CD   WT   WT
    WB    UC   WC   WP   WT   WB
""")
"""By the PAT type (rows) and that of the MTRRs (APM2 7.8.5, table 7-11; with WC+ 15.25.8, table 15-20)."""

_CACHED = ("WP", "WT", "WB")


class MTRR_DEF_TYPE(Bits):
    """MSR 2FFh (APM2 7.7.2)."""

    TYPE = bits(7, 0)
    FE = bit(10)
    E = bit(11)


_VALID = bit(11)
_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}
_FIXED = [(0, 0x10000), *((0x80000 + 0x20000 * n, 0x4000) for n in range(2)), *((0xC0000 + 0x8000 * n, 0x1000) for n in range(8))]
"""First address and stretch of one byte, for each of the fixed-range registers."""


@dataclass(frozen=True, slots=True)
class Mtrrs:
    """The memory type range registers of a processor."""

    def_type: int = 0
    fixed: tuple[int, ...] = (0,) * len(_FIXED)
    """By address: that of 64 KiB ranges, two of 16 KiB, eight of 4 KiB."""
    variable: tuple[tuple[int, int], ...] = ()
    """(base, mask) of each pair."""

    @property
    def enabled(self) -> bool:
        return bool(self.def_type & MTRR_DEF_TYPE.E)

    def type_of(self, spa: int) -> str | None:
        """The type of a system-physical address; None if the manual leaves it undefined (APM2 7.7.1 to 7.7.3)."""
        if not self.enabled:
            return "UC"
        if spa < 0x100000 and self.def_type & MTRR_DEF_TYPE.FE:
            value, (first, stretch) = next(
                (value, span) for value, span in zip(self.fixed, _FIXED, strict=True) if spa < span[0] + 8 * span[1]
            )
            return _TYPES.get(value >> 8 * ((spa - first) // stretch) & 7)
        found = {
            _TYPES.get(base & 0xFF) for base, mask in self.variable
            if mask & _VALID and not (spa ^ base) & mask & ~0xFFF
        } or {_TYPES.get(self.def_type & MTRR_DEF_TYPE.TYPE)}  # fmt: skip
        if "UC" in found:
            return "UC"
        if found == {"WT", "WB"}:
            return "WT"
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class Caching:
    """The registers that decide memory types."""

    pat: int
    """Of who translates: a guest's own under nested paging (G_PAT)."""
    host_pat: int | None
    """With nested paging: the host's, which the nested tables index."""
    mtrrs: Mtrrs
    host_cd: bool = False
    """With nested paging: the host's CR0.CD, which turns caching off as the guest's does (APM2 15.25.8)."""


@dataclass(frozen=True, slots=True)
class MemoryType:
    """The type of an access, and what it comes of; None where the manual leaves it undefined."""

    type: str | None
    pat: str | None
    """WB while paging is off."""
    nested_pat: str | None
    mtrr: str | None
    nested: bool
    caches_off: bool
    """CR0.CD is set, of the two under nested paging the guest's or the host's."""
    mtrrs_off: bool

    def text(self) -> str:
        whose = [f"PAT {_word(self.pat)}"]
        if self.nested:
            whose = [f"guest PAT {_word(self.pat)}", f"nested PAT {_word(self.nested_pat)}"]
        whose.append(f"MTRR {_word(self.mtrr)}{', as MTRRs are off' * self.mtrrs_off}")
        if self.caches_off:
            whose.append("CR0.CD is set")
        return f"{_word(self.type)} ({', '.join(whose)})"


def _word(name: str | None) -> str:
    return "undefined" if name is None else name


def _pat_type(step: Step | None, pat: int) -> str | None:
    """Of a leaf: PAT, PCD and PWT index the PAT (APM2 7.8.2).  Without one there is no paging."""
    if step is None:
        return "WB"
    high = ENTRY.PS if step.level == 1 else bit(12)
    index = (4 if step.value & high else 0) | (2 if step.value & ENTRY.PCD else 0) | (1 if step.value & ENTRY.PWT else 0)
    return memory_types(pat)[index]


def _combined(table: Mapping[str, Mapping[str, str]], row: str | None, column: str | None) -> str | None:
    return None if row is None or column is None else table[row][column]


def memory_type(walk: Walk, cr0_cd: bool, caching: Caching) -> MemoryType | None:
    """The memory type of the access that a walk permitted; None if it was refused."""
    if not isinstance(walk.verdict, Translation):
        return None
    leaves = [step for step in walk.steps if step.leaf]
    pat = _pat_type(next((step for step in leaves if not step.nested), None), caching.pat)
    both, nested_pat, nested = pat, None, walk.nested_mode is not None
    if nested:
        nested_pat = _pat_type(leaves[-1], caching.pat if caching.host_pat is None else caching.host_pat)
        both = _combined(COMBINED_PAT, pat, nested_pat)
    mtrr = caching.mtrrs.type_of(walk.verdict.spa)
    found = _combined(EFFECTIVE, both, mtrr)
    caches_off = cr0_cd or (nested and caching.host_cd)
    if caches_off and found in _CACHED:
        found = "CD"  # APM2 7.6.2
    return MemoryType(found, pat, nested_pat, mtrr, nested, caches_off, not caching.mtrrs.enabled)
