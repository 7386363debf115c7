"""`exits`: why guests left, what it cost, and all of it for other programs and for the eye."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from introspect.commands.context import CommandError, Context
from introspect.commands.parameters import Choice, ExitCodeKind, File, Flag, Guest, Number, Parameter, Text
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, jsonable, members
from introspect.disassembly import instruction_text
from introspect.exit_export import as_object, json_lines, trace_text
from introspect.exit_plot import page, svg
from introspect.exitlog import KEYS, ExitRecord, Group, RecordNames, RecordScope, Symbolize, group, subject, what
from introspect.exits import ExitCode
from introspect.expression import Expression, ExpressionError, Space, parse
from introspect.registers import ATTRIB
from introspect.scope import read_space
from introspect.symbols import Symbols

__all__ = ["COMMANDS", "Exits", "Histogram", "Written"]

_SECOND = 1_000_000_000
_MOST = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """One exit, with what is known of it only where it was."""

    record: ExitRecord
    symbol: str
    host_symbol: str
    disassembly: str
    """Of the instruction at RIP."""
    now: bool
    """Of which memory has been read just now: it may have changed since the exit."""

    @property
    def row(self) -> tuple[str, ...]:
        r = self.record
        return (
            str(r.number), str(r.time) if r.timed else "-", str(r.guest), str(r.in_guest) if r.timed else "-",
            "-" if r.in_host is None else str(r.in_host), _place(r.rip, self.symbol), "~" * self.now + self.disassembly,
            _place(r.host_rip, self.host_symbol) if r.timed else "-", what(r),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exits:
    lines: tuple[Line, ...]

    def text(self) -> str:
        if not self.lines:
            return "No #VMEXIT is recorded."
        head = ("#", "time", "guest", "in guest", "in host", "rIP", "instruction", "VMRUN", "exit")
        text = columns([head, *(line.row for line in self.lines)])
        if any(line.now for line in self.lines):
            text.append("~: the instruction that is at RIP now; the exit is not about it, or its page ended amid it")
        return "\n".join(text)

    def json(self) -> object:
        return [
            {**as_object(line.record), "symbol": line.symbol, "host_symbol": line.host_symbol, "disassembly": line.disassembly,
             "disassembly_now": line.now} for line in self.lines
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Histogram:
    """Exits counted by one thing. `unit`: how many units of time are a millisecond."""

    key: str
    exits: int
    without: int
    """Exits that have no such number."""
    time: int
    unit: float
    groups: tuple[Group, ...]

    def text(self) -> str:
        if not self.groups:
            return f"No #VMEXIT of {self.exits} has {self.key} to be counted by." if self.exits else "No #VMEXIT is recorded."
        rows = [(self.key, "exits", "share", "per ms", "in guest", "in host", "each", "most", "of #", "")]
        counted = self.exits - self.without
        rows += [
            (
                one.label, str(one.count), f"{one.count / counted:.1%}", f"{one.count / max(self.time / self.unit, 1e-9):.3g}",
                str(one.in_guest), str(one.in_host), f"{one.mean_in_host:.0f}", str(one.most), str(one.most_number or "-"),
                "" if self.key == "code" else " ".join(f"{name}:{count}" for name, count in one.codes),
            )
            for one in self.groups
        ]  # fmt: skip
        if not self.time:  # of a dump, or one single moment: there are no rates
            few = columns((*row[:3], row[9]) for row in rows)
            return "\n".join([f"{counted} #VMEXITs, of which no times are known", *few])
        rest = f", {self.without} more without {self.key}" if self.without else ""
        return "\n".join([f"{counted} #VMEXITs in {self.time} ticks{rest}; what costs the host most time first", *columns(rows)])

    def json(self) -> object:
        groups = [{**members(one), "mean_in_host": one.mean_in_host} for one in self.groups]
        return {"key": self.key, "exits": self.exits, "without": self.without, "time": self.time, "ticks_per_ms": self.unit,
                "groups": groups}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Written:
    """Files that were written, and of how many exits."""

    exits: int
    files: tuple[str, ...]

    def text(self) -> str:
        return f"{self.exits} #VMEXITs written to {', '.join(self.files)}"

    def json(self) -> object:
        return jsonable(self)


def _place(address: int, symbol: str) -> str:
    return f"{address:#x} <{symbol}>" if symbol else f"{address:#x}"


_GUEST = Parameter("GUEST", Guest(), optional=True, option="--guest")
_COUNT = Parameter("N", Number(1, _MOST), optional=True, option="--last", default=20,
                   help="the last so many: 20 if they are listed, else all that are remembered")  # fmt: skip
_BY = Parameter("KEY", Choice(KEYS), optional=True, option="--by", only_option=True, help=f"count them by {', '.join(KEYS)}")
_CODE = Parameter("CODE", ExitCodeKind(), optional=True, option="--code", only_option=True, help="only those with this exit code")
_IF = Parameter("EXPR", Text("an expression"), optional=True, option="--if", only_option=True,
                help="only those for which it holds: code gpa port msr write vector rip rax in_guest in_host ...")  # fmt: skip
_TOP = Parameter("top", Flag(), optional=True, option="--top", help="those that cost the host most, the most first")
_JSONL = Parameter("FILE", File(), optional=True, option="--jsonl", only_option=True, help="write them as JSON lines")
_PERFETTO = Parameter("FILE", File(), optional=True, option="--perfetto", only_option=True,
                      help="write a trace for ui.perfetto.dev or chrome://tracing: guests, and the host beside them")  # fmt: skip
_PLOT = Parameter("FILE", File(), optional=True, option="--plot", only_option=True,
                  help="write a picture: a page, or an image if FILE ends in .svg")  # fmt: skip


def _condition(context: Context, text: str) -> Expression:
    try:
        return parse(text, RecordNames(context.names((context.selected or context.host).number)))
    except ExpressionError as error:
        raise CommandError(f"{error.value} (column {error.position + 1} of {text})", error.rule, error.remedy) from None


def _holds(condition: Expression, record: ExitRecord) -> bool:
    """A fact that an exit does not have makes it not one of those that are meant."""
    try:
        return condition.holds(RecordScope(record))
    except ExpressionError:
        return False


def _chosen(context: Context, arguments: Arguments, *, listed: bool) -> list[ExitRecord]:
    """The exits that the filters leave: the last so many of them, or those that cost most."""
    guest, code, condition = arguments.get(_GUEST), arguments.get(_CODE), arguments.get(_IF)
    found: Iterable[ExitRecord] = context.exits(guest.number if guest else None, _MOST)
    if code is not None:
        found = (record for record in found if record.code == code)
    if condition is not None:
        compiled = _condition(context, condition)
        found = (record for record in found if _holds(compiled, record))
    count = arguments[_COUNT] if listed or arguments.given(_COUNT) else _MOST
    if arguments.given(_TOP):
        return sorted(found, key=lambda record: (-(record.in_host or 0), record.number))[:count]
    return list(found)[-count:]


def _symbolizer(context: Context) -> Symbolize:
    known: dict[int | None, Symbols | None] = {guest.number: context.symbols(guest.number) for guest in context.guests}
    known[None] = context.symbols(context.host.number)

    def name(number: int | None, address: int) -> str:
        symbols = known.get(number)
        return "" if symbols is None else symbols.name(address)

    return name


class _Now:
    """Instructions as memory has them now, for exits that are not about one."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.who = {guest.number: guest for guest in context.guests}
        self.code: dict[int, tuple[int, int]] = {}
        """By inferior: base of CS, and how many bits its code has."""

    def __call__(self, number: int, rip: int) -> str:
        inferior = self.who.get(number)
        if inferior is None:
            return ""
        if number not in self.code:
            registers = self.context.registers(number)
            attrib, long = registers.get("cs.attrib", 0), registers.get("efer", 0) & 0x400
            bits = 64 if long and attrib & ATTRIB.L else 32 if attrib & ATTRIB.DB else 16
            self.code[number] = 0 if bits == 64 else registers.get("cs.base", 0), bits
        base, bits = self.code[number]
        found = instruction_text(read_space(self.context.memory, inferior, Space.GVA, base + rip, 15), rip, bits)
        return found[0] if found is not None else ""


