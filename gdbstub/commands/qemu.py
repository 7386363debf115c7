"""QEMU's packets for single steps, which scripts written for it send (`maintenance packet Qqemu.sstep=0x5`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdbstub.commands.registry import command, number
from gdbstub.target import StepFlag, StepFlags, TargetError, offers

if TYPE_CHECKING:
    from gdbstub.session import Session


@command("qqemu.sstepbits")
def bits(session: Session, arguments: bytes) -> bytes:
    if not offers(session.target, StepFlags):
        return b""
    return ",".join(f"{flag.name}={flag.value:x}" for flag in StepFlag).encode()


@command("qqemu.sstep")
def flags(session: Session, arguments: bytes) -> bytes:
    return b"0x%x" % session.target.step_flags() if offers(session.target, StepFlags) else b""


@command("Qqemu.sstep")
def set_flags(session: Session, arguments: bytes) -> bytes:
    if not offers(session.target, StepFlags):
        return b""
    value = number(arguments.removeprefix(b"0x"))
    if value & ~sum(StepFlag):
        raise TargetError(f"{value:#x} has flags that there are not: {', '.join(f'{f.name} {f.value}' for f in StepFlag)}")
    session.target.set_step_flags(StepFlag(value))
    return b"OK"
