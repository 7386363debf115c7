"""A drgn program of a guest or of the hypervisor, live or from a dump: `pip install vmdbg[drgn]`.

    >>> guest = vmdbg.drgn.guests(context)[2]
    >>> prog = vmdbg.drgn.program(guest)
    >>> prog["counter"]
    >>> vmdbg.drgn.vmcb(prog, guest).exitcode

`context` is what commands run on: `debugger.monitor_commands`, or a `DumpContext`. Memory is read when drgn asks for it, without
side effects. drgn knows `struct svm_vmcb`, `enum svm_exitcode` and `union amd64_entry` (of a page table) besides the program's
own types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from introspect.commands.context import Context, GuestView, HostView
from introspect.commands.parameters import known_guests
from introspect.exits import ExitCode
from introspect.expression import Space
from introspect.layout import Bits, Field
from introspect.paging import ENTRY, Access, Translation, translate
from introspect.saving import guest_memory
from introspect.scope import read_space
from introspect.sources import Memory
from introspect.vmcb import VMCB, VMCB_SIZE
from introspect.vmcoreinfo import find_vmcoreinfo

try:
    import drgn
except ImportError as error:  # pragma: no cover - depends on what is installed
    raise ImportError("drgn is not installed; pip install 'vmdbg[drgn]'") from error

__all__ = ["Inferior", "guests", "host", "program", "vmcb"]

Owner = GuestView | HostView


@dataclass(frozen=True)
class Inferior:
    """A guest or the hypervisor of a context. It has the attributes of its view (`name`, `asid`, `ncr3` ...), as they are now."""

    context: Context
    number: int

    @property
    def view(self) -> Owner:
        """LookupError if the guest is gone."""
        known: tuple[Owner, ...] = (self.context.host, *self.context.guests)
        found = next((view for view in known if view.number == self.number), None)
        if found is None:
            raise LookupError(f"{self.number}: no guest has this number any more; {known_guests(self.context)}")
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of no view: what copies objects asks for such before there is one
            raise AttributeError(name)
        return getattr(self.view, name)

    def __str__(self) -> str:
        return str(self.view)


def guests(context: Context) -> dict[int, Inferior]:
    """Those that are there, by number."""
    return {view.number: Inferior(context, view.number) for view in context.guests}


def host(context: Context) -> Inferior:
    return Inferior(context, context.host.number)


def program(guest: Inferior) -> drgn.Program:
    """A drgn Program of a guest, or of the host.

    A Linux kernel is one to drgn, by the VMCOREINFO in its memory. Else what the context knows as its symbols is loaded, with its
    debug information. LookupError if the guest is gone.
    """
    context, who = guest.context, guest.view
    platform = drgn.Platform(drgn.Architecture.X86_64, drgn.PlatformFlags.IS_64_BIT | drgn.PlatformFlags.IS_LITTLE_ENDIAN)
    made = drgn.Program(platform)

    def read(space: Space) -> Callable[[int, int, int, bool], bytes]:
        def read_now(address: int, count: int, offset: int, physical: bool) -> bytes:
            data = read_space(context.memory, guest.view, space, address, count)
            if len(data) < count:
                raise drgn.FaultError("no memory", address + len(data))
            return data

        return read_now

    made.add_memory_segment(0, 1 << 63, read(Space.GPA), physical=True)
    information = _linux(context, who)
    if information:
        made.set_linux_kernel_custom(information, is_live=False)  # it stands still whenever it is looked at
    else:
        made.add_memory_segment(0, (1 << 64) - 1, read(Space.GVA))
        _load(made, context, guest.number)
    made.register_type_finder("vmdbg", _find_type, enable_index=-1)
    return made


def vmcb(made: drgn.Program, guest: Inferior, cpu: int = 0) -> drgn.Object:
    """The VMCB of a guest's virtual processor as a `struct svm_vmcb`, as it is now. LookupError if there is none."""
    context, who = guest.context, guest.view
    if not isinstance(who, GuestView) or not 0 <= cpu < len(who.vmcbs):
        raise LookupError(f"{who} has no VMCB {cpu}; {known_guests(context)}")
    contents = context.memory.read(who.vmcbs[cpu], VMCB_SIZE)
    return drgn.Object.from_bytes_(made, made.type("struct svm_vmcb"), contents)


