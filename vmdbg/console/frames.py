"""Where a function returns to, as its frame says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdbstub.target import ThreadId
from introspect.code import bits_of, instructions
from introspect.commands.situation import linear

if TYPE_CHECKING:
    from vmdbg.console.source import Source

__all__ = ["return_address"]

_LONGEST_CALL = 7


def return_address(source: Source, thread: ThreadId) -> int | None:
    """By the instructions of the function where these say what lies on the stack, else by the frame pointer.

    Only what lies behind a call is taken for one; None if that is not found.
    """
    assert source.control is not None
    driver = source.control.driver
    registers = driver.registers(thread)
    bits, pc = bits_of(registers), linear(registers, "cs", "rip")
    stack, frame = linear(registers, "ss", "rsp"), linear(registers, "ss", "rbp")
    if pc is None or stack is None or frame is None:
        return None
    size = bits // 8
    begin = source.function(thread.pid, pc)
    behind = pc - begin if begin is not None else None
    here = next(instructions(driver.read(thread, pc, 15), pc, bits, 1), None)
    places = [frame + size]
    if here is not None and (here.text.split()[0] in ("ret", "retf", "iretq") or behind == 0):
        places.insert(0, stack)
    elif begin is not None and here is not None:
        first = next(instructions(driver.read(thread, begin, 15), begin, bits, 1), None)
        if first is not None and first.text.startswith("push") and behind == first.length:
            places.insert(0, stack + size)
    for place in places:
        data = driver.read(thread, place, size)
        address = int.from_bytes(data, "little")
        if len(data) == size and _behind_call(driver.read(thread, max(address - _LONGEST_CALL, 0), _LONGEST_CALL), address, bits):
            return address
    return None


def _behind_call(code: bytes, end: int, bits: int) -> bool:
    """Whether some instruction that ends there is a call."""
    for length in range(2, len(code) + 1):
        one = next(instructions(code[-length:], end - length, bits, 1), None)
        if one is not None and one.call and one.length == length:
            return True
    return False
