"""`guests`: who runs on this machine."""

from collections.abc import Iterator
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
                "  " * depth + str(guest.number),
                guest.name,
                str(guest.asid),
                "-" if guest.ncr3 is None else f"{guest.ncr3:#x}",
                guest.paging.mode + (f" over {guest.nested.format.name}" if guest.nested else ""),
                " ".join(f"{spa:#x}" for spa in guest.vmcbs),
            )
            for depth, guest in self._tree(None)
        ]
        return "\n".join(columns(rows))

    def _tree(self, parent: int | None, depth: int = 0) -> Iterator[tuple[int, GuestView]]:
        """The guests with how deep they are nested, each behind the one it runs under."""
        numbers = {guest.number for guest in self.guests}
        for guest in self.guests:
            if (guest.parent if guest.parent in numbers else None) == parent:
                yield depth, guest
                yield from self._tree(guest.number, depth + 1)

    def json(self) -> object:
        return jsonable(self)


def _guests(context: Context, arguments: Arguments) -> Result:
    arguments.done()
    selected = context.selected
    return Guests(tuple(context.guests), selected.number if selected else None)


COMMANDS = (
    Command("guests", "guests", "List the guests: ASID, nCR3, paging mode, VMCBs. * marks the selected one.\n"
            "A guest that is run by another guest's hypervisor stands indented below that one.", _guests),
)
