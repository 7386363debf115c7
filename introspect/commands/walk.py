"""`walk`: how one address is translated, entry by entry."""

from dataclasses import dataclass

from introspect.commands.registry import Arguments, Command, Context, Result
from introspect.commands.render import columns, members, size_text
from introspect.exits import ExitCode, describe_exit, describe_page_fault
from introspect.memtypes import MemoryType, memory_type
from introspect.paging import ENTRY, Access, Fault, Step, Translation, Walk, walk
from introspect.registers import CR0

__all__ = ["COMMANDS", "Walked"]

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
            lines += columns([heading, *(_row(step, nested, step == found.blame) for step in found.steps)], "  ")
        memory = [f"memory type: {self.memory.text()}"] if self.memory else []
        return "\n".join([*lines, *_verdict(found), *memory])

    def json(self) -> object:
        steps = [{"name": step.name, "flags": step.flags.split(), **step._asdict()} for step in self.walk.steps]
        outcome = "fault" if isinstance(self.walk.verdict, Fault) else "translation"
        return {"who": self.who, **members(self.walk), "steps": steps, "outcome": outcome,
                "memory": self.memory and members(self.memory)}  # fmt: skip


def _row(step: Step, nested: bool, blamed: bool) -> tuple[str, ...]:
    name = f"  n{step.name}" if step.nested else step.name
    spa = "in processor" if step.spa is None else f"{step.spa:#x}"
    gpa = "" if step.gpa is None else f"{step.gpa:#x}"
    large = " (page)" if step.leaf and step.level > 1 else ""
    mark = ""
    if blamed:
        mark = "  <-- refuses this" if step.value & ENTRY.P else "  <-- not present"
    cells = (name, gpa, spa, f"{step.value:#018x}", f"{step.flags}{large}{mark}")
    return cells if nested else (cells[0], *cells[2:])


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


def _walk(context: Context, arguments: Arguments) -> Result:
    gva = arguments.number("GVA")
    guest = arguments.space()
    word = arguments.choice(("r", "w", "x", *_ACCESSES)) or "r"
    arguments.done()
    state = guest.paging if guest else context.host_paging
    access = _ACCESSES[word if len(word) == 2 else word + ("u" if state.cpl == 3 else "s")]
    found = walk(context.memory, state, gva, access, guest.nested if guest else None)
    caching = guest.caching if guest else context.host_caching
    memory = memory_type(found, bool(state.cr0 & CR0.CD), caching) if caching else None
    return Walked(str(guest) if guest else "the host", found, memory)


COMMANDS = (
    Command(
        "walk",
        "walk GVA [GUEST|host] [r|w|x][u|s]",
        "Translate a linear address: every entry of both dimensions, rights, verdict, memory type.\n\n"
        "Without GUEST the selected guest, or the host. The access is a read with the current privilege unless given:\n"
        "r read, w write, x execute; u as user, s as supervisor. Entries named n... belong to the nested page tables.\n"
        "Nothing in memory changes, not even accessed and dirty bits.",
        _walk,
    ),
)
