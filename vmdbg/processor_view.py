"""What a processor of the machine holds that is in no register, as `introspect` asks for it.  Nothing here has side effects."""

from __future__ import annotations

from collections.abc import Iterator

from introspect.processor_state import ApicState, IoApicPin, PicChip, ProcessorState
from vmdbg.cpu.processor import Processor
from vmdbg.platform import lapic
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.ioapic import REDIRECTION, IoApic
from vmdbg.platform.msrs import HWCR
from vmdbg.platform.pic import Chip, Pic


def _bank(apic: lapic.Lapic, offset: int) -> int:
    """ISR or IRR as one number."""
    return sum(apic.peek(offset + 0x10 * n) << 32 * n for n in range(8))


def _apic(apic: lapic.Lapic) -> ApicState:
    return ApicState(
        base=apic.base, spurious=apic.peek(lapic.SPIV), tpr=apic.tpr, irr=_bank(apic, lapic.IRR),
        isr=_bank(apic, lapic.ISR), lint0=apic.peek(lapic.Lvt.LINT0), id=apic.apic_id,
    )  # fmt: skip


def _chip(chip: Chip) -> PicChip:
    return PicChip(chip.base, chip.irr, chip.imr, chip.blocking, chip.order)


def _pins(ioapic: IoApic) -> Iterator[IoApicPin]:
    """Those with a vector."""
    for number, entry in enumerate(ioapic.table):
        if REDIRECTION.get(entry, "VECTOR") >= 16 and REDIRECTION.get(entry, "MODE") in (DeliveryMode.FIXED, DeliveryMode.LOWEST):
            yield IoApicPin(
                number, REDIRECTION.get(entry, "VECTOR"), bool(entry & REDIRECTION.MASK), bool(entry & REDIRECTION.LEVEL),
                bool(entry & REDIRECTION.REMOTE_IRR), bool(ioapic.pins >> number & 1),
                None if entry & REDIRECTION.LOGICAL else REDIRECTION.get(entry, "DESTINATION"),
            )  # fmt: skip


def processor_state(cpu: Processor, pic: Pic, ioapic: IoApic) -> ProcessorState:
    guest = cpu.guest
    return ProcessorState(
        name=f"CPU {cpu.index}", gif=cpu.gif, shadow=cpu.state.shadow, nmi_blocked=cpu.nmi_masked, nmi_pending=cpu.nmi_pending,
        apic=_apic(cpu.lapic), pic=(_chip(pic.master), _chip(pic.slave)) if cpu.index == 0 else None,
        ioapic=tuple(_pins(ioapic)),
        smi_pending=cpu.smi_pending, init_pending=cpu.init_pending, waits_for_sipi=cpu.wait_for_sipi, held=bool(cpu.hold),
        v_nmi_blocked=guest is not None and guest.v_nmi_enabled and cpu.state.nmi_blocked,
        vmcb=None if guest is None else guest.vmcb, host_if=None if guest is None else guest.host_if,
        v_intr=None if guest is None else guest.v_intr & ~0xFF | guest.v_tpr & 0xFF,
        avic_request=None if guest is None or guest.avic is None else guest.avic.request,
    )  # fmt: skip


def hidden_registers(cpu: Processor, *, in_guest: bool) -> dict[str, int]:
    """What decides about instructions besides the registers: see `introspect.subject.Subject`."""
    armed = in_guest and cpu.monitored is not None and not cpu.stored_to(cpu.monitored)
    return {"hwcr": cpu.msrs.values[HWCR], "monitor_armed": int(armed), "smm": int(cpu.smm is not None and not in_guest)}
