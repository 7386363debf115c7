"""Whether an instruction, an access or an event leaves a guest, by which bit, and what comes before that (APM2 15.7 to 15.14).

Pure functions over a VMCB, memory, and what is known of the guest's registers. What is not known and decides makes an answer
`DEPENDS`: it names what is missing. Nothing is read with side effects, and nothing is executed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from introspect.decode import STRING_IO, Undecodable, decode
from introspect.exits import EXCEPTION_BASE, ExitCode, exception_name, port_info
from introspect.interception import (
    BP,
    OF,
    PORT,
    UD,
    VIRTUAL_IOPL,
    Form,
    control_register,
    form_of,
    port_of,
    port_size,
)
from introspect.layout import bit
from introspect.memory_faults import refused_access, refused_fetch
from introspect.permissions import iopm_bits, msrpm_bit
from introspect.prediction import Exit, Looked, Outcome, Prediction, Situation, Trail
from introspect.registers import CR0, RFLAGS
from introspect.sources import Memory, Unreadable
from introspect.subject import NestedRefusal, Raised, Subject, Unknown, mode_bits
from introspect.vmcb import MISC_CTL2, V_INTR

__all__ = ["EVENTS", "BadInstruction", "event", "exception", "instruction"]


class BadInstruction(ValueError):
    """Bytes that are no whole instruction."""


def instruction(situation: Situation, code: bytes, subject: str = "") -> Prediction:
    """The instruction that `code` begins with, in the guest's mode. Raises `BadInstruction`."""
    bits = mode_bits(situation.registers)
    try:
        insn = decode(bytes(code[:15]), bits)
    except Undecodable:
        raise BadInstruction(f"{bytes(code[:15]).hex(' ') or 'nothing'} is no whole instruction in {bits}-bit code") from None
    g = Subject(situation.vmcb, situation.memory, situation.registers, situation.processor, insn, bytes(code[: insn.length]))
    form = form_of(g)
    trail = Trail(situation, subject or (form.name if form else bytes(code[: insn.length]).hex(" ")))
    try:
        refused = refused_fetch(trail, g)
        if refused is not None:
            return refused
        if form is not None:
            return _predict(trail, g, form)
    except NestedRefusal as nested:
        trail.looked.append(Looked("nested paging", "15.25.6", "an access of the instruction is refused", "#VMEXIT"))
        return trail.exits(Exit(ExitCode.NPF, nested.info1, nested.info2, 0))
    refused = refused_access(trail, g)
    if refused is not None:
        return refused
    trail.notes.append("no intercept of instructions concerns it: only exceptions of its own can exit")
    return trail.ends(Outcome.STAYS, may=frozenset(range(32)))


def _predict(trail: Trail, g: Subject, form: Form) -> Prediction:
    for check in form.before:
        if check is PORT and g.insn.opcode in STRING_IO and g.insn.rep and not _repeats(trail, g):
            return trail.ends(Outcome.STAYS)
        raised = trail.look(check, g)
        if raised is not None:
            return trail.raises(raised)
    found = _SPECIAL[form.special](trail, g, form) if form.special else _plain(trail, g, form)
    if found is not None:
        return trail.exits(found)
    if form.code in _BY_IOPL and g.need("rflags") & RFLAGS.VM:
        raised = trail.look(VIRTUAL_IOPL, g)
        if raised is not None:
            return trail.raises(raised)
    if form.special == "into" and not g.need("rflags") & RFLAGS.OF:
        trail.looked.append(Looked("RFLAGS.OF", "APM3 INTO", "0", ""))
        return trail.ends(Outcome.STAYS)
    after = Raised(OF) if form.special == "into" else form.after
    if form.special == "rsm":
        after = None if g.registers.get("smm") else Raised(UD)
    if after is not None:
        following = _nrip(g) if after.vector in (BP, OF) else 0
        return trail.raises(after, following or 0)
    if form.special in _ELSEWHERE:
        return trail.ends(Outcome.STAYS, may=form.may)
    return refused_access(trail, g) or trail.ends(Outcome.STAYS, may=form.may)


def _repeats(trail: Trail, g: Subject) -> bool:
    """Whether a repeated string instruction has an iteration left (APM3 1.2.6)."""
    try:
        count = g.need("rcx") & (1 << g.insn.address) - 1
    except Unknown:
        trail.doubts.append(("rcx", None))
        trail.looked.append(Looked("rCX is not 0", "APM3 1.2.6", "rcx is not known", "? nothing to do"))
        return True
    trail.looked.append(Looked("rCX is not 0", "APM3 1.2.6", f"{count:#x}", "" if count else "nothing to do"))
    return bool(count)


