"""Why an interrupt is not taken: the chain from who asks for it to the instruction boundary, link by link (APM2 15.17, 15.21).

Pure functions over a VMCB, memory, registers, and what is known of the processor (`ProcessorState`; None of it in a dump). A link
that is not known says so; the first that does not let the interrupt pass is the blocker.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from introspect.avic import APIC_ADDRESS, IRR, ISR, vectors
from introspect.exits import EVENT, ExitCode, describe_event
from introspect.intercepts import intercepted, words_of
from introspect.interrupt_requests import Link, above, link, request
from introspect.layout import Buffer
from introspect.processor_state import ProcessorState
from introspect.registers import RFLAGS
from introspect.rules import SVM_FEATURES, Processor, violations
from introspect.sources import Memory, Unreadable
from introspect.vmcb import INT_STATE, MISC_CTL, V_INTR, VMCB

__all__ = ["NMI", "Delivery", "Route", "guest_delivery", "host_delivery"]

NMI = 2
"""The vector that stands for NMIs."""
_INTR, _NMI_EVENT, _SOFT = 0, 2, 4
"""Event types (APM2 15.20)."""


@dataclass(frozen=True, slots=True)
class Route:
    """A way to a handler."""

    name: str
    requested: bool | None
    """Whether somebody asks for an interrupt this way."""
    links: tuple[Link, ...]

    @property
    def blocker(self) -> Link | None:
        return next((link for link in self.links if link.passes is False), None)

    @property
    def unknown(self) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.passes is None)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The ways to a handler; `vector` is the one that was asked about, if one was."""

    vector: int | None
    routes: tuple[Route, ...]

    @property
    def route(self) -> Route:
        """The one that matters: that is asked for and gets through, or is asked for at all; else the first."""
        asked = [route for route in self.routes if route.requested]
        return next((route for route in asked if route.blocker is None), (asked or list(self.routes))[0])

    @property
    def blocker(self) -> Link | None:
        return self.route.blocker


@dataclass(frozen=True, slots=True)
class _Guest:
    """A guest on its way: its VMCB, its registers, and the processor if it is on one."""

    vmcb: Buffer
    memory: Memory
    registers: Mapping[str, int]
    processor: Processor
    live: ProcessorState | None

    @property
    def v_intr(self) -> int:
        live = self.live.v_intr if self.live is not None else None
        return VMCB.read(self.vmcb, "v_intr") if live is None else live

    def field(self, name: str) -> int:
        return VMCB.read(self.vmcb, name)

    def has(self, feature: str) -> bool:
        return bool(self.processor.features & SVM_FEATURES.fields[feature])

    def intercepts(self, code: int) -> bool:
        return intercepted(words_of(self.vmcb), code)

    @property
    def flags(self) -> int:
        return self.registers.get("rflags", self.field("rflags"))

    @property
    def shadow(self) -> bool:
        return self.live.shadow if self.live is not None else bool(self.field("int_state") & INT_STATE.interrupt_shadow)

    @property
    def avic(self) -> bool:
        word = self.field("v_intr") & (V_INTR.avic_enable | V_INTR.x2avic_enable)
        return word == V_INTR.avic_enable and bool(self.field("misc_ctl") & MISC_CTL.np_enable) and self.has("AVIC")


def guest_delivery(
    vmcb: Buffer, memory: Memory, registers: Mapping[str, int], processor: Processor, live: ProcessorState | None,
    on_processor: bool, vector: int | None = None,
) -> Delivery:  # fmt: skip
    """Of a guest. `live` is the processor that it is on, or whose hypervisor runs it next; None if that is not known.

    `on_processor`: it executes; else what matters is its next VMRUN.
    """
    guest = _Guest(vmcb, memory, registers, processor, live if on_processor else None)
    if vector == NMI:
        virtual = Route("virtual NMI", *_virtual_nmi(guest))
        physical = Route("physical NMI", *_physical_nmi(live, guest))
        return Delivery(vector, (virtual, physical))
    first = Route("AVIC", *_avic(guest, vector)) if guest.avic else Route("virtual interrupt", *_virtual(guest, vector))
    return Delivery(vector, (first, Route("physical interrupt", *_physical(live, guest, registers, vector, for_host=False))))


def host_delivery(
    registers: Mapping[str, int], live: ProcessorState | None, guest: tuple[Buffer, Mapping[str, int]] | None = None,
    vector: int | None = None, memory: Memory | None = None, processor: Processor | None = None,
) -> Delivery:  # fmt: skip
    """Of the hypervisor. `guest`: VMCB and registers of the guest that is on its processor."""
    inside = None
    if guest is not None and memory is not None and live is not None:
        inside = _Guest(guest[0], memory, guest[1], processor or Processor(), live)
    if vector == NMI:
        return Delivery(vector, (Route("NMI", *_physical_nmi(live, inside, for_host=True)),))
    return Delivery(vector, (Route("interrupt", *_physical(live, inside, registers, vector, for_host=True)),))


