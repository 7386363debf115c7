"""What commands ask of a dump, or of a machine under a stub: the same as of a live machine, as far as it is known there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from introspect.commands.context import Cancelled, CommandError, ExitRecord, GuestView, HostView
from introspect.paging import Access, Nested, PagingState, Translation, translate
from introspect.registers import ATTRIB, RFLAGS
from introspect.rules import Processor
from introspect.scan import Found, Scan
from introspect.scope import ContextNames, ContextScope
from introspect.sources import Dump, Memory, Unreadable
from introspect.sources.notes import GuestNote, Registers, complete
from introspect.symbols import Symbols
from introspect.vmcb import VMCB, VMCB_SIZE

__all__ = ["DumpContext"]

FIRST_GUEST = 2
MAXPHYADDR = 48
"""Where nothing says how many bits the processor has."""
_STATE = (*(field.name for field in VMCB if field.group in ("segments", "state", "msrs")), "g_pat", "dbgctl")
_PAGING = ("cr0", "cr3", "cr4", "efer")
_TABLES = ("cr3", "gdtr.base", "idtr.base")


@dataclass(slots=True)
class _Known:
    """A guest as it was found."""

    number: int
    name: str
    vmcbs: tuple[int, ...]
    parent: int | None = None
    inner: int | None = None
    registers: dict[int, Registers] = field(default_factory=dict)
    """Of its virtual processors, by their index, as far as the dump has them."""
    on_cpu: int | None = None
    ncr3: int | None = None
    """As the dump's writer knew it, for a guest whose VMCB is not in the dump."""


