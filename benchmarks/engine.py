"""Instructions a second of compute-bound 64-bit code: this project's engine against bare Unicorn.

The kernels are those of examples/bench/compute.elf.  Every run boots the image here as far as the kernel's first
instruction.  From there the kernel runs on the native runtime, the same with a fingerprint of what it executes, on the Python
twin, on the native runtime as a guest under nested paging, or on a plain `Uc` without a single hook, given the same memory, page
tables and registers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from struct import pack
from typing import Any

from unicorn import unicorn_const as const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import Uc

from introspect.registers import EFER
from introspect.vmcb import MISC_CTL, SEGMENTS, VMCB
from vmdbg.engine.state import RAX, RSP
from vmdbg.fingerprint import FingerprintOptions
from vmdbg.machine import Config, Event, Machine

from .measure import BenchmarkError, Lines, Report, Times, finish, image, main

COLUMNS = (
    ("kernel", ""), ("bare M/s", ",.0f"), ("native M/s", ",.0f"), ("guest M/s", ",.0f"),
    ("fingerprint M/s", ",.0f"), ("python M/s", ",.1f"), ("native/bare", ".2f"), ("guest/bare", ".2f"),
    ("fingerprint/native", ".2f"), ("python/bare", ".3f"),
)  # fmt: skip
INSTRUCTIONS = {"mix": 64, "tight": 3, "store": 17}
"""By kernel, in one round: see kernels.S."""
ROUNDS = {"mix": 6_000_000, "tight": 100_000_000, "store": 2_000_000}
SLOWER = 100
"""The twin runs so many times fewer rounds."""

MEMORY = 64 << 20
IMAGE_END = 16 << 20
SCRATCH = 48 << 20
"""Memory that the image does not use: VMCB, host save area, nested tables, and the host's one instruction."""
VMCB_PAGE, HSAVE, PML4, PDPT, DIRECTORY, CODE = (SCRATCH + 0x1000 * n for n in range(6))
_ENCODED = ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{number}" for number in range(8, 16)))
GENERAL = [getattr(x86, f"UC_X86_REG_{name}") for name in _ENCODED]


def at_kernel(kernel: str, rounds: int, *, python: bool = False, fingerprint: bool = False) -> tuple[Machine, Lines]:
    """A machine before the first instruction of a kernel."""
    lines = Lines(time.process_time)
    command_line = f"kernel={kernel} n={rounds}"
    options = FingerprintOptions() if fingerprint else None
    config = Config(memory=MEMORY, command_line=command_line, serial=lines, python_runtime=python, fingerprint=options)
    machine = Machine(image("compute.elf"), config)
    entries = [symbol.address for symbol in machine.image.symbols if symbol.name == f"kernel_{kernel}"]
    if not entries:
        raise BenchmarkError("compute.elf has no symbols; build it again: make -B -C examples/bench")
    machine.engine.arm({entries[0]})
    while (event := machine.run(breakpoints=True)) != Event.BREAKPOINT:
        if event == Event.EXIT:
            raise BenchmarkError(f"compute.elf ended before its kernel: {machine.ended}")
    return machine, lines


def ours(kernel: str, rounds: int, *, python: bool = False, guest: bool = False, fingerprint: bool = False) -> float:
    """CPU seconds from the kernel's first instruction to the line "done"."""
    machine, lines = at_kernel(kernel, rounds, python=python, fingerprint=fingerprint)
    if guest:
        become_guest(machine)
    start = time.process_time()
    finish(machine)
    return lines.when("done") - start


