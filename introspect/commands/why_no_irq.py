"""`why-no-irq`: what holds an interrupt back."""

from dataclasses import dataclass

from introspect.commands.context import Context
from introspect.commands.live import on_processor, processor_state, vmcb_registers
from introspect.commands.parameters import Candidate, Misfit, Parameter, parse_number
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, jsonable
from introspect.commands.which import HOST_OR_WHICH, find_vmcb
from introspect.interrupt_requests import Link
from introspect.interrupts import NMI, Delivery, Route, guest_delivery, host_delivery
from introspect.sources import Unreadable
from introspect.vmcb import VMCB_SIZE

__all__ = ["COMMANDS", "Chain"]


@dataclass(frozen=True, slots=True)
class Chain:
    """The way of an interrupt to a handler, and what blocks it."""

    who: str
    where: str
    """What it executes on, in words."""
    delivery: Delivery

    def text(self) -> str:
        found = self.delivery
        what = "NMIs" if found.vector == NMI else f"vector {found.vector:#x}" if found.vector is not None else "interrupts"
        lines = [f"{what} of {self.who}, {self.where}"]
        for route in found.routes:
            lines.append(f"{route.name}:")
            rows = [(_mark(link), link.name, link.section, link.value, link.note) for link in route.links]
            lines += columns([("", "link", "APM2", "is", ""), *rows], "  ")
        when = "the next VMRUN" if "VMRUN" in self.where else "the next instruction boundary"
        return "\n".join([*lines, *_verdict(found.route, when)])

    def json(self) -> object:
        found = self.delivery
        routes = [
            {"name": route.name, "requested": route.requested, "blocker": route.blocker and route.blocker.name,
             "links": jsonable(route.links)} for route in found.routes
        ]  # fmt: skip
        blocker = found.blocker
        return {"who": self.who, "where": self.where, "vector": found.vector, "route": found.route.name,
                "blocker": blocker and jsonable(blocker), "routes": routes}  # fmt: skip


def _mark(link: Link) -> str:
    return "?" if link.passes is None else "ok" if link.passes else "NO"


def _verdict(route: Route, when: str) -> list[str]:
    blocker = route.blocker
    if blocker is not None:
        also = [link.name for link in route.links if link.passes is False and link is not blocker]
        rest = [f"   then by {', '.join(also)}"] if also else []
        note = f": {blocker.note}" if blocker.note else ""
        return [f"-> {route.name}: blocked by {blocker.name} = {blocker.value}{note}", *rest]
    if route.unknown:
        names = ", ".join(link.name for link in route.unknown)
        return [f"-> {route.name}: nothing that is known blocks it, but {names} is not known"]
    return [f"-> {route.name}: nothing blocks it: it is taken at {when}"]


@dataclass(frozen=True)
class _Vector:
    """A vector, or `nmi`."""

    noun: str = "a vector, or nmi"

    def take(self, context: Context, words: list[str]) -> int:
        value = NMI if words[0].lower() == "nmi" else parse_number(words[0])
        if value is None or not 0 <= value <= 0xFF:
            raise Misfit("it must be a vector from 0 to 0xff, or nmi")
        words.pop(0)
        return value

    def complete(self, context: Context, prefix: str) -> tuple[Candidate, ...]:
        return (Candidate("nmi", "non-maskable interrupts"),)


_VECTOR = Parameter("VECTOR", _Vector(), optional=True, help="which one, 2 or nmi for NMIs; else any")


def _why(context: Context, arguments: Arguments) -> Chain:
    vector = arguments.get(_VECTOR)
    named = arguments.get(HOST_OR_WHICH)
    if named == context.host or (named is None and context.selected is None):
        return _of_host(context, vector)
    spa, owner, contents = find_vmcb(context, arguments, HOST_OR_WHICH)
    live = processor_state(context, spa)
    executes = on_processor(live, spa)
    registers = vmcb_registers(context, spa, contents)
    found = guest_delivery(contents, context.memory, registers, context.processor, live, executes, vector)
    where = f"on {live.name}" if live is not None and executes else "in the host: at its next VMRUN"
    return Chain(owner, where if live is not None else "as its VMCB has it: at its next VMRUN", found)


def _of_host(context: Context, vector: int | None) -> Chain:
    live = processor_state(context, None)
    guest, where = None, "as its registers are"
    if live is not None:
        where = f"on {live.name}"
        if live.vmcb is not None:
            where += ", which runs a guest"
            try:
                contents = context.memory.read(live.vmcb, VMCB_SIZE)
                guest = contents, vmcb_registers(context, live.vmcb, contents)
            except Unreadable:
                where += f" whose VMCB at {live.vmcb:#x} is no memory"
    registers = context.registers(context.host.number)
    return Chain(str(context.host), where, host_delivery(registers, live, guest, vector, context.memory, context.processor))


COMMANDS = (
    Command(
        "why-no-irq", _why, "Say why an interrupt is not taken: each link of its way, and the one that blocks it.",
        (_VECTOR, HOST_OR_WHICH),
        "Of a guest, the way of virtual interrupts (V_IRQ, or AVIC) and that of physical ones; with vector 2 or nmi, of NMIs.\n"
        "Of the hypervisor, from the APIC or the PIC to its IF. A link that lets it pass is ok, one that does not NO; ? is not\n"
        "known, as in a dump. Without --guest, the selected guest or the host.",
        ("why-no-irq --guest 2", "why-no-irq 0x30 --guest host"),
    ),
)  # fmt: skip
