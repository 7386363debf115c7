"""The common world switch in C (switch.c): what it is told, and where it stands when Python looks again.

world.py is the twin: it enters a VMCB, judges it, and leaves an entry here; from then on VMRUN of that VMCB, and the common
exits, need no Python while what was judged stays as it was.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from introspect.exits import EVENT
from introspect.rules import RULES
from introspect.vmcb import INT_STATE, V_INTR, VMCB
from vmdbg.cpu.bits import CR4_PAE, EFER_LMA
from vmdbg.engine import layout
from vmdbg.engine.errors import EngineError
from vmdbg.engine.fingerprint import Sums
from vmdbg.engine.physical import NOTED, Shadow

from .images import IMAGE_SIZE
from .ring import RECORD_SIZE, Crossing, Head

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu

    from .guest import Guest

_switch: ModuleType | None = None
if os.environ.get("VMDBG_SWITCH") != "python":  # as continuous integration has it once: the twin under all tests
    with suppress(ImportError):  # no compiler at installation
        _switch = import_module("vmdbg.svm._switch")

ENTRIES, JUDGED = 64, 64
FREE = 1
"""In place of a VMCB's address: no entry.  A guest that runs by it is left by Python."""
HOST, UNKNOWN = -1, -2
"""`inside` while the host runs, and while a guest runs that has no entry."""


class Entry(ctypes.Structure):
    _fields_ = (
        ("vmcb", ctypes.c_uint64), ("judged", ctypes.c_uint64 * JUDGED),
        ("host_cr0", ctypes.c_uint64), ("host_cr4", ctypes.c_uint64), ("host_efer", ctypes.c_uint64),
        ("root", ctypes.c_uint64), ("iopm", ctypes.c_uint64), ("msrpm", ctypes.c_uint64), ("registers", ctypes.c_void_p),
        ("ring", ctypes.c_void_p), ("images", ctypes.c_void_p),
        ("words", ctypes.c_uint32 * 6), ("intercepts", ctypes.c_uint8 * 24),
    )  # fmt: skip


class State(ctypes.Structure):
    _fields_ = (
        ("ram", ctypes.c_void_p), ("pages", ctypes.c_void_p), ("ranges", ctypes.c_uint64 * 4), ("total", ctypes.c_void_p),
        ("busy", ctypes.c_uint64), ("cpu", ctypes.c_uint64), ("host_root", ctypes.c_uint64),
        ("physical_mask", ctypes.c_uint64), ("deadline", ctypes.c_uint64), ("tsc_offset", ctypes.c_uint64),
        ("dr", ctypes.c_uint64 * 8),
        ("v_intr", ctypes.c_uint64), ("eventinj", ctypes.c_uint64), ("host_pat", ctypes.c_uint64),
        ("inside", ctypes.c_int32), ("host_if", ctypes.c_uint32),
        ("switches", ctypes.c_uint64), ("judged_count", ctypes.c_uint64), ("judged_index", ctypes.c_uint32 * JUDGED),
        ("judged_mask", ctypes.c_uint64 * JUDGED), ("watched", ctypes.c_uint32 * 6), ("host_intercepts", ctypes.c_uint8 * 24),
        ("crossing", Crossing), ("fingerprint", ctypes.c_void_p), ("entries", Entry * ENTRIES),
    )  # fmt: skip


_AT = (
    layout.REGS, layout.EIP, layout.EFLAGS, layout.HFLAGS, layout.HFLAGS2, layout.SEGMENTS, layout.CR, layout.EFER, layout.PAT,
    layout.VM_HSAVE, layout.SYSENTER_CS, layout.LSTAR, layout.TSC_AUX, layout.INTERCEPT, layout.NESTED_CR3,
    layout.CODE_BASE,
)  # fmt: skip
_IN = tuple(
    VMCB.offset_of(name)
    for name in (
        "es.selector", "fs.selector", "gdtr.selector", "ldtr.selector", "idtr.selector", "tr.selector", "cpl", "efer", "cr4",
        "rsp", "rax", "star", "cr2", "g_pat", "v_intr", "int_state", "exitcode", "eventinj", "nrip", "insn_len",
        "misc_ctl2",
    )
)  # fmt: skip
"""As `at` and `in` of switch.c."""

