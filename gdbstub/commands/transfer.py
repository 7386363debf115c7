"""qXfer: documents that clients read in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape as text
from xml.sax.saxutils import quoteattr

from gdbstub.commands.registry import address_length, command, number
from gdbstub.packet import PACKET_SIZE, escape
from gdbstub.target import ExecFile, Libraries, MemoryMap, TargetError, Tracepoints, offers

if TYPE_CHECKING:
    from gdbstub.session import Session


def features(session: Session, annex: str) -> bytes:
    if annex != "target.xml":
        raise TargetError(f"there is no feature document {annex!r}: read target.xml")
    return session.attached[session.process()].xml


def threads(session: Session, annex: str) -> bytes:
    out = ["<?xml version='1.0'?><threads>"]
    for thread, details in session.threads():
        core = "" if details.core is None else f' core="{details.core}"'
        name = session.thread_name(thread).decode()
        out.append(f'<thread id="{name}"{core} name={quoteattr(details.name)}>{text(details.state)}</thread>')
    return "".join([*out, "</threads>"]).encode()


def osdata(session: Session, annex: str) -> bytes:
    """What `info os` lists: every inferior there is, attached or not."""
    if annex == "":
        rows = [{"Type": "processes", "Description": "Listing of all processes", "Title": "Processes"}]
        kind = "types"
    elif annex == "processes":
        kind = "processes"
        rows = [
            {
                "pid": str(inferior.pid),
                "command": inferior.name,
                "cores": ",".join(
                    sorted({str(t.core) for t in session.target.threads(inferior.pid) if t.core is not None})
                ),
                "attached": "yes" if inferior.pid in session.attached else "no",
                "state": inferior.state,
            }
            for inferior in session.target.inferiors()
        ]
    else:
        raise TargetError(f"there is no table {annex!r}: read processes")
    out = [f'<?xml version="1.0"?><!DOCTYPE target SYSTEM "osdata.dtd"><osdata type="{kind}">']
    for row in rows:
        columns = (f"<column name={quoteattr(name)}>{text(value)}</column>" for name, value in row.items())
        out.append(f"<item>{''.join(columns)}</item>")
    return "".join([*out, "</osdata>"]).encode()


def memory_map(session: Session, annex: str) -> bytes | None:
    if not offers(session.target, MemoryMap):
        return None
    regions = session.target.memory_map(session.process())
    rows = (f'<memory type="{r.kind}" start="{r.start:#x}" length="{r.length:#x}"/>' for r in regions if r.permissions)
    return f'<?xml version="1.0"?><memory-map>{"".join(rows)}</memory-map>'.encode()


def exec_file(session: Session, annex: str) -> bytes | None:
    if not offers(session.target, ExecFile):
        return None
    pid = number(annex.encode()) if annex else session.process()
    if pid not in session.attached:
        raise TargetError(f"process {pid} is not attached: attach to it first")
    path = session.target.exec_file(pid)
    if not path:
        raise TargetError(f"no image is known for process {pid}: load its symbols with the file command")
    return path.encode()


def libraries(session: Session, annex: str) -> bytes | None:
    if not offers(session.target, Libraries):
        return None
    rows = (
        f'<library name={quoteattr(library.name)}><segment address="{library.address:#x}"/></library>'
        for library in session.target.libraries(session.process())
    )
    return f'<library-list version="1.0">{"".join(rows)}</library-list>'.encode()


def traceframe_info(session: Session, annex: str) -> bytes | None:
    """What the trace frame that is looked at holds."""
    if not offers(session.target, Tracepoints):
        return None
    frame = session.frame
    if frame is None:
        raise TargetError("no trace frame is selected: tfind selects one")
    rows = [f'<memory start="{address:#x}" length="{len(data):#x}"/>' for address, data in frame.blocks]
    rows += [f'<tvar id="{number}"/>' for number in frame.variables]
    return f'<?xml version="1.0"?><traceframe-info>{"".join(rows)}</traceframe-info>'.encode()


_OBJECTS: dict[bytes, Callable[[Session, str], bytes | None]] = {
    b"features": features,
    b"threads": threads,
    b"osdata": osdata,
    b"memory-map": memory_map,
    b"exec-file": exec_file,
    b"libraries": libraries,
    b"traceframe-info": traceframe_info,
}


@command("qXfer")
def transfer(session: Session, arguments: bytes) -> bytes:
    """A document is made when its beginning is read, and kept for the pieces that follow: they fit together."""
    name, _, rest = arguments.partition(b":")
    make = _OBJECTS.get(name)
    if make is None or not rest.startswith(b"read:"):
        return b""
    annex, _, window = rest[5:].rpartition(b":")
    offset, length = address_length(window)
    key = name + b":" + annex
    if offset == 0 or key not in session.documents:
        document = make(session, annex.decode("ascii", "replace"))
        if document is None:
            return b""
        session.documents[key] = document
    document = session.documents[key]
    if offset > len(document):
        raise TargetError(f"offset {offset:#x} is behind the end of {key.decode('ascii', 'replace')}")
    piece = document[offset : offset + min(length, PACKET_SIZE // 2 - 1)]
    last = offset + len(piece) == len(document)
    if last:
        del session.documents[key]
    return (b"l" if last else b"m") + escape(piece)
