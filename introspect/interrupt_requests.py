"""Who asks a processor for an interrupt, and whether it gets that far: the local APIC (APM2 16.6), the I/O APIC, the 8259s."""

from collections.abc import Iterator
from dataclasses import dataclass

from introspect.processor_state import ApicState, IoApicPin, PicChip, ProcessorState

__all__ = ["Link", "above", "link", "request"]

_SOFTWARE_ENABLE, _LVT_MASK, _EXTINT = 1 << 8, 1 << 16, 7
_CASCADE, _BROADCAST = 2, 0xFF


@dataclass(frozen=True, slots=True)
class Link:
    """One thing on the way: what it is, where the manual has it, what it is now, whether it lets the interrupt pass (None: not
    known), and what that means, or what to do about it."""

    name: str
    section: str
    value: str
    passes: bool | None = True
    note: str = ""


def link(name: str, section: str, value: str, passes: bool, note: str) -> Link:
    """One whose note is about why it does not pass."""
    return Link(name, section, value, passes, "" if passes else note)


def above(name: str, section: str, vector: int, than: int, value: str, remedy: str) -> Link:
    """The priority, bits 7:4 of the vector, must be above that of something (APM2 16.6.4)."""
    passes = not vector or vector >> 4 > than >> 4
    return link(name, section, value, passes, f"{vector:#x} has priority {vector >> 4:#x}, not above: {remedy}")



def request(live: ProcessorState, vector: int | None) -> tuple[bool, list[Link]]:
    """Whether somebody asks for it, or for any, and the links as far as the processor's pins."""
    pin = _pin(live, vector)
    if pin is not None:
        return _ioapic_way(live.apic, pin)
    return _pic_way(live, vector) if _by_pic(live, vector) else _apic_way(live.apic, vector)


def _pin(live: ProcessorState, vector: int | None) -> IoApicPin | None:
    """The pin of the I/O APIC that the interrupt would come from, if it has not got to the APIC yet."""
    apic = live.apic
    if vector is None:
        return None if apic.irr else next((pin for pin in live.ioapic if pin.asks and (pin.masked or pin.waits)), None)
    if (apic.irr | apic.isr) >> vector & 1:
        return None
    found = [pin for pin in live.ioapic if pin.vector == vector]
    return next((pin for pin in found if pin.asks), found[0] if found else None)


def _ioapic_way(apic: ApicState, pin: IoApicPin) -> tuple[bool, list[Link]]:
    kind = "level" if pin.level else "edge"
    links = [link("I/O APIC pin", "82093AA", f"pin {pin.number}, {kind}, vector {pin.vector:#x}: {int(pin.asks)}", pin.asks,
                  "the device does not ask")]  # fmt: skip
    lost = "" if pin.level else "; an edge that comes meanwhile is lost"
    links.append(link("I/O APIC mask", "82093AA", f"{int(pin.masked)}", not pin.masked, f"its entry clears bit 16{lost}"))
    if pin.level:
        note = f"it has sent {pin.vector:#x}, and waits for the EOI"
        links.append(link("remote IRR", "82093AA", f"{int(pin.waits)}", not pin.waits, note))
    if pin.destination not in (None, apic.id, _BROADCAST):
        links.append(Link("destination", "82093AA", f"APIC {pin.destination:#x}", False, f"this processor's is {apic.id:#x}"))
    elif pin.asks and not pin.masked and not pin.waits:
        note = "its edge has been taken, or came while nobody listened: the next one counts"
        links.append(Link("IRR", "16.6.3", "empty", False, note))
    return pin.asks, links


def _by_pic(live: ProcessorState, vector: int | None) -> bool:
    """Whether it comes from the 8259s rather than from the APIC's own registers."""
    if live.pic is None or (vector is None and live.apic.irr):
        return False
    master, slave = live.pic
    if vector is None:
        return bool(master.irr & ~(1 << _CASCADE) | slave.irr) or not live.apic.enabled
    if live.apic.irr >> vector & 1:
        return False
    return any(chip.base <= vector < chip.base + 8 for chip in live.pic) and not (live.apic.isr >> vector & 1)


def _apic_way(apic: ApicState, vector: int | None) -> tuple[bool, list[Link]]:
    highest = max(apic.irr.bit_length() - 1, 0)
    found = highest if vector is None else vector if apic.irr >> vector & 1 else 0
    links = [link("APIC", "16.3.1", apic.mode, apic.enabled, "APIC_BASE.AE is 0: WRMSR of 1Bh enables it")]
    shown = ", ".join(f"{n:#x}" for n in range(255, -1, -1) if apic.irr >> n & 1) or "empty"
    if not found and not apic.spurious & _SOFTWARE_ENABLE:
        links.append(Link("SVR", "16.4.7", f"{apic.spurious:#x}", False, "bit 8 is 0: the APIC accepts no interrupts; set it"))
    if not found and vector is not None and apic.isr >> vector & 1:
        note = "it has been taken: its handler has not written EOI, and the next one has not been asked for"
    else:
        note = "nobody has asked for it" if vector is not None else "nobody asks for one"
    links.append(link("IRR", "16.6.3", shown, bool(found), note))
    links.append(above("TPR", "16.6.4", found, apic.tpr, f"{apic.tpr:#x} (CR8 {apic.tpr >> 4:#x})", "software lowers CR8"))
    serviced = max(apic.isr.bit_length() - 1, 0)
    links.append(above("ISR", "16.6.4", found, serviced, f"{serviced:#x} is in service" if serviced else "empty",
                        f"the EOI of {serviced:#x} comes first"))  # fmt: skip
    if found and highest >> 4 > found >> 4:
        links.append(Link("other requests", "16.6.4", f"{highest:#x} has the higher priority", True, "it comes first"))
    return bool(found), links


def _pic_way(live: ProcessorState, vector: int | None) -> tuple[bool, list[Link]]:
    assert live.pic is not None
    master, slave = live.pic
    if vector is not None:
        number = next(n for n, chip in enumerate(live.pic) if chip.base <= vector < chip.base + 8)
        line = vector - live.pic[number].base
    else:
        line, number = next(((n, 0) for n in range(8) if master.irr >> n & 1 and n != _CASCADE), (0, 0))
        if not master.irr & ~(1 << _CASCADE) and slave.irr:
            line, number = (slave.irr & -slave.irr).bit_length() - 1, 1
    chip = live.pic[number]
    requested = bool(chip.irr >> line & 1)
    irq = line + 8 * number
    links = [link("PIC request", "8259", f"IRQ {irq}: {int(requested)}", requested, "the device does not ask")]
    links += _chip_links(chip, line, f"IRQ {irq}")
    if number:
        links += _chip_links(master, _CASCADE, "IRQ 2, the slave's")
    apic = live.apic
    if apic.enabled:
        passes = apic.lint0 & (_LVT_MASK | 7 << 8) == _EXTINT << 8
        value = f"{apic.lint0:#x}{', masked' * bool(apic.lint0 & _LVT_MASK)}"
        links.append(link("LINT0", "16.4.5", value, passes, "to let the PIC through it must be ExtINT, and not masked"))
    return requested, links


def _chip_links(chip: PicChip, line: int, name: str) -> Iterator[Link]:
    masked = bool(chip.imr >> line & 1)
    yield link("PIC mask", "8259", f"{name}: {int(masked)}", not masked, f"OCW1 clears bit {line} of {chip.imr:#x}")
    served = next((one for one in chip.order[: chip.order.index(line) + 1] if chip.isr >> one & 1), None)
    yield link("PIC in service", "8259", f"{name}: {chip.isr:#x}", served is None, f"the EOI of line {served} comes first")
