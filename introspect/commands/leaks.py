"""`leak check`: state that VMRUN does not switch, and what came through."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from introspect.commands.context import HOST_NUMBER, Context
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import jsonable
from introspect.commands.which import WHICH, find_vmcb
from introspect.leaks import Evidence, Leak, Possible, possible

__all__ = ["COMMANDS", "Leaks"]


@runtime_checkable
class _Witness(Protocol):
    """A context that looks at world switches if it is told to."""

    def leaks(self) -> tuple[Leak, ...] | None:
        """What was seen; None if nobody looks."""


@dataclass(frozen=True, slots=True)
class Leaks:
    """`seen` is None where world switches were not looked at."""

    owner: str
    vmcb: int
    possible: tuple[Possible, ...]
    seen: tuple[Leak, ...] | None
    live: bool

    @property
    def exit_status(self) -> int:
        return int(bool(self.seen))

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"VMCB at {self.vmcb:#x}, {self.owner}"
        if self.seen is None:
            how = "; `leak record on`, let it run, then ask again" if self.live else ": it is no live machine"
            yield f"seen: nobody has looked{how}"
        elif not self.seen:
            yield "seen: no register with a value of another guest's or of the host's"
        for leak in self.seen or ():
            whose = "the host" if leak.source == HOST_NUMBER else f"guest {leak.source}"
            times = f"{leak.times} time{'s' * (leak.times > 1)}"
            yield f"seen: {leak.kind} of {whose} in guest {leak.guest}, {times} (APM2 {leak.section})"
            yield from (f"  {_evidence(one)}" for one in leak.evidence)
            yield f"  remedy: {leak.remedy}"
        if not self.possible:
            yield "possible: nothing that its intercepts leave open"
        for one in self.possible:
            yield f"possible: {one.kind}: {one.what} (APM2 {one.section})"
            yield f"  unless the hypervisor switches it: {one.remedy}"

    def json(self) -> object:
        return jsonable(self)


def _evidence(one: Evidence) -> str:
    own = f"; the guest had left {one.own:#x}" if one.own is not None else "; it was the guest's first VMRUN"
    after = f", as #VMEXIT {one.after} left it" if one.after else ""
    return f"{one.name} {one.value:#x} at the VMRUN at {one.time}{after}{own}"


def _leaks(context: Context, arguments: Arguments) -> Leaks:
    spa, owner, vmcb = find_vmcb(context, arguments)
    live = isinstance(context, _Witness)
    seen = context.leaks() if isinstance(context, _Witness) else None
    numbers = {guest.number for guest in context.guests if spa in guest.vmcbs}
    if seen is not None:
        seen = tuple(leak for leak in seen if leak.guest in numbers)
    return Leaks(owner, spa, possible(context.memory, vmcb), seen, live)


COMMANDS = (
    Command(
        "leak check", _leaks, "Find state that VMRUN does not switch and the hypervisor forgot: DR0-3, XMM, STAR, PAT ...",
        (WHICH,),
        "seen: at a VMRUN a register held what another guest, or the host, had left there; `leak record on` has the machine\n"
        "look. possible: the VMCB lets the guest at such state without a #VMEXIT; whether the hypervisor switches it all the\n"
        "same only a run can tell.",
        ("leak check 2", "leak check 3 --json"),
    ),
)
