"""Whether the memory that an instruction accesses lets it: #PF of the guest's tables, nested page faults (APM2 5.6, 15.25.6)."""

from collections.abc import Iterator
from typing import NamedTuple

from introspect.decode import FS
from introspect.decode import SS as STACK
from introspect.exits import ExitCode
from introspect.operands import Accessing, accessing, disassembler
from introspect.paging import Access, Fault, translate
from introspect.prediction import Exit, Looked, Prediction, Trail
from introspect.registers import ATTRIB
from introspect.subject import Raised, Subject, Unknown

__all__ = ["refused_access", "refused_fetch"]

_GP, _PF, _SS = 13, 14, 12
_PAGE, _LEAVE = 0x1000, 0xC9
_POPS, _PUSHES = 1, 2
"""`Accessing.stack`."""
_SECTION = "5.6, 15.25"
_NOTHING = ("invlpg", "prefetch")
"""Beginnings of names of instructions that do not access their operand."""


class _Piece(NamedTuple):
    """An access: its linear address, bytes, whether it writes, and whether it is one of the stack."""

    address: int
    size: int
    write: bool
    stack: bool


def _pieces(g: Subject) -> Iterator[_Piece]:
    """Raises `Unknown` where an address is not known."""
    found, bits = accessing(g.code, g.bits), g.bits
    insn = next(disassembler(bits).disasm_lite(g.code, 0, 1), None)
    if found is None or insn is None or insn[2].startswith(_NOTHING):
        return
    if insn[2].startswith("rep") and not g.need("rcx") & (1 << g.insn.address) - 1:
        return
    mask = (1 << 64) - 1 if bits == 64 else 0xFFFFFFFF
    if found.stack == _POPS:
        yield _top(g, found, mask)
    for operand in sorted(found.operands, key=lambda one: one.writes):  # MOVS reads first
        following = g.need("rip") + found.length if operand.from_rip else 0
        name = ("es", "cs", "ss", "ds", "fs", "gs")[operand.segment]
        base = g.need(f"{name}.base") if bits != 64 or operand.segment >= FS else 0
        yield _Piece(operand.at(g.general, following) + base & mask, operand.size, operand.writes, operand.segment == STACK)
    if found.stack == _PUSHES:
        yield _top(g, found, mask)


def _top(g: Subject, found: Accessing, mask: int) -> _Piece:
    """What is pushed or popped; LEAVE pops where rBP is."""
    pushes = found.stack == _PUSHES
    wide = mask if g.bits == 64 or g.need("ss.attrib") & ATTRIB.DB else 0xFFFF
    top = g.need("rbp" if g.insn.opcode == _LEAVE else "rsp") - (found.stack_size if pushes else 0)
    base = 0 if g.bits == 64 else g.need("ss.base")
    return _Piece(base + (top & wide) & mask, found.stack_size, pushes, True)


def _translate(g: Subject, address: int, access: Access) -> Fault | int:
    found = translate(g.memory, g.paging, address & (1 << 64) - 1, access, g.nested, set_ad=False)
    return found if isinstance(found, Fault) else int(found.spa)


def _refused(trail: Trail, g: Subject, piece: _Piece, *, fetch: bool) -> Prediction | None:
    """Look at every page of an access."""
    verb = "fetch" if fetch else "write" if piece.write else "read"
    what = f"{verb} of {piece.size} byte{'s' * (piece.size != 1)} at {piece.address:#x}"
    access = Access(write=piece.write, execute=fetch, user=g.cpl == 3)
    reached = []
    at = piece.address
    while at < piece.address + max(piece.size, 1):
        found = _translate(g, at, access)
        if isinstance(found, Fault):
            return _fault(trail, g, found, what, piece)
        reached.append(f"{trail.situation.space} {found:#x}")
        at = (at | _PAGE - 1) + 1
    trail.looked.append(Looked(what, _SECTION, ", ".join(reached)))
    return None


def _fault(trail: Trail, g: Subject, found: Fault, what: str, piece: _Piece) -> Prediction:
    if found.kind == "NPF":
        trail.looked.append(Looked(what, _SECTION, f"refused at gpa {found.address:#x}", "#VMEXIT"))
        return trail.exits(Exit(ExitCode.NPF, found.code, found.address, 0))
    if found.kind == "GP":
        raised = Raised(_SS if piece.stack else _GP, 0)
        trail.looked.append(Looked(what, _SECTION, "the address is not canonical", str(raised)))
        return trail.raises(raised)
    raised = Raised(_PF, found.code, found.address)
    trail.looked.append(Looked(what, _SECTION, "refused by the guest's tables", str(raised)))
    return trail.raises(raised)


def refused_fetch(trail: Trail, g: Subject) -> Prediction | None:
    """What the fetch of an instruction that stands somewhere leads to, if it is refused."""
    if "rip" not in g.registers:
        return None
    base = 0 if g.bits == 64 else g.registers.get("cs.base", 0)
    address = g.need("rip") + base & ((1 << 64) - 1 if g.bits == 64 else 0xFFFFFFFF)
    return _refused(trail, g, _Piece(address, g.insn.length, False, False), fetch=True)


def refused_access(trail: Trail, g: Subject) -> Prediction | None:
    """What its operands and its stack lead to, if one is refused. Segment limits are not looked at."""
    try:
        for piece in _pieces(g):
            refused = _refused(trail, g, piece, fetch=False)
            if refused is not None:
                return refused
    except Unknown as unknown:
        trail.doubts.append((unknown.what, None if g.nested is not None else _PF))
        result = "? nested page fault" if g.nested is not None else "? #PF"
        trail.looked.append(Looked("access to memory", _SECTION, f"{unknown.what} is not known", result))
    return None


