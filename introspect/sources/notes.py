"""Registers in the notes of an ELF core: as Linux (NT_PRSTATUS), QEMU and we write them.

Registers go by the names of the VMCB's fields, and rcx to r15: {"rip": ..., "cs.selector": ..., "cr3": ...}. A core holds some of
them only; what is not there is not known.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from introspect.layout import bits
from introspect.registers import CR0, CR4, EFER
from introspect.vmcb import NAMES

__all__ = [
    "GENERAL", "NT_PRSTATUS", "OWN", "OWN_TYPE", "Annotations", "GuestNote", "Note", "Registers", "complete", "guessed_efer",
    "iterate_notes", "known_register", "make_note", "make_own", "make_prstatus", "make_qemu", "read_notes",
]  # fmt: skip

Registers = dict[str, int]

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)))
NT_PRSTATUS, QEMU_TYPE = 1, 0
OWN_TYPE = int.from_bytes(b"VDBG", "big")
"""Readers that look at the type alone must not take it for another."""
OWN = b"VMDBG"
MAX_NOTES = 65536
"""Bound of the work on a hostile file."""
MAX_OWN = 1 << 24

_NOTE = struct.Struct("<III")
_PRSTATUS_64 = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "", "rip",
    "cs.selector", "rflags", "rsp", "ss.selector", "fs.base", "gs.base", "ds.selector", "es.selector", "fs.selector",
    "gs.selector",
)  # fmt: skip
"""Linux's user_regs_struct of x86-64, 8 bytes each, 112 bytes into the note of 336."""
_PRSTATUS_32 = (
    "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rax", "ds.selector", "es.selector", "fs.selector", "gs.selector", "", "rip",
    "cs.selector", "rflags", "rsp", "ss.selector",
)  # fmt: skip
"""That of i386, 4 bytes each, 72 bytes into the note of 144."""
_STATUS = {336: (112, "Q", _PRSTATUS_64, 32), 144: (72, "I", _PRSTATUS_32, 24)}
"""By the note's size: where the registers are, their format and names, where the thread's number is."""
_QEMU_HEAD = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)), "rip", "rflags")
_QEMU_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldtr", "tr", "gdtr", "idtr")
_QEMU_TAIL = ("cr0", "", "cr2", "cr3", "cr4")
_QEMU = struct.Struct("<II18Q" + "IIIIQ" * len(_QEMU_SEGMENTS) + "5Q")
_QEMU_TAIL_OFFSET = _QEMU.size


class Note(NamedTuple):
    name: bytes
    type: int
    contents: bytes


@dataclass(frozen=True, slots=True)
class GuestNote:
    """A guest, as the core's writer knew it."""

    number: int
    name: str
    vmcbs: tuple[int, ...]
    parent: int | None = None
    registers: tuple[Registers, ...] = ()
    """Of each virtual processor; empty where the VMCB has all that is known."""
    inner: int | None = None
    """The VMCB that the hypervisor in `parent` made for it."""
    ncr3: int | None = None
    """Its nested root: for where its VMCB is missing, since the file was cut off."""


@dataclass(frozen=True, slots=True)
class Annotations:
    """What the notes of a core say."""

    cpus: tuple[Registers, ...] = ()
    guests: tuple[GuestNote, ...] = ()
    of: int | None = None
    """The guest whose memory this is, by the writer's number; None if it is a machine's."""
    maxphyaddr: int | None = None
    features: int | None = None
    """CPUID 8000_000A EDX."""
    image: tuple[tuple[int, int], ...] = ()
    """Where the hypervisor's image lies, (start, end) of each part."""
    vmcoreinfo: bytes = b""
    remarks: tuple[str, ...] = field(default=())
    """What was wrong with the notes."""


def known_register(name: str) -> str | None:
    """The register that a name, or what people type instead of it, means; None if there is none."""
    name = name.lower()
    if name in GENERAL:
        return name
    if name in NAMES and (NAMES[name].group in ("segments", "state", "msrs") or name in ("g_pat", "dbgctl")):
        return NAMES[name].name
    others = {"eflags": "rflags", "fs_base": "fs.base", "gs_base": "gs.base", "vm_hsave_pa": "vm_hsave_pa", "pat": "g_pat",
              **{f"{s}": f"{s}.selector" for s in ("es", "cs", "ss", "ds", "fs", "gs", "tr")}}  # fmt: skip
    return others.get(name)


