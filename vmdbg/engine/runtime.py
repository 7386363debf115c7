"""The runtime: budget, interrupt windows, precise I/O, single steps and the branch ring around `uc_emu_start`.

`Runtime` is the state both implementations share, field for field the `struct runtime` of native.c.  `open_runtime`
binds the native functions where the extension was built and the Python ones of twin.py elsewhere; both are called with
the structure and leave `reason`, `executed` and the context behind.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from unicorn import unicorn_const as const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from . import layout
from .errors import EngineError
from .fingerprint import Sums

native: ModuleType | None
try:
    native = import_module("vmdbg.engine._native")
except ImportError:  # no compiler at installation: the twin does the same work
    native = None

BRANCH_RING = 65536
"""Branches that can be asked for."""
RING_SLOTS = 2 * BRANCH_RING
BLOCK_CODE = 8192
FLUSH, FORGET = 1, 2
"""As in runtime.h."""


class Reason(IntEnum):
    """Why the engine stopped."""

    BUDGET = 1
    """The next block does not fit the budget; it has not begun."""
    EXIT = 2
    """An exception or #VMEXIT, in `intno` (0x100 + EXITCODE, or the vector of INT n)."""
    IO = 3
    """IN or OUT, before it executes; `io_port`, `io_size`, `io_write`, `io_value`."""
    SYSCALL = 4
    SYSENTER = 5
    WINDOW = 6
    """RFLAGS.IF is set and `window` was asked for."""
    STEPPED = 7
    BREAK = 8
    """An armed breakpoint at `break_address`, before the instruction."""
    FAILED = 9
    TABLES = 10
    """Only from `Engine`: a store to a page in `Physical.tables_written` is about to be made."""
    ASKED = 11
    """There is input on the descriptor of `Engine.look_at`.  The native runtime only."""
    RECOUNT = 12
    """A block ended where it stored into itself, while instructions are counted.  Only for `Engine`."""


class Branch(ctypes.Structure):
    _fields_ = (("from_block", ctypes.c_uint64), ("to", ctypes.c_uint64), ("from_size", ctypes.c_uint64))


class Runtime(ctypes.Structure):
    _fields_ = (
        ("uc", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("emu_start", ctypes.c_void_p),
        ("emu_stop", ctypes.c_void_p),
        ("context_save", ctypes.c_void_p),
        ("context_restore", ctypes.c_void_p),
        ("ctl", ctypes.c_void_p),
        ("reg_read", ctypes.c_void_p),
        ("reg_write", ctypes.c_void_p),
        ("vmem_read", ctypes.c_void_p),
        ("budget", ctypes.c_int64),
        ("executed", ctypes.c_int64),
        ("reason", ctypes.c_uint32),
        ("intno", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("special", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("flush", ctypes.c_uint32),
        ("io_port", ctypes.c_uint32),
        ("io_size", ctypes.c_uint32),
        ("io_write", ctypes.c_uint32),
        ("io_value", ctypes.c_uint32),
        ("error", ctypes.c_uint32),
        ("block_start", ctypes.c_uint64),
        ("block_size", ctypes.c_uint64),
        ("tf", ctypes.c_uint32),
        ("rep", ctypes.c_uint32),
        ("branches", ctypes.c_uint64),
        ("breakpoints", ctypes.c_uint32),
        ("record", ctypes.c_uint32),
        ("break_address", ctypes.c_uint64),
        ("code", ctypes.c_uint8 * 16),
        ("code_size", ctypes.c_uint32),
        ("saved", ctypes.c_uint32),
        ("reading", ctypes.c_uint32),
        ("mixed", ctypes.c_uint32),
        ("look", ctypes.c_int64),
        ("input", ctypes.c_int32),
        ("idle", ctypes.c_uint64),
        ("on_exit", ctypes.c_void_p),
        ("on_exit_user", ctypes.c_void_p),
        ("on_break", ctypes.c_void_p),
        ("on_break_user", ctypes.c_void_p),
        ("instructions", ctypes.c_int64),
        ("counting", ctypes.c_uint32),
        ("block_count", ctypes.c_uint32),
        ("undone_from", ctypes.c_uint32),
        ("undone", ctypes.c_uint32),
        ("block_code", ctypes.c_uint8 * BLOCK_CODE),
        ("begun", ctypes.c_int64),
        ("entered", ctypes.c_int64),
        ("fingerprint", ctypes.c_void_p),
        ("salt", ctypes.c_uint64),
        ("summed", ctypes.c_uint64),
        ("translations", ctypes.c_void_p),
        ("ring", Branch * RING_SLOTS),
    )


class Point(ctypes.Structure):
    """A breakpoint's hook, as the `struct point` of runtime.h: it stays in translated code while it is not `armed`."""

    _fields_ = (("runtime", ctypes.c_void_p), ("armed", ctypes.c_uint32))


_BLOCK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)
_INTERRUPT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
_IN = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)
_OUT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
_PLAIN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)