def _linux(context: Context, who: Owner) -> bytes:
    memory: Memory = context.memory
    if isinstance(who, GuestView):
        own = guest_memory(context, who)
        if own is None:
            return b""  # its memory is not its own: what is found there may be another's
        memory = own

    def translated(linear: int) -> int | None:
        found = translate(memory, who.paging.privileged(), linear, Access(), set_ad=False)
        return int(found.gpa) if isinstance(found, Translation) else None

    return find_vmcoreinfo(memory, translated)


def _load(made: drgn.Program, context: Context, number: int) -> None:
    """The program's file: its symbols, and its types and variables if it says where they are."""
    symbols = context.symbols(number)
    if symbols is None:
        return
    if symbols.path is not None:
        module = made.extra_module(str(symbols.path), create=True)
        if symbols.offset:
            low = min((symbol.address for symbol in symbols), default=0)
            module.address_ranges = [(low, max((symbol.address + symbol.size for symbol in symbols), default=low) + 1)]
        module.try_file(str(symbols.path), force=True)
    binding, kind = drgn.SymbolBinding.GLOBAL, drgn.SymbolKind.UNKNOWN
    known = [drgn.Symbol(symbol.name, symbol.address, symbol.size, binding, kind) for symbol in symbols]
    made.register_symbol_finder("vmdbg", drgn.SymbolIndex(known), enable_index=-1)


# Types


def _find_type(made: drgn.Program, kinds: drgn.TypeKindSet, name: str, filename: str | None) -> drgn.Type | None:
    maker = _TYPES.get(name)
    if maker is None or filename is not None or maker[0] not in kinds:
        return None
    found: drgn.Type = made.cache.setdefault(("vmdbg", name), None) or maker[1](made)
    made.cache["vmdbg", name] = found
    return found


def _integer(made: drgn.Program, size: int) -> drgn.Type:
    return made.int_type(f"u{8 * size}", size, False)


def _register(made: drgn.Program, tag: str, table: type[Bits], size: int) -> drgn.Type:
    """A union of the value and of its bits."""
    members = [drgn.TypeMember(_integer(made, size), "value")]
    for name, mask in table.fields.items():
        low, count = (mask & -mask).bit_length() - 1, mask.bit_count()
        if low + count <= 8 * size:
            members.append(drgn.TypeMember(drgn.Object(made, _integer(made, size), bit_field_size=count), name, low))
    return made.union_type(tag, size, members)


def _field(made: drgn.Program, field: Field, tag: str) -> drgn.Type:
    if field.name == "exitcode":
        return _exit_codes(made)
    if field.size not in (1, 2, 4, 8):
        return made.array_type(_integer(made, 1), field.size)
    return _register(made, tag, field.bits, field.size) if field.bits is not None else _integer(made, field.size)


def _vmcb(made: drgn.Program) -> drgn.Type:
    return made.struct_type("svm_vmcb", VMCB.size, list(_members(made)))


def _members(made: drgn.Program) -> Iterator[drgn.TypeMember]:
    segments: dict[str, list[Field]] = {}
    for field in VMCB:
        segment, _, part = field.name.rpartition(".")
        if segment:
            segments.setdefault(segment, []).append(field)
        else:
            yield drgn.TypeMember(_field(made, field, f"svm_{part}"), part, 8 * field.offset)
    for segment, fields in segments.items():
        start = fields[0].offset
        parts = [
            drgn.TypeMember(_field(made, field, "svm_attrib"), field.name.rpartition(".")[2], 8 * (field.offset - start))
            for field in fields
        ]
        yield drgn.TypeMember(made.struct_type("svm_segment", 16, parts), segment, 8 * start)


def _exit_codes(made: drgn.Program) -> drgn.Type:
    enumerators = [drgn.TypeEnumerator(f"VMEXIT_{code.name}", code.value & (1 << 64) - 1) for code in ExitCode]
    return made.enum_type("svm_exitcode", _integer(made, 8), enumerators)


def _entry(made: drgn.Program) -> drgn.Type:
    return _register(made, "amd64_entry", ENTRY, 8)


_TYPES: dict[str, tuple[drgn.TypeKind, Callable[[drgn.Program], drgn.Type]]] = {
    "svm_vmcb": (drgn.TypeKind.STRUCT, _vmcb),
    "svm_exitcode": (drgn.TypeKind.ENUM, _exit_codes),
    "amd64_entry": (drgn.TypeKind.UNION, _entry),
}
