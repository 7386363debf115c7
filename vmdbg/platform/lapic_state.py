"""What a local APIC holds, in words."""

from collections.abc import Iterator

from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.bus import State
from vmdbg.platform.lapic import (
    CURRENT_COUNT,
    DFR,
    DIVIDE,
    ESR,
    ICRH,
    ICRL,
    INITIAL_COUNT,
    IRR,
    ISR,
    LDR,
    LINTS,
    LVT_MASK,
    LVT_RIR,
    LVT_TGM,
    SPIV,
    SPIV_ASE,
    TMR,
    VERSION,
    Lapic,
    Lvt,
    TimerMode,
)

__all__ = ["lapic_state"]


def _vectors(lapic: Lapic, bank: int) -> str:
    bits = sum(lapic.peek(bank + 0x10 * n) << 32 * n for n in range(8))
    return " ".join(f"{vector:#x}" for vector in range(256) if bits >> vector & 1) or "none"


def _lvt(lapic: Lapic, entry: Lvt) -> str:
    value = lapic.peek(entry)
    mode = DeliveryMode(value >> 8 & 7)
    words = [f"vector {value & 0xFF:#x}" if mode == DeliveryMode.FIXED else mode.name]
    if entry == Lvt.TIMER:
        words.append(TimerMode(value >> 17 & 3).name.lower().replace("_", " "))
    if entry in LINTS:
        words += [word for bit, word in ((LVT_TGM, "level"), (LVT_RIR, "in service")) if value & bit]
    return ", ".join([*words, "masked" if value & LVT_MASK else "active"])


def _timer(lapic: Lapic) -> Iterator[tuple[str, int | str]]:
    divide = lapic.peek(DIVIDE)
    divisor = 1 << ((divide & 3 | divide >> 1 & 4) + 1 & 7)
    yield "timer count", f"{lapic.peek(CURRENT_COUNT)} of {lapic.peek(INITIAL_COUNT)}, divided by {divisor}"
    if lapic.tsc_deadline:
        yield "TSC deadline", lapic.tsc_deadline


def lapic_state(lapic: Lapic) -> State:
    """Of one CPU's, by what the registers are for."""
    mode = "x2APIC" if lapic.x2apic else "xAPIC" if lapic.enabled else "disabled (APIC_BASE.AE)"
    pending, spurious = lapic.pending(), lapic.peek(SPIV)
    destination = {"LDR": lapic.peek(LDR)} if lapic.x2apic else {"LDR": lapic.peek(LDR), "DFR": lapic.peek(DFR)}
    return {
        "mode": f"{mode}, at {lapic.base & ~0xFFF:#x}{', boot processor' if lapic.bsp else ''}",
        "ID": lapic.apic_id, "version": lapic.peek(VERSION),
        "spurious vector": f"{spurious & 0xFF:#x}, {'enabled' if spurious & SPIV_ASE else 'disabled by software'}",
        "TPR": lapic.tpr, "PPR": lapic.ppr, **destination,
        "requested (IRR)": _vectors(lapic, IRR), "in service (ISR)": _vectors(lapic, ISR),
        "level-triggered (TMR)": _vectors(lapic, TMR),
        "deliverable": "none" if pending is None else f"vector {pending:#x}",
        **{f"LVT {entry.name}": _lvt(lapic, entry) for entry in Lvt}, **dict(_timer(lapic)),
        "ICR": lapic.peek(ICRH) << 32 | lapic.peek(ICRL), "errors (ESR)": lapic.peek(ESR),
    }  # fmt: skip
