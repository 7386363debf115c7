"""Commands on what happened at world switches: who changed a VMCB, forgotten clean bits and flushes, leaks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING

from introspect.commands import Arguments, Command, Context
from introspect.commands.context import HOST_NUMBER, GuestView
from introspect.commands.parameters import Choice, Field, Flag, Guest, Number, Parameter
from introspect.commands.render import columns, jsonable, size_text
from introspect.tlb_audit import Audit, Stale, audit
from introspect.vmcb import VMCB
from introspect.vmcb_history import By, Change, Forgotten, Image, changes, forgotten, forgotten_in, net
from vmdbg.catching import Set
from vmdbg.leakwatch import LeakWatch, unswitched
from vmdbg.results import Text
from vmdbg.svm.images import MOST_TRIPS
from vmdbg.svm.tlb_view import held_by

if TYPE_CHECKING:
    from vmdbg.history import KnownGuest
    from vmdbg.monitor import Monitor

_GUEST = Parameter("GUEST", Guest(), optional=True, option="--guest", help="the selected one if none is named")
_ANY = Parameter("GUEST", Guest(), optional=True, option="--guest", help="all of them if none is named")
_WHOSE = Parameter("GUEST", Guest(), optional=True, option="--guest", only_option=True, help="the selected one if none is named")
_N = Parameter("N", Number(1), optional=True, help="number of the #VMEXIT to begin with; else the one before the last")
_M = Parameter("M", Number(1), optional=True, help="number of the #VMEXIT to end with; else what is known last")
_NET = Parameter("net", Flag(), optional=True, option="--net", help="only fields that are others in the end, in one line each")
_FIELD = Parameter("FIELD", Field())
_TRIPS = Parameter("N", Number(0, MOST_TRIPS), optional=True, help="how many VMRUNs with their #VMEXITs; 0 for none")
_SWITCH = Parameter("on|off", Choice(("on", "off")), optional=True)


@dataclass(frozen=True, slots=True)
class VmcbDiff:
    """Changes of one VMCB, step by step. `first` and `last` are #VMEXITs."""

    owner: str
    vmcb: int
    first: int
    last: int
    known: tuple[int, ...]
    """The #VMEXITs whose VMCBs are kept."""
    steps: tuple[Change, ...]
    symbols: dict[int, str]
    """Of where the host's VMRUNs are."""
    net: bool

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"VMCB at {self.vmcb:#x}, {self.owner}: behind #VMEXIT {self.first} to #VMEXIT {self.last}"
        if not self.steps:
            yield "no field has changed"
        if self.net:
            yield from columns(((name, *self._values(name, found[0].old, found[-1].new), f"by {_whom(found)}")
                                for name, found in net(self.steps).items()), "  ")  # fmt: skip
            return
        for (time, number, rip), steps in groupby(self.steps, lambda step: (step.time, step.number, step.rip)):
            found = list(steps)
            symbol = f" <{self.symbols[rip]}>" if self.symbols.get(rip) else ""
            for by in dict.fromkeys(step.by for step in found):
                if by in (By.SOFTWARE, By.VMSAVE):
                    yield f"behind #VMEXIT {number}, before the VMRUN at {rip:#x}{symbol} (time {time}), by {by}:"
                else:
                    yield f"at #VMEXIT {number} (rIP {rip:#x}, time {time}), by {by}:"
                mine = [step for step in found if step.by == by]
                width = max(len(step.field) for step in mine)
                for step in mine:
                    old, new = self._values(step.field, step.old, step.new)
                    yield f"  {step.field.ljust(width)}  {old} -> {new}"

    def _values(self, name: str, old: int, new: int) -> tuple[str, str]:
        return VMCB.describe(name, old), VMCB.describe(name, new)

    def json(self) -> object:
        return jsonable(self)


def _whom(steps: Iterable[Change]) -> str:
    return ", then ".join(dict.fromkeys(step.by for step in steps))


