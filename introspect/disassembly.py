"""Instructions as text, and what they would do that a hypervisor may intercept: capstone's decoding, our names."""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import capstone
from capstone import x86

from introspect.exits import ExitCode

__all__ = ["MAX_INSTRUCTION", "Instruction", "instructions", "intercept_codes"]

MAX_INSTRUCTION = 15
"""Bytes: no instruction is longer (APM3 1.1)."""

_NEW = {
    b"\x0f\x01\xfd": "rdpru", b"\x0f\x01\xfe": "invlpgb", b"\x0f\x01\xff": "tlbsync", b"\xf3\x0f\x01\xfa": "mcommit",
}  # fmt: skip
"""Instructions without operands that capstone 5 does not know."""
_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}


class Instruction(NamedTuple):
    """One instruction, or a byte that begins none (`mnemonic` is then ".byte")."""

    address: int
    code: bytes
    mnemonic: str
    operands: str
    target: int | None
    """Where it branches to, if it says so."""
    memory: int | None
    """The linear address of its memory operand, where that does not depend on registers but RIP."""
    codes: tuple[int, ...]
    """Exit codes that it may cause, by which intercept decides: see `intercept_codes`."""

    @property
    def text(self) -> str:
        return f"{self.mnemonic} {self.operands}".rstrip()


@cache
def _engine(bits: int) -> Any:
    engine = capstone.Cs(capstone.CS_ARCH_X86, _MODES[bits])
    engine.detail = True
    return engine


def instructions(code: bytes, address: int, bits: int, count: int, base: int = 0) -> Iterator[Instruction]:
    """At most `count` instructions of `code`, which is at a linear address, in a segment of `bits` bits that begins at `base`.

    A byte that begins none is one of its own. Ends where the code ends, also amid an instruction.
    """
    engine, at, mask = _engine(bits), 0, (1 << 64 if bits == 64 else 1 << 32) - 1
    base = 0 if bits == 64 else base
    for _ in range(count):
        if at >= len(code):
            return
        here = address - base + at & mask
        window = code[at : at + MAX_INSTRUCTION]
        name = next((name for start, name in _NEW.items() if window.startswith(start)), None)
        if name is not None:
            size = 4 if window[0] == 0xF3 else 3
            yield Instruction(here + base & mask, window[:size], name, "", None, None, intercept_codes(name, ""))
            at += size
            continue
        found = next(engine.disasm(window, here, 1), None)
        if found is None:
            if len(window) < MAX_INSTRUCTION and _could_go_on(engine, window, here):
                return
            yield Instruction(here + base & mask, window[:1], ".byte", f"{window[0]:#04x}", None, None, (int(ExitCode.EXCP_UD),))
            at += 1
            continue
        yield _instruction(found, bits, base)
        at += found.size


def _could_go_on(engine: Any, window: bytes, address: int) -> bool:
    """Whether it is the end that is missing: with more bytes behind it is an instruction longer than what is here."""
    longer = next(engine.disasm(window + bytes(MAX_INSTRUCTION), address, 1), None)
    return longer is not None and longer.size > len(window)


def _instruction(found: Any, bits: int, base: int) -> Instruction:
    target = memory = None
    mask = (1 << 64 if bits == 64 else 1 << 32) - 1
    branch = found.group(x86.X86_GRP_JUMP) or found.group(x86.X86_GRP_CALL) or found.group(x86.X86_GRP_BRANCH_RELATIVE)
    for operand in found.operands:
        if operand.type == x86.X86_OP_IMM and branch:
            target = (operand.imm & (0xFFFF if bits == 16 else mask)) + base & mask
        elif operand.type == x86.X86_OP_MEM and not operand.mem.index and bits != 16:
            if operand.mem.base in (x86.X86_REG_RIP, x86.X86_REG_EIP):
                memory = found.address + found.size + operand.mem.disp & mask
            elif not operand.mem.base and operand.mem.segment in (0, x86.X86_REG_CS, x86.X86_REG_DS, x86.X86_REG_SS):
                memory = operand.mem.disp & mask
    return Instruction(
        found.address + base & mask, bytes(found.bytes), found.mnemonic, found.op_str, target, memory,
        intercept_codes(found.mnemonic, found.op_str),
    )  # fmt: skip