_GROUPS = frozenset(("intercepts", "control", "interrupts", "nested paging", "avic", "sev"))
_UNJUDGED = frozenset(("vmcb_clean", "erap_control", "bus_lock_counter"))
_PARTS = {
    "v_intr": ~V_INTR.v_tpr & 0xFFFFFFFFFFFFFFFF,
    "int_state": ~INT_STATE.interrupt_shadow & 0xFFFFFFFFFFFFFFFF,
    "eventinj": EVENT.v,
}  # fmt: skip
"""Fields of which some bits may differ: they are loaded anew by each VMRUN."""


def _judged() -> dict[int, int]:
    """Qword of the VMCB to the mask of its bits that must be as they were for an entry to hold.

    All that `Guest` and `world.vmrun` read from the control area, and what the consistency rules read anywhere.
    """
    control = {field.name for field in VMCB if field.offset < 0x400 and field.group in _GROUPS}
    ruled = {name for rule in RULES for name in rule.fields}
    masks: dict[int, int] = {}
    for name in (control | ruled) - _UNJUDGED:
        field = VMCB[name]
        mask = _PARTS.get(name, (1 << 8 * field.size) - 1)
        masks[field.offset // 8] = masks.get(field.offset // 8, 0) | mask << field.offset % 8 * 8
    return dict(sorted(masks.items()))


@cache
def on_exit() -> int:
    """Address of the extension's function, set up; 0 where it was not built."""
    if _switch is None:
        return 0
    found = _switch.symbols((ctypes.c_uint32 * len(_AT))(*_AT), (ctypes.c_uint32 * len(_IN))(*_IN))
    ours = {"size": ctypes.sizeof(State), "record": RECORD_SIZE, "image": IMAGE_SIZE, "ring": ctypes.sizeof(Head)}
    if any(found.get(name) != size for name, size in ours.items()):
        raise EngineError("the native world switch was built for another version of vmdbg. Remedy: pip install .")
    return int(found["on_exit"])


class Switcher:
    """The native world switch of one CPU."""

    def __init__(self, cpu: Cpu, host_intercepts: bytes, total: int, sums: Sums | None = None) -> None:
        """`host_intercepts`: the engine's intercept fields in host mode; `total`: address of the count of all exits; `sums`:
        where each switch is chained up, if a fingerprint is wanted."""
        engine, ram = cpu.engine, cpu.engine.ram
        self.state = state = State()
        self.address = ctypes.addressof(state)
        state.ram = ram.address
        state.pages = ctypes.addressof(ctypes.c_char.from_buffer(ram.pages))
        for index, bound in enumerate(bound for pair in ram.ranges for bound in pair):
            state.ranges[index] = bound
        state.total = total
        state.fingerprint = None if sums is None else ctypes.addressof(sums)
        state.busy = NOTED if engine.physical.nx else 0xFF
        state.cpu = cpu.index
        state.host_root = engine.physical.host.root
        state.physical_mask = ~((1 << cpu.physical_bits) - 1) & 0xFFFFFFFFFFFFFFFF
        state.inside = HOST
        ctypes.memmove(state.host_intercepts, host_intercepts, len(host_intercepts))
        judged = _judged()
        state.judged_count = len(judged)
        for index, (qword, mask) in enumerate(judged.items()):
            state.judged_index[index], state.judged_mask[index] = qword, mask
        self._judged = list(judged)
        self._seen = 0
        self._known: dict[int, tuple[Guest, Shadow]] = {}
        for entry in state.entries:
            entry.vmcb = FREE

    def entered(self, cpu: Cpu, guest: Guest, host: tuple[int, int, int], intercepts: bytes) -> None:
        """world.vmrun has entered a guest: remember it if its switches are of the common kind.  `host`: CR0, CR4, EFER."""
        state = self.state
        state.inside = UNKNOWN
        shadow = cpu.npt
        tasks = guest.intercepts_task_switch and not cpu.state.is_long
        loads_pdptes = host[1] & CR4_PAE and not host[2] & EFER_LMA
        special = tasks or loads_pdptes or guest.intercepts_ferr or not guest.np or not guest.is_common
        if not isinstance(shadow, Shadow) or shadow.volatile or special:
            return
        index = guest.vmcb // 4096 % ENTRIES
        entry = state.entries[index]
        entry.vmcb = guest.vmcb
        entry.host_cr0, entry.host_cr4, entry.host_efer = host
        entry.root = shadow.root
        entry.iopm, entry.msrpm = guest.iopm, guest.msrpm
        entry.registers, entry.ring, entry.images = cpu.observer.memory_of(guest.vmcb)
        q = guest.q
        for number, qword in enumerate(self._judged):
            entry.judged[number] = q[qword]
        for name in ("v_intr", "eventinj"):  # requests that this VMRUN took up: the next VMCB has none
            at = self._judged.index(VMCB.offset_of(name) // 8)
            entry.judged[at] &= ~(V_INTR.v_irq if name == "v_intr" else EVENT.v)
        for number, word in enumerate(guest.words):
            entry.words[number] = word
        ctypes.memmove(entry.intercepts, intercepts, len(intercepts))
        self._known[index] = guest, shadow
        state.inside = index
        state.eventinj = guest.eventinj
        state.host_if, state.host_pat = guest.host_if, guest.host_pat

    def watch(self, codes: set[int], host_intercepts: bytes) -> None:
        """Leave these exits, and of the host these instructions by their exit codes, to Python.  `host_intercepts` as above,
        which guests may share: their entries are made anew."""
        watched = self.state.watched
        watched[:] = [sum(1 << code % 32 for code in codes if code // 32 == word) for word in range(len(watched))]
        ctypes.memmove(self.state.host_intercepts, host_intercepts, len(host_intercepts))
        for entry in self.state.entries:
            entry.vmcb = FREE

    def left(self) -> None:
        """world.vmexit has left the guest."""
        self.state.inside = HOST

    def resumed(self) -> None:
        """The CPU is in a guest again that it left without an exit."""
        self.state.inside = UNKNOWN

    def restart(self, *, inside: bool) -> None:
        """The machine is in another state now; `inside`: in a guest.  Nothing is known of any VMCB."""
        self.state.inside = UNKNOWN if inside else HOST
        self._known.clear()
        self._seen = self.state.switches
        for entry in self.state.entries:
            entry.vmcb = FREE

    def prepare(self, guest: Guest | None, deadline: int, tsc_offset: int) -> int:
        """For a run up to guest time `deadline`: the address for `Engine.run`."""
        state = self.state
        state.deadline, state.tsc_offset = deadline, tsc_offset
        if guest is not None:
            state.v_intr = guest.v_intr & ~0xFF | guest.v_tpr & 0xFF
        return self.address

    @property
    def made(self) -> int:
        """World switches made in C, ever."""
        return int(self.state.switches)

    def has_switched(self) -> bool:
        """Whether it has since `where` was asked."""
        return bool(self.state.switches != self._seen)

    def where(self) -> tuple[Guest, Shadow] | None:
        """The guest that runs after native switches, as VMRUN read it, and its table; None in the host."""
        state = self.state
        self._seen = state.switches
        if state.inside < 0:
            return None
        guest, shadow = self._known[state.inside]
        guest.v_intr, guest.v_tpr = state.v_intr, state.v_intr & 0xFF
        guest.eventinj, guest.host_if, guest.host_pat = state.eventinj, bool(state.host_if), state.host_pat
        guest.load_pause_filter()  # the last switch was its VMRUN
        return guest, shadow

    def forget(self, vmcb: int | None = None, root: int | None = None) -> None:
        """What an entry of this VMCB, or of one under this table, stood for is no longer so."""
        for entry in self.state.entries:
            if entry.vmcb == vmcb or (root is not None and entry.root == root):
                entry.vmcb = FREE
