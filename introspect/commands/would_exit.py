"""`would-exit`: whether an instruction, an access or an event leaves a guest, and what decides it."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from introspect import msrs
from introspect.commands.context import CommandError, Context, GuestView
from introspect.commands.live import on_processor, processor_state, vmcb_registers
from introspect.commands.parameters import Address, AddressWord, Candidate, Flag, Located, Misfit, Number, Parameter, parse_number
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, jsonable
from introspect.commands.which import WHICH_OPTION, find_vmcb, inner_vmcb, read_vmcb
from introspect.disassembly import instruction_text
from introspect.exits import EVENT, describe_event, exception_name, exit_details
from introspect.expression import Space
from introspect.guest_memory import GuestMemory
from introspect.interception import MNEMONICS
from introspect.paging import Nested, PagingState
from introspect.prediction import Exit, Outcome, Prediction, Situation
from introspect.registers import CR0, RFLAGS
from introspect.rules import first_violation
from introspect.scope import read_space
from introspect.subject import mode_bits
from introspect.vmcb import VMCB
from introspect.would_exit import EVENTS, BadInstruction, event, exception, instruction

__all__ = ["COMMANDS", "Predicted"]


@dataclass(frozen=True, slots=True)
class Predicted:
    """What an instruction or event would lead to in a guest."""

    owner: str
    vmcb: int
    mode: str
    prediction: Prediction

    def text(self) -> str:
        found = self.prediction
        rows = [("looked at", "APM2", "found", ""), *((one.what, one.section, one.value, one.result) for one in found.looked)]
        lines = [f"{found.subject} in {self.owner}, VMCB at {self.vmcb:#x}, {self.mode}:"]
        lines += columns(rows, "  ") if found.looked else []
        return "\n".join([*lines, *_verdict(found), *(f"   {note}" for note in found.notes)])

    def json(self) -> object:
        found = self.prediction
        return {
            "owner": self.owner, "vmcb": self.vmcb, "mode": self.mode, "subject": found.subject, "outcome": str(found.outcome),
            "exit": found.exit and {"name": found.exit.name, **_exit_json(found.exit)},
            "exception": found.raised and {"name": exception_name(found.raised.vector), **found.raised._asdict()},
            "may_raise": sorted(found.may), "looked": jsonable(found.looked), "missing": list(found.missing),
            "notes": list(found.notes),
        }  # fmt: skip


def _exit_json(exit: Exit) -> dict[str, int | None]:
    return {name: None if value is None else int(value) for name, value in exit._asdict().items()}


def _verdict(found: Prediction) -> list[str]:
    match found.outcome:
        case Outcome.EXIT:
            assert found.exit is not None
            return [f"-> #VMEXIT {_exit(found.exit)}"]
        case Outcome.EXCEPTION:
            return [f"-> {found.raised}, which is not intercepted: the guest's own handler gets it"]
        case Outcome.STAYS:
            return ["-> no #VMEXIT"]
    what = f"#VMEXIT {_exit(found.exit)}" if found.exit else f"{found.raised}" if found.raised else "no #VMEXIT"
    return [f"-> depends on {', '.join(found.missing)}, not known here; else {what}"]


def _exit(exit: Exit) -> str:
    """Code and information: "CPUID (0x72), EXITINFO1 0, EXITINFO2 0, nRIP 0x1002"."""
    unknown = {"info1": "as the instruction is", "info2": "as the instruction is", "nrip": "behind the instruction"}
    parts = [f"{exit.name} ({exit.code:#x})"]
    for name, field in (("EXITINFO1", "info1"), ("EXITINFO2", "info2"), ("nRIP", "nrip")):
        value = getattr(exit, field)
        parts.append(f"{name} {unknown[field] if value is None else f'{value:#x}' if value else '0'}")
    details = exit_details(exit.code, exit.info1 or 0, exit.info2 or 0) if exit.info1 and exit.info2 is not None else ""
    named = f" ({details})" if details and "EXITINFO" not in details else ""
    return ", ".join(parts) + named


# What is asked


Ask = Callable[[Situation], Prediction]


@dataclass(frozen=True, slots=True)
class _Question:
    """Something to predict. `changed`: registers that it is asked with, None being any; `ask` does it."""

    ask: Ask
    changed: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class _At:
    """The instruction at an address."""

    address: AddressWord


def _hypothetical(code: Callable[[int], bytes], subject: str, **registers: int | None) -> _Question:
    """An instruction by its bytes, in code of so many bits, that stands nowhere."""

    def ask(situation: Situation) -> Prediction:
        return instruction(situation, code(mode_bits(situation.registers)), subject)

    return _Question(ask, {"rip": None, **registers})


def _number(words: list[str], what: str, high: int) -> int:
    value = parse_number(words[0]) if words else None
    if value is None or not 0 <= value <= high:
        raise Misfit(f"{what} must be a number from 0 to {high:#x}")
    words.pop(0)
    return value


def _access(words: list[str]) -> bool:
    """`r` or `w`: whether it writes."""
    if not words or words[0] not in ("r", "w"):
        raise Misfit("how it is accessed must be r or w")
    return words.pop(0) == "w"


def _msr(words: list[str]) -> _Question:
    """By number or name."""
    if words and parse_number(words[0]) is None:
        known = msrs.find(words[0])
        if known is None:
            raise Misfit("no MSR has this name", f"try {', '.join(msrs.near(words[0])) or 'its number'}")
        words[0] = str(known.number)
    number, write = _number(words, "an MSR", 0xFFFFFFFF), _access(words)
    name = msrs.msr_name(number)
    subject = f"{'WRMSR' if write else 'RDMSR'} of {f'{name} ({number:#x})' if name else f'{number:#x}'}"
    unknown = {"rax": None, "rdx": None}
    return _hypothetical(lambda bits: b"\x0f\x30" if write else b"\x0f\x32", subject, rcx=number, **unknown)


def _port(words: list[str]) -> _Question:
    port, size = _number(words, "a port", 0xFFFF), 1
    if words and words[0] in ("1", "2", "4"):
        size = int(words.pop(0))
    out = bool(words) and words[0] == "out"
    if words and words[0] in ("in", "out"):
        words.pop(0)
    opcode = 0xEC | (size > 1) | 2 * out

    def code(bits: int) -> bytes:
        other = (size == 2) != (bits == 16) and size > 1
        return b"\x66" * other + bytes([opcode])

    return _hypothetical(code, f"{'OUT to' if out else 'IN from'} port {port:#x}, {size} byte{'s' * (size > 1)}", rdx=port)


def _register(kind: str, words: list[str]) -> _Question:
    """MOV of a control or debug register through rAX; the value that is written may follow."""
    number, write = _number(words, f"a {kind.upper()}", 15), _access(words)
    value = _number(words, "a value", (1 << 64) - 1) if write and words and parse_number(words[0]) is not None else None
    opcode = (0x22 if write else 0x20) | (kind == "dr")

    def code(bits: int) -> bytes:
        rex = b"\x44" if number > 7 and bits == 64 else b"\xf0" if kind == "cr" and number == 8 else b""
        return rex + bytes([0x0F, opcode, 0xC0 | (0 if rex == b"\xf0" else number & 7) << 3])

    told = f" of {value:#x}" if value is not None else ""
    return _hypothetical(code, f"MOV {'to' if write else 'from'} {kind.upper()}{number}{told}", rax=value)


_VECTORS = {exception_name(vector).removeprefix("#").lower(): vector for vector in range(32)}


def _exception(words: list[str]) -> _Question:
    word = words[0].lower().removeprefix("#").removeprefix("excp_") if words else ""
    vector = _VECTORS.get(word, parse_number(word))
    if vector is None or not 0 <= vector < 32:
        raise Misfit("an exception must be a vector from 0 to 31, or a name as pf")
    words.pop(0)
    return _Question(lambda situation: exception(situation, vector), {})


def _interrupt(words: list[str]) -> _Question:
    vector = _number(words, "a vector", 0xFF)
    return _hypothetical(lambda bits: bytes([0xCD, vector]), f"INT {vector:#x}")


def _event(name: str) -> _Question:
    return _Question(lambda situation: event(situation, name), {})


_KINDS: Mapping[str, Callable[[list[str]], _Question]] = {
    "msr": _msr, "port": _port, "cr": lambda words: _register("cr", words), "dr": lambda words: _register("dr", words),
    "exception": _exception, "int": _interrupt,
}  # fmt: skip
_MEANINGS = {
    "msr": "MSR N|NAME r|w", "port": "port P [1|2|4] [in|out]", "cr": "control register N r|w [VALUE]",
    "dr": "debug register N r|w [VALUE]", "exception": "exception by vector or name", "int": "INT VECTOR",
    "at": "the instruction at an address",
}  # fmt: skip
_FROM_MEMORY = {"invlpg": ("rdi", "rbx"), **dict.fromkeys(("sgdt", "sidt", "lgdt", "lidt", "invpcid"), ("rdi", "rbx"))}
_ANY = b"\x90"
_HEX = re.compile(r"(?:[0-9a-fA-F]{2})+")


@dataclass(frozen=True)
class _Subject:
    """What may exit, in words."""

    noun: str = "an instruction, an access or an event"

    def take(self, context: Context, words: list[str]) -> "_Question | _At":
        left = list(words)
        found = self._take(context, left)
        words[:] = left
        return found

    def _take(self, context: Context, words: list[str]) -> "_Question | _At":
        word = words.pop(0)
        name = word.lower()
        if name in _KINDS:
            return _KINDS[name](words)
        if name in EVENTS:
            return _event(name)
        if name in MNEMONICS:
            code = MNEMONICS[name]
            return _hypothetical(lambda bits: code, name.upper(), **dict.fromkeys(_FROM_MEMORY.get(name, ()), None))
        if name == "at":
            if not words:
                raise Misfit("the address is missing behind `at`")
            word = words.pop(0)
        elif _HEX.fullmatch(word):
            digits = [word]
            while words and _HEX.fullmatch(words[0]):
                digits.append(words.pop(0))
            code = bytes.fromhex("".join(digits))
            return _Question(lambda situation: instruction(situation, code), {"rip": None})
        return _At(Address().parse(context, word))

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        yield from (Candidate(word, meaning) for word, meaning in _MEANINGS.items())
        yield from (Candidate(name, what) for name, what in EVENTS.items())
        yield from (Candidate(name, "instruction") for name in MNEMONICS)
        yield from Address().complete(context, prefix)


_WHAT = Parameter("WHAT", _Subject(), optional=True, help="what may exit, see above; else the guest's next instruction")
_INNER = Parameter("INNER", Flag(), option="--inner", optional=True,
                   help="by the VMCB that the guest's own hypervisor made for it: whether that one gets the exit")  # fmt: skip
_CPL = Parameter("CPL", Number(0, 3), option="--cpl", only_option=True, help="the privilege to ask for; else the current one")


def _mode(registers: Mapping[str, int]) -> str:
    if not registers["cr0"] & CR0.PE:
        return "real mode"
    if registers["rflags"] & RFLAGS.VM:
        return "virtual-8086 mode"
    return f"{mode_bits(registers)}-bit code at CPL {registers['cpl'] & 3}"


def _code_at(context: Context, number: int, where: _At | None, situation: Situation) -> tuple[int, bytes]:
    """rIP and bytes of an instruction in the memory of a guest."""
    registers, cpu = situation.registers, situation.processor
    guest = GuestView(
        number=number, name="", vmcbs=(), asid=0, ncr3=None,
        nested=Nested.from_vmcb(situation.vmcb, cpu.host_cr4, cpu.host_efer, cpu.maxphyaddr),
        paging=PagingState(registers["cr0"], registers["cr3"], registers["cr4"], registers["efer"], maxphyaddr=cpu.maxphyaddr),
    )  # fmt: skip
    linear = mode_bits(registers) == 64
    if where is None:
        rip, space = registers["rip"], Space.GVA
        at = rip if linear else rip + registers["cs.base"] & 0xFFFFFFFF
    else:
        located = where.address.locate(context, guest)
        at, space = located.offset, located.space
        rip = at if linear else at - registers["cs.base"] & 0xFFFFFFFF
    return rip, read_space(situation.memory, guest, space, at, 15)


def _fetched(situation: Situation) -> Prediction:
    """Of an instruction that cannot be read: its fetch is refused, or there is no memory."""
    rip = situation.registers["rip"]
    found = instruction(situation, _ANY, f"the instruction at rIP {rip:#x}")
    if not found.looked[0].result and found.raised is None:
        raise CommandError(f"{rip:#x}", "there is no code to read at this rIP", "`walk` shows where it leads")
    return found


def _would_exit(context: Context, arguments: Arguments) -> Predicted:
    spa, owner, contents = find_vmcb(context, arguments, WHICH_OPTION)
    registers = dict(vmcb_registers(context, spa, contents))
    cpl = arguments.get(_CPL)
    if cpl is not None:
        registers["cpl"] = cpl
    situation = Situation(contents, context.memory, context.processor, registers)
    number = next((view.number for view in context.guests if spa in view.vmcbs), 0)
    question, first = arguments.get(_WHAT), tuple[str, ...]()
    if arguments.given(_INNER):
        spa, owner, situation = _by_its_own_hypervisor(context, arguments, spa, situation)
    elif question is None:
        first = tuple(_comes_first(context, spa, contents))
    if question is None or isinstance(question, _At):
        registers["rip"], code = _code_at(context, number, question, situation)
        question = _Question(lambda asked: instruction(asked, code, _subject(code, asked)) if code else _fetched(asked), {})
    known = {name: value for name, value in {**registers, **question.changed}.items() if value is not None}
    known |= {name: known.get(name, 0) for name in ("cr0", "rflags", "cpl")}
    try:
        found = question.ask(replace(situation, registers=known))
    except BadInstruction as error:
        raise CommandError(str(error), "it cannot be decoded", "give all its bytes, or an address where one begins") from None
    return Predicted(owner, spa, _mode(known), replace(found, notes=(*first, *found.notes)))


def _by_its_own_hypervisor(
    context: Context, arguments: Arguments, spa: int, situation: Situation
) -> tuple[int, str, Situation]:
    """The VMCB that the hypervisor in a guest's parent made for it, with the parent's memory, where what it names lies."""
    guest = next((view for view in context.guests if spa in view.vmcbs), None)
    if guest is None:
        raise arguments.error("--inner", "it goes with a guest, not with an address")
    found, contents = read_vmcb(context, Located(context.host, Space.SPA, inner_vmcb(guest)))
    parent = next((view for view in context.guests if view.number == guest.parent), None)
    if parent is None:
        raise CommandError(str(guest), f"its parent, guest {guest.parent}, is not known", "put it right with `guest parent`")
    memory = context.memory if parent.nested is None else GuestMemory(context.memory, parent.nested)
    host = parent.paging
    processor = replace(situation.processor, host_cr0=host.cr0, host_cr4=host.cr4, host_efer=host.efer)
    return found, f"{guest}, as guest {parent.number} runs it", Situation(
        contents, memory, processor, situation.registers, "gpa"
    )


def _comes_first(context: Context, vmcb: int, contents: bytes) -> Iterator[str]:
    """What a guest that VMRUN has yet to enter meets before its next instruction."""
    if on_processor(processor_state(context, vmcb), vmcb):
        return
    if first_violation(contents, context.processor, context.memory) is not None:
        yield "but VMRUN refuses this VMCB: `vmrun why`"
    injected = VMCB.read(contents, "eventinj")
    if injected & EVENT.v:
        yield f"but VMRUN delivers what EVENTINJ holds first: {describe_event(injected)}"


def _subject(code: bytes, situation: Situation) -> str:
    """The instruction at rIP in words; its bytes if they are none that the disassembler knows."""
    rip = situation.registers["rip"]
    found = instruction_text(code, rip, mode_bits(situation.registers))
    return f"{found[0]} at rIP {rip:#x}" if found is not None else ""


COMMANDS = (
    Command(
        "would-exit", _would_exit, "Say whether an instruction, an access or an event would leave a guest, and what decides it.",
        (_WHAT, WHICH_OPTION, _CPL, _INNER),
        "WHAT is one of\n"
        "  cpuid, rdmsr, invlpg, vmmcall ...   an instruction by its name, with the registers as they are\n"
        "  0f a2                               an instruction by its bytes, in the guest's mode\n"
        "  at ADDRESS                          the instruction there; `at` may be left out\n"
        "  msr N|NAME r|w                      RDMSR or WRMSR\n"
        "  port P [1|2|4] [in|out]             IN or OUT of so many bytes (1)\n"
        "  cr N r|w [VALUE], dr N r|w [VALUE]  MOV of a control or debug register\n"
        "  int VECTOR                          INT\n"
        "  exception V                         an exception, by vector or name (pf)\n"
        "  intr, nmi, smi, init, vintr, task-switch, ferr, shutdown   an event\n"
        "The processor looks at these things in this order, until one decides (table 15-7): exceptions that come before the\n"
        "intercept, its bit, and the bit of the permission map. EXITINFO1 and 2 are what the exit would say. What decides but\n"
        "is not known, as a general register in a dump, is named.",
        ("would-exit cpuid --guest 2", "would-exit msr efer w --guest 2"),
    ),
)  # fmt: skip
