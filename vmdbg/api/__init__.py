# SPDX-License-Identifier: GPL-2.0-or-later
"""The Python API: `import vmdbg`, then `vmdbg.Machine(image)`.  docs/api.md begins with a first script."""

from vmdbg.api.errors import Closed, CommandFailed, Error, OptionError, TimeUp
from vmdbg.api.exits import Exit, ExitList
from vmdbg.api.guests import Guests
from vmdbg.api.inferior import Guest, Host, Inferior, Registers, Thread, Vmcb
from vmdbg.api.machine import Machine
from vmdbg.api.points import Breakpoint, Catchpoint, Watchpoint
from vmdbg.api.stop import Reason, Stop

__all__ = [
    "Breakpoint", "Catchpoint", "Closed", "CommandFailed", "Error", "Exit", "ExitList", "Guest", "Guests", "Host", "Inferior",
    "Machine", "OptionError", "Reason", "Registers", "Stop", "Thread", "TimeUp", "Vmcb", "Watchpoint",
]  # fmt: skip
