"""Names and memory for expressions about an inferior, of anything that offers the commands' `Context`.

What only a live machine knows (facts of an event, threads) it adds itself.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from introspect.execution import linear_pc
from introspect.expression import HOST, Space
from introspect.paging import Access, NestedTranslation, Translation, nested_translate, translate
from introspect.pci import RequesterId
from introspect.sources import Memory, Unreadable
from introspect.vmcb import NAMES, VMCB, VMCB_SIZE

if TYPE_CHECKING:
    from introspect.commands.context import Context, Inferior
    from introspect.symbols import Symbols

__all__ = ["GENERAL", "ContextNames", "ContextScope", "locate_space", "read_space"]

_VMCB = "vmcb."
_PAGE = 4096
GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_ALIASES = {
    "eflags": "rflags", "pc": "rip", "sp": "rsp", "fs_base": "fs.base", "gs_base": "gs.base", "k_gs_base": "kernel_gs_base",
    "pat": "g_pat", "debugctl": "dbgctl", **{f"e{name[1:]}": name for name in (*GENERAL[:8], "rip")},
    **{name: f"{name}.selector" for name in ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")},
}  # fmt: skip
"""Registers by the names that gdb has for them."""
_KNOWN = frozenset((
    *GENERAL, *_ALIASES, *(field.name for field in VMCB if field.group not in ("control",)), *(f"dr{n}" for n in range(4)),
    "xcr0",
))  # fmt: skip


class ContextNames:
    """Registers, VMCB fields and symbols; `number` is the inferior whose symbols need no owner."""

    def __init__(self, context: "Context", number: int) -> None:
        self.context, self.number = context, number

    def variable(self, name: str) -> bool:
        return name in _KNOWN or (name.startswith(_VMCB) and name[len(_VMCB) :] in NAMES)

    def constant(self, name: str, owner: str | None) -> int | None:
        symbols = self._symbols(owner)
        return None if symbols is None else symbols.address(name)

    def constants(self, owner: str | None) -> Iterable[str]:
        symbols = self._symbols(owner)
        return () if symbols is None else symbols.guesses

    def _symbols(self, owner: str | None) -> "Symbols | None":
        if owner is not None and owner != HOST and not owner.isdecimal():
            return None
        number = self.number if owner is None else self.context.host.number if owner == HOST else int(owner)
        return self.context.symbols(number)

    def known(self) -> Iterable[str]:
        return [*_KNOWN, *(_VMCB + name for name in NAMES)]


class ContextScope:
    """An inferior as the context has it."""

    def __init__(self, context: "Context", number: int) -> None:
        self.context, self.number = context, number

    @property
    def _inferior(self) -> "Inferior | None":
        context = self.context
        if self.number == context.host.number:
            return context.host
        return next((guest for guest in context.guests if guest.number == self.number), None)

    def value(self, name: str) -> int | None:
        if name.startswith(_VMCB):
            return self._field(NAMES[name[len(_VMCB) :]].name)
        registers: Mapping[str, int] = self.context.registers(self.number)
        if _ALIASES.get(name, name) == "rip":
            return linear_pc(registers)  # as gdb has it, and as addresses are; the offset is vmcb.rip
        return registers.get(_ALIASES.get(name, name))

    def _field(self, name: str) -> int | None:
        guest = next((guest for guest in self.context.guests if guest.number == self.number), None)
        if guest is None or not guest.vmcbs:
            return None
        try:
            return VMCB.read(self.context.memory.read(guest.vmcbs[0], VMCB_SIZE), name)
        except Unreadable:
            return None

    def read(self, space: Space, address: int, size: int) -> bytes:
        inferior = self._inferior
        return b"" if inferior is None else read_space(self.context.memory, inferior, space, address, size)

    def of(self, owner: str) -> "ContextScope | None":
        device = RequesterId.parse(owner)
        if device is not None:
            return DeviceScope(self.context, device)
        if owner != HOST and not owner.isdecimal():
            return None
        scope = ContextScope(self.context, self.context.host.number if owner == HOST else int(owner))
        return None if scope._inferior is None else scope


class DeviceScope(ContextScope):
    """A device: memory at its I/O addresses. Names are the hypervisor's."""

    def __init__(self, context: "Context", device: RequesterId) -> None:
        super().__init__(context, context.host.number)
        self.device = device

    @property
    def _inferior(self) -> "Inferior | None":
        from introspect.commands.devices import device_view  # it builds on contexts, which build on scopes

        return device_view(self.context, self.device)


def locate_space(memory: Memory, inferior: "Inferior", space: Space, address: int) -> int | None:
    """System-physical address of one address of an inferior, past all rights; None if it leads nowhere."""
    nested = inferior.nested
    if space == Space.SPA or (space == Space.GPA and nested is None):
        return address
    if space == Space.GPA and nested is not None:
        through = nested_translate(memory, nested, address, write=False, execute=False, set_ad=False)
        return int(through.spa) if isinstance(through, NestedTranslation) else None
    if space == Space.IOVA:
        return inferior.locate_iova(memory, address)
    found = translate(memory, inferior.paging.privileged(), address, Access(), nested, set_ad=False)
    return int(found.spa) if isinstance(found, Translation) else None


def read_space(memory: Memory, inferior: "Inferior", space: Space, address: int, size: int) -> bytes:
    """As much as can be read of a range, a page at a time, without side effects."""
    data = bytearray()
    while len(data) < size:
        at = address + len(data) & (1 << 64) - 1
        length = min(size - len(data), _PAGE - at % _PAGE)
        spa = locate_space(memory, inferior, space, at)
        if spa is None:
            break
        try:
            data += memory.read(spa, length)
        except Unreadable as error:
            data += error.readable_prefix
            break
    return bytes(data)
