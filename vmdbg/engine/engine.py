"""The CPU engine: runs one CPU state on one physical address space until something needs a decision.

What this package hides from the rest: Unicorn, its context layout, its translation cache, its clock.  What it gives: an
exact stop at a time, before every exception, #VMEXIT, IN and OUT, and device accesses at instruction boundaries.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import unicorn
from unicorn import unicorn_const as const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from introspect.decode import Undecodable, decode
from introspect.paging import NestedFault

from . import layout
from .attention import call_attention
from .bases import mend_code_bases, mend_segment_overrides
from .closed import closed, make_room
from .errors import EngineError
from .fingerprint import Sums
from .memory import PAGE, Ram
from .physical import APIC_PAGE, MSRPM_PAGES, PRIVATE, PRIVATE_SIZE, VMCB_PAGE, WINDOW, WINDOW_PAGES, Npt, Physical
from .repair import (
    end_blocks_at_pages,
    knows_privilege,
    mend_nested_walker,
    mend_reserved_bits,
    mend_xsave,
    withdraw_features,
    withdraw_string_io,
)
from .runtime import BRANCH_RING, FLUSH, FORGET, RING_SLOTS, Binding, Point, Reason, Runtime, add_hook
from .state import HF_CS32, HF_CS64, HF_GUEST, HF_LMA, MXCSR_DEFAULT, CpuState
from .translations import LACKED, Translations

MOST_IDLE = 100_000
"""How often disarmed breakpoints may be looked at before they are taken out: about as long as that takes itself."""

VMEXIT = 0x100
EXCEPTION = 0x40
NPF = 0x400
_EXITINFO2 = VMCB_PAGE - PRIVATE + 0x80 >> 3
_NESTED_CR3 = layout.NESTED_CR3 >> 3
_MSRPM_BASE = VMCB_PAGE - PRIVATE + 0x48 >> 3


class Devices(Protocol):
    """Where accesses to anything but RAM go: system-physical address, size in bytes."""

    def read_mmio(self, spa: int, size: int) -> int: ...

    def write_mmio(self, spa: int, size: int, value: int) -> None: ...


class HasNow(Protocol):
    now: int
    changes: int


class Judge(Protocol):
    """Deals with breakpoints without a stop: see judge.c."""

    def prepare(self, cpu: Any) -> int:
        """What `Engine.run` is to give `on_break` for a run of a processor; 0 to stop at each breakpoint."""


@dataclass(slots=True)
class Stop:
    """Why `Engine.run` returned.

    `reason` is a `Reason`; with EXIT, `code` is 0x100 + EXITCODE or the vector of INT n.  With `npf`, a nested fault the
    user's tables made, or one at an address beyond MAXPHYADDR: an entry has bits there that are reserved.
    """

    reason: int
    code: int = 0
    npf: NestedFault | None = None
    watched: int | None = None
    """A page under WATCH_WRITE or WATCH_READ was about to be accessed at this spa."""
    write: bool = False
    apic: int | None = None
    """The guest's APIC page was about to be accessed at this gpa: `Engine.access_apic` lets it."""


_EXIT, _IO = int(Reason.EXIT), int(Reason.IO)
_DEVICE, _PORT = Stop(0), Stop(_IO)
_PLAIN_EXITS = {code: Stop(_EXIT, code) for code in range(VMEXIT + EXCEPTION + 32, VMEXIT + NPF)}
"""#VMEXITs that need no second look; who gets one leaves it as it is."""


