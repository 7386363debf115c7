"""`disasm`: code in the inferior's mode, with names, and the instructions that its hypervisor intercepts."""

from dataclasses import dataclass

from introspect.commands.context import CommandError, Context
from introspect.commands.inferior_state import OWNER, InferiorState, find_inferior, unreadable
from introspect.commands.live import vmcb_registers
from introspect.commands.parameters import Address, AddressWord, Located, Misfit, Number, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members
from introspect.disassembly import MAX_INSTRUCTION, Instruction, instructions
from introspect.exits import IOIO, ExitCode
from introspect.expression import Space
from introspect.prediction import Exit, Outcome, Prediction, Situation
from introspect.scope import GENERAL
from introspect.would_exit import BadInstruction, instruction

__all__ = ["COMMANDS", "Predictions"]

_BEFORE = 4
"""Instructions before the current one that are shown."""
_LONGEST_FUNCTION = 1 << 16
"""Bytes that are decoded at most to find these: where instructions begin only the start of a function tells."""


@dataclass(frozen=True, slots=True)
class Line:
    """One instruction. `exit`: by which #VMEXIT it would leave the guest, or what it would raise; empty for neither."""

    address: int
    symbol: str
    code: str
    text: str
    target: str
    exit: str
    current: bool


@dataclass(frozen=True, slots=True)
class Disassembly:
    who: str
    bits: int
    lines: tuple[Line, ...]
    end: str

    def text(self) -> str:
        rows = [
            ("=>" if line.current else "", f"{line.address:#x}", line.symbol and f"<{line.symbol}>", line.code, line.text,
             "  ".join(filter(None, (line.target and f"# {line.target}", line.exit and f"! {line.exit}"))))
            for line in self.lines
        ]  # fmt: skip
        return "\n".join([f"{self.who}, {self.bits}-bit code", *columns(rows), *([self.end] if self.end else [])])

    def json(self) -> object:
        return members(self)


_MEMORY = (ExitCode.NPF, ExitCode.EXCP_PF, ExitCode.EXCP_GP, ExitCode.EXCP_SS, ExitCode.EXCP_AC)
"""What accesses to memory may lead to: by the time that another instruction is the current one that may be different."""


class Predictions:
    """Which instructions of a guest would exit; nothing for the hypervisor, and where there is no VMCB."""

    def __init__(self, subject: InferiorState) -> None:
        context, spa = subject.context, subject.vmcb_pa
        self._here: Situation | None = None
        if spa is not None and subject.vmcb:
            known = {**vmcb_registers(context, spa, subject.vmcb), **subject.registers}
            self._here = Situation(subject.vmcb, context.memory, context.processor, known)
            elsewhere = {name: value for name, value in known.items() if name not in (*GENERAL, "rip")}
            self._elsewhere = Situation(subject.vmcb, context.memory, context.processor, elsewhere)

    def mark(self, one: Instruction, current: bool) -> str:
        """Of the current instruction all that is predicted, faults of its operands too; of another one, whose registers are
        not known, what its intercepts say."""
        if self._here is None:
            return ""
        try:
            found = instruction(self._here if current else self._elsewhere, one.code)
        except BadInstruction:
            return ""
        if not current and (found.exit is None or found.exit.code in _MEMORY):
            return ""
        return _mark(found)


def _mark(found: Prediction) -> str:
    exit = f"exit {found.exit.name}{_about(found.exit)}" if found.exit is not None else ""
    match found.outcome:
        case Outcome.EXIT:
            return exit
        case Outcome.EXCEPTION:
            return f"raises {found.raised}"
        case Outcome.DEPENDS:
            what = exit or (f"raises {found.raised}" if found.raised else "may exit")
            return f"{what}, depending on {', '.join(found.missing)}"
    return ""


def _about(exit: Exit) -> str:
    """What decides what its hypervisor does: the address of a nested page fault, the port."""
    if exit.code == ExitCode.NPF and exit.info2 is not None:
        return f" at gpa {exit.info2:#x}"
    if exit.code == ExitCode.IOIO and exit.info1 is not None:
        return f" of port {IOIO.get(exit.info1, 'PORT'):#x}"
    return ""


class _OptionalAddress(Address):
    """An address, but for what names a whole inferior."""

    def parse(self, context: Context, word: str) -> AddressWord:
        if word == "host":
            raise Misfit("it is the hypervisor, not an address")
        return super().parse(context, word)


_WHERE = Parameter("ADDRESS", _OptionalAddress(), optional=True, help="where to begin; else around the current instruction")
_COUNT = Parameter("N", Number(1, 4096), optional=True, option="--count", default=12, help="how many instructions (12)")


def _start(subject: InferiorState) -> int:
    """Where to begin for the current instruction to have some before it: its function tells where these begin."""
    pc, symbols = subject.pc, subject.symbols
    found = symbols.at(pc) if symbols is not None else None
    if found is None or not 0 < found[1] <= _LONGEST_FUNCTION:
        return pc
    code = subject.linear(pc - found[1], found[1])
    base = subject.registers.get("cs.base", 0)
    starts = [one.address for one in instructions(code, pc - found[1], subject.mode.code_bits, len(code), base)]
    last = starts[-1:] and subject.linear(starts[-1], MAX_INSTRUCTION)
    if not starts or not last:
        return pc
    end = next(instructions(last, starts[-1], subject.mode.code_bits, 1, base), None)
    aligned = end is not None and end.address + len(end.code) == pc
    return starts[-_BEFORE:][0] if aligned else pc


def _disassemble(context: Context, arguments: Arguments) -> Disassembly:
    word, count = arguments.get(_WHERE), arguments[_COUNT]
    subject = find_inferior(context, arguments)
    where = Located(subject.owner, Space.GVA, 0) if word is None else word.locate(context, subject.owner)
    subject = InferiorState(context, where.owner)
    if word is None:
        where = where._replace(offset=_start(subject))
    bits, base = subject.mode.code_bits, subject.registers.get("cs.base", 0) if where.space == Space.GVA else 0
    data = subject.read(where.space, where.offset, count * MAX_INSTRUCTION)
    here = subject.pc if where.space == Space.GVA and "rip" in subject.registers else None
    predictions = Predictions(subject)
    found = list(instructions(data, where.offset, bits, count, base))
    lines = []
    for one in found:
        current = one.address == here
        name = one.target if one.target is not None else one.memory
        lines.append(Line(
            one.address, subject.symbol(one.address) if where.space == Space.GVA else "", one.code.hex(), one.text,
            "" if name is None else subject.symbol(name) or (f"{name:#x}" if one.memory is not None else ""),
            predictions.mark(one, current), current,
        ))  # fmt: skip
    end = ""
    if len(found) < count:
        at = where._replace(offset=where.offset + len(data) & (1 << 64) - 1)
        end = f"{at}: {unreadable(context, at)}"
    if not found:
        raise CommandError(str(where), end.partition(": ")[2], "choose an address that code is at")
    return Disassembly(subject.title, bits, tuple(lines), end)


COMMANDS = (
    Command(
        "disasm", _disassemble, "Disassemble code in the inferior's mode: names, and what its hypervisor intercepts.",
        (_WHERE, _COUNT, OWNER),
        "Without ADDRESS around the current instruction, which => marks. A first number is the address: to name a guest write\n"
        "2:rip, or --guest 2. # names what an operand means, ! the #VMEXIT by which the instruction would leave its guest, or\n"
        "the exception it would raise: for the current one with the registers as they are. `would-exit` says why.",
        ("disasm --guest 2", "disasm host:main 5"),
    ),
)  # fmt: skip
