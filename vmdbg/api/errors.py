# SPDX-License-Identifier: GPL-2.0-or-later
"""What the Python API raises: one family, one line each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from gdbstub.target import TargetError
from introspect.commands import CommandError
from introspect.sources import Unreadable
from vmdbg.engine.errors import EngineError
from vmdbg.options import UsageError
from vmdbg.timetravel.tree import SnapshotError

__all__ = ["Closed", "CommandFailed", "Error", "OptionError", "TimeUp", "WrongType", "translated"]


class Error(Exception):
    """Something that cannot be done: one line with the offending value, the rule it breaks, and what to do instead."""


class OptionError(Error):
    """A machine that cannot be made so: an option, its value, or the image."""


class CommandFailed(Error):
    """A command or an address that makes no sense now, as `value`, `rule` and `remedy`."""

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        super().__init__(f"{value}: {rule}; {remedy}")
        self.value, self.rule, self.remedy = value, rule, remedy


class WrongType(CommandFailed, TypeError):
    """An argument that is of no type that its method takes; a TypeError, too."""


class Closed(Error):
    """The machine has been closed: there is nothing left of it."""


class TimeUp(Error):
    """The machine's `deadline` has passed while it ran: where it was."""


_OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*)")
"""As the command line has it; here it is a keyword."""
_SYMBOLS = re.compile(r"--symbols (?:guest(\d+)|(host))=FILE")


@contextmanager
def translated() -> Iterator[None]:
    """Errors of the rooms below come out as `Error`."""
    try:
        yield
    except CommandError as error:
        remedy = _SYMBOLS.sub(lambda found: f"symbols={{{found[1] or repr(found[2])}: FILE}}", error.remedy)
        raise CommandFailed(error.value, error.rule, remedy) from None
    except UsageError as error:
        raise OptionError(_OPTION.sub(lambda found: found[1].replace("-", "_"), str(error))) from None
    except (TargetError, EngineError, SnapshotError, Unreadable) as error:
        raise Error(str(error)) from None
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        raise Error(f"{named}{error.strerror or error}") from None