_Found = tuple[bool | None, tuple[Link, ...]]


# What several ways have


def _entered(guest: _Guest, vector: int | None, kind: int) -> Iterator[Link]:
    """Links of a guest that has yet to be entered: VMRUN, and the events that come first (APM2 15.20, 15.7.2)."""
    if guest.live is not None:
        return
    broken = [one.rule.id for one in violations(guest.vmcb, guest.processor, guest.memory) if one.rule.fatal]
    value = f"refuses the VMCB: {', '.join(broken)}" if broken else "enters the guest"
    yield link("VMRUN", "15.5.1", value, not broken, "`vmrun why` tells what to change")
    injected, cut = guest.field("eventinj"), guest.field("exitintinfo")
    yield link("EVENTINJ", "15.20", describe_event(injected), not injected & EVENT.v,
               "it is delivered first, and behind an interrupt gate its handler begins with IF clear")  # fmt: skip
    lost = _is(cut, kind, vector) and not injected & EVENT.v
    note = "its delivery was cut short by the exit, and it is lost unless the hypervisor puts it into EVENTINJ"
    yield link("EXITINTINFO", "15.7.2", describe_event(cut), not lost, note)


def _is(event: int, kind: int, vector: int | None) -> bool:
    """Whether EVENTINJ or EXITINTINFO holds such an event."""
    return bool(event & EVENT.v) and EVENT.get(event, "type") == kind and (vector is None or event & EVENT.vector == vector)


def _injection(guest: _Guest, vector: int | None, kind: int) -> _Found | None:
    """An event that the next VMRUN delivers, whatever else there is."""
    event = guest.field("eventinj")
    if guest.live is not None or not (_is(event, kind, vector) or (kind == _INTR and _is(event, _SOFT, vector))):
        return None
    refused = next(iter(_entered(guest, vector, kind)))
    return True, (Link("EVENTINJ", "15.20", describe_event(event), True, "VMRUN delivers it whatever IF and GIF are"), refused)


def _gif(guest: _Guest) -> Link:
    if guest.live is None:
        return Link("GIF", "15.17", "VMRUN sets it")
    gif = guest.live.gif
    return link("GIF", "15.17", f"{int(gif)}", gif, "the guest's CLGI has cleared it: intercept CLGI, or give the guest a V_GIF")


def _v_gif(guest: _Guest) -> Link:
    word = guest.v_intr
    if not word & V_INTR.v_gif_enable or not guest.has("vGIF"):
        return Link("V_GIF", "15.33.2", "not used")
    on = bool(word & V_INTR.v_gif)
    return link("V_GIF", "15.33.2", f"{int(on)}", on, "virtual events wait for the guest's STGI")


def _shadow(on: bool) -> Link:
    return link("interrupt shadow", "15.21.5", f"{int(on)}", not on, "it ends behind the next instruction")


def _guest_if(guest: _Guest) -> Link:
    on = bool(guest.flags & RFLAGS.IF)
    return link("RFLAGS.IF", "15.21.1", f"{int(on)}", on, "the guest has interrupts off: they wait for its STI, POPF or IRET")


def _held(live: ProcessorState | None) -> Iterator[Link]:
    if live is not None and live.held:
        yield Link("debugger", "-", "the thread is held", False, "let it go on")


def _leaves(guest: _Guest, code: ExitCode, what: str) -> Link:
    """An intercept that gives the hypervisor the event in the guest's place."""
    on = guest.intercepts(code)
    return link(f"intercept {code.name}", "15.13", f"{int(on)}", not on, f"#VMEXIT {code.name} in its place: {what}")


# Virtual interrupts (APM2 15.21.4)


def _virtual(guest: _Guest, vector: int | None) -> _Found:
    injected = _injection(guest, vector, _INTR)
    if injected is not None:
        return injected
    word = guest.v_intr
    given, requested = V_INTR.get(word, "v_intr_vector"), bool(word & V_INTR.v_irq)
    wanted = requested and vector in (None, given)
    note = "" if wanted else "the hypervisor asks for none: it sets V_IRQ and V_INTR_VECTOR, or injects with EVENTINJ"
    if requested and not wanted:
        note = f"it is {given:#x} that V_IRQ asks for"
    value = f"1, vector {given:#x}" if requested else "0"
    links = [Link("V_IRQ", "15.21.4", value, wanted, note), *_entered(guest, vector, _INTR), _gif(guest), _v_gif(guest)]
    links += [_v_tpr(word), _guest_if(guest), _shadow(guest.shadow), *_held(guest.live)]
    links.append(_leaves(guest, ExitCode.VINTR, "the hypervisor has asked to be told when the guest can take one"))
    cut = _is(guest.field("exitintinfo"), _INTR, vector) and guest.live is None
    return wanted or cut, tuple(links)


