"""Address spaces: what lldb asks of them (its docs/resources/lldbgdbremote.md), and QEMU's physical memory mode."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gdbstub.commands.registry import command
from gdbstub.packet import escape
from gdbstub.target import Spaces, TargetError

if TYPE_CHECKING:
    from gdbstub.session import Session


@command("jAddressSpacesInfo")
def address_spaces(session: Session, arguments: bytes) -> bytes:
    """Numbers from 1; m and x take one behind their length."""
    if session.spaces is None:
        return b""
    known = session.spaces.spaces(session.process())
    rows = [
        {"name": space.name, "space_id": number, "is_thread_specific": space.thread}
        for number, space in enumerate(known, 1)
    ]
    return escape(json.dumps(rows).encode())


def _physical(spaces: Spaces, pid: int) -> int | None:
    return next((index for index, space in enumerate(spaces.spaces(pid)) if space.physical), None)


@command("qqemu.PhyMemMode")
def physical_memory_mode(session: Session, arguments: bytes) -> bytes:
    if session.spaces is None:
        return b""
    pid = session.process()
    return b"1" if session.spaces.chosen_space(pid) == _physical(session.spaces, pid) else b"0"


@command("Qqemu.PhyMemMode")
def set_physical_memory_mode(session: Session, arguments: bytes) -> bytes:
    """One switch for all, as QEMU's is: for every attached inferior."""
    if session.spaces is None:
        return b""
    if arguments not in (b"0", b"1"):
        raise TargetError(f"{arguments[:20]!r} is no memory mode: send 1 for physical addresses, 0 for the usual ones")
    for pid in session.attached:
        index = _physical(session.spaces, pid) if arguments == b"1" else 0
        if index is None:
            raise TargetError(f"process {pid} has no physical address space")
        session.spaces.choose_space(pid, index)
    return b"OK"
