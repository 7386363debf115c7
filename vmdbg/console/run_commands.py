"""The console's commands that run the machine and stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdbstub.target import TargetError, ThreadId
from introspect.commands import HOST_NUMBER, Arguments, Command, CommandError, Context
from introspect.commands.parameters import Candidate, Misfit, Number, Parameter
from introspect.commands.render import columns
from vmdbg.console.control import Control, Goal, Point
from vmdbg.console.stopped import Started, Stopped
from vmdbg.results import Text

if TYPE_CHECKING:
    from vmdbg.console.source import Source

__all__ = ["RUNNING", "RunCommands"]

RUNNING = (
    "continue", "step", "next", "stepi", "nexti", "finish", "until", "break", "tbreak", "delete", "watch", "catch", "restart",
    "interrupt",
)  # fmt: skip
"""What no dump can do."""


@dataclass(frozen=True)
class _Condition:
    """The word `if`, and all the words that are left."""

    noun: str = "if, and an expression"

    def take(self, context: Context, words: list[str]) -> str:
        if words[0] != "if" or len(words) == 1:
            raise Misfit("a condition is the word if and an expression")
        text = " ".join(words[1:])
        words.clear()
        return text

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        yield Candidate("if", "a condition follows")


_TICKS = Parameter("TICKS", Number(1), optional=True, help="ticks to run at most; without, until something stops it")
_COUNT = Parameter("N", Number(1, 1 << 20), optional=True, default=1, help="how many (1)")
_IF = Parameter("if EXPR", _Condition(), optional=True, help="an expression that must not be 0 then")
_NUMBER = Parameter("N", Number(1, noun="a breakpoint's number"), optional=True)
_THREAD = Parameter("N", Number(1), optional=True, help="of the selected inferior")


@dataclass(frozen=True, slots=True)
class Points:
    """Breakpoints as a table."""

    points: tuple[Point, ...]

    def text(self) -> str:
        if not self.points:
            return "No breakpoints; `break ADDRESS` sets one. `watch` and `catch` list theirs."
        rows = [("#", "inferior", "address", "hits", "", "what")]
        for p in self.points:
            how = " ".join([*(["once"] if p.once else []), *([] if p.enabled else ["disabled"])])
            where = "waits for it" if p.address is None else f"{p.address:#x}"
            rows.append(
                (str(p.number), str(p.pid), where, str(p.hits), how, p.text + (f" if {p.condition}" if p.condition else ""))
            )
        return "\n".join(columns(rows))

    def json(self) -> object:
        return [_as_json(point) for point in self.points]


def _as_json(point: Point) -> dict[str, object]:
    return {
        "number": point.number,
        "inferior": point.pid,
        "address": point.address,
        "hits": point.hits,
        "once": point.once,
        "enabled": point.enabled,
        "what": point.text,
        "condition": point.condition,
    }


@dataclass(frozen=True, eq=False)
class _Where:
    """An address, which the source reads."""

    source: Source
    noun: str = "an address"

    def take(self, context: Context, words: list[str]) -> str:
        return words.pop(0)

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return self.source.addresses(prefix)


@dataclass(frozen=True, eq=False)
class _Who:
    """The host or a guest, as the driver has them."""

    control: Control
    noun: str = "host, or a guest's number or name"

    def take(self, context: Context, words: list[str]) -> int:
        known = self.control.driver.inferiors()
        word = words[0]
        found = next(
            (one.pid for one in known if word in (str(one.pid), one.name) or (word == "host" and one.pid == HOST_NUMBER)), None
        )
        if found is None:
            said = ", ".join(f"{one.pid} ({one.name})" for one in known)
            raise Misfit("there is no such inferior", f"there are {said}" if said else "the machine has ended")
        words.pop(0)
        return found

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        yield Candidate("host", "the hypervisor")
        for one in self.control.driver.inferiors():
            if one.pid != HOST_NUMBER:
                yield Candidate(str(one.pid), one.name)


class RunCommands:
    """Those of one control."""

    def __init__(self, source: Source, control: Control) -> None:
        self.source, self.control = source, control
        control.resolve = self._resolve
        control.line_of = self._line_of
        self._where = Parameter("ADDRESS", _Where(source))
        self._who = Parameter("N", _Who(control), optional=True, help="the host (1), or a guest's number or name")

    def commands(self) -> Iterator[Command]:
        yield Command(
            "continue",
            self._continue,
            "Run until something stops it, or for some ticks of guest time.",
            (_TICKS,),
            "^C stops it. While it runs, everything that only reads can be asked.",
            ("continue", "continue 1000000"),
        )
        yield Command(
            "step",
            self._step,
            "Execute one instruction of the selected thread, or N, into calls.",
            (_COUNT,),
            "After `set steps line` it is a line of the source, where lines are known.\n"
            "`follow`, `sstep` and `step-into-guest` say what a step is where a guest leaves, or an interrupt comes.",
            ("step", "step 10"),
        )
        yield Command(
            "next", self._next, "The same, over calls and repeated string instructions.", (_COUNT,), "", ("next", "next 5")
        )
        yield Command(
            "stepi",
            self._stepi,
            "Execute an instruction, or N, into calls, whatever steps are.",
            (_COUNT,),
            "",
            ("stepi", "stepi 3"),
        )
        yield Command("nexti", self._nexti, "The same, over calls.", (_COUNT,), "", ("nexti", "nexti 3"))
        yield Command(
            "finish",
            self._finish,
            "Run until the selected thread returns from its function.",
            (),
            "",
            ("finish", "finish --json"),
        )
        yield Command(
            "until",
            self._until,
            "Run until an inferior gets to an address.",
            (self._where,),
            "",
            ("until handle_exit", "until 2:work"),
        )
        yield self._breaking("break", "Stop at an address.")
        yield self._breaking("tbreak", "Stop at an address, once.")
        yield Command("points", self._list, "List the breakpoints of the console.", (), "", ("points", "points --json"))
        yield Command(
            "delete",
            self._delete,
            "Delete a breakpoint, or all.",
            (_NUMBER,),
            "Watchpoints and catchpoints are deleted by `watch delete N` and `catch delete N`.",
            ("delete 1", "delete"),
        )
        yield Command(
            "enable", self._enable, "Let a disabled breakpoint stop again, or all.", (_NUMBER,), "", ("enable 1", "enable")
        )
        yield Command("disable", self._disable, "Let a breakpoint, or all, pass.", (_NUMBER,), "", ("disable 1", "disable"))
        yield Command(
            "interrupt", self._interrupt, "Stop the machine where it is, as ^C does.", (), "", ("interrupt", "interrupt --json")
        )
        yield Command(
            "inferior",
            self._inferior,
            "Choose whose the commands are, or list who there is.",
            (self._who,),
            "Breakpoints choose the one that stops.",
            ("inferior 2", "inferior"),
        )
        yield Command(
            "thread",
            self._thread,
            "Choose a CPU or vCPU of the selected inferior, or list them.",
            (_THREAD,),
            "",
            ("thread 1", "thread"),
        )
        yield Command(
            "restart",
            self._restart,
            "Start the machine over, and stop before its first instruction.",
            (),
            "Breakpoints stay; those of guests wait for these to appear.",
            ("restart", "restart --json"),
        )

    def _breaking(self, name: str, summary: str) -> Command:
        def run(context: Context, arguments: Arguments) -> Text:
            return self._break(context, arguments, once=name == "tbreak")

        return Command(
            name,
            run,
            summary,
            (self._where, _IF),
            "Of the selected inferior unless the address names another: host:main, 2:work. One of a guest that is not there yet\n"
            "waits for it. With `if`, only where the expression is not 0 then (see `help catch` for what it can ask for).",
            (f"{name} handle_exit", f"{name} 2:work if rdi > 3"),
        )

    # Running

    def _line_of(self, thread: ThreadId) -> str:
        pc = self.control.pc(thread)
        return self.source.line(thread.pid, pc) if pc is not None else ""

    def _continue(self, context: Context, arguments: Arguments) -> Started:
        self.control.go(Goal(), arguments.get(_TICKS))
        return Started("")

    def _stepping(self, kind: str, arguments: Arguments, lines: bool) -> Started:
        self.control.go(Goal(kind, self.control.selected, arguments[_COUNT], lines))
        return Started("")

    def _step(self, context: Context, arguments: Arguments) -> Started:
        return self._stepping("step", arguments, self.control.by_lines)

    def _next(self, context: Context, arguments: Arguments) -> Started:
        return self._stepping("next", arguments, self.control.by_lines)

    def _stepi(self, context: Context, arguments: Arguments) -> Started:
        return self._stepping("step", arguments, False)

    def _nexti(self, context: Context, arguments: Arguments) -> Started:
        return self._stepping("next", arguments, False)

    def _finish(self, context: Context, arguments: Arguments) -> Started:
        control, thread = self.control, self.control.selected
        frames = self.source.frames()
        stack = frames[0][1] if len(frames) > 1 else None
        if stack is None:
            raise CommandError(
                "finish", "where this function returns to is not known", "`bt` says why; `until ADDRESS` goes somewhere"
            )
        frame = frames[1][0]
        control.reach(Point(0, thread.pid, frame, "", once=True, above=stack - 1, thread=thread), "finish")
        return Started(f"runs until it returns to {frame:#x}")

    def _until(self, context: Context, arguments: Arguments) -> Started:
        text = arguments[self._where]
        pid, address = self._place(text)
        if address is None:
            raise CommandError(text, f"there is no guest {pid} yet", "`tbreak` waits for it")
        self.control.reach(Point(0, pid, address, text, once=True), "until")
        return Started("")

    def _interrupt(self, context: Context, arguments: Arguments) -> Started | Text:
        control = self.control
        if not control.running:
            stands = Stopped("it does not run", self.source.where(), control.selected.tid, (), control.driver.ended)
            return Text(stands.why, stands.json())
        self.source.reports.extend(control.interrupt())
        return Started("")

    def _restart(self, context: Context, arguments: Arguments) -> Text:
        self.control.restart()
        self.source.select(self.control.selected)
        return Text("the machine stands before its first instruction")

    # Breakpoints

    def _place(self, text: str) -> tuple[int, int | None]:
        """(inferior, linear address); the address is None where the inferior is not there yet."""
        owner, colon, _ = text.partition(":")
        living = [inferior.pid for inferior in self.control.driver.inferiors()]
        if colon and owner.isdecimal() and int(owner) != HOST_NUMBER and int(owner) not in living:
            return int(owner), None
        number, space, offset = self.source.locate(text)
        if space != "gva":
            raise CommandError(text, "code is executed at linear addresses", "leave out the space, or write gva")
        return number, offset

    def _break(self, context: Context, arguments: Arguments, *, once: bool) -> Text:
        point = self.set(arguments[self._where], arguments.get(_IF) or "", once=once)
        who = "the host" if point.pid == HOST_NUMBER else f"guest {point.pid}"
        if point.address is None:
            return Text(f"{point.words()} waits for guest {point.pid}", _as_json(point))
        name = self.source.symbol(point.pid, point.address)
        return Text(f"{point.words()} at {point.address:#x}{f' <{name}>' if name else ''} of {who}", _as_json(point))

    def set(self, where: str, condition: str = "", *, once: bool = False) -> Point:
        """A breakpoint, with a number. CommandError and TargetError for what cannot be one."""
        pid, address = self._place(where)
        if condition and address is not None:
            self.source.check(condition, pid)
        point = Point(self.control.numbered(), pid, address, where, condition, once)
        self.control.points[point.number] = point
        try:
            self.control.add(point)
        except (TargetError, CommandError):
            del self.control.points[point.number]
            raise
        return point

    def _resolve(self, point: Point) -> None:
        try:
            _, point.address = self._place(point.text)
        except CommandError:
            point.address = None

    def _known(self, arguments: Arguments) -> list[Point]:
        number, points = arguments.get(_NUMBER), self.control.points
        if number is not None and number not in points:
            raise arguments.error(
                str(number), "there is no such breakpoint", f"there are {', '.join(map(str, points)) or 'none'}"
            )
        return list(points.values()) if number is None else [points[number]]

    def _list(self, context: Context, arguments: Arguments) -> Points:
        return Points(tuple(self.control.points.values()))

    def _each(self, arguments: Arguments, act: Callable[[Point], None]) -> Points:
        for point in self._known(arguments):
            act(point)
        return Points(tuple(self.control.points.values()))

    def _delete(self, context: Context, arguments: Arguments) -> Points:
        return self._each(arguments, self.control.delete)

    def _enable(self, context: Context, arguments: Arguments) -> Points:
        return self._each(arguments, lambda point: self.control.enable(point, True))

    def _disable(self, context: Context, arguments: Arguments) -> Points:
        return self._each(arguments, lambda point: self.control.enable(point, False))

    # Whose

    def _inferior(self, context: Context, arguments: Arguments) -> Text:
        driver, pid = self.control.driver, arguments.get(self._who)
        if pid is not None and pid != self.control.selected.pid:
            self.source.select(ThreadId(pid, driver.threads(pid)[0].tid))
        return _listed("inferior", [(one.pid, one.name, one.state) for one in driver.inferiors()], self.control.selected.pid)

    def _thread(self, context: Context, arguments: Arguments) -> Text:
        selected, number = self.control.selected, arguments.get(_THREAD)
        threads = self.control.driver.threads(selected.pid)
        if number is not None:
            if number not in [thread.tid for thread in threads]:
                known = ", ".join(str(thread.tid) for thread in threads)
                raise arguments.error(str(number), f"inferior {selected.pid} has no such thread", f"it has {known}")
            self.source.select(ThreadId(selected.pid, number))
        return _listed("thread", [(one.tid, one.name, one.state) for one in threads], self.control.selected.tid)


def _listed(what: str, known: list[tuple[int, str, str]], selected: int) -> Text:
    """A table of (number, name, state), the selected one marked."""
    rows = [("*" if number == selected else "", str(number), name, state) for number, name, state in known]
    data = [{"number": number, "name": name, "state": state, "selected": number == selected} for number, name, state in known]
    return Text("\n".join(columns([("", what, "name", "state"), *rows])), {f"{what}s": data})