def _v_tpr(word: int) -> Link:
    priority, tpr = V_INTR.get(word, "v_intr_prio"), word & 0xF
    if word & V_INTR.v_ign_tpr:
        return Link("V_INTR_PRIO", "15.21.4", f"{priority:#x}, V_IGN_TPR is 1")
    note = "it must be above V_TPR: the guest lowers its CR8, or the hypervisor raises V_INTR_PRIO or sets V_IGN_TPR"
    return link("V_INTR_PRIO", "15.21.4", f"{priority:#x}, V_TPR {tpr:#x}", priority > tpr, note)


# AVIC (APM2 15.29)


def _avic(guest: _Guest, vector: int | None) -> _Found:
    injected = _injection(guest, vector, _INTR)
    if injected is not None:
        return injected
    spa = guest.field("avic_backing_page") & APIC_ADDRESS
    rest = [*_entered(guest, vector, _INTR), _gif(guest)]
    tail = [_guest_if(guest), _shadow(guest.shadow), *_held(guest.live)]
    tail.append(_leaves(guest, ExitCode.VINTR, "the hypervisor has asked to be told when the guest can take one"))
    try:
        page = guest.memory.read(spa, 0x1000)
    except Unreadable:
        return None, (Link("backing page", "15.29.3", f"no memory at spa {spa:#x}", None), *rest, *tail)
    requests, serviced = vectors(page, IRR), max(vectors(page, ISR).bit_length() - 1, 0)
    highest = max(requests.bit_length() - 1, 0)
    found = vector if vector is not None and requests >> vector & 1 else highest if vector is None else 0
    shown = ", ".join(f"{n:#x}" for n in range(255, -1, -1) if requests >> n & 1) or "empty"
    note = "nobody has put it into the backing page: V_IRQ does not count with AVIC"
    links = [link("IRR", "15.29.3.1", shown, bool(found), note)]
    links += rest
    tpr = guest.v_intr & 0xF
    links.append(above("V_TPR", "15.29.3.1", found, tpr << 4, f"V_TPR {tpr:#x}", "the guest lowers its TPR"))
    links.append(above("ISR", "15.29.3.1", found, serviced, f"{serviced:#x} is in service" if serviced else "empty",
                        f"the guest's EOI of {serviced:#x} comes first"))  # fmt: skip
    live = guest.live
    if live is not None and live.avic_request is not None:
        looked = bool(live.avic_request) or not (highest >> 4 > max(tpr, serviced >> 4))
        note = "the processor looks at VMRUN, and when who sets IRR rings the doorbell (MSR C001_011B)"
        value = f"found {live.avic_request:#x}" if live.avic_request else "found none"
        links.append(link("last look at the page", "15.29.8", value, looked, note))
    return bool(found), (*links, *tail)


# Physical interrupts (APM2 15.21.1, chapter 16)


def _physical(
    live: ProcessorState | None, guest: _Guest | None, registers: Mapping[str, int], vector: int | None, *, for_host: bool
) -> _Found:
    if live is None:
        link = Link("request", "16.6", "not known: there is no APIC to look at", None)
        return None, (link, *_to_whom(None, guest, registers, for_host=for_host))
    if live.waits_for_sipi:
        links: list[Link] = [Link("start-up", "16.7.1", "waits for a SIPI", False, "another processor starts it")]
    else:
        links = []
    requested, way = request(live, vector)
    links += way
    links += _to_whom(live, guest, registers, for_host=for_host)
    return requested, tuple(links)


