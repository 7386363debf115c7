"""Which VMCB a command is about: a guest's, or one anywhere in memory."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from introspect.commands.context import CommandError, Context, GuestView, HostView
from introspect.commands.parameters import AddressWord, Candidate, Choice, Guest, Located, Misfit, Parameter, Physical, find_guest
from introspect.commands.registry import Arguments
from introspect.expression import Space
from introspect.scope import locate_space
from introspect.sources import Unreadable
from introspect.vmcb import VMCB_SIZE

__all__ = ["HOST_OR_WHICH", "INNER", "WHICH", "WHICH_OPTION", "find_vmcb", "inner_vmcb", "read_vmcb"]


@dataclass(frozen=True)
class _HostOrWhich:
    """The hypervisor as `host`, a guest, or the address of a VMCB."""

    noun: str = "host, a guest, or the system-physical address of a VMCB"

    def take(self, context: Context, words: list[str]) -> GuestView | AddressWord | HostView:
        if words[0] != "host":
            return _Which().take(context, words)
        words.pop(0)
        return context.host

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return (Candidate("host", "the hypervisor"), *_Which().complete(context, prefix))


@dataclass(frozen=True)
class _Which:
    """A guest, or the address of a VMCB."""

    noun: str = "a guest, or the system-physical address of a VMCB"

    def take(self, context: Context, words: list[str]) -> GuestView | AddressWord:
        guest = find_guest(context, words[0])
        if guest is None and not any(mark.isdigit() or mark in ":$[" for mark in words[0]):
            raise Misfit("no guest has this name", "write the address as 0x1000 or spa:0x1000, or name a guest")
        word = words.pop(0)
        return guest or Physical().parse(context, word)

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        yield from Guest().complete(context, prefix)
        for guest in context.guests:
            for spa in guest.vmcbs:
                yield Candidate(f"{spa:#x}", f"VMCB of {guest.name}")


WHICH = Parameter("GUEST|PA", _Which(), optional=True, option="--guest",
                  help="whose VMCB, or where it is; else the selected guest's")  # fmt: skip
WHICH_OPTION = replace(WHICH, only_option=True)
"""The same for commands whose words are something else."""
HOST_OR_WHICH = Parameter("GUEST|PA|host", _HostOrWhich(), option="--guest", only_option=True,
                          help="who is meant; else who is selected")  # fmt: skip
INNER = Parameter("inner", Choice(("inner",)), optional=True, help="the VMCB that the guest's own hypervisor made for it")


def read_vmcb(context: Context, where: Located) -> tuple[int, bytes]:
    """System-physical address and contents of a VMCB at an address of any space.  CommandError if there is none."""
    spa = locate_space(context.memory, where.owner, where.space, where.offset)
    if spa is None:
        remedy = "`walk` shows why" if where.space == Space.GVA else "`npt` lists what is"
        raise CommandError(str(where), "it is not mapped", remedy)
    if spa & VMCB_SIZE - 1:
        raise CommandError(f"{spa:#x}", "a VMCB is aligned to 4 KiB", "clear the low 12 bits, or name a guest")
    try:
        return spa, context.memory.read(spa, VMCB_SIZE)
    except Unreadable as error:
        raise CommandError(f"{spa:#x}", f"no memory at {error.address:#x}", "name a guest, or an address in RAM") from error


def find_vmcb(
    context: Context, arguments: Arguments, parameter: Parameter[Any] = WHICH
) -> tuple[int, str, bytes]:
    """Address, owner and contents of the VMCB that `WHICH` or such a parameter, and `INNER` where the command has that, mean."""
    which = arguments.get(parameter) or arguments.selected_guest()
    inner = arguments.given(INNER)
    if isinstance(which, GuestView):
        if not which.vmcbs:
            raise CommandError(str(which), "it has no VMCB", "name a guest that VMRUN has entered")
        where = Located(context.host, Space.SPA, inner_vmcb(which) if inner else which.vmcbs[0])
    elif inner:
        raise arguments.error("inner", "it goes with a guest, not with an address")
    else:
        where = which.locate(context, context.host)
    spa, contents = read_vmcb(context, where)
    owners = [view for view in context.guests if spa in view.vmcbs]
    return spa, str(owners[0]) if owners else "no guest's so far", contents


def inner_vmcb(guest: GuestView) -> int:
    """Where the VMCB is that the hypervisor in a guest's parent made for it.  CommandError if that is not known."""
    if guest.parent is None:
        rule = "the hypervisor of this machine runs it, not that of another guest"
        raise CommandError(str(guest), rule, "leave `inner` out, or put it right with `guest parent`")
    if guest.inner is None:
        rule = f"which VMCB guest {guest.parent} has for it is known from rAX at that one's VMRUN, until it runs again"
        raise CommandError(str(guest), rule, "stop where this guest executes, or at its next #VMEXIT: `stop-on`")
    return guest.inner
