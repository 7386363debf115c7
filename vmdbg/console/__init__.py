"""The console: a prompt over the command registry, on a machine, a dump, or a machine behind a stub."""

from vmdbg.console.user_commands import command

__all__ = ["command"]