def _to_whom(
    live: ProcessorState | None, guest: _Guest | None, registers: Mapping[str, int], *, for_host: bool
) -> Iterator[Link]:
    """From the processor's pins on: GIF, IF, the shadow, and who gets it."""
    if live is not None:
        if guest is None or guest.live is not None:
            yield _host_gif(live)
        elif not for_host:
            yield Link("GIF", "15.17", "VMRUN sets it")
        events = (("INIT", live.init_pending), ("an SMI", live.smi_pending), ("an NMI", live.nmi_pending))
        first = [name for name, on in events if on]
        if first:
            yield Link("other events", "8.5", f"{' and '.join(first)} pending", True, "comes first")
    yield _which_if(live, guest, registers)
    if guest is not None:
        yield _shadow(guest.shadow)
    elif live is not None:
        yield _shadow(live.shadow)
    yield from _held(live)
    if guest is None:
        return
    if not for_host:
        yield _leaves(guest, ExitCode.INTR, "it is the hypervisor's, which may pass it on with EVENTINJ or V_IRQ")
    elif not guest.intercepts(ExitCode.INTR):
        yield Link("intercept INTR", "15.13.1", "0", False, "the guest that runs takes it through its own IDT: intercept INTR")
    else:
        yield Link("intercept INTR", "15.13.1", "1", True, "the guest exits, and the hypervisor takes it behind STGI with IF set")


def _which_if(live: ProcessorState | None, guest: _Guest | None, registers: Mapping[str, int]) -> Link:
    """The IF that gates physical interrupts: with V_INTR_MASKING the host's (APM2 15.21.1)."""
    if guest is not None and guest.field("v_intr") & V_INTR.v_intr_masking:
        on = live.host_if if live is not None and guest.live is not None else None
        value = "not known before VMRUN" if on is None else str(int(on))
        note = "V_INTR_MASKING is 1, so the hypervisor's IF at VMRUN counts: it runs STI before CLGI"
        return link("host RFLAGS.IF", "15.21.1", value, on is not False, note)
    if guest is not None:
        return _guest_if(guest)
    if "rflags" not in registers:
        return Link("RFLAGS.IF", "8.5", "not known", None)
    on = bool(registers["rflags"] & RFLAGS.IF)
    return link("RFLAGS.IF", "8.5", f"{int(on)}", on, "interrupts are off: they wait for STI, POPF or IRET")


def _host_gif(live: ProcessorState) -> Link:
    return link("GIF", "15.17", f"{int(live.gif)}", live.gif, "it waits for STGI; #VMEXIT clears GIF")


# NMIs (APM2 15.21.10)


def _virtual_nmi(guest: _Guest) -> _Found:
    injected = _injection(guest, None, _NMI_EVENT)
    if injected is not None:
        return injected
    word = guest.v_intr
    used = bool(word & V_INTR.v_nmi_enable) and guest.has("VNMI")
    pending = used and bool(word & V_INTR.v_nmi)
    cut = _is(guest.field("exitintinfo"), _NMI_EVENT, None) and guest.live is None
    if not used:
        note = "without virtual NMIs the hypervisor injects them with EVENTINJ, type 2: it has not"
        return cut, (link("V_NMI_ENABLE", "15.21.10", "0", cut, note), *_entered(guest, None, _NMI_EVENT))
    note = "the hypervisor has set none: V_NMI asks for one"
    links = [link("V_NMI", "15.21.10", f"{int(pending)}", pending, note), *_entered(guest, None, _NMI_EVENT)]
    links += [_gif(guest), _v_gif(guest)]
    blocked = guest.live.v_nmi_blocked if guest.live is not None else bool(word & V_INTR.v_nmi_mask)
    note = "the guest is in an NMI handler: its IRET ends that"
    links.append(link("V_NMI_BLOCKING", "15.21.10", f"{int(blocked)}", not blocked, note))
    links += [_shadow(guest.shadow), *_held(guest.live)]
    return pending or cut, tuple(links)


def _physical_nmi(live: ProcessorState | None, guest: _Guest | None, *, for_host: bool = False) -> _Found:
    if live is None:
        return None, (Link("request", "8.5", "not known: there is no processor to look at", None),)
    pending, blocked = live.nmi_pending, live.nmi_blocked
    links = [link("NMI pending", "8.5", f"{int(pending)}", pending, "nobody asks for one")]
    entering = guest is not None and guest.live is None
    links.append(Link("GIF", "15.17", "VMRUN sets it") if entering and not for_host else _host_gif(live))
    links.append(link("NMI mask", "8.5", f"{int(blocked)}", not blocked, "an NMI handler has not ended: its IRET does"))
    links.append(_shadow(live.shadow if guest is None else guest.shadow))
    links += _held(live)
    if guest is not None and not for_host:
        links.append(_leaves(guest, ExitCode.NMI, "it is the hypervisor's, which may pass it on with EVENTINJ or V_NMI"))
    elif guest is not None and not guest.intercepts(ExitCode.NMI):
        note = "the guest that runs takes it through its own IDT: intercept NMI"
        links.append(Link("intercept NMI", "15.13.2", "0", False, note))
    return pending, tuple(links)
