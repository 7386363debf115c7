"""The `catch` command: catchpoints set, listed and changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from introspect.commands import Arguments, Command, CommandError, Context, worded
from introspect.commands.parameters import Candidate, ExitCodeKind, Field, parse_number
from introspect.commands.render import columns
from introspect.exitlog import RECORD_FACTS
from introspect.exits import EXCEPTION_BASE, ExitCode
from introspect.expression import ExpressionError, parse
from introspect.facts import EXIT_FACTS
from introspect.pci import RequesterId
from introspect.vmcb import NAMES
from vmdbg.catchpoints import RULES, Catchpoint, Sort
from vmdbg.history import HOST
from vmdbg.scopes import MachineNames

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger

_HELP = """Stop at an event of the processor, or list such catchpoints with their hits.
  vmexit [CODE|any]    a guest has left; CODE is a name (npf, cpuid, vmmcall) or a number
  vmrun                VMRUN, before it is executed
  skinit               SKINIT, before it is executed or intercepted
  inject [VECTOR]      VMRUN that injects an event through EVENTINJ
  exception [VECTOR]   an exception (14, pf), before it is delivered, intercepted or not
  io [PORT] [r|w]      an access to a port (0x3f8, 0x3f8-0x3ff)
  msr [MSR] [r|w]      RDMSR or WRMSR (0xc0000080, efer)
  cr [N] [r|w]         a read or write of a control register
  guest-start          a guest runs for the first time
  triple-fault         of a guest or of the hypervisor
  vmcb FIELD           a field of a VMCB has another value than at the last world switch; old and value are numbers of it
  dma [BDF] [r|w]      a transaction of a device (00:03.0, 00:03.0-00:04.7), made or refused
  iommu-fault [BDF] [r|w]   an IOMMU refuses a transaction or an interrupt, logged or not
