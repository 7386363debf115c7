"""What lldb asks beyond GDB's packets (lldb's docs/lldb-gdb-remote.txt)."""

from __future__ import annotations

import json
from binascii import hexlify
from typing import TYPE_CHECKING

from gdbstub.commands.registry import command, number
from gdbstub.packet import escape
from gdbstub.target import MemoryRegions, Stop, TargetError, ThreadId

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
    return session.stop_reply(_stop(session, session.thread(arguments)))


@command("jThreadsInfo")
def threads_info(session: Session, arguments: bytes) -> bytes:
    process, rows = session.process(), []
    for thread, details in session.threads():
        if thread.pid != process:
            continue
        stop = _stop(session, thread)
        block = session.target.read_registers(thread)
        row: dict[str, object] = {"tid": thread.tid, "name": details.name, "signal": int(stop.signal)}
        row["reason"] = session.lldb_reason(stop)
        if stop.text:
            row["description"] = stop.text
        expedited = session.attached[thread.pid].expedited
        row["registers"] = {str(index): block[start:end].hex() for index, start, end in expedited}
        rows.append(row)
    return escape(json.dumps(rows).encode())


@command("qMemoryRegionInfo")
def memory_region_info(session: Session, arguments: bytes) -> bytes:
    if not isinstance(session.target, MemoryRegions):
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
