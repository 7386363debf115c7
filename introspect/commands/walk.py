"""`walk`: how one address is translated, entry by entry."""

from dataclasses import dataclass

from introspect.address import Gva
from introspect.blame import reason
from introspect.commands.context import CommandError, Context, GuestView, HostView
from introspect.commands.parameters import Address, Choice, Number, Owner, Parameter, Physical
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns, members, size_text
from introspect.commands.which import read_vmcb
from introspect.exits import ExitCode, describe_exit, describe_page_fault
from introspect.expression import Space
from introspect.intercepts import intercepted, words_of
from introspect.memtypes import MemoryType, memory_type
from introspect.paging import ENTRY, Access, Fault, Nested, PagingState, Step, Translation, Walk, walk
from introspect.registers import CR0
from introspect.sources import Unreadable
from introspect.vmcb import VMCB, VMCB_SIZE

__all__ = ["COMMANDS", "Walked"]

_SHOWN = 16

_ACCESSES = {
    word + who: Access(write=word == "w", execute=word == "x", user=who == "u")
    for word in "rwx"
    for who in ("u", "s")
}


@dataclass(frozen=True, slots=True)
class Walked:
    """A walk, whose addresses it translates, and the memory type of what it leads to, if that is known."""

    who: str
    walk: Walk
    memory: MemoryType | None = None
    data: bytes = b""
    """What is at the address, if it translates: as much of 16 bytes as lies in its page and is memory."""
    reason: str = ""
    """Why the entry to blame refuses the access."""
    exits: bool | None = None
    """Whether a #PF, if it is one, is intercepted; None for whom no VMCB is known."""

    def text(self) -> str:
        found = self.walk
        access = "write" if found.access.write else "execute" if found.access.execute else "read"
        mode = "paging off" if found.mode == "off" else f"{found.mode} paging"
        over = f" over {found.nested_mode} nested paging{' with GMET' * found.gmet}" if found.nested_mode else ""
        user = "user" if found.access.user else "supervisor"
        lines = [f"{found.gva:#x} in {self.who}, {user} {access}: {mode}{over}"]
        nested = found.nested_mode is not None
        if found.steps:
            heading = ("entry", "gpa", "at spa", "value", "flags") if nested else ("entry", "at spa", "value", "flags")
            lines += columns([heading, *[_row(step, nested, step is found.blame) for step in found.steps]], "  ")
        memory = [f"memory type: {self.memory.text()}"] if self.memory else []
        return "\n".join([*lines, *self._verdict(), *memory])

    def _verdict(self) -> list[str]:
        found = self.walk
        lines = _verdict(found)
        if isinstance(found.verdict, Translation):
            value = f"{int.from_bytes(self.data[:8], 'little'):#x}, bytes {self.data.hex(' ')}"
            return [*lines, f"value: {value if self.data else 'no memory there, but a device or nothing'}"]
        if found.blame is not None:
            lines.append(f"   to blame: {_entry(found.blame)}: {self.reason}")
        if found.verdict.kind == "PF" and self.exits is not None:
            outcome = "is intercepted: #VMEXIT EXCP_PF" if self.exits else "is not intercepted: the guest's own"
            lines.append(f"   which {outcome}")
        return lines

    def json(self) -> object:
        steps = [{"name": step.name, "flags": step.flags.split(), **step._asdict()} for step in self.walk.steps]
        outcome = "fault" if isinstance(self.walk.verdict, Fault) else "translation"
        return {"who": self.who, **members(self.walk), "steps": steps, "outcome": outcome,
                "memory": self.memory and members(self.memory), "data": self.data.hex(), "reason": self.reason,
                "intercepted": self.exits}  # fmt: skip


def _entry(step: Step) -> str:
    """An entry by its name and where it is."""
    kind = "nested " if step.nested else ""
    where = "in the processor" if step.spa is None else f"at spa {step.spa:#x}"
    return f"{kind}{step.name} {where}"


def _row(step: Step, nested: bool, blamed: bool) -> tuple[str, ...]:
    name = f"  n{step.name}" if step.nested else step.name
    spa = "in processor" if step.spa is None else hex(step.spa)
    flags = step.flags
    if step.leaf and step.level > 1:
        flags += " (page)"
    if blamed:
        flags += "  <-- refuses this" if step.value & ENTRY.P else "  <-- not present"
    if not nested:
        return name, spa, f"{step.value:#018x}", flags
    return name, "" if step.gpa is None else hex(step.gpa), spa, f"{step.value:#018x}", flags


def _verdict(found: Walk) -> list[str]:
    verdict = found.verdict
    if isinstance(verdict, Translation):
        gpa = f"gpa {verdict.gpa:#x} -> " if found.nested_mode else ""
        size = f", in a {size_text(verdict.page_size)} page" if verdict.page_size else ""
        return [f"-> {gpa}spa {verdict.spa:#x}{size}", f"rights: {_rights(found)}"]
    if verdict.kind == "GP":
        return ["-> #GP or #SS: the address is not canonical"]
    if verdict.kind == "NPF":
        info1, info2 = f"EXITINFO1 {verdict.code:#x}", f"EXITINFO2 {verdict.address:#x}"
        lines = [f"-> #VMEXIT {describe_exit(ExitCode.NPF, verdict.code, verdict.address)}", f"   {info1}, {info2}"]
        if found.blame is None:
            lines.append("   the nested page tables cannot express this gpa: it has too many bits")
        return lines
    return [f"-> #PF, error code {verdict.code:#x} ({describe_page_fault(verdict.code)}), CR2 {verdict.address:#x}"]


