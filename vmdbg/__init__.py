# SPDX-License-Identifier: GPL-2.0-or-later
"""A debugger for hypervisors: an AMD-V machine whose hypervisor and guests are GDB inferiors.

`vmdbg.Machine` and what belongs to it are `vmdbg.api`, which is loaded when it is first asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmdbg.api import (
        Breakpoint,
        Catchpoint,
        Closed,
        CommandFailed,
        Error,
        Exit,
        ExitList,
        Guest,
        Guests,
        Host,
        Inferior,
        Machine,
        OptionError,
        Reason,
        Registers,
        Snapshot,
        Stop,
        Thread,
        TimeUp,
        Vmcb,
        Watchpoint,
    )

__all__ = [
    "Breakpoint", "Catchpoint", "Closed", "CommandFailed", "Error", "Exit", "ExitList", "Guest", "Guests", "Host", "Inferior",
    "Machine", "OptionError", "Reason", "Registers", "Snapshot", "Stop", "Thread", "TimeUp", "Vmcb", "Watchpoint",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'vmdbg' has no attribute {name!r}")
    from vmdbg import api

    found: object = getattr(api, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
