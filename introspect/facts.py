"""What an exit says, as numbers by name: the facts that expressions and scripts ask for (APM2 15.7 to 15.12, 15.25.6)."""

from introspect.exits import EXCEPTION_BASE, IOIO, NPF_INFO, PF_ERROR, ExitCode
from introspect.layout import bit

__all__ = ["EXIT_FACTS", "event_facts", "exit_facts"]

EXIT_FACTS = frozenset((
    "code", "info1", "info2", "gpa", "gva", "write", "fetch", "port", "size", "string", "vector", "error", "cr", "dr", "reg",
    "selector",
))  # fmt: skip
"""All names of `exit_facts`.  `write` and `fetch` are 1 or 0, `size` is in bytes, `reg` the number of a general register."""

_ERRORS = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))
_SIZES = {IOIO.SZ8: 1, IOIO.SZ16: 2, IOIO.SZ32: 4}


def exit_facts(code: int, info1: int, info2: int) -> dict[str, int]:
    """Those that an exit has.  Takes any three 64-bit values."""
    facts = {"code": code, "info1": info1, "info2": info2}
    if code < 0x40:
        facts |= {"dr" if code & 0x20 else "cr": code & 15, "write": code >> 4 & 1}
        if code & 0x20 or info1 & bit(63):
            facts["reg"] = info1 & 15
    elif code < EXCEPTION_BASE + 32:
        facts |= event_facts(code - EXCEPTION_BASE, info1, info2)
    match code:
        case ExitCode.NPF:
            facts |= {"gpa": info2, "write": int(bool(info1 & NPF_INFO.W)), "fetch": int(bool(info1 & NPF_INFO.ID))}
        case ExitCode.IOIO:
            size = _SIZES.get(info1 & (IOIO.SZ8 | IOIO.SZ16 | IOIO.SZ32), 0)
            write, string = int(not info1 & IOIO.IN), int(bool(info1 & IOIO.STR))
            facts |= {"port": IOIO.get(info1, "PORT"), "size": size, "write": write, "string": string}
        case ExitCode.MSR:
            facts["write"] = info1 & 1
        case ExitCode.SWINT:
            facts["vector"] = info1 & 0xFF
        case ExitCode.INVLPG:
            facts["gva"] = info1
        case ExitCode.TASK_SWITCH:
            facts["selector"] = info1 & 0xFFFF
    return facts


def event_facts(vector: int, error: int, address: int) -> dict[str, int]:
    """Those of an exception; the error code and #PF's address where it has one."""
    facts = {"vector": vector}
    if vector in _ERRORS:
        facts["error"] = error
    if vector == 14:
        facts |= {"gva": address, "write": int(bool(error & PF_ERROR.W)), "fetch": int(bool(error & PF_ERROR.ID))}
    return facts
