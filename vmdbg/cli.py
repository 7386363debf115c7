"""The command line: `vmdbg run` boots an image, `console` is a prompt on one, `gdb` attaches gdb, `inspect` reads a dump,
`test` runs tests, `demo` shows how."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from vmdbg import attach, completion, inspect, run
from vmdbg.console import start
from vmdbg.demo import command as demo
from vmdbg.options import UsageError, version
from vmdbg.testkit import command as tests

EXIT_USAGE = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other error; `--help` has the rest."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top: argparse.ArgumentParser = _Parser(
        prog="vmdbg",
        description="A debugger for hypervisors: an AMD-V machine whose hypervisor and guests are GDB inferiors.",
    )
    top.add_argument("--version", action="version", version=f"vmdbg {version()}")
    commands: argparse._SubParsersAction[argparse.ArgumentParser]
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    run.add_parser(commands)
    attach.add_parser(commands)
    start.add_parser(commands)
    inspect.add_parser(commands)
    tests.add_parser(commands)
    demo.add_parser(commands)
    completion.add_parser(commands, top)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the process exit status (2 for a usage error or an image that cannot be loaded)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    behind: list[str] = []
    if words[:1] == ["gdb"] and "--" in words:  # argparse takes an optional rest only right behind the image
        at = words.index("--")
        words, behind = words[:at], words[at + 1 :]
    options = parser().parse_args(words)
    options.gdb_arguments, options.typed = behind, words[1:]
    try:
        status: int = options.run(options)
    except UsageError as error:
        print(f"vmdbg: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130
    return status