def twin(kernel: str, rounds: int) -> float:
    """What `rounds` on the Python runtime would take, from fewer."""
    return SLOWER * ours(kernel, rounds // SLOWER, python=True)


def become_guest(machine: Machine) -> None:
    """Make what runs a guest: its state into a VMCB, identity nested tables below it, and a host that is one VMRUN."""
    cpu, ram = machine.cpu, machine.ram
    s = cpu.state
    fields = {
        "intercept_misc2": 1, "guest_asid": 1, "misc_ctl": MISC_CTL.np_enable, "n_cr3": PML4, "g_pat": s.field("pat"),
        "efer": s.efer | EFER.SVME, "cr0": s.cr(0), "cr3": s.cr(3), "cr4": s.cr(4), "dr6": cpu.dr[6], "dr7": cpu.dr[7],
        "rflags": s.rflags, "rip": s.rip, "rsp": s.reg(RSP), "rax": s.reg(RAX),
    }  # fmt: skip
    for name, number in (("es", 0), ("cs", 1), ("ss", 2), ("ds", 3), ("gdtr", 8), ("idtr", 9)):
        assert name in SEGMENTS
        fields |= {f"{name}.limit": s.limit(number), f"{name}.base": s.base(number)}
        if number < 8:
            fields |= {f"{name}.selector": s.selector(number), f"{name}.attrib": s.attrib(number)}
    ram.write(VMCB_PAGE, bytes(VMCB.encode(fields)))
    ram.write_u64(PML4, PDPT | 7)
    ram.write_u64(PDPT, DIRECTORY | 7)
    ram.write(DIRECTORY, pack("<512Q", *(page << 21 | 0x87 for page in range(512))))
    ram.write(CODE, b"\x0f\x01\xd8\xf4")  # vmrun; hlt
    s.efer |= EFER.SVME
    s.set_field("vm_hsave", HSAVE)
    s.set_reg(RAX, VMCB_PAGE)
    s.rip = CODE
    s.refresh()
    cpu.flush()


def bare(kernel: str, rounds: int) -> float:
    """CPU seconds from the kernel's first instruction to its return, on Unicorn alone."""
    machine, _ = at_kernel(kernel, rounds)
    s = machine.cpu.state
    uc: Any = Uc(const.UC_ARCH_X86, const.UC_MODE_64)
    uc.mem_map(0, MEMORY)
    uc.mem_write(0, machine.ram.read(0, IMAGE_END))
    for register, value in ((x86.UC_X86_REG_CR4, s.cr(4)), (x86.UC_X86_REG_CR3, s.cr(3))):
        uc.reg_write(register, value)
    uc.msr_write(0xC0000080, s.efer)
    uc.reg_write(x86.UC_X86_REG_CR0, s.cr(0))
    for number, register in enumerate(GENERAL):
        uc.reg_write(register, s.reg(number))
    uc.reg_write(x86.UC_X86_REG_EFLAGS, s.rflags)
    end = machine.ram.read_u64(s.reg(RSP))
    start = time.process_time()
    uc.emu_start(s.rip, end)
    seconds = time.process_time() - start
    stopped = uc.reg_read(x86.UC_X86_REG_RIP)
    if stopped != end:
        raise BenchmarkError(f"bare Unicorn stopped at {stopped:#x}, not at {end:#x} where the kernel returns to")
    return seconds


def measure(quick: bool) -> Report:
    report = Report("engine", COLUMNS)
    for kernel, instructions in INSTRUCTIONS.items():
        work = ROUNDS[kernel] // (200 if quick else 1)
        peers: dict[str, Callable[[], float]] = {
            "bare": partial(bare, kernel, work),
            "native": partial(ours, kernel, work),
            "guest": partial(ours, kernel, work, guest=True),
            "fingerprint": partial(ours, kernel, work, fingerprint=True),
            "python": partial(twin, kernel, work),
        }
        times = Times(peers, 1 if quick else 7)
        row: dict[str, object] = {"kernel": kernel}
        row |= {f"{name} M/s": instructions * work / times.median(name) / 1e6 for name in peers}
        row["fingerprint/native"] = times.speed("fingerprint", "native")
        row |= {f"{name}/bare": times.speed(name, "bare") for name in ("native", "guest", "python")}
        report.rows.append(row)
    report.remarks.append("M/s: million instructions in a second of CPU time.")
    report.remarks.append("Bare Unicorn is slow to store to pages without NX.")
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))
