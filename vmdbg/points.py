"""`monitor` commands on what stops a run: breakpoints, ranges of them, watchpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gdbstub.target import BreakpointKind, TargetError
from introspect.commands import Arguments, Command, Context, worded
from introspect.commands.parameters import AddressWord, parse_number
from introspect.commands.render import columns
from introspect.expression import Space as AnySpace
from vmdbg.breakpoints import Rule
from vmdbg.results import Text
from vmdbg.watchpoints import Space, Watchpoint

if TYPE_CHECKING:
    from vmdbg.monitor import Monitor

_KINDS = {
    BreakpointKind.SOFTWARE: "break", BreakpointKind.HARDWARE: "hbreak", BreakpointKind.WRITE: "watch",
    BreakpointKind.READ: "rwatch", BreakpointKind.ACCESS: "awatch",
}  # fmt: skip
_RULES = {
    Rule.ANY: "in every address space (any)",
    Rule.SHARED: "where their address is the same page (shared)",
    Rule.OWN: "under their own page tables (own)",
}
_ACCESSES = {"w": BreakpointKind.WRITE, "r": BreakpointKind.READ, "a": BreakpointKind.ACCESS, "rw": BreakpointKind.ACCESS}


class PointCommands:
    """Those of one `Monitor`."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._debugger = monitor.debugger

    def commands(self) -> Iterator[Command]:
        yield worded(
            "breakpoints", "breakpoints [any|shared|own]", "List breakpoints and watchpoints, or choose where they "
            "hit.\nOne belongs to the address space that was in use when gdb first put it in, at a resume: to its\n"
            "page tables and the page found there. Set with paging off, or before the address was mapped, it\n"
            "hits everywhere once and then belongs there. What hits it elsewhere passes, and is counted.\n"
            "  breakpoints shared  also where other tables have the same page at the address (default)\n"
            "  breakpoints own     under its own page tables only\n"
            "  breakpoints any     in every address space of the inferior", self._breakpoints,
            examples=("breakpoints", "breakpoints shared"),
        )  # fmt: skip
        yield worded(
            "watch", "watch [[GUEST:][gva:|gpa:|spa:]ADDRESS [LENGTH] [w|r|a]] | watch delete N",
            "Stop when memory is written (w), read (r) or either (a), and say who did it; or list, or delete.\n"
            "ADDRESS is linear (gva, the default), guest-physical or system-physical, of the selected inferior\n"
            "unless another is named (1 is the hypervisor). LENGTH is 1 to 4096 bytes (8). All see stores of any\n"
            "inferior to the same memory, of the processor itself (page walks, events, VMCBs) and of devices.\n"
            "  watch spa:0x10f6000\n  watch 2:gpa:0x5000 4096 a\n  watch delete 1", self._watch,
            examples=("watch 2:counter 8 w", "watch delete 1"),
        )  # fmt: skip
        yield worded(
            "break-range", "break-range [[GUEST:]START END] | break-range delete N",
            "Stop at every instruction within START <= address < END; or list, or delete.\n"
            "  break-range 0x101000 0x101200\n  break-range 2:0xffffffff80100000 0xffffffff80101000",
            self._range,
            examples=("break-range host:handle_exit host:handle_exit+0x10", "break-range delete 1"),
        )  # fmt: skip

    def _breakpoints(self, context: Context, arguments: Arguments) -> Text:
        breakpoints, watchpoints = self._debugger.breakpoints, self._debugger.watchpoints
        chosen = arguments.choice(tuple(Rule))
        if arguments.words:
            raise arguments.error(arguments.words[0], "there is no such rule", "choose any, shared or own")
        if chosen is not None:
            breakpoints.rule = Rule(chosen)
            self._debugger.running.agents.forget()
            return Text(f"breakpoints hit {_RULES[breakpoints.rule]}", {"rule": str(breakpoints.rule)})
        points = [*breakpoints, *(point for point in watchpoints if not point.number)]
        rows = [("process", "address", "kind", "page tables", "page", "hits", "passes")]
        rows += [
            (
                str(point.pid), f"{point.address:#x}", _KINDS[point.kind] + (f" {point.length}" if point.kind > 1 else ""),
                *((f"{point.home.root:#x}", f"{point.home.page:#x}") if point.home is not None else ("-", "-")),
                str(point.hits), str(point.passes),
            )
            for point in points
        ]  # fmt: skip
        found: list[dict[str, object]] = [
            {"inferior": point.pid, "address": point.address, "kind": _KINDS[point.kind], "length": point.length,
             "root": point.home.root if point.home is not None else None,
             "page": point.home.page if point.home is not None else None, "hits": point.hits, "passes": point.passes}
            for point in points
        ]  # fmt: skip
        data = {"rule": str(breakpoints.rule), "points": found}
        return Text("\n".join([*columns(rows), f"They hit {_RULES[breakpoints.rule]}."]), data)

    def _address(self, arguments: Arguments, word: str) -> tuple[int, Space, int]:
        """(pid, space, address) of `[GUEST:][SPACE:]ADDRESS`."""
        context, pid = self._monitor, self._monitor.thread.pid
        owner = next((guest for guest in context.guests if guest.number == pid), context.host)
        where = AddressWord(word, AnySpace.GVA).locate(context, owner)
        if str(where.space) not in [str(space) for space in Space]:
            raise arguments.error(word, f"there are no points in the space {where.space}", f"choose {', '.join(Space)}")
        return where.owner.number, Space(where.space), where.offset

    def _watch(self, context: Context, arguments: Arguments) -> Text:
        watchpoints = self._debugger.watchpoints
        if arguments.choice(("delete",)):
            number = arguments.number("N")
            arguments.done()
            watchpoints.delete(number)
            return Text(f"watchpoint {number} is deleted", {"number": number})
        if not arguments.words:
            rows = [("#", "process", "address", "bytes", "access", "now at", "hits")]
            rows += [
                (
                    str(p.number), "any" if p.space == Space.SPA else str(p.pid), f"{p.space}:{p.address:#x}", str(p.length),
                    _KINDS[p.kind], f"spa {p.pieces[0][0]:#x}" if p.pieces else "not mapped", str(p.hits),
                )
                for p in watchpoints if p.number
            ]  # fmt: skip
            found: list[dict[str, object]] = [
                {"number": p.number, "inferior": None if p.space == Space.SPA else p.pid, "space": str(p.space),
                 "address": p.address, "length": p.length, "access": _KINDS[p.kind],
                 "spa": p.pieces[0][0] if p.pieces else None, "hits": p.hits}
                for p in watchpoints if p.number
            ]  # fmt: skip
            text = "\n".join(columns(rows)) if len(rows) > 1 else "no watchpoints are set; gdb's own stand in `breakpoints`"
            return Text(text, {"watchpoints": found})
        pid, space, address = self._address(arguments, arguments.words.pop(0))
        length = arguments.number("LENGTH", 1, 4096) if arguments.words and parse_number(arguments.words[0]) is not None else 8
        access = _ACCESSES[arguments.choice(_ACCESSES) or "w"]
        arguments.done()
        point = self.watch(access, space, address, length, pid)
        where = ", ".join(f"{spa:#x}" for spa, _ in point.pieces)
        there = f", which is spa {where}" if space != Space.SPA else ""
        return Text(f"watchpoint {point.number}: {length} bytes at {space}:{address:#x}{there}", {"number": point.number})

    def watch(self, access: BreakpointKind, space: Space, address: int, length: int, pid: int) -> Watchpoint:
        """Set a numbered one. TargetError where the address leads nowhere that can be watched."""
        thread = self._monitor.thread if self._monitor.thread.pid == pid else self._debugger.who.first_thread(pid)
        return self._debugger.watchpoints.add(access, space, address, length, pid, self._debugger.context(thread))

    def _range(self, context: Context, arguments: Arguments) -> Text:
        breakpoints = self._debugger.breakpoints
        if arguments.choice(("delete",)):
            number = arguments.number("N")
            arguments.done()
            if breakpoints.ranges.pop(number, None) is None:
                raise TargetError(f"there is no range {number}; `monitor break-range` lists them")
            return Text(f"range {number} is deleted", {"number": number})
        if not arguments.words:
            rows = [("#", "process", "start", "end", "hits")]
            rows += [
                (str(n), str(r.pid), f"{r.start:#x}", f"{r.end:#x}", str(r.hits)) for n, r in breakpoints.ranges.items()
            ]
            found: list[dict[str, object]] = [
                {"number": n, "inferior": r.pid, "start": r.start, "end": r.end, "hits": r.hits}
                for n, r in breakpoints.ranges.items()
            ]
            return Text("\n".join(columns(rows)) if len(rows) > 1 else "no ranges are set", {"ranges": found})
        word = arguments.words.pop(0)
        pid, space, start = self._address(arguments, word)
        if space != Space.GVA:
            raise arguments.error(word, "code is executed at linear addresses", "leave out the space")
        if not arguments.words:
            raise arguments.error("END", "missing", "give the address behind the last one")
        owner, _, end = self._address(arguments, arguments.words.pop(0))
        arguments.done()
        if ":" not in word:  # then the end says whose they are
            pid = owner
        if end <= start:
            raise arguments.error(f"{end:#x}", f"the end must be behind {start:#x}", "the range ends before END")
        number = breakpoints.add_range(start, end, pid)
        said = f"range {number}: stops at every instruction of process {pid} from {start:#x} to below {end:#x}"
        return Text(said, {"number": number})
