"""`bt`: the frames of an inferior's stack."""

from dataclasses import dataclass

from introspect.cfi import Cfi
from introspect.commands.context import CommandError, Context
from introspect.commands.inferior_state import OWNER, find_inferior
from introspect.commands.parameters import Number, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members
from introspect.unwind import MAX_FRAMES, unwind

__all__ = ["COMMANDS"]


@dataclass(frozen=True, slots=True)
class FrameView:
    """`how` its caller was found, empty if it was not; `cfa` is what the stack pointer is after its return."""

    number: int
    pc: int
    symbol: str
    cfa: int | None
    how: str


@dataclass(frozen=True, slots=True)
class Backtrace:
    who: str
    frames: tuple[FrameView, ...]
    end: str

    def text(self) -> str:
        rows = [
            (f"#{one.number}", f"{one.pc:#x}", one.symbol or "??", "" if one.cfa is None else f"cfa {one.cfa:#x}", one.how)
            for one in self.frames
        ]
        return "\n".join([*columns(rows), f"ends: {self.end}"])

    def json(self) -> object:
        return members(self)


_LIMIT = Parameter("N", Number(1, MAX_FRAMES), optional=True, option="--frames", default=64, help="how many frames at most (64)")


def _bt(context: Context, arguments: Arguments) -> Backtrace:
    subject = find_inferior(context, arguments)
    symbols = subject.symbols
    cfi = Cfi.load(symbols.path, symbols.offset) if symbols is not None and symbols.path is not None else None

    def function(pc: int) -> int | None:
        found = symbols.at(pc) if symbols is not None else None
        return found[0].address if found is not None else None

    def executable(pc: int) -> bool:
        return bool(subject.linear(pc, 1))

    found = unwind(subject.registers, subject.linear, cfi, function, arguments[_LIMIT], executable)
    if not found.frames:
        raise CommandError(subject.title, found.end, "open the source with registers")
    frames = tuple(
        FrameView(number, frame.pc, _name(subject.symbol(frame.pc), subject.symbol(frame.inside)), frame.cfa, frame.how)
        for number, frame in enumerate(found.frames)
    )
    return Backtrace(subject.title, frames, found.end)


def _name(at: str, inside: str) -> str:
    """Of a return address, which behind a call that does not return is already the next function's."""
    name = inside.partition("+")[0]
    return at if at.partition("+")[0] == name or not name else f"{name}, at its end"


COMMANDS = (
    Command(
        "bt", _bt, "Show the frames of the stack: who called whom.", (_LIMIT, OWNER),
        "By the call frame information (.debug_frame, .eh_frame) of the inferior's symbol file where that has any, else by\n"
        "frame pointers. Says how each frame was found and where knowledge ends. A first number is N; name a guest with --guest.",
        ("bt", "bt --guest 2"), aliases=("backtrace", "where"),
    ),
)  # fmt: skip