def _lines(context: Context, records: Sequence[ExitRecord]) -> tuple[Line, ...]:
    symbolize, now = _symbolizer(context), _Now(context)
    lines = []
    for record in records:
        own = None if record.code == ExitCode.INVALID else record.guest
        kept = instruction_text(record.insn, record.rip, record.bits) if record.insn else None
        text = kept[0] if kept is not None else now(own, record.rip) if own is not None else ""
        lines.append(
            Line(record, symbolize(own, record.rip), symbolize(None, record.host_rip), text, kept is None and bool(text))
        )
    return tuple(lines)


def _write(path: str, parts: Iterable[str]) -> str:
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(parts)
    except OSError as error:
        raise CommandError(path, error.strerror or "it cannot be written", "choose a file that can be written") from None
    return path


def _exits(context: Context, arguments: Arguments) -> Exits | Histogram | Written:
    key = arguments.get(_BY)
    targets = [(option, path) for option in (_JSONL, _PERFETTO, _PLOT) if (path := arguments.get(option)) is not None]
    records = _chosen(context, arguments, listed=key is None and not targets)
    per_second: int = getattr(context, "ticks_per_second", _SECOND)
    if targets:
        names, symbolize = {guest.number: guest.name for guest in context.guests}, _symbolizer(context)
        files = []
        for option, path in targets:
            if option is _JSONL:
                files.append(_write(path, json_lines(records, symbolize)))
            elif option is _PERFETTO:
                files.append(_write(path, trace_text(records, names, per_second, symbolize)))
            else:
                files.append(_write(path, [(svg if path.endswith(".svg") else page)(records, names, per_second)]))
        return Written(len(records), tuple(files))
    if key is None:
        return Exits(_lines(context, records))
    first = min((record.time - record.in_guest for record in records), default=0)
    last = max((max(record.time, record.resumed) for record in records), default=0)
    without = sum(subject(record, key) is None for record in records)
    groups = group(records, key, _symbolizer(context))
    return Histogram(key, len(records), without, last - first, per_second / 1000, groups)


COMMANDS = (
    Command(
        "exits", _exits, "Show the last #VMEXITs of one guest or of all, oldest first; count, export or draw them.",
        (_GUEST, _COUNT, _BY, _CODE, _IF, _TOP, _JSONL, _PERFETTO, _PLOT),
        "A first number that is the number of a guest names that guest. `in guest` is the time from VMRUN to the exit,\n"
        "`in host` from there to the CPU's next VMRUN, in ticks: bytes of code executed. The instruction is the one that the\n"
        "guest was at, as it was then; with ~ as memory has it now. VMRUN is where the host had entered the guest.",
        ("exits 2 5", "exits --top 3", "exits --by code", "exits 3 --by gpa --last 500",
         'exits --code ioio --if "port == 0xe9" --last 3'),
    ),
)  # fmt: skip