def iterate_notes(data: bytes) -> Iterator[Note]:
    """The notes of a PT_NOTE segment, as far as they make sense."""
    at = 0
    for _ in range(MAX_NOTES):
        if at + _NOTE.size > len(data):
            return
        name_size, size, kind = _NOTE.unpack_from(data, at)
        start = at + _NOTE.size
        contents = start + (name_size + 3 & ~3)
        if contents + size > len(data):
            return
        yield Note(data[start : start + name_size].rstrip(b"\0"), kind, data[contents : contents + size])
        at = contents + (size + 3 & ~3)


def make_note(name: bytes, kind: int, contents: bytes) -> bytes:
    """A note as it stands in the file."""
    name += b"\0"
    return b"".join((
        _NOTE.pack(len(name), len(contents), kind), name, bytes(-len(name) % 4), contents, bytes(-len(contents) % 4),
    ))  # fmt: skip


def read_notes(data: bytes, *, long_mode: bool) -> Annotations:
    """What the notes say. `long_mode`: what the file's machine type says of the first processor."""
    statuses: list[Registers] = []
    qemu: list[Registers] = []
    own: Annotations | None = None
    vmcoreinfo, remarks = b"", []
    for note in iterate_notes(data):
        if note.name == b"CORE" and note.type == NT_PRSTATUS:
            if note.contents and len(note.contents) in _STATUS:
                statuses.append(_status(note.contents))
            else:
                remarks.append(f"a NT_PRSTATUS note has {len(note.contents)} bytes, not 336 or 144: left out")
        elif note.name == b"QEMU" and note.type == QEMU_TYPE:
            if len(note.contents) >= _QEMU.size:
                qemu.append(_qemu(note.contents, long_mode and not qemu))
            else:
                remarks.append(f"a note of QEMU's has {len(note.contents)} bytes, not {_QEMU.size}: left out")
        elif note.name == b"VMCOREINFO":
            vmcoreinfo = note.contents
        elif note.name == OWN and note.type == OWN_TYPE:
            try:
                own = _own(note.contents)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                remarks.append(f"the note of vmdbg's own is damaged ({type(error).__name__}): left out")
    if own is not None:
        return replace(own, vmcoreinfo=vmcoreinfo, remarks=tuple(remarks))
    cpus = [{**status, **state} for status, state in zip(statuses, qemu, strict=False)]
    cpus += qemu[len(cpus) :] or statuses[len(cpus) :]
    return Annotations(tuple(cpus), vmcoreinfo=vmcoreinfo, remarks=tuple(remarks))


def _status(contents: bytes) -> Registers:
    start, code, names, _ = _STATUS[len(contents)]
    values = struct.unpack_from(f"<{len(names)}{code}", contents, start)
    return {name: value for name, value in zip(names, values, strict=True) if name}


def _qemu(contents: bytes, long_mode: bool) -> Registers:
    values = _QEMU.unpack_from(contents)[2:]
    found = dict(zip(_QEMU_HEAD, values, strict=False))
    rest = values[len(_QEMU_HEAD) :]
    for number, name in enumerate(_QEMU_SEGMENTS):
        selector, limit, flags, _, base = rest[5 * number : 5 * number + 5]
        # QEMU keeps the upper half of the descriptor; the VMCB its bits 23:20 and 15:8, packed.
        attrib = flags >> 8 & 0xFF | flags >> 12 & 0xF00
        found |= {f"{name}.selector": selector, f"{name}.limit": limit, f"{name}.base": base, f"{name}.attrib": attrib}
    found |= {name: value for name, value in zip(_QEMU_TAIL, rest[5 * len(_QEMU_SEGMENTS) :], strict=True) if name}
    if len(contents) >= _QEMU_TAIL_OFFSET + 8:
        found["kernel_gs_base"] = int.from_bytes(contents[_QEMU_TAIL_OFFSET : _QEMU_TAIL_OFFSET + 8], "little")
    found["efer"] = guessed_efer(found, long_mode)
    return found


