"""The packets, one module a family; importing this package fills the table."""

from gdbstub.commands import (
    breakpoints,
    files,
    lldb,
    memory,
    monitor,
    process,
    qemu,
    query,
    registers,
    resume,
    spaces,
    tracepoints,
    transfer,
)
from gdbstub.commands.registry import COMMANDS

__all__ = [
    "COMMANDS",
    "breakpoints",
    "files",
    "lldb",
    "memory",
    "monitor",
    "process",
    "qemu",
    "query",
    "registers",
    "resume",
    "spaces",
    "tracepoints",
    "transfer",
]
