"""`exits`: why guests left."""

from dataclasses import dataclass

from introspect.commands.context import Context, ExitRecord, Result
from introspect.commands.parameters import Guest, Number, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members
from introspect.exits import EVENT, describe_event, describe_exit, exit_name

__all__ = ["COMMANDS"]


@dataclass(frozen=True, slots=True)
class Exits:
    records: tuple[ExitRecord, ...]

    def text(self) -> str:
        if not self.records:
            return "No #VMEXIT is recorded."
        rows = [("#", "time", "guest", "rIP", "exit")]
        for record in self.records:
            during = f" (while delivering {describe_event(record.intinfo)})" if record.intinfo & EVENT.v else ""
            what = describe_exit(record.code, record.info1, record.info2) + during
            rows.append((str(record.number), str(record.time), str(record.guest), f"{record.rip:#x}", what))
        return "\n".join(columns(rows))

    def json(self) -> object:
        return [{**members(record), "name": exit_name(record.code)} for record in self.records]


_GUEST = Parameter("GUEST", Guest(), optional=True, option="--guest")
_COUNT = Parameter("N", Number(1, 1 << 20), optional=True, option="--last", default=20, help="how many, the last ones (20)")


def _exits(context: Context, arguments: Arguments) -> Result:
    guest = arguments.get(_GUEST)
    return Exits(tuple(context.exits(guest.number if guest else None, arguments[_COUNT])))


COMMANDS = (
    Command(
        "exits", _exits, "Show the last #VMEXITs of one guest or of all, oldest first.", (_GUEST, _COUNT),
        "A first number that is the number of a guest names that guest.", ("exits 2 5", "exits --last 3"),
    ),
)  # fmt: skip