class Engine:
    """One Unicorn instance, its RAM, and the runtime around it."""

    def __init__(
        self, memory_size: int, clock: HasNow, *, python: bool = False, physical_bits: int = layout.PHYSICAL_BITS,
        sums: Sums | None = None,
    ) -> None:  # fmt: skip
        """`memory_size` in bytes; `python` takes the twin even where the native runtime exists; `sums`: what executed code is
        added to, if a fingerprint is wanted.

        `physical_bits`: of an address.  With fewer than the engine's own, what an entry of a page table has beyond them stops
        it as a nested fault at that address: see `Stop`.
        """
        if unicorn.__version__ != "2.1.4":
            raise EngineError(
                f"unicorn {unicorn.__version__} from {unicorn.__file__} cannot be used: vmdbg reads the private CPU state of "
                "exactly 2.1.4. Remedy: pip install unicorn==2.1.4"
            )
        make_room()
        self.uc = uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC_ROME)
        layout.calibrate(uc)
        withdraw_features(uc)
        withdraw_string_io()
        call_attention()
        mend_code_bases()
        mend_segment_overrides()
        self.has_xsave = mend_xsave()
        """XSAVE and its like are right."""
        uc.ctl_exits_enabled(True)
        uc.ctl_set_exits([])
        self.clock = clock
        self.ram = ram = Ram(memory_size)
        if ram.ranges[-1][1] > 1 << physical_bits:
            raise EngineError(
                f"{memory_size:#x} bytes of memory end at {ram.ranges[-1][1]:#x}, beyond {physical_bits} physical address bits. "
                "Remedy: less --memory or a larger --maxphyaddr"
            )
        self.physical = Physical(ram, nx=mend_nested_walker(), bits=physical_bits)
        self.has_gmet = self.physical.nx and knows_privilege()
        """Nested leaves that hold code of one privilege only are enforced."""
        self.checks_reserved = mend_reserved_bits()
        """All reserved bits of a guest's tables are."""
        for first, end in ram.ranges:
            self._map(first, end - first, ram.address + first)
        self.translations = Translations(uc, ram)
        """What is held of the guest's translations."""
        self.holder: CpuState | None = None
        """Whose they are."""
        ends = end_blocks_at_pages()
        mended = {
            "no-execute in nested tables": self.physical.nx, "GMET": self.has_gmet, "XSAVE": self.has_xsave,
            "reserved bits of upper page-table entries": self.checks_reserved,
            "accessed bits of executed pages alone": ends,
            LACKED: bool(self.translations.address),
        }  # fmt: skip
        self.lacks = [what for what, works in mended.items() if not works]
        """In words, what a processor has and this does not, since its Unicorn is not as we know it, or nothing is compiled."""
        arena = ctypes.addressof(ctypes.c_char.from_buffer(self.physical.arena.buffer))
        self._map(PRIVATE, PRIVATE_SIZE, arena)
        self.physical.arena.q[_MSRPM_BASE] = MSRPM_PAGES
        self.asked = False
        """The last run ended with ASKED."""
        self._window: list[tuple[Npt, int, int] | None] = [None] * WINDOW_PAGES
        uc.mmio_map(WINDOW, WINDOW_PAGES * PAGE, self._mmio_read, None, self._mmio_write, None)
        self.devices: Devices | None = None
        self._error: BaseException | None = None
        self._sums = sums
        self.binding = Binding(uc, python=python, sums=sums)
        self.rt = self.binding.state
        self.rt.record = 1
        self.rt.mixed = self.physical.mixed
        self._asked = False, False
        self.on_exit = 0
        """A C function that may deal with exits: see runtime.h."""
        self.judge: Judge | None = None
        """Who knows whether breakpoints can be dealt with in C."""
        self._switcher = 0
        self._judge = 0
        # Bytes at the last EXIT or IO, `rt.code_size` of them.
        self.last_code = memoryview((ctypes.c_char * 16).from_buffer(self.rt, Runtime.code.offset)).cast("B")
        self.physical.flush = self.flush
        self.physical.invalidate = self.invalidate
        ram.written = self.physical.written
        self._flat = self.state()
        self._flat.set_cr(0, 1)
        self._flat.hflags = HF_LMA | HF_CS64
        self._flat.i[layout.HFLAGS2 // 4] = 1
        self.armed: set[int] = set()
        """Linear addresses to stop at."""
        self._hooks: dict[int, tuple[int, Point]] = {}
        """Handles of code hooks, armed or not, by their linear address."""
        self._ranges: dict[tuple[int, int], tuple[int, Point]] = {}
        self._wanted: dict[object, set[int]] = {}
        self._active: CpuState | None = None

    def _map(self, first: int, size: int, address: int) -> None:
        error = uclib.uc_mem_map_ptr(
            self.uc._uch, ctypes.c_uint64(first), ctypes.c_size_t(size), ctypes.c_uint32(const.UC_PROT_ALL),
            ctypes.c_void_p(address),
        )  # fmt: skip
        if error:
            raise EngineError(f"the engine refused {size:#x} bytes of memory at {first:#x} (error {error})")

    def state(self) -> CpuState:
        """A new CPU state, all registers as the engine starts, under the engine's interception."""
        state = CpuState(self.uc)
        state.q[layout.VM_VMCB // 8] = VMCB_PAGE
        state.i[layout.NESTED_PG_MODE // 4] = 1 | 2 | 4
        state.i[layout.HFLAGS2 // 4] = 0x41
        state.q[layout.DR // 8 + 7] = 2 << 16 | 2
        """The I/O breakpoint of the runtime: DR7 of the engine is ours, the guest's registers are kept elsewhere.

        A global one: the engine's own task switches clear the local ones.
        """
        state.i[layout.OLD_EXCEPTION // 4] = 0xFFFFFFFF
        state.hflags |= HF_GUEST
        state.mxcsr = MXCSR_DEFAULT
        return state

    def look_at(self, descriptor: int, ticks: int) -> None:
        """Stop (ASKED) where a file descriptor can be read, looked at every so many ticks; a negative one for none."""
        self.rt.input, self.rt.look = descriptor, ticks if descriptor >= 0 else 0

    def flush(self) -> None:
        """A table of ours says something else now: the next run starts with an empty TLB.  No guest notices."""
        self.rt.flush |= FLUSH

    def forget(self) -> None:
        """The processor flushes its TLB: the next run starts without translations."""
        self.rt.flush = FLUSH | FORGET

    def held(self) -> bytes:
        """The translations of `holder` with which the next run would start."""
        return b"" if self.rt.flush & FORGET else self.translations.dump()

    def hold(self, holder: CpuState | None, held: bytes) -> None:
        """Have the next run start with what `held` gave; `ValueError` if it is no such thing."""
        self.translations.load(held)
        self.holder, self.rt.flush = holder, FLUSH

    def invalidate(self, spa: int, length: int) -> None:
        """Drop translations of code in a physical range."""
        self._look_flat()
        error = uclib.uc_ctl(
            self.uc._uch, 1 << 30 | 2 << 26 | const.UC_CTL_TB_REMOVE_CACHE, ctypes.c_uint64(spa), ctypes.c_uint64(spa + length)
        )
        if error:
            raise EngineError(f"dropping translations at {spa:#x} failed (error {error})")

    def _look_flat(self) -> None:
        """Until the next run the engine has a view without paging.

        Its calls that drop translated code take linear addresses, and walk the tables of whoever has executed last: those would
        get accessed bits for what the debugger did.
        """
        uclib.uc_context_restore(self.uc._uch, ctypes.c_void_p(self._flat.address))
        uclib.uc_ctl(self.uc._uch, 1 << 30 | const.UC_CTL_TLB_FLUSH)
        self.flush()

    def flush_code(self) -> None:
        """Drop every translation."""
        uclib.uc_ctl(self.uc._uch, 1 << 30 | const.UC_CTL_TB_FLUSH)

    # Breakpoints: code hooks on linear addresses.  They stay installed when disarmed, since removing one costs a flush
    # of all translations and gdb takes every breakpoint out at each stop and puts it back at each resume.

    def arm(self, addresses: set[int], owner: object = None) -> None:
        """Stop before instructions at these linear addresses, from the next run on, whoever executes them.

        They take the place of those that `owner` armed before.
        """
        if self._wanted.get(owner) == addresses:
            return
        self._wanted[owner] = addresses
        armed = set().union(*self._wanted.values())
        if armed == self.armed:
            return
        hooks = self._hooks
        for address in self.armed - armed:
            hooks[address][1].armed = 0
        missing = armed - hooks.keys()
        for address in armed - self.armed - missing:
            hooks[address][1].armed = 1
        self.armed = armed
        if not missing:
            return
        for address in missing:
            hooks[address] = self._hook(address, address)
        self.flush_code()

    def arm_ranges(self, ranges: set[tuple[int, int]]) -> None:
        """Stop before every instruction that starts within one of these (first, end), in place of those armed before."""
        if ranges == self._ranges.keys():
            return
        self._unhook([self._ranges.pop(gone) for gone in self._ranges.keys() - ranges])
        for first, end in ranges - self._ranges.keys():
            self._ranges[first, end] = self._hook(first, end - 1)
        self.flush_code()

    def _hook(self, first: int, last: int) -> tuple[int, Point]:
        """An armed code hook: its handle, and its state, which must stay where it is."""
        point = Point(self.binding.user, 1)
        callback = self.binding.on_breakpoint
        return add_hook(self.uc, const.UC_HOOK_CODE, callback, ctypes.addressof(point), first, last, None), point

    def _unhook(self, gone: list[tuple[int, Point]]) -> None:
        """Take code hooks out."""
        self._look_flat()
        for handle, _ in gone:
            uclib.uc_hook_del(self.uc._uch, ctypes.c_size_t(handle))

    def tidy(self) -> None:
        """Take disarmed breakpoints out of translated code if execution comes to them often: at each, the engine looks through
        all of them."""
        rt, hooks = self.rt, self._hooks
        if rt.idle * len(hooks) < MOST_IDLE:
            return
        rt.idle = 0
        self._unhook([hooks.pop(address) for address in hooks.keys() - self.armed])
        self.flush_code()

    def _mmio_read(self, _uc: Any, offset: int, size: int, _data: Any) -> int:
        try:
            entry = self._window[offset // PAGE]
            assert entry is not None
            assert self.devices is not None
            return self.devices.read_mmio(entry[2] + offset % PAGE, size)
        except BaseException as error:
            self._error = error
            return 0

    def _mmio_write(self, _uc: Any, offset: int, size: int, value: int, _data: Any) -> None:
        try:
            entry = self._window[offset // PAGE]
            assert entry is not None
            assert self.devices is not None
            self.devices.write_mmio(entry[2] + offset % PAGE, size, value)
        except BaseException as error:
            self._error = error

    def _account(self) -> None:
        self.clock.now += self.rt.executed
        if self.rt.counting:
            self._take_off()

    def retire(self, length: int) -> None:
        """An instruction of so many bytes has been executed by others than the engine."""
        self.clock.now += length
        self.rt.instructions += 1

    def count(self, on: bool) -> None:
        """Whether instructions are counted: it takes time."""
        self.rt.counting = on

    @property
    def instructions(self) -> int:
        """Those executed so far, while they were counted; an iteration of a repeated string instruction is one, too."""
        count: int = self.rt.instructions
        return count

    def _take_off(self) -> None:
        """The runtime counts a block as it begins: take off what the stop has left undone of it."""
        rt, state = self.rt, self._active
        if not rt.undone or state is None:
            return
        code = bytes(rt.block_code[rt.undone_from : rt.undone_from + rt.undone])
        bits = 64 if state.is_code64 else 32 if state.hflags & HF_CS32 else 16
        while code:
            rt.instructions -= 1
            try:
                code = code[decode(code, bits).length :]
            except Undecodable:  # the rest is one that the engine has refused
                break
        rt.undone = 0

    def run(
        self, state: CpuState, npt: Npt, deadline: int, *, window: bool = False, breakpoints: bool = False, switcher: int = 0,
        judge: int = 0,
    ) -> Stop:  # fmt: skip
        """Execute until the clock reaches `deadline` (BUDGET), or until something happens.

        `window`: stop where RFLAGS.IF is set, with `state.shadow` telling whether the boundary is inhibited.
        `switcher`: what `on_exit` gets to deal with exits in C (its address); 0 to return at each.  `judge`: likewise, what
        `on_break` gets to deal with breakpoints.
        """
        if state.root is not None:
            with state.rooted():
                return self.run(state, npt, deadline, window=window, breakpoints=breakpoints, switcher=switcher)
        rt, clock = self.rt, self.clock
        if self._active is not state or state.q[_NESTED_CR3] != npt.root:
            self._enter(state, npt)
        if (window, breakpoints) != self._asked:
            self._ask(window, breakpoints)
        counting = bool(rt.counting)
        if counting:
            switcher = 0  # which does not count
        if switcher != self._switcher:
            self._switcher = switcher
            rt.on_exit, rt.on_exit_user = (self.on_exit, switcher) if switcher else (None, None)
        if judge != self._judge:
            self._judge = judge
            rt.on_break_user = judge or None
        while True:
            self.asked = False
            budget = deadline - clock.now
            if budget <= 0:
                return Stop(Reason.BUDGET)
            rt.budget = budget
            if judge or self._sums is not None:
                rt.begun = clock.now
            self.binding.run()
            clock.now += rt.executed
            reason = rt.reason
            if counting:
                self._take_off()
                if reason == Reason.RECOUNT:
                    continue
            if reason == _EXIT:
                plain = _PLAIN_EXITS.get(rt.intno)
                if plain is not None and self._error is None:
                    return plain
            elif reason == _IO:
                if self._error is None:
                    return _PORT
            elif reason == Reason.BUDGET:
                rt.budget = deadline - self.clock.now
                if rt.budget > 0:
                    self.binding.step_through()
                    self._account()
                    reason = rt.reason
                if reason == Reason.BUDGET:
                    return Stop(reason)
            stop = self._stopped(state, npt, reason)
            if stop is not None:
                return stop

    def step(self, state: CpuState, npt: Npt) -> Stop:
        """Execute one instruction, or one iteration of a repeated string instruction (STEPPED)."""
        if state.root is not None:
            with state.rooted():
                return self.step(state, npt)
        self._enter(state, npt)
        self._ask(False, False)
        return self._step(state, npt)

    def _ask(self, window: bool, breakpoints: bool) -> None:
        """Tell the runtime what to stop for; told only what changes, since each telling costs."""
        self._asked = window, breakpoints
        self.rt.window, self.rt.breakpoints = window, breakpoints

    def _step(self, state: CpuState, npt: Npt) -> Stop:
        while True:
            self.rt.budget, self.rt.begun = 1, self.clock.now
            self.binding.step()
            self._account()
            if self.rt.reason == Reason.STEPPED:
                return Stop(Reason.STEPPED)
            retired = self.rt.executed > 0
            stop = self._stopped(state, npt, self.rt.reason, stepping=True)
            if stop is not None:
                return stop
            if retired:  # SYSRET: the engine's trap does not come, and the fetch of the next instruction stopped us
                return Stop(Reason.STEPPED)

    def _enter(self, state: CpuState, npt: Npt) -> None:
        if self._active is not state or state.q[_NESTED_CR3] != npt.root:
            self._active = state
            self.rt.context, self.rt.salt = state.address, state.salt
            state.q[_NESTED_CR3] = npt.root
            self.flush()
            self.rt.translations = None if state.strict else self.translations.address or None
            if self.holder is not state:
                self.holder = state
                self.forget()

    def _stopped(self, state: CpuState, npt: Npt, reason: int, *, stepping: bool = False) -> Stop | None:
        """What a stop of the runtime means; None to go on."""
        rt = self.rt
        root = state.q[_NESTED_CR3]
        if root != npt.root:  # `on_exit` has switched
            npt = self.physical.table(root)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if reason == Reason.FAILED or reason == 0:
            raise EngineError(
                f"the engine stopped with Unicorn error {rt.error} at RIP {state.rip:#x} (linear {state.linear_rip:#x}, "
                f"hflags {state.hflags:#x}). Remedy: report it with the image; this is a defect of vmdbg or of Unicorn"
            )
        if reason != Reason.EXIT:
            self.asked = reason == Reason.ASKED
            return Stop(reason)
        code = rt.intno
        if code == VMEXIT + NPF:
            gpa = self.physical.arena.q[_EXITINFO2]
            error_code = state.error_code
            write, fetch = bool(error_code & 2), bool(error_code & 0x10)
            found = self.physical.fill(npt, gpa, write, fetch, state.cpl == 3)
            rt.mixed = self.physical.mixed
            if found == -1:
                return Stop(Reason.TABLES) if self.physical.tables_written else None
            if isinstance(found, NestedFault):
                if fetch and not stepping and gpa & (PAGE - 1) == 0:
                    return self._cross(state, npt)
                return Stop(Reason.EXIT, code, npf=found, write=write)
            if self.ram.contains(found):
                return Stop(Reason.EXIT, code, watched=found, write=write)
            if found >= APIC_PAGE:
                if not fetch:
                    return Stop(Reason.EXIT, code, apic=gpa)
                if not stepping and gpa & (PAGE - 1) == 0:
                    return self._cross(state, npt)
                return Stop(Reason.EXIT, VMEXIT + EXCEPTION + 6)  # nothing sensible can be executed there
            return self._access_device(state, npt, gpa, found)
        if code == VMEXIT + EXCEPTION + 14 and not stepping:
            address = self.physical.arena.q[_EXITINFO2]
            rip = state.linear_rip
            if not state.error_code & 2 and address & (PAGE - 1) == 0 and 0 < address - rip < 2 * PAGE:
                return self._cross(state, npt)
        return Stop(reason, code)

    def _cross(self, state: CpuState, npt: Npt) -> Stop | None:
        """A fault that may belong to a later instruction of the block: translation fetches ahead.  Step up to it."""
        stop = self._step(state, npt)
        return None if stop.reason == Reason.STEPPED else stop

    def branches(self, count: int) -> list[tuple[int, int, int]]:
        """The last `count` branches at most, oldest first: linear start and size of the block they leave, and where they go.

        A branch is any way from one block to another than to the next byte.  The last `BRANCH_RING` are kept.
        """
        rt = self.rt
        total = rt.branches
        count = min(count, total, BRANCH_RING)
        ring = rt.ring
        found = (ring[number % RING_SLOTS] for number in range(total - count, total))
        return [(entry.from_block, entry.from_size, entry.to) for entry in found]

    def code(self) -> bytes:
        """The bytes of the instruction that the last EXIT or IO stopped at, as far as its page goes; may be empty."""
        return bytes(self.last_code[: self.rt.code_size])

    def fault_address(self) -> int:
        """The linear address of the last page fault (EXITINFO2 of an intercepted #PF)."""
        return self.physical.arena.q[_EXITINFO2]

    def access_apic(self, state: CpuState, npt: Npt, gpa: int) -> Stop:
        """Execute the instruction that stopped with `Stop.apic`; `devices` is asked with `APIC_PAGE` and the offset."""
        return self._access_device(state, npt, gpa, APIC_PAGE)

    def _access_device(self, state: CpuState, npt: Npt, gpa: int, spa: int) -> Stop:
        """Execute the instruction that accesses a device, with the device's page let through for that instruction."""
        opened: list[int] = []
        rt = self.rt
        try:
            while True:
                index = len(opened)
                if index == WINDOW_PAGES:
                    raise EngineError(f"one instruction at {state.linear_rip:#x} accesses more than {WINDOW_PAGES} device pages")
                opened.append(gpa)
                self._window[index] = (npt, gpa, spa & -PAGE)
                self.physical.open(npt, gpa, index)
                while True:
                    rt.budget, rt.begun = 1, self.clock.now
                    self.binding.step()
                    self._account()
                    if self._error is not None:
                        error, self._error = self._error, None
                        raise error
                    if rt.reason == Reason.STEPPED:
                        return _DEVICE
                    if rt.reason != Reason.EXIT or rt.intno != VMEXIT + NPF:
                        stop = self._stopped(state, npt, rt.reason, stepping=True)
                        assert stop is not None
                        return stop
                    gpa = self.physical.arena.q[_EXITINFO2]
                    code = state.error_code
                    if code & 0x10 and gpa & -PAGE in {page & -PAGE for page in opened}:
                        # It lies in the device page that it accesses: nothing sensible can be executed there.
                        return Stop(Reason.EXIT, VMEXIT + EXCEPTION + 6)
                    found = self.physical.fill(npt, gpa, bool(code & 2), bool(code & 0x10), state.cpl == 3)
                    rt.mixed = self.physical.mixed
                    if isinstance(found, NestedFault):
                        return Stop(Reason.EXIT, rt.intno, npf=found, write=bool(code & 2))
                    if found >= APIC_PAGE:
                        return Stop(Reason.EXIT, rt.intno, apic=gpa)
                    if found >= 0 and not self.ram.contains(found):
                        spa = found
                        break
                    if found >= 0:
                        return Stop(Reason.EXIT, rt.intno, watched=found, write=bool(code & 2))
        finally:
            for page in opened:
                npt.unmap(page)
            self.flush()

    def close(self) -> None:
        """Free the engine; nothing may be used afterwards."""
        self.rt.translations = None
        self.translations.close()
        self.uc = None
        closed(self)
