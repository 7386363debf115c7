"""Interrupt messages: who receives what (APM2 16.6), and the signals a local APIC gives its CPU."""

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Protocol


class DeliveryMode(IntEnum):
    """The MT field of ICR and LVT, and of I/O APIC and MSI messages (APM2 16.5)."""

    FIXED = 0
    LOWEST = 1
    SMI = 2
    REMOTE_READ = 3
    NMI = 4
    INIT = 5
    SIPI = 6
    EXTINT = 7


class CpuSignals(Protocol):
    """What a local APIC tells its CPU.  The CPU decides when each is taken (GIF, IF, shadows, intercepts).

    `extint(level)`: the ExtINT request is now `level`; its vector comes from the interrupt controller behind it.
    `changed()`: `Lapic.pending()` may answer differently from now on.
    """

    def nmi(self) -> None: ...

    def smi(self) -> None: ...

    def init(self) -> None: ...

    def sipi(self, vector: int) -> None: ...

    def extint(self, level: bool) -> None: ...

    def changed(self) -> None: ...


class Receiver(Protocol):
    """A local APIC as the bus sees it."""

    def matches(self, dest: int, logical: bool, wide: bool) -> bool: ...

    def accept(self, mode: DeliveryMode, vector: int, level: bool) -> None: ...

    def read_remote(self, offset: int) -> int | None: ...

    @property
    def enabled(self) -> bool: ...

    @property
    def accepts_fixed(self) -> bool: ...

    @property
    def arbitration_priority(self) -> int: ...


class ApicBus:
    """Carries messages between local APICs and from I/O APICs and MSIs.

    `eoi_listeners` are called with the vector at each EOI of a level-triggered interrupt, `doorbell_listeners` with the
    physical APIC ID of the CPU whose doorbell is rung (APM2 15.29.8.2).
    """

    def __init__(self) -> None:
        self.receivers: list[Receiver] = []
        self.eoi_listeners: list[Callable[[int], None]] = []
        self.doorbell_listeners: list[Callable[[int], None]] = []

    def deliver(
        self, vector: int, mode: DeliveryMode, dest: int, logical: bool, level: bool = False, wide: bool = False
    ) -> bool:
        """Send one message; `level` is its trigger mode; `wide` says that `dest` has 32 bits, not 8 (x2APIC sender).

        True if an APIC took it.
        """
        targets = [receiver for receiver in self.receivers if receiver.matches(dest, logical, wide)]
        return self.deliver_to(targets, vector, mode, level)

    def deliver_to(self, targets: Iterable[Receiver], vector: int, mode: DeliveryMode, level: bool) -> bool:
        """As `deliver`, to receivers already chosen.  Of equal arbitration priorities the first added wins."""
        if mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST):
            targets = [target for target in targets if target.accepts_fixed]
            if mode == DeliveryMode.LOWEST and targets:
                targets = [min(targets, key=_arbitration_priority)]
                mode = DeliveryMode.FIXED
        taken = False
        for target in targets:
            target.accept(mode, vector, level)
            taken = True
        return taken

    def end_of_interrupt(self, vector: int) -> None:
        for listener in self.eoi_listeners:
            listener(vector)

    def doorbell(self, apic_id: int) -> None:
        for listener in self.doorbell_listeners:
            listener(apic_id)


def _arbitration_priority(receiver: Receiver) -> int:
    return receiver.arbitration_priority