def guessed_efer(registers: Mapping[str, int], long_mode: bool = False) -> int:
    """EFER where a source leaves it out: LMA shows in CS.L or in an address, NXE is taken for set, as all systems do."""
    long_mode = long_mode or bool(registers.get("cs.attrib", 0) & 0x200) or registers.get("rip", 0) >> 32 > 0
    active = EFER.LME | EFER.LMA if long_mode and registers.get("cr0", CR0.PG) & CR0.PG else 0
    return EFER.NXE | active


def _own(contents: bytes) -> Annotations:
    """Ours is JSON: who has lost vmdbg can read it with `strings`."""
    if len(contents) > MAX_OWN:
        raise ValueError("too long")
    value = json.loads(contents)
    guests = tuple(
        GuestNote(
            int(guest["number"]), str(guest["name"])[:64], tuple(map(_number, guest["vmcbs"]))[:4096],
            None if guest.get("parent") is None else int(guest["parent"]), tuple(map(_registers, guest.get("registers", ()))),
            None if guest.get("inner") is None else _number(guest["inner"]),
            None if guest.get("ncr3") is None else _number(guest["ncr3"]) & bits(51, 0),
        )
        for guest in value.get("guests", ())[:4096]
    )  # fmt: skip
    optional = (value.get(name) for name in ("of", "maxphyaddr", "features"))
    of, maxphyaddr, features = (None if one is None else _number(one) for one in optional)
    image = tuple((_number(start), _number(end)) for start, end in value.get("image", ())[:4096])
    return Annotations(tuple(map(_registers, value["cpus"][:4096])), guests, of, maxphyaddr, features, image)


def _number(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 128:
        raise ValueError("no number")
    return value


def _registers(values: Mapping[str, object]) -> Registers:
    return {str(name)[:32]: _number(value) for name, value in values.items()}


def make_own(annotations: Annotations) -> bytes:
    """Our note, whole."""
    guests = [
        {"number": guest.number, "name": guest.name, "vmcbs": guest.vmcbs, "parent": guest.parent, "inner": guest.inner,
         "registers": guest.registers, "ncr3": guest.ncr3}
        for guest in annotations.guests
    ]
    value = {"version": 1, "cpus": annotations.cpus, "guests": guests, "of": annotations.of, "maxphyaddr": annotations.maxphyaddr,
             "features": annotations.features, "image": annotations.image}  # fmt: skip
    return make_note(OWN, OWN_TYPE, json.dumps(value, separators=(",", ":")).encode())


def make_prstatus(registers: Mapping[str, int], thread: int) -> bytes:
    """NT_PRSTATUS of x86-64, by which gdb and drgn know a thread."""
    contents = bytearray(336)
    struct.pack_into("<I", contents, 32, thread)
    values = (registers.get(name, 0) & bits(63, 0) if name else bits(63, 0) for name in _PRSTATUS_64)
    struct.pack_into(f"<{len(_PRSTATUS_64)}Q", contents, 112, *values)
    return make_note(b"CORE", NT_PRSTATUS, bytes(contents))


def make_qemu(registers: Mapping[str, int]) -> bytes:
    """QEMU's note: control registers and segments, for programs that know it."""
    size = _QEMU.size + 8
    values = [1, size, *(registers.get(name, 0) for name in _QEMU_HEAD)]
    for name in _QEMU_SEGMENTS:
        attrib = registers.get(f"{name}.attrib", 0)
        flags = (attrib & 0xFF) << 8 | (attrib & 0xF00) << 12
        selector, limit, base = (registers.get(f"{name}.{part}", 0) for part in ("selector", "limit", "base"))
        values += [selector, limit, flags, 0, base]
    values += [registers.get(name, 0) if name else 0 for name in _QEMU_TAIL]
    contents = _QEMU.pack(*values) + struct.pack("<Q", registers.get("kernel_gs_base", 0))
    return make_note(b"QEMU", QEMU_TYPE, contents)


def complete(registers: Mapping[str, int]) -> Registers:
    """With what follows for paging from what is known: a CR3 alone means a system in long mode."""
    found = dict(registers)
    if "cr3" in found:
        found.setdefault("cr0", CR0.PE | CR0.PG | CR0.WP)
        found.setdefault("cr4", CR4.PAE)
        found.setdefault("efer", guessed_efer(found, long_mode="cs.attrib" not in found))
    return found