@dataclass(frozen=True, slots=True)
class CleanBit:
    """A forgotten clean bit of a VMCB: at a VMRUN of the past, or if VMRUN came `now`."""

    guest: int
    vmcb: int
    now: bool
    time: int
    rip: int
    """Of the VMRUN; 0 if it has not come."""
    cpu: int
    """Which CPU has run the VMCB last."""
    strict: bool
    """It does use what it remembers; else a processor might."""
    forgotten: Forgotten


@dataclass(frozen=True, slots=True)
class CleanBits:
    checked: int
    """VMRUNs, with those that might come now."""
    strict: bool
    found: tuple[CleanBit, ...]

    @property
    def exit_status(self) -> int:
        return int(bool(self.found))

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for one in self.found:
            bit, name = one.forgotten.clean, one.forgotten.name
            when = "if VMRUN came now" if one.now else f"at the VMRUN at {one.rip:#x}, time {one.time}"
            who = f"CPU {one.cpu} {'uses' if one.strict else 'may use'}"
            values = f"{one.forgotten.field} {one.forgotten.cached:#x}, in memory {one.forgotten.value:#x}"
            yield (
                f"VMCB at {one.vmcb:#x} of guest {one.guest}, {when}: {who} {values}: clean bit {bit} ({name}) says that nothing "
                "changed. Clear it with the change (APM2 15.15)"
            )
        if not self.checked:
            yield "No VMRUN is known to look at; `vmcb record` says how many are kept"
        elif not self.found:
            yield f"{self.checked} VMRUNs: no field was changed under a set clean bit"
        if not self.strict:
            yield "Processors read every field here; with `vmdbg run --vmcb-cache strict` they use what they remember"

    def json(self) -> object:
        return jsonable(self)


@dataclass(frozen=True, slots=True)
class TlbAudit:
    """Without strict TLBs nothing was looked at."""

    audit: Audit
    strict: bool

    @property
    def exit_status(self) -> int:
        return int(bool(self.audit.stale))

    def text(self) -> str:
        if not self.strict:
            return "TLBs hold nothing here that the tables do not say: start with `vmdbg run --tlb strict` for those that do"
        lines = [_stale_text(one) for one in self.audit.stale]
        if not lines:
            lines.append(f"{self.audit.checked} translations are held, and the tables say the same of each")
        if not self.audit.complete:
            lines.append(f"Only {self.audit.checked} translations were looked at; name a guest for the others")
        return "\n".join(lines)

    def json(self) -> object:
        found = [
            {"cpu": one.held.cpu, "asid": one.held.asid, "nested": one.held.nested, "address": one.address,
             "size": one.held.size, "held": one.held.spa + one.address - one.held.base, "now": one.spa, "why": one.why,
             "in_nested": one.in_nested, "vmcb": one.held.vmcb, "remedy": one.remedy} for one in self.audit.stale
        ]  # fmt: skip
        return {"strict": self.strict, "checked": self.audit.checked, "complete": self.audit.complete, "stale": found}


def _stale_text(one: Stale) -> str:
    held = one.held
    kind, where = "gpa " * held.nested, held.spa + one.address - held.base
    now = f" (to {one.spa:#x})" if one.spa is not None and one.spa != where else ""
    tables = "nested tables" if one.in_nested or held.nested else "page tables"
    size = f", a page of {size_text(held.size)}" if held.size > 4096 else ""
    return (
        f"CPU {held.cpu} holds for ASID {held.asid} {kind}{one.address:#x} -> {where:#x}{size}: {one.why}{now}, in the {tables}. "
        f"Due: {one.remedy}"
    )


