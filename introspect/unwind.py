"""Who called whom: frames of a stack by call frame information, or by frame pointers where there is none."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from introspect.cfi import Cfi, CfiError, Row, Rule
from introspect.disassembly import MAX_INSTRUCTION, instructions
from introspect.execution import execution_mode, linear_pc, linear_sp
from introspect.registers import RFLAGS

__all__ = ["MAX_FRAMES", "Frame", "Unwound", "unwind"]

MAX_FRAMES = 1024
_FAR = 1 << 24
"""Bytes of stack that no frame has: a frame pointer that leads farther is none."""
_PROLOGUE = 64
"""Bytes at the start of a function in which it may push the frame pointer."""
_SAVED = 48
"""Words that the entry of an interrupt handler pushes at most over what the processor has pushed."""
_SWITCHES = 8
"""How often the stack may be another one, since interrupts switch stacks."""
_CANNOT = ~(RFLAGS.defined | RFLAGS.ones)


Read = Callable[[int, int], bytes]
"""Linear memory: as much of a range as can be read."""


class Frame(NamedTuple):
    """`pc` and `cfa` (what the stack pointer is after the return) are linear; `cfa` is None where it was not found.
    `how` its caller was found: "CFI", "frame pointer", "prologue" or "interrupt"; empty if it was not."""

    pc: int
    cfa: int | None
    how: str
    inside: int
    """An address within the instruction that it is at: for a caller, that of the call."""


class Unwound(NamedTuple):
    """The frames, innermost first, and why there are no more."""

    frames: tuple[Frame, ...]
    end: str


class _Stop(Exception):
    """Why a caller cannot be found."""


class _Caller(NamedTuple):
    """Its registers (offsets, as the processor has them), the linear CFA, how they were found, and whether it was interrupted
    rather than having called: its program counter is then the instruction itself, and not one behind a call."""

    registers: dict[str, int]
    cfa: int
    how: str
    interrupted: bool = False


class _Unwinder:
    def __init__(self, registers: Mapping[str, int], read: Read, cfi: Cfi | None, function: Callable[[int], int | None]) -> None:
        mode = execution_mode(registers)
        self.code_selector = registers.get("cs.selector")
        self.read, self.cfi, self.function = read, cfi, function
        self.bits, self.word = mode.code_bits, mode.code_bits // 8
        self.mask = (1 << mode.code_bits) - 1
        flat = mode.code_bits == 64
        self.code_base, self.stack_base = (0, 0) if flat else (registers.get("cs.base", 0), registers.get("ss.base", 0))

    def load(self, address: int) -> int:
        data = self.read(address, self.word)
        if len(data) < self.word:
            raise _Stop(f"the stack at {address:#x} cannot be read")
        return int.from_bytes(data, "little")

    def caller(self, registers: dict[str, int], inside: int, innermost: bool) -> _Caller:
        """Raises `_Stop`."""
        found = None
        if self.cfi is not None:
            try:
                found = self.cfi.row(inside)
            except CfiError as error:
                raise _Stop(f"the call frame information of {inside:#x} is damaged: {error}") from None
        if found is not None:
            return self._by_cfi(registers, *found)
        return self._by_interrupt(registers, inside, innermost) or self._by_pointer(registers, innermost)

    def _by_cfi(self, registers: dict[str, int], row: Row, return_register: str, interrupted: bool) -> _Caller:
        if not row.register:
            raise _Stop("its call frame information has an expression, which is not evaluated")
        if row.register not in registers:
            raise _Stop(f"{row.register} is not known there, which its frame is counted from")
        cfa = registers[row.register] + row.offset & self.mask
        # Registers that are not named keep their values, as far as calls keep them: what a caller sees of the others is
        # of no use to find its own frame.
        caller = {name: value for name, value in registers.items() if name != return_register}
        caller["rsp"] = cfa
        for name, rule in row.rules.items():
            value = self._value(registers, rule, cfa, name)
            if value is None:
                caller.pop(name, None)
            else:
                caller[name] = value
        rule = row.rules.get(return_register, Rule("undefined"))
        if rule.kind == "undefined":
            raise _Stop("its call frame information says that it is the outermost one")
        if return_register not in caller:
            raise _Stop("its call frame information does not tell where it returns to")
        caller["rip"] = caller[return_register]
        return _Caller(caller, self.stack_base + cfa, "CFI", interrupted)

    def _value(self, registers: Mapping[str, int], rule: Rule, cfa: int, name: str) -> int | None:
        match rule.kind:
            case "offset":
                return self.load(self.stack_base + (cfa + rule.value & self.mask))
            case "value":
                return cfa + rule.value & self.mask
            case "register":
                return registers.get(rule.register)
            case "same":
                return registers.get(name)
        return None

    def _by_interrupt(self, registers: dict[str, int], inside: int, innermost: bool) -> _Caller | None:
        """What an interrupt or exception has pushed (APM2 8.7.3, 8.9.3), below what the entry of its handler has: assembly that
        has no frame of its own, so that the frame pointer is still that of what it interrupted."""
        start = self.function(inside)
        if start is None or self.code_selector is None or self.bits == 16 or self._pushes_pointer(start):
            return None
        top, frame = registers["rsp"], registers.get("rbp", 0)
        count = (frame - top) // self.word if 0 < frame - top < _SAVED * self.word else _SAVED
        data = self.read(self.stack_base + top, (count + 5) * self.word)
        words = [int.from_bytes(data[at : at + self.word], "little") for at in range(0, len(data), self.word)]
        called = innermost and bool(words) and self.function(self.code_base + words[0] & self.mask) is not None
        for n in range(1 if called else min(count, len(words) - 3)):  # one that has been called is no entry of a handler
            rip, selector, flags = words[n : n + 3]
            if flags & _CANNOT or not flags & RFLAGS.ones or not self._is_code(rip, selector):
                continue
            same = selector & 3 == self.code_selector & 3
            rsp = top + (n + 3) * self.word
            if self.bits == 64 or not same:
                if n + 5 > len(words) or words[n + 4] > 0xFFFF or (not same and words[n + 4] & 3 != selector & 3):
                    continue
                rsp = words[n + 3]
            return _Caller({**registers, "rip": rip, "rsp": rsp}, self.stack_base + rsp, "interrupt", True)
        return None

    def _pushes_pointer(self, start: int) -> bool:
        """Whether a function has a frame pointer of its own."""
        code = self.read(start, 2 * MAX_INSTRUCTION)
        first = [one for one in instructions(code, start, self.bits, 2) if not one.mnemonic.startswith("endbr")]
        return bool(first) and first[0].mnemonic == "push" and first[0].operands in ("rbp", "ebp")

    def _is_code(self, rip: int, selector: int) -> bool:
        """Of the code segment that executes, in a function that is known; or of users, whose functions are not."""
        if selector == self.code_selector:
            return self.function(self.code_base + rip & self.mask) is not None
        return 3 < selector <= 0xFFFF and selector & 3 == 3 and bool(self.read(rip & self.mask, 1))

    def _by_pointer(self, registers: dict[str, int], innermost: bool) -> _Caller:
        depth = self._pushed(registers) if innermost else None
        if depth is not None:  # the function has no frame yet, or no longer
            at, caller = registers["rsp"] + depth & self.mask, dict(registers)
            if depth:
                caller["rbp"] = self.load(self.stack_base + registers["rsp"])
            how = "prologue"
        else:
            if "rbp" not in registers:
                raise _Stop("the frame pointer is not known")
            frame = registers["rbp"]
            if not frame:
                raise _Stop("the frame pointer is 0: the outermost frame")
            if not 0 <= frame - registers["rsp"] < _FAR or frame % self.word:
                where = f"in the stack above {registers['rsp']:#x}"
                raise _Stop(f"the frame pointer {frame:#x} does not lie {where}: no frame, or one of another stack")
            at, caller = frame + self.word & self.mask, dict(registers)
            caller["rbp"] = self.load(self.stack_base + frame)
            how = "frame pointer"
        caller["rip"] = self.load(self.stack_base + at)
        caller["rsp"] = at + self.word & self.mask
        return _Caller(caller, self.stack_base + caller["rsp"], how)

    def _pushed(self, registers: Mapping[str, int]) -> int | None:
        """How far the return address is above rSP, where the innermost function has just begun or is about to return; else
        None, for it has a frame, or none that can be found."""
        pc = self.code_base + registers["rip"] & (self.mask if self.bits == 64 else 0xFFFFFFFF)
        code = self.read(pc, MAX_INSTRUCTION)
        here = next(instructions(code, pc, self.bits, 1), None)
        if here is not None and here.mnemonic.startswith("ret"):
            return 0
        start = self.function(pc)
        if start is None:
            return None
        if start == pc:
            return 0
        if not 0 < pc - start <= _PROLOGUE:
            return None
        depth = 0
        for one in instructions(self.read(start, pc - start), start, self.bits, _PROLOGUE):
            if one.mnemonic == "push" and one.operands in ("rbp", "ebp", "bp"):
                depth = self.word
            elif depth or one.mnemonic not in ("endbr64", "endbr32", "nop"):
                return None
        return depth


def unwind(
    registers: Mapping[str, int], read: Read, cfi: Cfi | None = None,
    function: Callable[[int], int | None] = lambda pc: None, limit: int = MAX_FRAMES,
    executable: Callable[[int], bool] = lambda pc: True,
) -> Unwound:  # fmt: skip
    """The frames of a stack, from registers by the names of the VMCB's fields.

    `function`: where the function that has an address begins, if that is known; `executable`: whether code may be there. Takes
    any contents of memory: each frame must lie above the one before it, and there are at most `limit`.
    """
    pc, sp = linear_pc(registers), linear_sp(registers)
    if pc is None or sp is None:
        return Unwound((), "rip or rsp is not known from this source")
    work = _Unwinder(registers, read, cfi, function)
    current = {name: value & work.mask for name, value in registers.items() if "." not in name}
    frames: list[Frame] = []
    inside, last, switches = pc, sp - 1, 0
    while True:
        try:
            caller, cfa, how, interrupted = work.caller(current, inside, not frames)
        except _Stop as stop:
            frames.append(Frame(pc, None, "", inside))
            return Unwound(tuple(frames), str(stop))
        frames.append(Frame(pc, cfa, how, inside))
        target = work.code_base + caller["rip"] & (work.mask if work.bits == 64 else 0xFFFFFFFF)
        if not caller["rip"]:
            return Unwound(tuple(frames), "the return address is 0: the outermost frame")
        if cfa <= last:
            switches += how == "interrupt"
            if how != "interrupt" or switches > _SWITCHES:
                return Unwound(tuple(frames), f"the frame at {cfa:#x} does not lie above the one before it")
        if not executable(target):
            return Unwound(tuple(frames), f"the return address {target:#x} is not in memory that is code")
        if len(frames) == limit:
            return Unwound(tuple(frames), f"there are more than {limit} frames")
        pc, last, current = target, cfa, caller
        inside = target if interrupted else target - 1
