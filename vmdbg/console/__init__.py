"""The console: a prompt over the command registry, on a machine, a dump, or a machine behind a stub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmdbg.console.user_commands import command

if TYPE_CHECKING:
    from introspect.commands import Registry
    from introspect.dump_context import DumpContext

__all__ = ["command", "inspect"]


def inspect(context: DumpContext, registry: Registry, name: str = "dump") -> int:
    """A console on a dump; its exit status."""
    from argparse import Namespace

    from vmdbg.console.source import ContextSource
    from vmdbg.console.start import talk

    return talk(ContextSource(name, context, registry), Namespace(lines=[], interactive=True))
