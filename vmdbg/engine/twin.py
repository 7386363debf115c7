"""The runtime of native.c in Python, for machines without a compiler: same state, same results, slower."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from unicorn import unicorn_const as const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from . import layout
from .fingerprint import MASK, Sums, stretch
from .runtime import BLOCK_CODE, FORGET, Point, native

if TYPE_CHECKING:
    from .runtime import Runtime

HF_INHIBIT_IRQ, HF_CS32, HF_TF, HF_CS64 = 1 << 3, 1 << 4, 1 << 8, 1 << 15
EFLAGS_CC, EFLAGS_ZF, EFLAGS_TF, EFLAGS_IF = 0x8D5, 0x40, 0x100, 0x200
VMEXIT, EXCEPTION, NPF = 0x100, 0x40, 0x400
BUDGET, EXIT, IO, SYSCALL, SYSENTER, WINDOW, STEPPED, BREAK, FAILED = range(1, 10)
RECOUNT = 12
REQUEST_CACHE = 3 << 30 | 2 << 26 | const.UC_CTL_TB_REQUEST_CACHE
_PREFIXES = frozenset((0x66, 0x67, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65))
_REP = frozenset((0x6C, 0x6D, 0x6E, 0x6F, 0xA4, 0xA5, 0xAA, 0xAB, 0xAC, 0xAD))
_REP_COMPARE = frozenset((0xA6, 0xA7, 0xAE, 0xAF))


class _Block(ctypes.Structure):
    """What the engine knows of a translated block (uc_tb)."""

    _fields_ = (("pc", ctypes.c_uint64), ("instructions", ctypes.c_uint16), ("size", ctypes.c_uint16))


def rep_of(code: bytes, cs64: bool) -> int:
    """The REP prefix of a string instruction, | 0x100 for CMPS and SCAS, which also end by ZF; 0 for all others."""
    rep = 0
    for b in code:
        if b in (0xF2, 0xF3):
            rep = b
        elif b in _PREFIXES or (cs64 and 0x40 <= b <= 0x4F):
            continue
        elif rep and b in _REP_COMPARE:
            return rep | 0x100
        elif rep and b in _REP:
            return rep
        else:
            return 0
    return 0


class Twin:
    """Hook callbacks and entry points of native.c; see there for the reasons."""

    def __init__(self, uc: Any, state: Runtime, sums: Sums | None) -> None:
        self.uch = uc._uch
        self.state = state
        self.sums = sums
        self._eflags = ctypes.c_uint64()

    def _field(self, kind: Any, offset: int) -> Any:
        return kind.from_address(self.state.context + offset)

    def _stop(self, reason: int) -> None:
        self.state.reason = reason
        uclib.uc_emu_stop(self.uch)

    def _flags(self) -> int:
        uclib.uc_reg_read(self.uch, x86.UC_X86_REG_EFLAGS, ctypes.byref(self._eflags))
        return self._eflags.value

    def _block_code(self, address: int, length: int, cs64: bool) -> bytes:
        first = min(length, 4096 - (address & 4095))
        code = ctypes.create_string_buffer(first)
        error = uclib.uc_vmem_read(self.uch, ctypes.c_uint64(address), const.UC_PROT_EXEC, code, ctypes.c_size_t(first))
        if error or first == length:
            return b"" if error else code.raw
        following = address + first if cs64 else (address + first) & 0xFFFFFFFF
        return code.raw + self._block_code(following, length - first, cs64)

    def _given_back(self, address: int, size: int) -> int:
        rt = self.state
        done = address - rt.block_start
        return rt.block_size - done if done >= 0 and done + size < rt.block_size else 0

    def _restarted(self, address: int, size: int) -> None:
        rt, back = self.state, self._given_back(address, size)
        rt.budget += back
        rt.block_size -= back

    def on_block(self, _uc: int, address: int, size: int, _user: int) -> None:
        rt = self.state
        if rt.step:
            if rt.step == 2:
                if not rt.mixed or address != rt.block_start:
                    self._stop(STEPPED)
                return
            rt.step = 2
            rt.tf = int(bool(self._flags() & EFLAGS_TF))
            cs64 = bool(self._field(ctypes.c_uint32, layout.HFLAGS).value & HF_CS64)
            rt.rep = rep_of(self._block_code(address, min(size, 15), cs64), cs64)
        else:
            if rt.mixed:
                before = rt.block_size
                self._restarted(address, size)
                if rt.counting and rt.block_size != before and self._recount(before):
                    return
            if rt.window and self._flags() & EFLAGS_IF:
                self._stop(WINDOW)
                return
            if size > rt.budget:
                self._stop(BUDGET)
                return
        if rt.record and rt.block_size and address != rt.block_start + rt.block_size:
            branch = rt.ring[rt.branches % len(rt.ring)]
            branch.from_block, branch.to, branch.from_size = rt.block_start, address, rt.block_size
            rt.branches += 1
        rt.budget -= size
        rt.block_start = address
        rt.block_size = size
        if rt.counting:
            self._count(address, size)

    def _recount(self, before: int) -> bool:
        rt = self.state
        rt.undone_from, rt.undone = rt.block_size, before - rt.block_size
        if rt.block_size:
            self._stop(RECOUNT)
        else:
            rt.instructions -= rt.block_count
        return bool(rt.block_size)

    def _count(self, address: int, size: int) -> None:
        """The instructions of the block that begins, and its code."""
        rt, found = self.state, _Block()
        uclib.uc_ctl(self.uch, REQUEST_CACHE, ctypes.c_uint64(address), ctypes.byref(found))
        cs64 = bool(self._field(ctypes.c_uint32, layout.HFLAGS).value & HF_CS64)
        code = self._block_code(address, min(size, BLOCK_CODE), cs64)
        ctypes.memmove(rt.block_code, code, len(code))
        instructions = found.instructions if found.size == size else 1
        repeated = instructions == 1 and rep_of(code, cs64) and self._repeated(code, cs64)
        rt.block_count = 0 if repeated else instructions
        rt.instructions += rt.block_count

    def _repeated(self, code: bytes, cs64: bool) -> bool:
        """Whether the count of the REP instruction that is a block is 0: it is entered so behind its last iteration."""
        count = ctypes.c_uint64()
        uclib.uc_reg_read(self.uch, x86.UC_X86_REG_RCX, ctypes.byref(count))
        cs32, other = bool(self._field(ctypes.c_uint32, layout.HFLAGS).value & HF_CS32), 0x67 in code
        bits = (32 if other else 64) if cs64 else 32 if cs32 != other else 16
        return not count.value & ((1 << bits) - 1)

    def _sum_up(self, unexecuted: int) -> None:
        rt, sums = self.state, self.sums
        if sums is not None:
            end = rt.block_start + rt.block_size - unexecuted
            to = rt.begun + rt.entered - rt.budget - unexecuted
            size = to - rt.summed
            sums.code = sums.code + stretch(end - size, rt.summed, size, rt.salt) & MASK
            rt.summed = to

    def on_summed_block(self, _uc: int, address: int, size: int, _user: int) -> None:
        rt = self.state
        self._sum_up(self._given_back(address, size) if rt.mixed and not rt.step else 0)
        self.on_block(_uc, address, size, _user)

    def _save(self) -> None:
        rt = self.state
        uclib.uc_context_save(self.uch, ctypes.c_void_p(rt.context))
        self._field(ctypes.c_uint64, layout.EFLAGS).value = self._flags()
        rt.saved = 1
        # The engine leaves a read that faults by a long jump, which the interpreter would not survive: others fetch.
        rt.code_size = 0

    def on_interrupt(self, _uc: int, intno: int, _user: int) -> None:
        rt = self.state
        if not rt.reason:
            if rt.step == 2 and intno == VMEXIT + EXCEPTION + 1 and not rt.tf:
                rt.reason = STEPPED
            else:
                rt.reason = EXIT
                rt.intno = intno
                self._save()
        uclib.uc_emu_stop(self.uch)

    def _io(self, port: int, size: int, write: int, value: int) -> None:
        rt = self.state
        rt.reason = IO
        rt.io_port, rt.io_size, rt.io_write, rt.io_value = port, size, write, value
        self._save()
        address = ctypes.c_uint64(port)
        uclib.uc_reg_write(self.uch, x86.UC_X86_REG_DR0, ctypes.byref(address))

    def on_in(self, _uc: int, port: int, size: int, _user: int) -> int:
        self._io(port, size, 0, 0)
        return 0

    def on_out(self, _uc: int, port: int, size: int, value: int, _user: int) -> None:
        self._io(port, size, 1, value)

    def on_syscall(self, _uc: int, _user: int) -> None:
        self._stop(SYSCALL)

    def on_sysenter(self, _uc: int, _user: int) -> None:
        self._stop(SYSENTER)

    def on_breakpoint(self, _uc: int, address: int, _size: int, point: int) -> None:
        armed = Point.from_address(point).armed
        self.state.idle += not armed
        if armed and self.state.breakpoints:
            self.state.break_address = address
            self._stop(BREAK)

    def _linear_rip(self) -> int:
        eip = int(self._field(ctypes.c_uint64, layout.EIP).value)
        if self._field(ctypes.c_uint32, layout.HFLAGS).value & HF_CS64:
            return eip
        return (int(self._field(ctypes.c_uint64, layout.SEGMENTS + 24 + 8).value) + eip) & 0xFFFFFFFF

    def _unexecuted(self) -> int:
        rt = self.state
        if not rt.block_size or rt.reason not in (EXIT, IO, BREAK):
            return 0
        if rt.reason == EXIT:
            code = rt.intno - VMEXIT
            if code == EXCEPTION + 1:
                return 0
            if code in (EXCEPTION + 14, NPF) and self._field(ctypes.c_uint32, layout.ERROR_CODE).value & 0x10:
                return 0
        done = self._linear_rip() - rt.block_start
        return rt.block_size - done if 0 <= done < rt.block_size else 0

    def run(self) -> None:
        rt = self.state
        before = rt.entered = rt.budget
        rt.reason = 0
        rt.block_size = 0
        rt.summed = rt.begun
        rt.saved = 0
        context = ctypes.c_void_p(rt.context)
        uclib.uc_context_restore(self.uch, context)
        if rt.flush:
            uclib.uc_ctl(self.uch, 1 << 30 | const.UC_CTL_TLB_FLUSH)
        held, outer = rt.translations or 0, 0
        if native is not None:  # which holds translations for this runtime, too
            if rt.flush & FORGET and held:
                native.translations_clear(held)
            outer = native.translations_enter(held)
        rt.flush = 0
        rip = self._field(ctypes.c_uint64, layout.EIP).value
        rt.error = uclib.uc_emu_start(
            self.uch, ctypes.c_uint64(rip), ctypes.c_uint64(0), ctypes.c_uint64(0), ctypes.c_size_t(0)
        )
        if native is not None:
            native.translations_enter(outer)
        eflags = self._field(ctypes.c_uint64, layout.EFLAGS)
        if not rt.saved:
            uclib.uc_context_save(self.uch, context)
            eflags.value = self._flags()
        self._field(ctypes.c_uint64, layout.CC_SRC).value = eflags.value & EFLAGS_CC
        if rt.error:
            rt.reason = FAILED
        left = 0
        rt.executed = before - rt.budget
        if rt.reason != RECOUNT:
            rt.undone = left = self._unexecuted()
            rt.undone_from = rt.block_size - rt.undone
            rt.executed -= rt.undone
        self._sum_up(left)
        rt.budget = before - rt.executed
        rt.begun += rt.executed

    def step(self) -> None:
        rt = self.state
        hflags = self._field(ctypes.c_uint32, layout.HFLAGS)
        entry = hflags.value
        count = self._field(ctypes.c_uint64, layout.REGS + 8).value
        rt.step = 1
        rt.rep = 0
        hflags.value = entry | HF_TF
        self.run()
        hflags.value &= ~HF_TF
        rt.step = 0
        if not entry & HF_CS64:
            count &= 0xFFFFFFFF
        ended = rt.reason == STEPPED and self._linear_rip() == rt.block_start + rt.block_size
        if ended and rt.rep and not rt.tf and not entry & HF_INHIBIT_IRQ and count:
            zf = bool(self._field(ctypes.c_uint64, layout.EFLAGS).value & EFLAGS_ZF)
            if not rt.rep & 0x100 or zf == (rt.rep & 0xFF == 0xF3):
                rt.executed += rt.block_size
                rt.begun += rt.block_size
                rt.budget -= rt.block_size
                rt.entered = rt.budget
                self._sum_up(0)

    def step_through(self) -> None:
        rt = self.state
        executed = 0
        while rt.budget > 0:
            self.step()
            executed += rt.executed
            if rt.reason != STEPPED:
                break
            if rt.window and self._field(ctypes.c_uint64, layout.EFLAGS).value & EFLAGS_IF:
                rt.reason = WINDOW
                break
        if rt.reason == STEPPED:
            rt.reason = BUDGET
        rt.executed = executed
