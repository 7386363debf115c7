"""`exits`: why guests left."""

from dataclasses import dataclass

from introspect.commands.registry import Arguments, Command, Context, ExitRecord, Result
from introspect.commands.render import columns, members
from introspect.exitlog import what
from introspect.exits import exit_name

__all__ = ["COMMANDS"]


@dataclass(frozen=True, slots=True)
class Exits:
    records: tuple[ExitRecord, ...]

    def text(self) -> str:
        if not self.records:
            return "No #VMEXIT is recorded."
        rows = [("#", "time", "guest", "rIP", "exit")]
        for record in self.records:
            rows.append((str(record.number), str(record.time), str(record.guest), f"{record.rip:#x}", what(record)))
        return "\n".join(columns(rows))

    def json(self) -> object:
        return [{**members(record), "insn": record.insn.hex(" "), "name": exit_name(record.code)} for record in self.records]


def _exits(context: Context, arguments: Arguments) -> Result:
    guest = arguments.named_guest()
    count = arguments.number("N", 1, 1 << 20) if arguments.words else 20
    arguments.done()
    return Exits(tuple(context.exits(guest.number if guest else None, count)))


COMMANDS = (
    Command(
        "exits",
        "exits [GUEST] [N]",
        "Show the last N (20) #VMEXITs of one guest or of all, oldest first.\n\n"
        "A first number that is the number of a guest names that guest.",
        _exits,
    ),
)
