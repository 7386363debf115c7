"""What a search for VMCBs found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from introspect.scan.relations import Relations

__all__ = ["Area", "Evidence", "Found", "Scan"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Something that speaks for a page being what it looks like, or against it."""

    points: int
    """As many of `most` as it is worth here; none if it speaks against it."""
    most: int
    text: str


@dataclass(frozen=True, slots=True)
class Area:
    """A structure that a VMCB leads to."""

    kind: str
    """"IOPM", "MSRPM" or "nested root"."""
    spa: int
    text: str


@dataclass(frozen=True, slots=True)
class Found:
    """A page that looks like a VMCB or a host save area."""

    kind: str
    """"VMCB" or "HSAVE"."""
    spa: int
    evidence: tuple[Evidence, ...]
    areas: tuple[Area, ...] = ()
    inside: int | None = None
    """The VMCB whose nested tables map this page as memory of its guest: the guest's hypervisor made it."""
    runs_as: int | None = None
    """Of a VMCB inside a guest: that which the hypervisor outside runs in its place, if one has the same state."""

    @property
    def score(self) -> int:
        """Of 100."""
        most = sum(one.most for one in self.evidence)
        return 100 * sum(one.points for one in self.evidence) // most if most else 0


@dataclass(frozen=True, slots=True)
class Scan:
    """What a search found, by address."""

    found: tuple[Found, ...]
    doubtful: tuple[Found, ...]
    """Pages that have the form of a VMCB, but too little speaks for them."""
    bytes_read: int
    ended: str = ""
    """Why it did not look at everything, if it did not."""
    relations: Relations | None = field(default=None, repr=False)

    @property
    def vmcbs(self) -> tuple[Found, ...]:
        return tuple(one for one in self.found if one.kind == "VMCB")
