"""`disasm`: code in the inferior's mode, with names, and the instructions that its hypervisor intercepts."""

from dataclasses import dataclass

from introspect.commands.context import CommandError, Context, Result
from introspect.commands.parameters import Address, AddressWord, Located, Misfit, Number, Parameter
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members
from introspect.commands.subject import OWNER, Subject, find_subject, unreadable
from introspect.disassembly import MAX_INSTRUCTION, Instruction, instructions
from introspect.exits import ExitCode, exit_name
from introspect.expression import Space
from introspect.intercepts import intercepted, words_of
from introspect.permissions import iopm_intercepts, msrpm_intercepts
from introspect.vmcb import VMCB

__all__ = ["COMMANDS"]

_BEFORE = 4
"""Instructions before the current one that are shown."""
_LONGEST_FUNCTION = 1 << 16
"""Bytes that are decoded at most to find these: where instructions begin only the start of a function tells."""


@dataclass(frozen=True, slots=True)
class Line:
    """One instruction. `exit`: by which #VMEXIT it would leave the guest, as far as intercepts decide; empty for none."""

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


class _Intercepts:
    """What the VMCB of a subject intercepts; nothing for the hypervisor."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._vmcb = subject.vmcb

    def exit(self, one: Instruction, current: bool) -> str:
        """Only of the current instruction is known which port or MSR it accesses, if it does not say so itself."""
        if not self._vmcb:
            return ""
        words = words_of(self._vmcb)
        found = [code for code in one.codes if intercepted(words, code)]
        if not found:
            return ""
        code = found[0]
        if code == ExitCode.IOIO:
            return self._port(one, current)
        if code == ExitCode.MSR:
            return self._msr(one, current)
        if code == ExitCode.CR0_SEL_WRITE:
            return f"exit {exit_name(code)} if it changes more than TS and MP"
        if code == ExitCode.MWAIT_COND:
            return f"exit {exit_name(code)} if the monitor is armed"
        if code == ExitCode.IDLE_HLT:
            return f"exit {exit_name(code)} if no virtual interrupt is pending"
        return f"exit {exit_name(code)}"

    def _port(self, one: Instruction, current: bool) -> str:
        port = next((int(part, 0) for part in one.operands.replace(",", " ").split() if part[0].isdigit()), None)
        if port is None and current and "rdx" in self.subject.registers:
            port = self.subject.registers["rdx"] & 0xFFFF
        if port is None:
            return "exit IOIO if the IOPM has the port"
        registers = one.operands.replace(",", " ").split()
        size = {"al": 1, "ax": 2, "eax": 4}.get(next((r for r in registers if r in ("al", "ax", "eax")), ""))
        size = size or {"b": 1, "w": 2, "d": 4}[one.mnemonic[-1]]
        base = VMCB.read(self._vmcb, "iopm_base_pa")
        return f"exit IOIO, port {port:#x}" if iopm_intercepts(self.subject.context.memory, base, port, size) else ""

    def _msr(self, one: Instruction, current: bool) -> str:
        if not current or "rcx" not in self.subject.registers:
            return "exit MSR if the MSRPM has it"
        number, base = self.subject.registers["rcx"] & 0xFFFFFFFF, VMCB.read(self._vmcb, "msrpm_base_pa")
        write = one.mnemonic == "wrmsr"
        return f"exit MSR, {number:#x}" if msrpm_intercepts(self.subject.context.memory, base, number, write) else ""


class _OptionalAddress(Address):
    """An address, but for what names a whole inferior."""

    def parse(self, context: Context, word: str) -> AddressWord:
        if word == "host":
            raise Misfit("it is the hypervisor, not an address")
        return super().parse(context, word)


_WHERE = Parameter("ADDRESS", _OptionalAddress(), optional=True, help="where to begin; else around the current instruction")
_COUNT = Parameter("N", Number(1, 4096), optional=True, option="--count", default=12, help="how many instructions (12)")


def _start(subject: Subject) -> int:
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


def _disassemble(context: Context, arguments: Arguments) -> Result:
    word, count = arguments.get(_WHERE), arguments[_COUNT]
    subject = find_subject(context, arguments)
    where = Located(subject.owner, Space.GVA, 0) if word is None else word.locate(context, subject.owner)
    subject = Subject(context, where.owner)
    if word is None:
        where = where._replace(offset=_start(subject))
    bits, base = subject.mode.code_bits, subject.registers.get("cs.base", 0) if where.space == Space.GVA else 0
    data = subject.read(where.space, where.offset, count * MAX_INSTRUCTION)
    here = subject.pc if where.space == Space.GVA and "rip" in subject.registers else None
    intercepts = _Intercepts(subject)
    found = list(instructions(data, where.offset, bits, count, base))
    lines = []
    for one in found:
        current = one.address == here
        name = one.target if one.target is not None else one.memory
        lines.append(Line(
            one.address, subject.symbol(one.address) if where.space == Space.GVA else "", one.code.hex(), one.text,
            "" if name is None else subject.symbol(name) or (f"{name:#x}" if one.memory is not None else ""),
            intercepts.exit(one, current), current,
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
        "2:rip, or --guest 2. # names what an operand means, ! the #VMEXIT by which the instruction would leave its guest, as\n"
        "far as intercepts and permission maps decide; `would-exit` knows what comes before them.",
        ("disasm --guest 2", "disasm host:main 5"),
    ),
)  # fmt: skip
