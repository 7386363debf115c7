# SPDX-License-Identifier: GPL-2.0-or-later
"""A debugger for hypervisors: an AMD-V machine whose hypervisor and guests are GDB inferiors.

`vmdbg.Machine` and what belongs to it are `vmdbg.api`, which is loaded when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmdbg.api.errors import Closed, CommandFailed, Error, OptionError
    from vmdbg.api.exits import Exit, ExitList
    from vmdbg.api.guests import Guests
    from vmdbg.api.inferior import Guest, Host, Inferior, Registers, Thread, Vmcb
    from vmdbg.api.machine import Machine
    from vmdbg.api.points import Breakpoint, Catchpoint, Watchpoint
    from vmdbg.api.stop import Reason, Stop

__all__ = [
    "Breakpoint", "Catchpoint", "Closed", "CommandFailed", "Error", "Exit", "ExitList", "Guest", "Guests", "Host", "Inferior",
    "Machine", "OptionError", "Reason", "Registers", "Stop", "Thread", "Vmcb", "Watchpoint",
]  # fmt: skip

_MODULES = {
    "errors": ("Closed", "CommandFailed", "Error", "OptionError"),
    "exits": ("Exit", "ExitList"),
    "guests": ("Guests",),
    "inferior": ("Guest", "Host", "Inferior", "Registers", "Thread", "Vmcb"),
    "machine": ("Machine",),
    "points": ("Breakpoint", "Catchpoint", "Watchpoint"),
    "stop": ("Reason", "Stop"),
}
_HOMES = {name: f"vmdbg.api.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vmdbg' has no attribute {name!r}")
    found: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
