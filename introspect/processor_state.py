"""What is known of a processor that is in no register: pending events, masks, and its interrupt controllers."""

from dataclasses import dataclass

__all__ = ["ApicState", "IoApicPin", "PicChip", "ProcessorState"]

APIC_ENABLE, X2APIC = 1 << 11, 1 << 10
"""Bits of APIC_BASE (APM2 16.3.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApicState:
    """A local APIC (APM2 16.3): registers, and IRR and ISR as numbers of 256 bits."""

    base: int
    spurious: int
    tpr: int
    irr: int
    isr: int
    lint0: int
    """The LVT entry of the 8259's pin."""
    id: int = 0

    @property
    def enabled(self) -> bool:
        return bool(self.base & APIC_ENABLE)

    @property
    def mode(self) -> str:
        return "disabled" if not self.enabled else "x2APIC" if self.base & X2APIC else "xAPIC"


@dataclass(frozen=True, slots=True)
class PicChip:
    """One 8259: the vector of its line 0; requests, mask, the lines whose service holds others back, and all by priority."""

    base: int
    irr: int
    imr: int
    isr: int
    order: tuple[int, ...] = tuple(range(8))


@dataclass(frozen=True, slots=True)
class IoApicPin:
    """A pin of the I/O APIC with an entry of fixed or lowest-priority delivery."""

    number: int
    vector: int
    masked: bool
    level: bool
    """Level-triggered."""
    waits: bool
    """Remote IRR: what it has sent has not been ended."""
    asks: bool
    """A device asks."""
    destination: int | None = None
    """The APIC ID; None if that is a logical one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorState:
    """What a processor holds that is in no register."""

    name: str
    gif: bool
    shadow: bool
    """The instruction before, as STI does, holds interrupts back for one boundary."""
    nmi_blocked: bool
    """Physical NMIs are masked, by one whose handler has not ended."""
    v_nmi_blocked: bool = False
    """In a guest with virtual NMIs: those are."""
    nmi_pending: bool
    apic: ApicState
    pic: tuple[PicChip, PicChip] | None = None
    """The master and the slave behind its line 2; None for a processor that they are not wired to."""
    ioapic: tuple[IoApicPin, ...] = ()
    smi_pending: bool = False
    init_pending: bool = False
    waits_for_sipi: bool = False
    held: bool = False
    """A debugger has its thread stand still while others run."""
    vmcb: int | None = None
    """Of the guest that it is in."""
    host_if: bool | None = None
    """In a guest: RFLAGS.IF of the hypervisor at VMRUN."""
    v_intr: int | None = None
    """In a guest: its V_INTR word as the processor has it."""
    avic_request: int | None = None
    """In a guest with AVIC: the vector that was found deliverable when the processor looked last; 0 if none."""