class DumpContext:
    """Implements `introspect.commands.Context` on a dump. Guests are those that the dump names, `vmcbs`, and what a search finds.

    Memory types are not known: a dump has no MTRRs.
    """

    def __init__(
        self,
        dump: Dump,
        registers: Mapping[str, int] | None = None,
        vmcbs: Sequence[int] = (),
        symbols: Mapping[int, tuple[Path, int]] | None = None,
        told: Callable[[float, str], bool] | None = None,
    ) -> None:
        """`registers` are taken for the first processor's, over what the dump says. `symbols`: file and offset for an inferior.

        `told` is told of progress and says whether to go on. CommandError for an address in `vmcbs` where no VMCB can be.
        """
        self.dump = dump
        self.told = told
        """Asked now and then by what takes long, whether to go on."""
        self._symbols = dict(symbols or {})
        cpus = [dict(cpu) for cpu in dump.annotations.cpus]
        if registers:
            cpus[:1] = [{**(cpus[0] if cpus else {}), **registers}]
        self._given = bool(registers)
        self._cpus = [complete(cpu) for cpu in cpus]
        self._known: list[_Known] = []
        self._saved: list[Found] = []
        self._host: Registers = {}
        self._doubtful = False
        """Its registers may be those of a guest."""
        self.host_from = ""
        """Where the host's registers come from; empty if they are not known."""
        self._choose_host()
        self._selected: int | None = None
        if dump.annotations.of is None:
            for note in dump.annotations.guests:
                self._add_noted(note)
            self._check_parents()
        for spa in vmcbs:
            self.add_vmcb(spa)

    # What is known

    @property
    def memory(self) -> Memory:
        return self.dump.memory

    @property
    def maxphyaddr(self) -> int:
        return min(max(self.dump.annotations.maxphyaddr or MAXPHYADDR, 32), 52)

    @property
    def processor(self) -> Processor:
        default = Processor()
        features = self.dump.annotations.features
        known = all(name in self._host for name in _PAGING) and not self._doubtful
        host = self._host if known else {}  # else a host in long mode, as all are that have nested paging
        return Processor(
            self.maxphyaddr, default.features if features is None else features, host.get("cr0", default.host_cr0),
            host.get("cr4", default.host_cr4), host.get("efer", default.host_efer),
        )  # fmt: skip

    @property
    def host(self) -> HostView:
        found = self._host
        of = self.dump.annotations.of
        noted = next((guest.name for guest in self.dump.annotations.guests if guest.number == of), "")
        state = self._state(found)
        doubt = "(registers not known)" if not found else "(or a guest)" if self._doubtful and state.format else ""
        name = f"guest {of} ({noted})" if of is not None else f"the host {doubt}".rstrip()
        saves = tuple(cpu["vm_hsave_pa"] for cpu in self._cpus if "vm_hsave_pa" in cpu) or tuple(one.spa for one in self._saved)
        return HostView(name=name, paging=state, image=self.dump.annotations.image, saves=saves)

    @property
    def guests(self) -> Sequence[GuestView]:
        return [self._view(known) for known in self._known]

    @property
    def selected(self) -> GuestView | None:
        return next((self._view(known) for known in self._known if known.number == self._selected), None)

    def select(self, number: int | None) -> None:
        """The guest that commands mean if they name none; None for the host. CommandError if there is no such."""
        if number is not None and all(known.number != number for known in self._known):
            numbers = ", ".join(str(known.number) for known in self._known)
            remedy = f"there are {numbers}" if numbers else "`guests --scan` looks for some"
            raise CommandError(str(number), "no guest has this number", remedy)
        self._selected = number

    def exits(self, guest: int | None, count: int) -> Sequence[ExitRecord]:
        """A dump has each guest's last exit, in its VMCB."""
        records: list[ExitRecord] = []
        for known in self._known:
            contents = self._vmcb(known.vmcbs[0]) if guest in (None, known.number) and known.vmcbs else None
            if contents is None or known.on_cpu is not None:
                continue
            code, info1, info2, intinfo, rip = (
                VMCB.read(contents, name) for name in ("exitcode", "exitinfo1", "exitinfo2", "exitintinfo", "rip")
            )
            if code or info1 or info2 or VMCB.read(contents, "intercept_cr_read") & 1:  # else none that is known of
                number, vmcb = len(records) + 1, known.vmcbs[0]
                records.append(ExitRecord(number, known.number, 0, rip, code, info1, info2, intinfo, vmcb=vmcb))
        return records[-count:] if count else []

    def registers(self, number: int) -> Mapping[str, int]:
        if number == self.host.number:
            return dict(self._host)
        return next((self.threads(number)[0] for known in self._known if known.number == number), {})

    def threads(self, number: int) -> Sequence[Mapping[str, int]]:
        """Registers of each processor of an inferior."""
        if number == self.host.number:
            guests = {known.on_cpu for known in self._known}
            return [dict(self._host if index in guests else cpu) for index, cpu in enumerate(self._cpus)] or [dict(self._host)]
        known = next((known for known in self._known if known.number == number), None)
        if known is None:
            return []
        return [self._vcpu(known, index) for index in range(len(known.vmcbs))]

    def symbols(self, number: int) -> Symbols | None:
        found = self._symbols.get(number)
        return None if found is None else Symbols.load(*found)

    def names(self, number: int) -> ContextNames:
        return ContextNames(self, number)

    def scope(self, number: int) -> ContextScope:
        return ContextScope(self, number)

    def progress(self, part: float, what: str) -> None:
        if self.told is not None and not self.told(part, what):
            raise Cancelled(what)

    # Finding guests

    def add_vmcb(self, spa: int) -> GuestView:
        """Take a page for a guest's VMCB. CommandError if it cannot be one."""
        if spa % VMCB_SIZE:
            raise CommandError(f"{spa:#x}", "a VMCB is aligned to 4 KiB", "clear the low 12 bits")
        known = next((known for known in self._known if spa in known.vmcbs), None)
        if known is None:
            if self._vmcb(spa) is None:
                raise CommandError(f"{spa:#x}", "the dump has no memory there", "`guests --scan` finds VMCBs")
            known = self._add("", (spa,))
        self._sort_out()
        return self._view(known)

    def attach(self, result: Scan) -> None:
        """Make guests of what a search has found: VMCBs with the same nested root are one guest's."""
        self._saved = [one for one in result.found if one.kind == "HSAVE" and one.inside is None]
        outside = [one.spa for one in result.vmcbs if one.inside is None]
        groups: dict[object, list[int]] = {}
        for spa in outside:
            contents = self._vmcb(spa)
            if contents is not None:
                nested = self._nested(contents)
                groups.setdefault(("root", nested.ncr3) if nested is not None else spa, []).append(spa)
        for vmcbs in groups.values():
            known = next((known for known in self._known if set(vmcbs) & set(known.vmcbs)), None)
            if known is None:
                self._add("", tuple(vmcbs))
            else:
                known.vmcbs = (*known.vmcbs, *(spa for spa in vmcbs if spa not in known.vmcbs))
        self._relate(result)
        self._sort_out()

    def _relate(self, result: Scan) -> None:
        relations = result.relations
        if relations is None:
            return
        by_vmcb = {spa: known for known in self._known for spa in known.vmcbs}
        for known in self._known:
            made = relations.made_for(known.vmcbs) if known.parent is None else None
            owner = relations.owner(made) if made is not None else None
            parent = by_vmcb.get(owner) if owner is not None else None
            if parent is not None and parent is not known:
                known.parent, known.inner = parent.number, made

    def _sort_out(self) -> None:
        """A processor that was in a guest when the dump was made has that one's registers, not the host's.

        It shows in the page and descriptor tables, unless a host save area has the same. Our own dumps say whose they are.
        """
        for index, cpu in enumerate(self._cpus):
            if self.dump.annotations.guests or (self._given and not index):
                continue
            if any(name not in cpu for name in _TABLES) or any(self._same_tables(cpu, saved.spa) for saved in self._saved):
                continue
            for known in self._known:
                for vcpu, spa in enumerate(known.vmcbs):
                    if known.on_cpu is None and self._same_tables(cpu, spa):
                        known.registers[vcpu], known.on_cpu = cpu, index
        self._choose_host()

    def _choose_host(self) -> None:
        """Of the processors that are in no guest the first whose code is where its tables say; else a host save area; else any.

        One in a guest that is not known has tables of guest-physical addresses, which lead nowhere.
        """
        own = [cpu for index, cpu in enumerate(self._cpus) if all(known.on_cpu != index for known in self._known)]
        sure = next((cpu for cpu in own if self._runs_here(cpu)), None)
        contents = self._vmcb(self._saved[0].spa) if self._saved and sure is None else None
        self._doubtful = sure is None and contents is None
        if contents is not None:
            self._host = {name: VMCB.read(contents, name) for name in _STATE}
            self.host_from = f"the host save area at {self._saved[0].spa:#x}"
        else:
            self._host = sure or (own[0] if own else {})
            self.host_from = "the dump's registers" if self._host else ""

    def _runs_here(self, cpu: Registers) -> bool:
        """Whether a processor's code can be reached by its own page tables alone. Those that were given are believed."""
        if self._given or self.dump.annotations.guests:
            return True
        state, long_mode = self._state(cpu), cpu.get("cs.attrib", ATTRIB.L) & ATTRIB.L
        linear = cpu.get("rip", 0) if long_mode else cpu.get("cs.base", 0) + cpu.get("rip", 0) & 0xFFFF_FFFF
        found = translate(self.memory, state.privileged(), linear, Access(), set_ad=False)
        if state.format is None or not isinstance(found, Translation):
            return False
        try:
            self.memory.read(found.spa, 1)
        except Unreadable:
            return False
        return True

    def _same_tables(self, cpu: Registers, spa: int) -> bool:
        contents = self._vmcb(spa)
        return contents is not None and all(cpu[name] == VMCB.read(contents, name) for name in _TABLES)

    def _add(self, name: str, vmcbs: tuple[int, ...]) -> _Known:
        number = max((known.number for known in self._known), default=FIRST_GUEST - 1) + 1
        self._known.append(_Known(number, name or f"guest{number}", vmcbs))
        return self._known[-1]

    def _add_noted(self, note: GuestNote) -> None:
        """Numbers that are taken, or the host's, are given anew."""
        vmcbs = tuple(spa for spa in note.vmcbs if self._vmcb(spa) is not None)
        known = self._add(note.name, vmcbs)
        if note.number >= FIRST_GUEST and all(other.number != note.number for other in self._known[:-1]):
            known.number = note.number
        known.parent, known.inner, known.ncr3 = note.parent, note.inner, note.ncr3
        known.registers = {index: registers for index, registers in enumerate(note.registers) if registers}

    def _check_parents(self) -> None:
        """A note may be damaged: each guest has the host below it at last."""
        known = {known.number: known for known in self._known}
        for one in self._known:
            seen, at = {one.number}, one.parent
            while at is not None and at in known and at not in seen:
                seen.add(at)
                at = known[at].parent
            if at is not None:
                one.parent = one.inner = None

    # Views

    def _vmcb(self, spa: int) -> bytes | None:
        try:
            return self.memory.read(spa, VMCB_SIZE)
        except Unreadable:
            return None

    def _nested(self, contents: bytes) -> Nested | None:
        processor = self.processor
        return Nested.from_vmcb(contents, processor.host_cr4, processor.host_efer, processor.maxphyaddr)

    def _state(self, registers: Mapping[str, int]) -> PagingState:
        cr0, cr3, cr4, efer = (registers.get(name, 0) for name in _PAGING)
        if "cr3" not in registers:
            cr0 = 0  # without tables there is nothing to translate with
        cpl = registers.get("cpl", registers.get("ss.attrib", 0) >> 5 & 3 or registers.get("cs.selector", 0) & 3)
        return PagingState(cr0, cr3, cr4, efer, cpl, bool(registers.get("rflags", 0) & RFLAGS.AC), self.maxphyaddr)

    def _vcpu(self, known: _Known, index: int) -> Registers:
        contents = self._vmcb(known.vmcbs[index])
        found = {name: VMCB.read(contents, name) for name in _STATE} if contents is not None else {}
        return {**found, **known.registers.get(index, {})}

    def _view(self, known: _Known) -> GuestView:
        contents = self._vmcb(known.vmcbs[0]) if known.vmcbs else None
        registers = self._vcpu(known, 0) if known.vmcbs else known.registers.get(0, {})
        processor = self.processor
        if contents is not None:
            nested = self._nested(contents)
        elif known.ncr3 is not None:
            nested = Nested(known.ncr3, processor.host_cr4, processor.host_efer, processor.maxphyaddr)
        else:
            nested = None
        asid = VMCB.read(contents, "guest_asid") if contents is not None else 0
        return GuestView(
            number=known.number, name=known.name, vmcbs=known.vmcbs, asid=asid, ncr3=nested.ncr3 if nested is not None else None,
            paging=self._state(registers), nested=nested, parent=known.parent, inner=known.inner,
            state=f"on CPU {known.on_cpu}" if known.on_cpu is not None else "",
        )  # fmt: skip
