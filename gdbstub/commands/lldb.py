"""What lldb asks beyond GDB's packets (lldb's docs/lldb-gdb-remote.txt)."""

from __future__ import annotations

import json
from binascii import hexlify
from typing import TYPE_CHECKING

from gdbstub.commands.registers import known
from gdbstub.commands.registry import command, number
from gdbstub.description import Register
from gdbstub.packet import escape
from gdbstub.replies import lldb_reason, stop_reply
from gdbstub.target import MemoryRegions, Stop, TargetError, ThreadId, offers

if TYPE_CHECKING:
    from gdbstub.session import Session


def _pairs(**values: str | int) -> bytes:
    return "".join(f"{key}:{value};" for key, value in values.items()).encode()


@command("qHostInfo")
def host_info(session: Session, arguments: bytes) -> bytes:
    """Without it lldb guesses the byte order."""
    description = session.attached[session.process()]
    return _pairs(triple=description.triple.encode().hex(), ptrsize=description.pointer_size, endian="little")


@command("qProcessInfo")
def process_info(session: Session, arguments: bytes) -> bytes:
    pid = session.process()
    description = session.attached[pid]
    triple = description.triple.encode().hex()
    return b"pid:%x;" % pid + _pairs(triple=triple, ptrsize=description.pointer_size, endian="little")


@command("QThreadSuffixSupported")
def thread_suffix(session: Session, arguments: bytes) -> bytes:
    session.thread_suffix = True
    return b"OK"


@command("QListThreadsInStopReply")
def list_threads(session: Session, arguments: bytes) -> bytes:
    session.list_threads = True
    return b"OK"


@command("QEnableErrorStrings")
def error_strings(session: Session, arguments: bytes) -> bytes:
    session.error_strings = True
    return b"OK"


def _stop(session: Session, thread: ThreadId) -> Stop:
    stopped = session.stopped
    return stopped if stopped is not None and stopped.thread == thread else Stop(thread, signal=0)


@command("qThreadStopInfo")
def thread_stop_info(session: Session, arguments: bytes) -> bytes:
    return stop_reply(session, _stop(session, session.thread(arguments)))


@command("jThreadsInfo")
def threads_info(session: Session, arguments: bytes) -> bytes:
    process, rows = session.process(), []
    for thread, details in session.threads():
        if thread.pid != process:
            continue
        stop = _stop(session, thread)
        block = session.target.read_registers(thread)
        row: dict[str, object] = {"tid": thread.tid, "name": details.name, "signal": int(stop.signal)}
        row["reason"] = lldb_reason(stop)
        if stop.text:
            row["description"] = stop.text
        expedited = session.attached[thread.pid].expedited
        row["registers"] = {str(index): block[start:end].hex() for index, start, end in expedited}
        rows.append(row)
    return escape(json.dumps(rows).encode())


@command("qMemoryRegionInfo")
def memory_region_info(session: Session, arguments: bytes) -> bytes:
    if not offers(session.target, MemoryRegions):
        return b""
    region = session.target.memory_region(session.current(), number(arguments))
    if region.length <= 0:
        raise TargetError(f"no region is known at {number(arguments):#x}")
    # lldb walks regions until one ends at its invalid address, 2**64 - 1, and past 2**64 starts over.
    parts = [b"start:%x;size:%x;" % (region.start, min(region.length, (1 << 64) - 1 - region.start))]
    if region.permissions:
        parts.append(b"permissions:%b;" % region.permissions.encode())
    if region.name:
        parts.append(b"name:%b;" % hexlify(region.name.encode()))
    return b"".join(parts)


@command("jThreadExtendedInfo")
def thread_extended_info(session: Session, arguments: bytes) -> bytes:
    """`thread info --json`. Without an argument it is the question whether there is such a thing."""
    if not arguments:
        return b"OK"
    try:
        wanted = json.loads(arguments)["thread"]
    except (ValueError, KeyError, TypeError, RecursionError):
        wanted = None
    if type(wanted) is not int or wanted <= 0:
        raise TargetError('jThreadExtendedInfo takes {"thread": NUMBER}')
    pid, tid = session.resolve(ThreadId(0, wanted))
    for thread in session.target.threads(pid):
        if thread.tid == tid:
            row = {"process": pid, "thread": tid, "name": thread.name, "state": thread.state, "core": thread.core}
            stopped = session.stopped
            if stopped is not None and stopped.thread == (pid, tid):
                row["stop"] = stopped.text or lldb_reason(stopped)
            return escape(json.dumps(row).encode())
    raise TargetError(f"process {pid} has no thread {tid}")


@command("qStructuredDataPlugins")
def structured_data_plugins(session: Session, arguments: bytes) -> bytes:
    """What may send structured data while the machine runs: nothing here does."""
    return b"[]"


# An lldb that dies in an expression leaves its saved state behind.
_MOST_SAVED = 64


@command("QSaveRegisterState")
def save_registers(session: Session, arguments: bytes) -> bytes:
    """Before lldb calls a function for an expression; QRestoreRegisterState undoes what the call did to registers."""
    _, thread = session.suffixed(b";" + arguments)
    saved = session.saved_registers
    if len(saved) >= _MOST_SAVED:
        raise TargetError(f"{_MOST_SAVED} register states are saved already: restore one first")
    key = next(n for n in range(1, _MOST_SAVED + 1) if n not in saved)
    saved[key] = thread, session.target.read_registers(thread)
    return b"%d" % key


@command("QRestoreRegisterState")
def restore_registers(session: Session, arguments: bytes) -> bytes:
    digits, thread = session.suffixed(arguments)
    key = int(digits) if digits.isdigit() and len(digits) < 4 else 0
    owner, block = session.saved_registers.get(key, (None, b""))
    if owner != thread:
        raise TargetError(f"there is no saved register state {digits[:20]!r} of this thread: QSaveRegisterState makes them")
    session.require_stopped()
    session.target.write_registers(thread, block)
    del session.saved_registers[key]
    return b"OK"


# lldb's words for what the registers of a description are.
_ENCODINGS = {"ieee_single": ("ieee754", "float"), "i387_ext": ("ieee754", "float"), "vec128": ("vector", "vector-uint8")}
_GENERIC = {"ip": "pc", "sp": "sp", "bp": "fp"}
_SETS = {"general": "General Purpose Registers", "float": "Floating Point Registers", "vector": "Vector Registers"}


@command("qRegisterInfo")
def register_info(session: Session, arguments: bytes) -> bytes:
    """One register after the other, for an lldb built without an XML parser; an error ends the list."""
    description = session.attached[session.process()]
    index = known(session, session.process(), arguments)
    register: Register = description.registers[index]
    kind = register.type if isinstance(register.type, str) else "flags"
    encoding, form = _ENCODINGS.get(kind, ("uint", "hex"))
    values: dict[str, str | int] = {
        "name": register.name, "bitsize": register.bits, "offset": description.offsets[index], "encoding": encoding,
        "format": form, "set": _SETS.get(register.group, register.group or "Other Registers"),
    }  # fmt: skip
    generic = "flags" if register.name == "eflags" else _GENERIC.get(register.name[1:])
    if generic is not None:
        values["generic"] = generic
    return _pairs(**values)
