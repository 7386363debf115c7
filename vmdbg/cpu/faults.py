"""Events of the processor, and how faults travel through our own code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from introspect.paging import NestedFault

DE, DB, NMI, BP, OF, BR, UD, NM, DF, TS, NP, SS, GP, PF, MF, AC, MC, XF, SX = (
    *range(9), *range(10, 15), 16, 17, 18, 19, 30,
)  # fmt: skip

CP, VC = 21, 29
"""Nothing here raises them, but they can be injected."""
CONTRIBUTORY = frozenset((DE, TS, NP, SS, GP, CP, VC, SX))
"""APM2 table 8-2; #PF is a class of its own."""
WITH_ERROR_CODE = frozenset((DF, TS, NP, SS, GP, PF, AC, SX))


class Kind(IntEnum):
    """The event types of EVENTINJ and EXITINTINFO (APM2 15.20)."""

    INTR = 0
    NMI = 2
    EXCEPTION = 3
    SOFTWARE = 4


@dataclass(frozen=True, slots=True)
class Event:
    """An interrupt or exception on its way through the IDT."""

    vector: int
    kind: Kind
    error: int | None = None
    address: int | None = None
    """What CR2 becomes, for #PF."""
    length: int = 0
    """Of the instruction that asked for it: RIP is already past it, and goes back if a software event cannot be delivered."""
    trap: bool = False
    """RIP is past the instruction that caused it: RFLAGS.RF is not set in the image (APM2 3.1.6)."""

    @property
    def software(self) -> bool:
        """Asked for by INT n, INT3 or INTO: the gate's DPL is checked (APM2 8.6.1; 15.20 for injected ones)."""
        return self.kind == Kind.SOFTWARE or (self.kind == Kind.EXCEPTION and self.vector in (BP, OF))

    @property
    def restarts(self) -> bool:
        """Its handler returns to the instruction that raised it: RFLAGS.RF is saved as 1 (APM2 3.1.6)."""
        return self.kind == Kind.EXCEPTION and not self.trap and not self.software and self.vector != DF

    @property
    def external(self) -> int:
        """EXT, bit 0 of the error codes that its delivery may raise."""
        return 0 if self.software else 1

    def encode(self) -> int:
        """The form of EXITINTINFO: vector, type, EV, V and error code."""
        value = self.vector | self.kind << 8 | 1 << 31
        return value if self.error is None else value | 1 << 11 | self.error << 32


class CpuFault(Exception):
    """An exception that the present operation raises."""

    def __init__(self, vector: int, error: int | None = None, address: int | None = None) -> None:
        super().__init__(vector, error, address)
        self.vector = vector
        self.error = error
        self.address = address
        self.committed = False
        """A task switch has gone too far to go back: the fault is the new task's."""

    def event(self) -> Event:
        return Event(self.vector, Kind.EXCEPTION, self.error, self.address)


class WatchedAccess(Exception):
    """An instruction of ours is about to access a watched page: nothing of it is done."""

    def __init__(self, spa: int, write: bool) -> None:
        super().__init__(spa, write)
        self.spa = spa
        self.write = write


class NestedPageFault(Exception):
    """A nested fault on an access of ours for a guest."""

    def __init__(self, fault: NestedFault) -> None:
        super().__init__(fault)
        self.fault = fault
