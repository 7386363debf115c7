"""qRcmd: `monitor` in GDB, `process plugin packet monitor` in lldb."""

from __future__ import annotations

from binascii import Error, unhexlify
from typing import TYPE_CHECKING

from gdbstub.commands.registry import command
from gdbstub.target import Monitor, TargetError, offers

if TYPE_CHECKING:
    from gdbstub.session import Session


@command("qRcmd")
def monitor(session: Session, arguments: bytes) -> bytes:
    """A command's failure is shown like its output: GDB prints nothing of an error's text."""
    if not offers(session.target, Monitor):
        return b""
    try:
        line = unhexlify(arguments).decode()
    except (Error, UnicodeDecodeError):
        raise TargetError("a monitor command must be UTF-8 in hex") from None
    if session.non_stop is not None and session.non_stop.said:
        session.output("".join(session.non_stop.said))
        session.non_stop.said.clear()
    try:
        session.target.monitor(line, session.output, session.spoken_for())
    except TargetError as error:
        session.output(f"{error}\n")
        raise
    return b"OK"