Behind these: `guest N` for one guest only (1: the hypervisor), `if EXPR` for what must hold then. `once` before them, or
tcatch, deletes it when it stops. Ranges are FIRST-LAST. What `if` can ask for:
  rax, $exitcode, vmcb.cs.base            registers, VMCB fields
  code info1 info2 gpa gva port size msr write vector error cr reg value slb    of the event, as far as it has them
  requester iova pasid length translated refused event domain interrupt    of DMA and what an IOMMU refuses
  guest cpu time cpl                      whose it is, and when
  u32[$rsp + 8], u8[gpa:0x1000], u64[host:counter]    memory
  && || ! == < + << & ...                 as in C, in unsigned 64 bits
  catch vmexit npf if gpa >= 0xfee00000 && gpa < 0xfee01000
  catch msr w 0xc0000080 guest 2
  catch ignore 2 100       pass over the next 100 hits of number 2
  catch disable 2          or enable, delete; `delete all`"""
SYNOPSIS = "catch [once] WHAT [guest N] [if EXPR] | delete N|all | enable|disable N | ignore N COUNT"


_CHANGES = ("delete", "enable", "disable", "ignore")


def _offered(context: Context, words: Sequence[str]) -> Iterator[Candidate]:
    """What may follow these words of a `catch`."""
    words = [word for word in words if word != "once"]
    if "if" in words:
        yield from (Candidate(name, "fact, register or field") for name in sorted({*EXIT_FACTS, *RECORD_FACTS}))
        return
    if not words:
        yield Candidate("once", "delete it when it stops")
        yield from (Candidate(str(sort), "an event") for sort in Sort)
        yield from (Candidate(word, "catchpoints that are set") for word in _CHANGES)
        return
    if words[-1] == "guest":
        yield from (Candidate(str(guest.number), guest.name) for guest in context.guests)
        return
    if words[0] == "delete":
        yield Candidate("all", "catchpoints")
    if words[0] in _CHANGES:
        return
    if len(words) == 1:
        if words[0] == Sort.VMEXIT:
            yield from ExitCodeKind().complete(context, "")
        elif words[0] == Sort.VMCB:
            yield from Field().complete(context, "")
    if words[0] in (Sort.IO, Sort.MSR, Sort.CR, Sort.DMA) and not {"r", "w"} & set(words):
        yield from (Candidate("r", "reads"), Candidate("w", "writes"))
    yield from (Candidate("guest", "of one guest only"), Candidate("if", "only where an expression holds"))


@dataclass(frozen=True, slots=True)
class Listing:
    """Catchpoints as a table."""

    points: tuple[Catchpoint, ...]

    def text(self) -> str:
        if not self.points:
            return "No catchpoints; `catch vmexit npf` sets one, `help catch` lists the kinds."
        rows = [("number", "enabled", "hits", "ignore", "what")]
        rows += [(str(p.number), "y" if p.enabled else "n", str(p.hits), str(p.ignore or ""), p.text) for p in self.points]
        return "\n".join(columns(rows))

    def json(self) -> object:
        return [
            {"number": p.number, "enabled": p.enabled, "hits": p.hits, "ignore": p.ignore, "once": p.once, "what": p.text}
            for p in self.points
        ]


@dataclass(frozen=True, slots=True)
class Set:
    """A catchpoint that was just set."""

    point: Catchpoint

    def text(self) -> str:
        return f"Catchpoint {self.point.number} ({self.point.text})"

    def json(self) -> object:
        return {"number": self.point.number, "what": self.point.text}


class Catch:
    """The command on one debugger."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger

    @property
    def commands(self) -> tuple[Command, ...]:
        return (
            worded("catch", SYNOPSIS, _HELP, self._run, _offered,
                   examples=("catch vmexit npf if gpa >= 0xfee00000", "catch delete all")),
            worded("tcatch", "tcatch WHAT [guest N] [if EXPR]", "The same as catch once.", self._once, _offered,
                   examples=("tcatch msr w 0xc0000080 guest 2", "tcatch triple-fault")),
        )

    def _run(self, context: Context, arguments: Arguments) -> Listing | Set:
        points = self.debugger.catchpoints.points
        action = arguments.choice(("delete", "enable", "disable", "ignore"))
        if action is None and arguments.words:
            return self._once(context, arguments) if arguments.choice(("once",)) else self.set(arguments)
        if action == "delete" and arguments.choice(("all",)):
            points.clear()
        elif action is not None:
            point = self._known(arguments)
            if action == "delete":
                del points[point.number]
            elif action == "ignore":
                point.ignore = arguments.number("COUNT")
            else:
                point.enabled = action == "enable"
        arguments.done()
        self.debugger.catchpoints.arm()
        return Listing(tuple(points.values()))

    def _once(self, context: Context, arguments: Arguments) -> Set:
        return self.set(arguments, once=True)

    def _known(self, arguments: Arguments) -> Catchpoint:
        points = self.debugger.catchpoints.points
        number = arguments.number("N")
        if number not in points:
            known = ", ".join(map(str, points)) or "none"
            raise arguments.error(str(number), "there is no catchpoint of this number", f"there are: {known}")
        return points[number]

    def set(self, arguments: Arguments, *, once: bool = False) -> Set:
        """The catchpoint that the words describe, set."""
        words, arguments.words = arguments.words, []
        end = words.index("if") if "if" in words else len(words)
        arguments.words = words[:end]
        chosen = arguments.choice(tuple(Sort))
        if chosen is None:
            what = " ".join(words) or "nothing"
            raise arguments.error(what, f"it must be one of {', '.join(Sort)}", "`help catch` explains them")
        sort = Sort(chosen)
        point = Catchpoint(0, sort, once=once)
        while arguments.words:
            if arguments.choice(("guest",)):
                point.guest = arguments.number("guest", HOST)
            elif RULES[sort].accesses and (access := arguments.choice(("r", "w", "rw"))):
                point.write = None if access == "rw" else access == "w"
            elif sort == Sort.VMCB and not point.field:
                point.field = self._vmcb_field(arguments)
            elif point.first is None and RULES[sort].subject:
                point.first, point.last = self._subject(arguments, sort)
            else:
                raise arguments.error(arguments.words[0], f"not understood behind {sort}", "a condition begins with the word if")
        if sort == Sort.VMCB and not point.field:
            raise arguments.error("vmcb", "it must be said which field", "write catch vmcb rip; `vmcb` shows the names")
        if end < len(words):
            names = MachineNames(self.debugger.executables, RULES[sort].facts, point.guest or HOST)
            try:
                point.condition = parse(" ".join(words[end + 1 :]), names)
            except ExpressionError as error:
                raise CommandError(f"{error.value} (column {error.position + 1} behind if)", error.rule, error.remedy) from None
        catchpoints = self.debugger.catchpoints
        point.number = catchpoints.new_number()
        if point.field:
            catchpoints.watch_field(point)
        catchpoints.add(point)
        return Set(point)

    def _vmcb_field(self, arguments: Arguments) -> str:
        word = arguments.words.pop(0)
        name = word.removeprefix("vmcb.").lower()
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=3)
            remedy = f"did you mean {', '.join(near)}?" if near else "`vmcb` shows the names"
            raise arguments.error(word, "a VMCB has no such field", remedy)
        return NAMES[name].name

    def _subject(self, arguments: Arguments, sort: Sort) -> tuple[int | None, int | None]:
        word = arguments.words.pop(0)
        if word == "any":
            return None, None
        first, dash, last = word.partition("-")
        low = self._number(arguments, sort, first)
        high = self._number(arguments, sort, last) if dash else low
        if high < low:
            raise arguments.error(word, "a range goes from the smaller to the larger number", "write it the other way round")
        return low, high

    def _number(self, arguments: Arguments, sort: Sort, word: str) -> int:
        rule = RULES[sort]
        value = parse_number(word)
        if value is None:
            value = self._named(sort, word)
        if value is None or not 0 <= value <= rule.limit:
            raise arguments.error(word, f"a {rule.subject} is a number up to {rule.limit:#x}, or a name", f"write {rule.example}")
        return value

    def _named(self, sort: Sort, word: str) -> int | None:
        name = word.upper().removeprefix("#")
        if sort == Sort.VMEXIT:
            return ExitCode[name].value if name in ExitCode.__members__ else None
        if sort in (Sort.EXCEPTION, Sort.INJECT):
            code = f"EXCP_{name}"
            return ExitCode[code].value - EXCEPTION_BASE if code in ExitCode.__members__ else None
        if RULES[sort].subject == "requester":
            return RequesterId.parse(word)
        if sort == Sort.MSR:
            table = self.debugger.machine.cpu.msrs.table.values()
            return next((msr.number for msr in table if msr.name.upper() == name), None)
        return None
