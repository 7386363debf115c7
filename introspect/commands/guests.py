"""`guests`: who runs on this machine."""

from dataclasses import dataclass

from introspect.commands.registry import Arguments, Command, Context, GuestView, Result
from introspect.commands.render import columns, jsonable

__all__ = ["COMMANDS"]


@dataclass(frozen=True, slots=True)
class Guests:
    guests: tuple[GuestView, ...]
    selected: int | None

    def text(self) -> str:
        if not self.guests:
            return "No guest has been entered by VMRUN yet."
        rows = [("", "guest", "name", "asid", "nCR3", "paging", "VMCB")]
        rows += [
            (
                "*" if guest.number == self.selected else "",
                str(guest.number),
                guest.name,
                str(guest.asid),
                "-" if guest.ncr3 is None else f"{guest.ncr3:#x}",
                guest.paging.mode + (f" over {guest.nested.format.name}" if guest.nested else ""),
                " ".join(f"{spa:#x}" for spa in guest.vmcbs),
            )
            for guest in self.guests
        ]
        return "\n".join(columns(rows))

    def json(self) -> object:
        return jsonable(self)


def _guests(context: Context, arguments: Arguments) -> Result:
    arguments.done()
    selected = context.selected
    return Guests(tuple(context.guests), selected.number if selected else None)


COMMANDS = (
    Command("guests", "guests", "List the guests: ASID, nCR3, paging mode, VMCBs. * marks the selected one.", _guests),
)