def _nrip(g: Subject) -> int | None:
    """nRIP of an instruction intercept (APM2 15.7.1)."""
    rip = g.registers.get("rip")
    if not g.has("NRIPS"):
        return 0
    return None if rip is None else rip + g.insn.length


def _known(what: Callable[[], int]) -> int | None:
    """A value that only the exit's information needs; None if it is not known."""
    try:
        return what()
    except Unknown:
        return None


def _plain(trail: Trail, g: Subject, form: Form) -> Exit | None:
    if form.code is None or not trail.bit(form.code):
        return None
    return Exit(form.code, 0, 0, _nrip(g))


def _vmload(trail: Trail, g: Subject, form: Form) -> Exit | None:
    """Where virtual VMLOAD and VMSAVE are asked for but not recognized they exit, intercepted or not (APM2 15.33.1)."""
    found = _plain(trail, g, form)
    if found is not None or form.code is None or not g.field("misc_ctl2") & MISC_CTL2.v_vmload_vmsave:
        return found
    if not g.has("V_VMSAVE_VMLOAD") or g.virtual_vmload:
        return None
    value = "they need nested paging and a hypervisor in 64-bit mode"
    trail.looked.append(Looked(f"virtual {form.name} is not recognized", "15.33.1", value, "#VMEXIT"))
    return Exit(form.code, 0, 0, _nrip(g))


def _assisted(g: Subject, info1: int | None) -> int | None:
    """EXITINFO1 that decode assists give (APM2 15.8)."""
    return info1 if g.has("DecodeAssists") else 0


def _cr(trail: Trail, g: Subject, form: Form) -> Exit | None:
    code = (ExitCode.CR0_WRITE if g.insn.opcode == 0x0F22 else ExitCode.CR0_READ) + control_register(g)
    return Exit(code, _assisted(g, bit(63) | g.insn.rm), 0, _nrip(g)) if trail.bit(code) else None


def _cr0(trail: Trail, g: Subject, form: Form) -> Exit | None:
    """Two intercepts; the selective one sees changes of bits other than TS and MP, and any LMSW (APM2 15.8.1, 15.9)."""
    move, clts = g.insn.opcode == 0x0F22, g.insn.opcode == 0x0F06
    info1 = _assisted(g, bit(63) | g.insn.rm if move else 0)
    if trail.bit(ExitCode.CR0_WRITE):
        return Exit(ExitCode.CR0_WRITE, info1, 0, _nrip(g))
    if clts or not trail.situation.wants(ExitCode.CR0_SEL_WRITE):
        if not clts:
            trail.bit(ExitCode.CR0_SEL_WRITE)
        return None
    selected = Exit(ExitCode.CR0_SEL_WRITE, info1, 0, _nrip(g))
    if move:
        try:
            changed = ((g.need("cr0") | CR0.ET) ^ (g.moved & CR0.defined | CR0.ET)) & ~(CR0.TS | CR0.MP)
        except Unknown as unknown:
            trail.doubts.append((unknown.what, None))
            trail.looked.append(Looked("bits other than TS and MP change", "15.9", f"{unknown.what} is not known", "? no exit"))
        else:
            names = CR0.describe(changed)
            trail.looked.append(Looked("bits other than TS and MP change", "15.9", names or "none", "" if changed else "no exit"))
            if not changed:
                return None
    trail.bit(ExitCode.CR0_SEL_WRITE)
    return selected


def _dr(trail: Trail, g: Subject, form: Form) -> Exit | None:
    code = (ExitCode.DR0_WRITE if g.insn.opcode == 0x0F23 else ExitCode.DR0_READ) + g.insn.reg
    return Exit(code, _assisted(g, g.insn.rm), 0, _nrip(g)) if trail.bit(code) else None


def _invlpg(trail: Trail, g: Subject, form: Form) -> Exit | None:
    if not trail.bit(ExitCode.INVLPG):
        return None
    return Exit(ExitCode.INVLPG, _assisted(g, _known(g.operand_linear)), 0, _nrip(g))


def _interrupt(trail: Trail, g: Subject, form: Form) -> Exit | None:
    if not trail.bit(ExitCode.SWINT):
        return None
    return Exit(ExitCode.SWINT, _assisted(g, g.insn.immediate & 0xFF), 0, _nrip(g))


def _icebp(trail: Trail, g: Subject, form: Form) -> Exit | None:
    if trail.bit(ExitCode.ICEBP):
        return Exit(ExitCode.ICEBP, 0, 0, _nrip(g))
    trail.notes.append("the intercept of #DB does not see it (APM2 15.12.2)")
    return None