class SwitchCommands:
    """On one machine."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    @property
    def commands(self) -> tuple[Command, ...]:
        return (
            Command(
                "vmcb diff", self._diff, "Show which fields of a VMCB changed between #VMEXITs, and who changed them.",
                (_N, _M, _NET, _WHOSE),
                "By hardware: #VMEXIT has stored it. By software: the hypervisor, or a debugger, before VMRUN. A store while\n"
                "the guest ran is one that #VMEXIT does not make: by another CPU, a device, or the guest itself. The VMCB is\n"
                "kept for the last 16 VMRUNs of each guest; `vmcb record` changes that, `exits` has the numbers.",
                ("vmcb diff --guest 2", "vmcb diff 33 --guest 2 --net", "vmcb diff --guest 3 --json"),
            ),
            Command(
                "vmcb watch", self._watch, "Stop when a field of a VMCB has another value than at the last world switch.",
                (_FIELD, _ANY),
                "The stop says by whom: the processor at #VMEXIT, or software before VMRUN. It is `catch vmcb FIELD`, where\n"
                "conditions and counts may be added and which lists it; for the very store, watch the address in gdb.",
                ("vmcb watch n_cr3 2", "vmcb watch intercept_misc1"),
            ),
            Command(
                "vmcb record", self._record, "Say or choose for how many VMRUNs of each guest the VMCB is kept.", (_TRIPS,),
                "Each takes 2.3 KiB. What is kept so far goes.", ("vmcb record", "vmcb record --json"),
            ),
            Command(
                "clean-bits check", self._clean_bits, "Find fields that were changed without clearing their VMCB clean bit.",
                (_ANY,),
                "At the VMRUNs that are kept (`vmcb record`), and if VMRUN came now. With `vmdbg run --vmcb-cache strict` a CPU\n"
                "uses what it remembers of a VMCB; then the answer is what it remembers.",
                ("clean-bits check", "clean-bits check 2"),
            ),
            Command(
                "tlb audit", self._tlb, "Compare the translations that TLBs hold with what the tables say now.", (_ANY,),
                "Needs `vmdbg run --tlb strict`: without it, nothing is held that the tables do not say. Stale ones are flushes\n"
                "that are due, or were forgotten; `stop-on stale` stops where one is used.",
                ("tlb audit", "tlb audit 2"),
            ),
            Command(
                "leak record", self._leak_record, "Look at each world switch for what VMRUN does not switch, or no more.",
                (_SWITCH,),
                "Some thirty times slower meanwhile: world switches are made in Python. `leak check` tells what was seen.",
                ("leak record", "leak record off"),
            ),
        )  # fmt: skip

    def _guest(self, arguments: Arguments, parameter: Parameter[GuestView]) -> KnownGuest:
        return self.monitor.debugger.history.guests[arguments.guest_or_selected(parameter).number]

    def _guests(self, arguments: Arguments) -> list[KnownGuest]:
        known = self.monitor.debugger.history.guests
        chosen = arguments.get(_ANY)
        return [known[chosen.number]] if chosen is not None else [guest for guest in known.values() if not guest.gone]

    def _images(self, guest: KnownGuest) -> dict[int, list[Image]]:
        """By VMCB, each oldest first; that with the newest is last."""
        found: dict[int, list[Image]] = {}
        for image in guest.images.images() if guest.images is not None else ():
            found[image.vmcb] = [*found.pop(image.vmcb, []), image]
        return found

    def _diff(self, context: Context, arguments: Arguments) -> VmcbDiff:
        guest = self._guest(arguments, _WHOSE)
        images = self._images(guest)
        numbers = {vmcb: [image.number for image in kept if image.at_exit] for vmcb, kept in images.items()}
        first, last = arguments.get(_N), arguments.get(_M)
        vmcb = next((vmcb for vmcb, known in numbers.items() if first in known), None) if first else next(reversed(images), None)
        if vmcb is None or not numbers[vmcb]:
            known = ", ".join(str(number) for number in sorted(chain.from_iterable(numbers.values()))) or "none"
            raise arguments.error(
                str(first or guest.name), "its VMCB at this #VMEXIT is not kept",
                f"of {guest.name} those of {known} are; `vmcb record` keeps more from now on",
            )  # fmt: skip
        mine = numbers[vmcb]
        if first is None:
            first = mine[-2] if len(mine) > 1 else mine[-1]
        if last is not None and (last not in mine or last < first):
            raise arguments.error(
                str(last), f"it is no #VMEXIT of this VMCB behind {first}", f"choose from {', '.join(map(str, mine))}"
            )
        steps = changes(images[vmcb], first, last)
        symbols = self.monitor.symbols(HOST_NUMBER)
        names = {step.rip: symbols.name(step.rip) for step in steps} if symbols is not None else {}
        return VmcbDiff(guest.name, vmcb, first, last or mine[-1], tuple(mine), steps, names, arguments.given(_NET))

    def _watch(self, context: Context, arguments: Arguments) -> Set:
        guest = arguments.get(_ANY)
        words = ["vmcb", arguments[_FIELD], *(["guest", str(guest.number)] if guest is not None else [])]
        return self.monitor.catch.set(Arguments(context, self.monitor.registry.commands["catch"], words))

    def _record(self, context: Context, arguments: Arguments) -> Text:
        history = self.monitor.debugger.history
        trips = arguments.get(_TRIPS)
        if trips is not None:
            history.keep_images(trips)
        kept = f"for the last {history.trips} VMRUNs and #VMEXITs of each guest" if history.trips else "never"
        return Text(f"The VMCB is kept {kept}", {"trips": history.trips})

    def _clean_bits(self, context: Context, arguments: Arguments) -> CleanBits:
        machine = self.monitor.debugger.machine
        strict = any(cpu.vmcb_cache is not None for cpu in machine.cpus)
        checked, found = 0, list[CleanBit]()
        for guest in self._guests(arguments):
            images = self._images(guest)
            for vmcb, vcpu in guest.vcpus.items():
                kept = images.get(vmcb, [])
                checked += sum(not image.at_exit for image in kept[1:])
                for image, one in forgotten_in(kept):
                    found.append(CleanBit(guest.number, vmcb, False, image.time, image.rip, image.cpu, strict, one))
                if vcpu.running_on is not None:
                    continue
                now = machine.ram.read(vmcb, VMCB.size)
                caches: Iterable[tuple[int, bytes | None]]
                caches = [(cpu.index, cpu.vmcb_cache.held(vmcb)) for cpu in machine.cpus if cpu.vmcb_cache is not None]
                if not strict:
                    caches = [(kept[-1].cpu, kept[-1].contents)] if kept and kept[-1].at_exit else []
                for cpu, cached in caches:
                    if cached is not None:
                        checked += 1
                        time = machine.clock.now
                        found += [CleanBit(guest.number, vmcb, True, time, 0, cpu, strict, one) for one in forgotten(cached, now)]
        return CleanBits(checked, strict, tuple(found))

    def _tlb(self, context: Context, arguments: Arguments) -> TlbAudit:
        machine = self.monitor.debugger.machine
        chosen = arguments.get(_ANY)
        asid = chosen.asid if chosen is not None else None
        strict = any(cpu.tlb is not None for cpu in machine.cpus)
        return TlbAudit(audit(machine.ram, chain.from_iterable(held_by(cpu, asid) for cpu in machine.cpus)), strict)

    def _leak_record(self, context: Context, arguments: Arguments) -> Text:
        history, machine = self.monitor.debugger.history, self.monitor.debugger.machine
        switch = arguments.get(_SWITCH)
        if switch == "on":
            hosts = {cpu.index: unswitched(cpu) for cpu in machine.cpus if cpu.guest is None}
            history.witness = LeakWatch(history, hosts)
        elif switch == "off":
            history.witness = None
        watch = history.witness
        if not isinstance(watch, LeakWatch):
            return Text("World switches are not looked at; `leak record on` begins", {"switches": None})
        looked = watch.log.switches
        return Text(f"{looked} world switches looked at; `leak check` tells what was seen", {"switches": looked})
