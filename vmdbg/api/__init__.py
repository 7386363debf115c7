# SPDX-License-Identifier: GPL-2.0-or-later
"""The Python API: `import vmdbg`, then `vmdbg.Machine(image)`.  docs/api.md begins with a first script.

Names come from the modules of this package when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmdbg.api.errors import Closed, CommandFailed, Error, OptionError, TimeUp
    from vmdbg.api.exits import Exit, ExitList
    from vmdbg.api.guests import Guests
    from vmdbg.api.inferior import Guest, Host, Inferior
    from vmdbg.api.machine import Machine
    from vmdbg.api.points import Breakpoint, Catchpoint, Watchpoint
    from vmdbg.api.snapshots import Snapshot
    from vmdbg.api.stop import Reason, Stop
    from vmdbg.api.threads import Registers, Thread, Vmcb

__all__ = [
    "Breakpoint", "Catchpoint", "Closed", "CommandFailed", "Error", "Exit", "ExitList", "Guest", "Guests", "Host", "Inferior",
    "Machine", "OptionError", "Reason", "Registers", "Snapshot", "Stop", "Thread", "TimeUp", "Vmcb", "Watchpoint",
]  # fmt: skip

_MODULES = {
    "errors": ("Closed", "CommandFailed", "Error", "OptionError", "TimeUp"),
    "exits": ("Exit", "ExitList"),
    "guests": ("Guests",),
    "inferior": ("Guest", "Host", "Inferior"),
    "machine": ("Machine",),
    "snapshots": ("Snapshot",),
    "points": ("Breakpoint", "Catchpoint", "Watchpoint"),
    "stop": ("Reason", "Stop"),
    "threads": ("Registers", "Thread", "Vmcb"),
}
_HOMES = {name: f"vmdbg.api.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vmdbg.api' has no attribute {name!r}")
    found: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
