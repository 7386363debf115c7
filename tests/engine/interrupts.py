"""Making interrupts arrive: at once from Python, as the local APIC would get them from the bus."""

from __future__ import annotations

from tests.engine.rig import Rig
from vmdbg.platform.apicbus import DeliveryMode

IF = 1 << 9


def enable_apic(rig: Rig) -> None:
    rig.cpu.lapic.write_mmio(0xF0, 4, 0x1FF)


def interrupt(rig: Rig, vector: int) -> None:
    """A fixed interrupt for the first CPU."""
    enable_apic(rig)
    rig.cpu.lapic.accept(DeliveryMode.FIXED, vector, False)