def _hlt(trail: Trail, g: Subject, form: Form) -> Exit | None:
    if trail.bit(ExitCode.HLT):
        return Exit(ExitCode.HLT, 0, 0, _nrip(g))
    if g.has("IdleHlt") and trail.bit(ExitCode.IDLE_HLT):
        word = g.field("v_intr")
        nmi = word & V_INTR.v_nmi_enable and word & V_INTR.v_nmi
        pending = "V_IRQ" if word & V_INTR.v_irq else "V_NMI" if nmi else ""
        trail.looked.append(Looked("no virtual interrupt is pending", "15.9", pending or "none", "no exit" if pending else ""))
        if not pending:
            return Exit(ExitCode.IDLE_HLT, 0, 0, _nrip(g))
    trail.notes.append("the processor halts in the guest until an event comes")
    return None


def _mwait(trail: Trail, g: Subject, form: Form) -> Exit | None:
    """MWAIT_COND, which counts where the monitor is armed, comes before MWAIT (APM2 table 15-7)."""
    if trail.bit(ExitCode.MWAIT_COND):
        else_ = "MWAIT" if trail.situation.wants(ExitCode.MWAIT) else "no exit"
        armed = g.registers.get("monitor_armed")
        if armed is None:
            trail.doubts.append(("whether the monitor is armed", None))
        value = "not known" if armed is None else "yes" if armed else "no"
        result = f"? {else_}" if armed is None else "" if armed else else_
        trail.looked.append(Looked("the monitor is armed", "APM3 MWAIT", value, result))
        if armed != 0:
            return Exit(ExitCode.MWAIT_COND, 0, 0, _nrip(g))
    return Exit(ExitCode.MWAIT, 0, 0, _nrip(g)) if trail.bit(ExitCode.MWAIT) else None


def _pause(trail: Trail, g: Subject, form: Form) -> Exit | None:
    """The filter counts PAUSEs since VMRUN, or in one loop (APM2 15.14.4)."""
    if not trail.bit(ExitCode.PAUSE):
        return None
    count = g.field("pause_filter_count") if g.has("PauseFilter") else 0
    if count:
        trail.doubts.append(("the count of the PAUSE filter", None))
        trail.looked.append(Looked("the PAUSE filter", "15.14.4", f"counts {count} PAUSEs before one exits", "? no exit"))
    return Exit(ExitCode.PAUSE, 0, 0, _nrip(g))


def _port(trail: Trail, g: Subject, form: Form) -> Exit | None:
    if not trail.bit(ExitCode.IOIO):
        return None
    trail.looked[-1] = trail.looked[-1]._replace(result="")
    try:
        port = port_of(g)
    except Unknown as unknown:
        trail.doubts.append((unknown.what, None))
        trail.looked.append(Looked("IOPM", "15.10.1", f"{unknown.what} is not known", "? no exit"))
        return Exit(ExitCode.IOIO, None, _nrip(g), _nrip(g))
    size, spas = port_size(g), iopm_bits(g.field("iopm_base_pa"), port, port_size(g))
    first, number = spas[0]
    last = spas[-1]
    where = f"byte at {trail.situation.space} {first:#x} bit {number}"
    where += f" to {last[0]:#x} bit {last[1]}" if size > 1 else ""
    hit = next(((at, one) for at, one in spas if _map_bit(trail, g.memory, at) >> one & 1), None)
    found = "all 0" if size > 1 else "0"
    if hit is not None:
        found = f"{hit[0]:#x} bit {hit[1]} is 1" if size > 1 else "1"
    what = f"IOPM, port {port:#x}, {size} byte{'s' * (size > 1)}"
    trail.looked.append(Looked(what, "15.10.1", f"{where}: {found}", "#VMEXIT" if hit else ""))
    following = _known(lambda: g.need("rip") + g.insn.length)
    return Exit(ExitCode.IOIO, port_info(g.insn, port, size), following, _nrip(g)) if hit else None


def _map_bit(trail: Trail, memory: Memory, spa: int) -> int:
    """A byte of a permission map; ones where there is no memory."""
    try:
        return memory.read(spa, 1)[0]
    except Unreadable:
        trail.notes.append(f"the permission map has no memory at {trail.situation.space} {spa:#x}: it reads as ones")
        return 0xFF