def _rights(found: Walk) -> str:
    """The rights of both dimensions together, as the entries grant them."""
    leaves = [step for step in found.steps if step.leaf]
    inner = [step for step in leaves if not step.nested]
    combined = ENTRY.W | ENTRY.U
    denied = 0
    for step in [*inner, *(leaves[-1:] if found.nested_mode else [])]:
        combined &= step.rights | (ENTRY.U if step.nested else 0)
        denied |= step.rights & ENTRY.NX
    execute = "execute"
    if found.gmet:
        execute += f" as {'user' if leaves[-1].rights & ENTRY.U else 'supervisor'} only (GMET)"
    words = ["read", *(["write"] if combined & ENTRY.W else []), *([] if denied else [execute])]
    return f"{', '.join(words)}; {'user and supervisor' if combined & ENTRY.U else 'supervisor only'}"


_WHERE = Parameter("GVA", Address())
_OWNER = Parameter("GUEST|host", Owner(), optional=True, option="--guest",
                   help="whose address it is, if it does not say so itself")  # fmt: skip
_ACCESS = Parameter("ACCESS", Choice(("r", "w", "x", *_ACCESSES)), optional=True, option="--access",
                    help="read, write or execute (r); ru ... xs say as whom, too")  # fmt: skip
_CPL = Parameter("CPL", Number(0, 3), option="--cpl", only_option=True, help="the privilege of the access; else the current one")
_VMCB = Parameter("PA", Physical(), option="--vmcb", only_option=True, help="a VMCB anywhere in memory, whose guest is meant")


def _owner(context: Context, arguments: Arguments) -> GuestView | HostView | None:
    word = arguments.get(_VMCB)
    if word is None:
        return arguments.get(_OWNER)
    spa, contents = read_vmcb(context, word.locate(context, context.host))
    known = next((guest for guest in context.guests if spa in guest.vmcbs), None)
    processor = context.processor
    nested = Nested.from_vmcb(contents, processor.host_cr4, processor.host_efer, processor.maxphyaddr)
    return GuestView(
        number=known.number if known else 0, name=f"VMCB at {spa:#x}", nested=nested,
        paging=PagingState.from_vmcb(contents, processor.maxphyaddr), vmcbs=(spa,),
        asid=VMCB.read(contents, "guest_asid"), ncr3=nested.ncr3 if nested else None,
    )  # fmt: skip


def _walk(context: Context, arguments: Arguments) -> Walked:
    named = _owner(context, arguments)
    where = arguments[_WHERE].locate(context, named)
    owner = named if named is not None and where.owner.number == named.number else where.owner
    if where.space != Space.GVA:
        raise CommandError(str(where), "page tables translate linear addresses", "leave out the space, or write gva")
    state, word, cpl = owner.paging, arguments.get(_ACCESS) or "r", arguments.get(_CPL)
    if cpl is None:
        cpl = state.cpl
    access = _ACCESSES[word if len(word) == 2 else word + ("u" if cpl == 3 else "s")]
    found = walk(context.memory, state, Gva(where.offset), access, owner.nested)
    memory = memory_type(found, bool(state.cr0 & CR0.CD), owner.caching) if owner.caching else None
    return Walked(
        str(owner), found, memory, _data(context, found), reason(found, state, owner.nested), _intercepted(context, owner)
    )


def _data(context: Context, found: Walk) -> bytes:
    verdict = found.verdict
    if not isinstance(verdict, Translation):
        return b""
    size = min(_SHOWN, 0x1000 - verdict.spa % 0x1000)
    try:
        return context.memory.read(verdict.spa, size)
    except Unreadable as error:
        return error.readable_prefix


def _intercepted(context: Context, owner: GuestView | HostView) -> bool | None:
    """Whether the guest's VMCB intercepts #PF."""
    if not isinstance(owner, GuestView) or not owner.vmcbs:
        return None
    try:
        return intercepted(words_of(context.memory.read(owner.vmcbs[0], VMCB_SIZE)), ExitCode.EXCP_PF)
    except Unreadable:
        return None


COMMANDS = (
    Command(
        "walk", _walk, "Translate a linear address: every entry of both dimensions, rights, verdict, memory type.",
        (_WHERE, _OWNER, _ACCESS, _CPL, _VMCB),
        "Without GUEST the selected guest, or the host. The access is a read with the current privilege unless given:\n"
        "r read, w write, x execute; u as user, s as supervisor. Entries named n... belong to the nested page tables.\n"
        "Nothing in memory changes, not even accessed and dirty bits.",
        ("walk 2:counter", "walk 0x40000 --guest 5 --access w"),
    ),
)  # fmt: skip
