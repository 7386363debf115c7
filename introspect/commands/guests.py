"""`guests`: who runs on this machine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from introspect.commands.context import Context, GuestView, HostView
from introspect.commands.parameters import Flag, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, jsonable
from introspect.commands.scan import Attaching, Scanned, scan_guests
from introspect.exits import exit_name

__all__ = ["COMMANDS"]


_NONE = "No guest has been entered by VMRUN yet."


@dataclass(frozen=True, slots=True)
class Guests:
    guests: tuple[GuestView, ...]
    selected: int | None
    last: Mapping[int, str]
    """What the last exit of each was, for those that are known to have left."""
    host: HostView
    complete: bool = True
    """Whether there are no others: a live machine sees each VMRUN, in a dump a search may find more."""

    def text(self) -> str:
        if not self.guests:
            return _NONE if self.complete else "No guest is known; `guests --scan` looks for some."
        rows = [("", "guest", "name", "state", "asid", "nCR3", "paging", "last exit", "VMCB")]
        mark, host = "*" if self.selected is None else "", self.host
        rows.append((mark, str(host.number), host.name, "-", "0", "-", host.paging.mode, "-", "-"))
        rows += [
            (
                "*" if guest.number == self.selected else "",
                "  " * (depth + 1) + str(guest.number),
                guest.name,
                guest.state or "-",
                str(guest.asid),
                "-" if guest.ncr3 is None else f"{guest.ncr3:#x}",
                guest.paging.mode + (f" over {guest.nested.format.name}" if guest.nested else ""),
                self.last.get(guest.number, "-"),
                " ".join(f"{spa:#x}" for spa in guest.vmcbs) or "-",
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


_SCAN = Parameter("SCAN", Flag(), optional=True, option="--scan", default=False, help="search memory for VMCBs, without symbols")
_EXPLAIN = Parameter("EXPLAIN", Flag(), optional=True, option="--explain", default=False, help="say what each score is made of")


def _guests(context: Context, arguments: Arguments) -> Guests | Scanned:
    if arguments[_SCAN]:
        return scan_guests(context, arguments[_EXPLAIN])
    selected = context.selected
    guests = tuple(context.guests)
    last = {guest.number: exit_name(record.code) for guest in guests for record in context.exits(guest.number, 1)}
    return Guests(guests, selected.number if selected else None, last, context.host, not isinstance(context, Attaching))


COMMANDS = (
    Command(
        "guests", _guests, "List the host and its guests as a tree: state, ASID, nCR3, paging mode, last exit, VMCBs.",
        (_SCAN, _EXPLAIN),
        "* marks the selected one. A guest that is run by another guest's hypervisor stands indented below that one.\n"
        "--scan searches all memory for VMCBs and host save areas; in a dump, what it finds become guests. A score is out of\n"
        "100: what speaks against a page is listed, with --explain also what speaks for it. \"made in\" a guest is what that\n"
        "one's own hypervisor made, \"for\" the guest that runs in its place.",
        ("guests", "guests --scan"),
    ),
)  # fmt: skip