def _msr(trail: Trail, g: Subject, form: Form) -> Exit | None:
    write = g.insn.opcode == 0x0F30
    if not trail.bit(ExitCode.MSR):
        return None
    trail.looked[-1] = trail.looked[-1]._replace(result="")
    exit = Exit(ExitCode.MSR, int(write), 0, _nrip(g))
    try:
        number = g.need("rcx") & 0xFFFFFFFF
    except Unknown:
        trail.doubts.append(("rcx", None))
        trail.looked.append(Looked("MSRPM", "15.11", "rcx is not known", "? no exit"))
        return exit
    place = msrpm_bit(g.field("msrpm_base_pa"), number, write)
    verb = "write" if write else "read"
    if place is None:
        trail.looked.append(Looked(f"MSRPM, {verb} of {number:#x}", "15.11", "the map does not cover it", "#VMEXIT"))
        return exit
    spa, position = place
    on = _map_bit(trail, g.memory, spa) >> position & 1
    value = f"byte at {trail.situation.space} {spa:#x} bit {position} is {on}"
    trail.looked.append(Looked(f"MSRPM, {verb} of {number:#x}", "15.11", value, "#VMEXIT" if on else ""))
    return exit if on else None


def _nothing(trail: Trail, g: Subject, form: Form) -> Exit | None:
    return None


_SPECIAL: Mapping[str, Callable[[Trail, Subject, Form], Exit | None]] = {
    "cr": _cr, "cr0": _cr0, "dr": _dr, "invlpg": _invlpg, "int": _interrupt, "icebp": _icebp, "hlt": _hlt, "mwait": _mwait,
    "pause": _pause, "port": _port, "msr": _msr, "rsm": _plain, "into": _nothing,
    "vmload": _vmload,
}  # fmt: skip

_BY_IOPL = (ExitCode.PUSHF, ExitCode.POPF, ExitCode.IRET, ExitCode.SWINT)
_ELSEWHERE = ("int", "icebp", "into", "rsm", "invlpg")
"""What they access is not said by an operand, or is no memory."""


# Exceptions and events


@dataclass(frozen=True, slots=True)
class _Event:
    code: int
    what: str
    stays: str
    """What happens in the guest without the intercept."""


_EVENTS = {
    "intr": _Event(ExitCode.INTR, "a physical interrupt", "the guest takes it through its own IDT where its RFLAGS.IF allows"),
    "nmi": _Event(ExitCode.NMI, "a physical NMI", "the guest takes it through its own IDT"),
    "smi": _Event(ExitCode.SMI, "an SMI", "the processor enters SMM under the hypervisor"),
    "init": _Event(ExitCode.INIT, "an INIT", "the processor is reset, or gets #SX where VM_CR.R_INIT says so"),
    "vintr": _Event(ExitCode.VINTR, "a virtual interrupt that can be taken", "the guest takes it through its own IDT"),
    "task-switch": _Event(ExitCode.TASK_SWITCH, "a hardware task switch", "the processor makes it"),
    "ferr": _Event(ExitCode.FERR_FREEZE, "an x87 error with CR0.NE clear", "FERR is asserted"),
    "shutdown": _Event(ExitCode.SHUTDOWN, "a shutdown (triple fault)", "the processor shuts down, host and all"),
}  # fmt: skip
EVENTS: Mapping[str, str] = {name: one.what for name, one in _EVENTS.items()}
_FROM_INSTRUCTIONS = frozenset((3, 4, 5))
"""INT3, INTO and BOUND have an nRIP (APM2 15.7.1)."""
_HAS_ERROR = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))


def event(situation: Situation, name: str) -> Prediction:
    """An event of `EVENTS`. KeyError for another one."""
    one = _EVENTS[name]
    trail = Trail(situation, one.what)
    if not trail.bit(one.code):
        trail.notes.append(one.stays)
        return trail.ends(Outcome.STAYS)
    known = 0 if one.code not in (ExitCode.TASK_SWITCH, ExitCode.SMI) else None
    return trail.exits(Exit(one.code, known, known, 0))


def exception(situation: Situation, vector: int) -> Prediction:
    """An exception 0 to 31 that the guest raises, by its vector."""
    trail = Trail(situation, f"exception {exception_name(vector)}")
    if vector == 2:
        trail.notes.append("vector 2 is that of NMIs, which have an intercept of their own: `would-exit nmi` (APM2 15.12.3)")
        return trail.ends(Outcome.STAYS)
    code = EXCEPTION_BASE + vector
    exits = trail.bit(code)
    if vector == 1:
        trail.notes.append("INT1 has an intercept of its own: `would-exit int1` (APM2 15.12.2)")
    if not exits:
        if situation.wants(ExitCode.SHUTDOWN):
            trail.notes.append("one that cannot be delivered may end in a shutdown, which is intercepted")
        return trail.ends(Outcome.STAYS)
    nrip = None if vector in _FROM_INSTRUCTIONS else 0
    return trail.exits(Exit(code, None if vector in _HAS_ERROR else 0, None if vector == 14 else 0, nrip))
