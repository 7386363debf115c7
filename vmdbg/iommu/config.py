"""What is asked of the IOMMUs: how many, which caching, which memory the IVRS reserves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from introspect.pci import RequesterId
from vmdbg.iommu.topology import MOST_UNITS

PAGE = 0x1000
EVERY = 0xFFFF


@dataclass(frozen=True)
class Reserved:
    """Memory that the IVRS names for devices first..last (an IVMD): a unity map, or if `exclusion`, memory left untranslated."""

    start: int
    end: int
    first: int = 0
    last: int = EVERY
    read: bool = True
    write: bool = True
    exclusion: bool = False

    @classmethod
    def parse(cls, text: str) -> Reserved:
        """Of "all,0x1000-0x1fff", "00:03.0,0x1000-0x1fff,r", "00:03.0-00:05.7,0x1000-0x1fff,exclusion".  Raises ValueError."""
        who, _, rest = text.partition(",")
        where, _, way = rest.partition(",")
        ends = who.split("-")
        first_id: int | None = 0
        last_id: int | None = EVERY
        if who != "all":
            first_id, last_id = (RequesterId.parse(word) for word in (ends[0], ends[-1]))
        try:
            start, last = (int(word, 0) for word in where.split("-"))
        except ValueError:
            start, last = 1, 0
        rights = {"": (True, True, False), "rw": (True, True, False), "r": (True, False, False), "w": (False, True, False),
                  "exclusion": (True, True, True)}.get(way)  # fmt: skip
        if first_id is None or last_id is None or last_id < first_id or len(ends) > 2 or rights is None:
            raise ValueError(f"{text!r} names no devices and rights; write 00:03.0,0x100000-0x1fffff,rw")
        if start % PAGE or (last + 1) % PAGE or not start <= last < 1 << 52:
            raise ValueError(f"{where!r} is no range of whole 4 KiB pages; write 0x100000-0x1fffff")
        return cls(start, last + 1, first_id, last_id, *rights)


@dataclass(frozen=True)
class IommuConfig:
    units: int = 1
    strict: bool = False
    """Caches keep what hardware may keep."""
    reserved: Sequence[Reserved] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.units <= MOST_UNITS:
            raise ValueError(f"{self.units} IOMMUs are not possible; choose 1 to {MOST_UNITS}")