HOOKS = {
    "on_block": (_BLOCK, const.UC_HOOK_BLOCK, None),
    "on_interrupt": (_INTERRUPT, const.UC_HOOK_INTR, None),
    "on_in": (_IN, const.UC_HOOK_INSN, x86.UC_X86_INS_IN),
    "on_out": (_OUT, const.UC_HOOK_INSN, x86.UC_X86_INS_OUT),
    "on_syscall": (_PLAIN, const.UC_HOOK_INSN, x86.UC_X86_INS_SYSCALL),
    "on_sysenter": (_PLAIN, const.UC_HOOK_INSN, x86.UC_X86_INS_SYSENTER),
}

_CALLBACKS = {name: prototype for name, (prototype, _, _) in HOOKS.items()} | {
    "on_summed_block": _BLOCK, "on_breakpoint": _BLOCK,
}  # fmt: skip

LAYOUT = (
    layout.REGS,
    layout.EIP,
    layout.EFLAGS,
    layout.CC_SRC,
    layout.HFLAGS,
    layout.SEGMENTS,
    layout.ERROR_CODE,
    layout.EFER,
    layout.STAR,
    layout.LSTAR,
    layout.SFMASK,
)
"""As `struct layout` of native.c."""


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def add_hook(uc: Any, kind: int, callback: int, user: int, begin: int, end: int, instruction: int | None) -> int:
    """`uc_hook_add` with a raw function address; returns the hook's handle."""
    handle = ctypes.c_size_t()
    arguments = [ctypes.c_int(instruction)] if instruction is not None else []
    error = uclib.uc_hook_add(
        uc._uch, ctypes.byref(handle), ctypes.c_int(kind), ctypes.c_void_p(callback), ctypes.c_void_p(user),
        ctypes.c_uint64(begin), ctypes.c_uint64(end), *arguments,
    )  # fmt: skip
    if error:
        raise EngineError(f"uc_hook_add failed with error {error} for hook type {kind}")
    return handle.value


class Binding:
    """A runtime bound to one engine: `run`, `step`, `step_through`, and the address for breakpoint hooks."""

    def __init__(self, uc: Any, *, python: bool = False, sums: Sums | None = None) -> None:
        """`sums`: what executed code is added to; without it a block costs less."""
        self.state = state = Runtime()
        state.fingerprint = None if sums is None else ctypes.addressof(sums)
        state.uc = ctypes.cast(uc._uch, ctypes.c_void_p).value
        for field, function in (
            ("emu_start", uclib.uc_emu_start),
            ("emu_stop", uclib.uc_emu_stop),
            ("context_save", uclib.uc_context_save),
            ("context_restore", uclib.uc_context_restore),
            ("ctl", uclib.uc_ctl),
            ("reg_read", uclib.uc_reg_read),
            ("reg_write", uclib.uc_reg_write),
            ("vmem_read", uclib.uc_vmem_read),
        ):
            setattr(state, field, _address(function))
        self._keep: list[Any] = []
        user = ctypes.addressof(state)
        addresses: dict[str, int]
        if native is not None and not python:
            symbols = native.symbols((ctypes.c_uint32 * len(LAYOUT))(*LAYOUT))
            if symbols["size"] != ctypes.sizeof(Runtime):
                raise EngineError(
                    f"the native runtime was built for another version of vmdbg (its state is {symbols['size']} bytes, "
                    f"{ctypes.sizeof(Runtime)} expected). Remedy: reinstall vmdbg (pip install .)"
                )
            addresses = symbols
            self.name = "native"
            self.run: Callable[[], None] = partial(native.run, user)
            self.step: Callable[[], None] = partial(native.step, user)
            self.step_through: Callable[[], None] = partial(native.step_through, user)
        else:
            from .twin import Twin

            twin = Twin(uc, state, sums)
            self.name = "python"
            self.run, self.step, self.step_through = twin.run, twin.step, twin.step_through
            addresses = {}
            for name, prototype in _CALLBACKS.items():
                callback = prototype(getattr(twin, name))
                self._keep.append(callback)
                addresses[name] = _address(callback)
        if sums is not None:
            addresses["on_block"] = addresses["on_summed_block"]
        for name, (_, kind, instruction) in HOOKS.items():
            add_hook(uc, kind, addresses[name], user, 1, 0, instruction)
        self.on_breakpoint = addresses["on_breakpoint"]
        self.user = user
