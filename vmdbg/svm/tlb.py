"""A TLB that keeps what it may (APM2 5.5, 15.16), for `--tlb strict`: what nobody flushes stays, as far as hardware may go.

Each CPU holds translations by ASID, the host's being 0: of linear addresses, and of guest-physical ones, from which the
former are made.  Linear ones go by INVLPG, INVLPGA, MOV CR3 (if not global) and the other control registers; all of an ASID
by TLB_CONTROL at VMRUN; everything by INIT.  VMRUN and #VMEXIT flush nothing, and no tag but the ASID tells CR3s and nCR3s
apart.  Rights that a translation lacks, dirty bits among them, are looked up anew: no fault comes from the TLB.

The engine has a TLB of its own, which knows no ASIDs.  It is made to run on a `Mirror`: a page table of ours whose leaves
are translations held here, filled on its page faults, over the host's nested table.  For that its CR3 and some bits of CR0,
CR4 and EFER are ours while it runs; reads of these registers are intercepted.

Use of a stale translation is seen where it happens.  Pages of tables that translations came from are guarded; a store to
one takes the leaves that depend on it out of the mirror, so that the next use comes here, is compared with what the tables
say then, and told if that is something else.  It stays the old translation all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from introspect.address import Gpa
from introspect.exits import PF_ERROR
from introspect.paging import (
    ENTRY,
    Access,
    Fault,
    Nested,
    NestedFault,
    NestedTranslation,
    PagingState,
    nested_translate,
    permits,
    translate,
)
from introspect.registers import CR0, CR4, EFER
from vmdbg.cpu.core import Cpu, Notice
from vmdbg.cpu.faults import NestedPageFault
from vmdbg.engine.engine import EXCEPTION, NPF, VMEXIT, Stop
from vmdbg.engine.physical import (
    APIC_HOLE,
    HOLE,
    LEAF,
    ONLY_SUPERVISOR,
    ONLY_USER,
    Mirror,
    OutOfTables,
    TableReader,
)
from vmdbg.engine.runtime import Reason
from vmdbg.engine.state import HF_SMAP, TR, CpuState

from .held import Entry, Fresh, Held, Origin, Space, Tables, doubt

if TYPE_CHECKING:
    from vmdbg.engine.physical import Npt

    from .guest import Guest

PAGE = 4096
MOST_SPACES = 64

_W, _U, _G, _NX = ENTRY.W, ENTRY.U, ENTRY.G, ENTRY.NX
_ONLY = ONLY_USER | ONLY_SUPERVISOR
_PAGE_FAULT = VMEXIT + EXCEPTION + 14
_LINEAR = 0xFFFFFFFFFFFF
_CR0, _CR4, _EFER = CR0.PG | CR0.WP, CR4.PAE | CR4.PSE | CR4.PGE | CR4.SMEP | CR4.SMAP, EFER.LMA | EFER.NXE
"""What decides a translation besides CR3 and the tables."""
_TABLE_ACCESS = Access(write=True)
"""Of a walk of the guest's tables in the nested ones (APM2 15.25.6)."""
_BY_ASID = "TLB_CONTROL 3 (or 1)"