_BY_MNEMONIC: dict[str, tuple[ExitCode, ...]] = {
    **{name: (ExitCode[name.upper()],) for name in (
        "cpuid", "rdtsc", "rdtscp", "rdpmc", "rsm", "invd", "pause", "invlpg", "invlpga", "invlpgb", "invpcid", "vmrun",
        "vmmcall", "vmload", "vmsave", "stgi", "clgi", "skinit", "monitor", "xsetbv", "rdpru", "mcommit", "tlbsync", "wbinvd")},
    **dict.fromkeys(("wbnoinvd",), (ExitCode.WBINVD,)), **dict.fromkeys(("monitorx",), (ExitCode.MONITOR,)),
    **dict.fromkeys(("mwait", "mwaitx"), (ExitCode.MWAIT, ExitCode.MWAIT_COND)), "hlt": (ExitCode.HLT, ExitCode.IDLE_HLT),
    **dict.fromkeys(("pushf", "pushfd", "pushfq"), (ExitCode.PUSHF,)),
    **dict.fromkeys(("popf", "popfd", "popfq"), (ExitCode.POPF,)),
    **dict.fromkeys(("iret", "iretd", "iretq"), (ExitCode.IRET,)), "int": (ExitCode.SWINT,),
    "int1": (ExitCode.ICEBP, ExitCode.EXCP_DB), "int3": (ExitCode.EXCP_BP,), "into": (ExitCode.EXCP_OF,),
    **dict.fromkeys(("ud0", "ud1", "ud2", "ud2b"), (ExitCode.EXCP_UD,)),
    "sidt": (ExitCode.IDTR_READ,), "sgdt": (ExitCode.GDTR_READ,), "sldt": (ExitCode.LDTR_READ,), "str": (ExitCode.TR_READ,),
    "lidt": (ExitCode.IDTR_WRITE,), "lgdt": (ExitCode.GDTR_WRITE,), "lldt": (ExitCode.LDTR_WRITE,), "ltr": (ExitCode.TR_WRITE,),
    "clts": (ExitCode.CR0_WRITE,), "lmsw": (ExitCode.CR0_WRITE, ExitCode.CR0_SEL_WRITE), "smsw": (ExitCode.CR0_READ,),
    **dict.fromkeys(("rdmsr", "wrmsr"), (ExitCode.MSR,)),
    **dict.fromkeys(("in", "out", "insb", "insw", "insd", "outsb", "outsw", "outsd"), (ExitCode.IOIO,)),
}  # fmt: skip
_MOVES: tuple[tuple[str, ExitCode, ExitCode], ...] = (
    ("cr", ExitCode.CR0_READ, ExitCode.CR0_WRITE), ("dr", ExitCode.DR0_READ, ExitCode.DR0_WRITE),
)  # fmt: skip


@cache
def intercept_codes(mnemonic: str, operands: str) -> tuple[int, ...]:
    """The exit codes of the intercepts that see an instruction (APM2 15.9, 15.12): any of them, if it is set, makes it exit.
    For those of ports and MSRs a permission map decides besides."""
    name = mnemonic.split()[-1] if mnemonic else ""
    if name == "mov":
        destination, _, source = (part.strip() for part in operands.partition(","))
        for prefix, read, write in _MOVES:
            for text, base in ((source, read), (destination, write)):
                if text.startswith(prefix) and text[len(prefix) :].isdecimal() and int(text[len(prefix) :]) < 16:
                    code = base + int(text[len(prefix) :])
                    return (code, int(ExitCode.CR0_SEL_WRITE)) if code == ExitCode.CR0_WRITE else (code,)
        return ()
    return tuple(int(code) for code in _BY_MNEMONIC.get(name, ()))