class Registers(NamedTuple):
    """By which the engine translates."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    root: int | None
    """`CpuState.root`."""

    def load(self, state: CpuState) -> None:
        state.set_cr(0, self.cr0)
        state.set_cr(3, self.cr3)
        state.set_cr(4, self.cr4)
        state.efer, state.root = self.efer, self.root


class GuestTables(TableReader):
    """A guest's page tables for one walk of them: by guest-physical addresses, through nested translations that are held.

    Accessed and dirty bits are set by `commit`, when all of the translation has succeeded.
    """

    def __init__(self, tlb: Tlb, space: Space, nested: Nested | None) -> None:
        super().__init__(tlb.physical.ram)
        self._tlb, self._space, self._nested = tlb, space, nested
        self._marks: dict[int, int] = {}

    def _at(self, gpa: int) -> int:
        if self._nested is None:
            return gpa
        entry, _ = self._tlb.nested(self._space, self._nested, gpa, _TABLE_ACCESS, table=True)
        self.seen |= entry.tables
        return entry.spa_of(gpa)

    def read_u64(self, gpa: int, /) -> int:
        return super().read_u64(self._at(gpa))

    def read_u32(self, gpa: int, /) -> int:
        return super().read_u32(self._at(gpa))

    def write_u32(self, gpa: int, value: int, /) -> None:
        spa = self._at(gpa)
        self._marks[spa] = self._marks.get(spa, 0) | value

    def commit(self) -> None:
        for spa, value in self._marks.items():
            super().write_u32(spa, value)


class Tlb:
    """The TLB of one CPU, in front of its engine: runs what `Engine` would run."""

    def __init__(self, cpu: Cpu, tables: Tables) -> None:
        self.cpu = cpu
        self.tables = tables
        self.physical = tables.physical
        self._spaces: dict[int, Space] = {}
        self._moves = 0
        self._lent: Registers | None = None
        self._tss: tuple[int, ...] = ()

    @property
    def spaces(self) -> Mapping[int, Space]:
        """What is held, by ASID."""
        return self._spaces

    # Running

    def run(
        self, state: CpuState, npt: Npt, deadline: int, *, window: bool = False, breakpoints: bool = False, judge: int = 0
    ) -> Stop:
        """As `Engine.run`, but it stops at each breakpoint; may also return with one instruction done (STEPPED)."""
        engine = self.cpu.engine
        return self._execute(state, npt, lambda on: engine.run(state, on, deadline, window=window, breakpoints=breakpoints))

    def step(self, state: CpuState, npt: Npt) -> Stop:
        """As `Engine.step`."""
        return self._execute(state, npt, None)

    def access_apic(self, state: CpuState, npt: Npt, gpa: int) -> Stop:
        """As `Engine.access_apic`."""
        return self._execute(state, npt, lambda on: self.cpu.engine.access_apic(state, on, gpa))

    def _execute(self, state: CpuState, npt: Npt, run: Callable[[Npt], Stop] | None) -> Stop:
        """`run` None: a step."""
        engine = self.cpu.engine
        storing = False
        self.tables.settle()
        while True:
            space = self._space()
            if space is None:
                self._show(None)
                stop = engine.step(state, npt) if run is None else run(npt)
            else:
                saved = self._lend(state, space)
                try:
                    stop = engine.step(state, self.physical.host) if run is None else run(self.physical.host)
                finally:
                    saved.load(state)
            if stop.reason == Reason.TABLES:
                # The store retires before what depends on the page is in doubt: else the instruction's own page, mapped by
                # the tables that it writes, would go and come back with the guard, and it would never end.
                storing, run = True, None
                continue
            if space is not None and stop.code == _PAGE_FAULT:
                filled = self._fill(space, state, stop)
                if filled is None:
                    # A step that retired (SYSRET, see Engine._step), or a stale use to be stopped for.
                    done = engine.rt.executed > 0 if run is None else self.cpu.pause
                    if not done:
                        continue
                    filled = Stop(Reason.STEPPED)
                stop = filled
            if storing:
                self.tables.settle()
            return stop

    def show_anew(self) -> None:
        """The engine knows nothing of what it translated by."""
        self._lent = None

    def _show(self, registers: Registers | None) -> None:
        """What the engine translates by changes: its own TLB must not outlast that."""
        if registers != self._lent:
            self._lent = registers
            self.physical.flush()

    def _lend(self, state: CpuState, space: Space) -> Registers:
        """Give the engine a mirror for the page table.  Returns the registers as they were."""
        cpu = self.cpu
        tss = (state.base(TR), state.cr(0), state.cr(3), state.hflags, cpu.asid)
        if tss != self._tss:
            self._tss = tss
            cpu.guard_tasks()
        saved = Registers(state.cr(0), state.cr(3), state.cr(4), state.efer, state.root)
        root = space.mirror.root if state.is_long else space.mirror.low
        gmet = space.by is not None and space.by.gmet
        lent = Registers(
            saved.cr0 | _CR0, root, saved.cr4 | CR4.PAE | (CR4.SMEP if gmet else 0), saved.efer | EFER.NXE, None
        )
        lent.load(state)
        self._show(lent)
        return saved

    def _fill(self, space: Space, state: CpuState, stop: Stop) -> Stop | None:
        """Answer a page fault of the engine; None to try again."""
        error, address = state.error_code, self._linear(self.cpu.engine.fault_address())
        user = bool(error & PF_ERROR.U)
        access = Access(bool(error & PF_ERROR.W), bool(error & PF_ERROR.ID), user, state.cpl == 3 and not user)
        found = self._look(space, address, access)
        if isinstance(found, Fault):
            if found.kind == "NPF":
                return Stop(Reason.EXIT, VMEXIT + NPF, npf=NestedFault(found.code, Gpa(found.address)))
            state.error_code = found.code
            return stop
        try:
            self._map(space, *found, address, access)
        except OutOfTables:
            self.physical.make_room()
            self._map(space, *found, address, access)
        return None

    def _map(self, space: Space, entry: Entry, rights: int, address: int, access: Access) -> None:
        cr0, cr4 = self.cpu.state.cr(0), self.cpu.state.cr(4)
        user = rights & _U if cr0 & CR0.PG else _U * access.user
        spa = entry.spa_of(address) & -PAGE
        if spa >= APIC_HOLE:
            spa = HOLE
        if space.by is not None and space.by.apic is not None and entry.gpa_of(address) & -PAGE == space.by.apic[0]:
            spa = APIC_HOLE
        leaf = spa | LEAF & ~_U | rights & (_W | _NX)
        if access.write and not rights & _W:
            # A supervisor without CR0.WP: the page is writable for as long as no user comes.
            leaf, user = leaf | _W | (_NX if rights & _U and cr4 & CR4.SMEP else 0), 0
        if rights & _ONLY:
            # With SMEP, a page of users holds their code only; to supervisors it is lent as theirs until a user comes.
            if access.execute and not access.user:
                user = 0
            if rights & _ONLY != (ONLY_USER if user else ONLY_SUPERVISOR):
                leaf |= _NX
        leaf |= user
        page = address & _LINEAR & -PAGE
        if space.mirror.get(page) not in (0, leaf):
            self.physical.flush()
        space.mirror.set(page, leaf)
        entry.leaves.add(page)

    # Looking up

    def guest_physical(self, address: int, access: Access) -> int | Fault:
        """Guest-physical address of an access of the instruction at RIP, without a mark and untold."""
        space, address = self._space(), self._linear(address)
        assert space is not None
        entry = (space.linear if self._paging.format else space.nested).find(address)
        if entry is not None and self._permits(entry, access):
            return entry.gpa_of(address)
        found = translate(self.physical.ram, self._paging, address, access, self.cpu.nested, set_ad=False)
        return found if isinstance(found, Fault) else found.gpa

    def locate(self, address: int, access: Access, *, set_ad: bool) -> int | Fault:
        """System-physical address of an access of the processor's own.  Without `set_ad` nothing is added, or told."""
        found = self._locate(address, access, set_ad)
        return found if isinstance(found, Fault) else found & self.physical.a20

    def _locate(self, address: int, access: Access, set_ad: bool) -> int | Fault:
        space = self._space()
        address = self._linear(address)
        if space is not None and set_ad:
            used = self._look(space, address, access)
            return used if isinstance(used, Fault) else used[0].spa_of(address)
        if space is not None:
            entry = (space.linear if self._paging.format else space.nested).find(address)
            if entry is not None and self._permits(entry, access):
                return entry.spa_of(address)
        found = translate(self.physical.ram, self._paging, address, access, self.cpu.nested, set_ad=set_ad)
        return found if isinstance(found, Fault) else found.spa

    @property
    def _paging(self) -> PagingState:
        paging, state = self.cpu.paging, self.cpu.state
        if paging.cr4 & CR4.SMAP and not state.hflags & HF_SMAP:
            return replace(paging, cr4=paging.cr4 & ~CR4.SMAP)  # see Processor._without_smap
        return paging

    def _linear(self, address: int) -> int:
        return address if self.cpu.state.is_long else address & 0xFFFFFFFF

    def _space(self) -> Space | None:
        """What is held for the present address space; None where there is nothing to translate."""
        cpu = self.cpu
        state, nested = cpu.state, cpu.nested
        if not state.cr(0) & CR0.PG and nested is None:
            return None
        space = self._spaces.pop(cpu.asid, None) or self._new_space()
        self._spaces[cpu.asid] = space
        paging = state.cr(0) & _CR0, state.cr(3), state.cr(4) & _CR4, state.efer & _EFER
        if (paging, nested) != (space.paging, space.by):
            for entry in space.linear:
                doubt(entry)
            for entry in space.nested:
                if nested != space.by:
                    doubt(entry)
                entry.leaves.clear()
            space.mirror.clear()
            self.physical.flush()
            space.paging, space.by = paging, nested
        return space

    def _new_space(self) -> Space:
        if len(self._spaces) >= MOST_SPACES:
            oldest = self._spaces.pop(next(iter(self._spaces)))
            self._empty(oldest)
            self.physical.mirrors.remove(oldest.mirror)
            oldest.mirror.close()
        try:
            mirror = Mirror(self.physical.arena)
        except OutOfTables:
            self.physical.make_room()
            mirror = Mirror(self.physical.arena)
        self.physical.mirrors.append(mirror)
        return Space(mirror)

    def _permits(self, entry: Entry, access: Access) -> bool:
        if access.write and not entry.dirty:
            return False
        if access.execute and entry.rights & (ONLY_SUPERVISOR if access.user else ONLY_USER):
            return False
        if entry.nested:
            return not (access.execute and entry.rights & _NX)
        return permits(self._paging, entry.rights, access)

    def _look(self, space: Space, address: int, access: Access) -> tuple[Entry, int] | Fault:
        """The translation that an access uses, and with what rights it may be used until the tables change."""
        nested = self.cpu.nested
        try:
            if self._paging.format is None:
                assert nested is not None
                return self.nested(space, nested, address, access)
            entry = space.linear.find(address)
            if entry is not None:
                if self._permits(entry, access):
                    return entry, self._checked(entry, address, access)
                self._drop(entry)
            return self._walk(space, nested, address, access)
        except NestedPageFault as refused:
            return Fault("NPF", refused.fault.exitinfo1, refused.fault.gpa)

    def _walk(self, space: Space, nested: Nested | None, address: int, access: Access) -> tuple[Entry, int] | Fault:
        memory = GuestTables(self, space, nested)
        found = translate(memory, self._paging, address, access, None, set_ad=True)
        if isinstance(found, Fault):
            return found
        spa, size, rights, dirty, seen = int(found.spa), found.page_size, found.rights, found.dirty, memory.seen
        if not self.cpu.state.cr(4) & CR4.PGE:
            rights &= ~_G
        if nested is not None:
            final, granted = self.nested(space, nested, found.gpa, access)
            spa, size, seen = final.spa_of(found.gpa), min(size, final.size), seen | final.tables
            rights, dirty = rights | granted & (_NX | _ONLY), dirty and bool(granted & _W)
        memory.commit()
        offset = address & size - 1
        entry = Entry(
            space, False, address - offset, size, found.gpa - offset, spa - offset, rights, dirty, found.guest_page_size,
            self._origin(),
        )  # fmt: skip
        self._add(entry, seen)
        return entry, _usable(entry)

    def nested(
        self, space: Space, nested: Nested, gpa: int, access: Access, *, table: bool = False
    ) -> tuple[Entry, int]:
        """The same for a guest-physical address; `table` as in `nested_translate`.  Raises `NestedPageFault`."""
        entry = space.nested.find(gpa)
        if entry is not None:
            if self._permits(entry, access):
                return entry, self._checked(entry, gpa, access)
            self._drop(entry)
        reader = TableReader(self.physical.ram)
        found = nested_translate(reader, nested, gpa, access.write, access.execute, access.user, set_ad=True, table=table)
        if isinstance(found, NestedFault):
            raise NestedPageFault(found)
        size = found.page_size
        offset = gpa & size - 1
        entry = Entry(
            space, True, gpa - offset, size, gpa - offset, found.spa - offset, _W | _U | _execution(nested, found),
            found.writable and found.dirty, size, self._origin(),
        )  # fmt: skip
        self._add(entry, reader.seen)
        return entry, _usable(entry)

    def _origin(self) -> Origin:
        cpu, guest = self.cpu, self.cpu.guest
        cr3 = cpu.state.cr(3)
        return Origin(0, cr3, 0, 0) if guest is None else Origin(guest.vmcb, cr3, guest.n_cr3 * guest.np, self._moves)

    def _add(self, entry: Entry, seen: set[int]) -> None:
        space = entry.space
        out = (space.nested if entry.nested else space.linear).add(entry)
        if out is not None:
            doubt(out)
            self.tables.forget(out)
            self.physical.flush()
        self.tables.note(entry, seen)

    # Doubt

    def _checked(self, entry: Entry, address: int, access: Access) -> int:
        """The rights with which an entry may be used until the tables change; tells of it if it is stale."""
        rights = _usable(entry)
        if not entry.doubtful or entry.told:
            return rights
        fresh = self._fresh(entry, address, access)
        if (
            isinstance(fresh, Fault) or fresh.spa != entry.spa_of(address)
            or (access.write and not (fresh.writable and fresh.dirty))
        ):  # fmt: skip
            entry.told = True
            self._tell(entry, address, access, fresh)
            return rights
        same = rights & fresh.rights & (_W | _U) | (rights | fresh.rights) & (_NX | _ONLY)
        if not fresh.dirty:
            same &= ~_W
        entry.doubtful = entry.size > PAGE or same != rights & ~_G
        return same

    def _fresh(self, entry: Entry, address: int, access: Access) -> Fresh | Fault:
        """What the tables say now, without a mark in them, and whether a write would find them marked."""
        nested = self.cpu.nested
        reader = TableReader(self.physical.ram)
        if entry.nested:
            assert nested is not None
            final = nested_translate(reader, nested, address, False, access.execute, access.user, set_ad=False)
            self.tables.note(entry, reader.seen)
            if isinstance(final, NestedFault):
                return Fault("NPF", final.exitinfo1, final.gpa)
            rights = _U | (_W if final.writable else 0) | _execution(nested, final)
            return Fresh(final.spa, address, rights, final.writable, final.dirty)
        found = translate(reader, self._paging, address, replace(access, write=False), nested, set_ad=False)
        self.tables.note(entry, reader.seen)
        if isinstance(found, Fault):
            return found
        rights = found.rights
        if nested is not None and nested.gmet:
            final = nested_translate(reader, nested, found.gpa, False, False, set_ad=False)
            rights |= _execution(nested, final) if isinstance(final, NestedTranslation) else _NX
        return Fresh(found.spa, found.gpa, rights, found.writable, found.dirty)

    def _tell(self, entry: Entry, address: int, access: Access, fresh: Fresh | Fault) -> None:
        cpu = self.cpu
        if isinstance(fresh, Fault):
            tables = "nested tables" if fresh.kind == "NPF" else "page tables"
            says = f"the {tables} refuse {'this access' if fresh.code & PF_ERROR.P else 'it as not present'}"
        elif fresh.spa != entry.spa_of(address):
            says = f"the tables now say {fresh.spa:#x}"
        else:
            says = "the tables now forbid writing" if not fresh.writable else "the tables want its dirty bit set again"
        kind = "write" if access.write else "fetch" if access.execute else "read"
        cpu.observer.notice(
            cpu, Notice.STALE, cpu.guest,
            f"a {kind} of {'gpa ' * entry.nested}{address:#x} at RIP {cpu.state.rip:#x} used a translation that the TLB of CPU "
            f"{cpu.index} holds for ASID {cpu.asid}: {entry.spa_of(address):#x}; {says}. {self._cause(entry, address, fresh)}",
        )  # fmt: skip

    def _cause(self, entry: Entry, address: int, fresh: Fresh | Fault) -> str:
        """What was forgotten, and the remedy."""
        guest, made, now = self.cpu.guest, entry.origin, self._origin()
        if guest is not None and made.ncr3 != now.ncr3:
            return (
                f"The ASID served nCR3 {made.ncr3:#x} before (VMCB {made.vmcb:#x}), now {now.ncr3:#x}. Give each guest an ASID "
                f"of its own, or flush with {_BY_ASID} when an ASID changes hands (APM2 15.16)"
            )
        if self._of_nested(entry, address, fresh):
            return (
                f"The nested tables were changed without a flush. Flush with {_BY_ASID} behind the change, on each CPU that has "
                "run this ASID (APM2 15.16)"
            )
        if guest is not None and made.moves != now.moves:
            return (
                "The vCPU has been on another CPU meanwhile. "
                f"Flush with {_BY_ASID} at the first VMRUN on a CPU that it comes to (APM2 15.16)"
            )
        if guest is not None and not guest.np:
            if made.cr3 != now.cr3:
                return f"CR3 of the VMCB names another shadow page table. Flush with {_BY_ASID} (APM2 15.16)"
            return (
                "The shadow page table was changed without a flush. "
                f"Execute INVLPGA with rAX {address:#x} and ECX {guest.asid}, or flush with {_BY_ASID} (APM2 15.16)"
            )
        if entry.rights & _G:
            return "The page table of a global page was changed without a flush. Execute INVLPG, or change CR4.PGE (APM2 5.5.2)"
        return "The page table was changed without a flush. Execute INVLPG, or load CR3 (APM2 5.5.2)"

    def _of_nested(self, entry: Entry, address: int, fresh: Fresh | Fault) -> bool:
        """Whether it is the nested tables that differ."""
        nested = self.cpu.nested
        if isinstance(fresh, Fault) or nested is None or entry.nested:
            return entry.nested or (isinstance(fresh, Fault) and fresh.kind == "NPF")
        if fresh.spa != entry.spa_of(address):
            return fresh.gpa == entry.gpa + address - entry.base
        final = nested_translate(self.physical.ram, nested, fresh.gpa, False, False, set_ad=False)
        return isinstance(final, NestedFault) or not (final.writable and final.dirty)

    # Flushing

    def control(self, guest: Guest) -> None:
        """VMRUN has entered a guest: TLB_CONTROL (APM2 15.16.1).  Reserved values flush nothing."""
        self._moves = self.tables.visit(guest.vmcb, self.cpu.index)
        command = guest.tlb_control
        if command == 1:
            self.forget_all()
        elif command in (3, 7):
            self.forget(guest.asid, keep_global=command == 7, nested=True)

    def forget_all(self) -> None:
        """Translations of all address spaces, the host's too."""
        for space in self._spaces.values():
            self._empty(space)

    def forget(self, asid: int, *, keep_global: bool, nested: bool = False) -> None:
        """Linear translations of one ASID; `nested`: guest-physical ones, too."""
        space = self._spaces.get(asid)
        if space is None:
            return
        if nested and not keep_global:
            self._empty(space)
            return
        for entry in space.linear:
            if not (keep_global and entry.rights & _G):
                self._drop(entry)
        for entry in space.nested if nested else ():
            self._drop(entry)

    def forget_page(self, address: int, asid: int) -> None:
        """What translates one linear address under an ASID: all of the guest's page, if it is in parts."""
        space = self._spaces.get(asid)
        if space is None:
            return
        for held in (space.linear, *([] if space.paging[0] & CR0.PG else [space.nested])):
            for entry in held:
                if not (entry.base ^ address) & -entry.span:
                    self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        held = entry.space.nested if entry.nested else entry.space.linear
        held.remove(entry)
        doubt(entry)
        self.tables.forget(entry)
        self.physical.flush()

    def _empty(self, space: Space) -> None:
        for held in (space.linear, space.nested):
            for entry in held:
                self.tables.forget(entry)
        space.linear, space.nested = Held(), Held()
        space.mirror.clear()
        self.physical.flush()


def _execution(nested: Nested, found: NestedTranslation) -> int:
    """NX, or under GMET whose code the page may hold."""
    if not found.executable:
        return _NX
    return (ONLY_USER if found.user else ONLY_SUPERVISOR) if nested.gmet else 0


def _usable(entry: Entry) -> int:
    """The rights of an entry with which the engine may use it on its own: a write that must set a dirty bit comes here."""
    return entry.rights if entry.dirty else entry.rights & ~_W
