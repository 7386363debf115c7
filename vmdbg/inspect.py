"""`vmdbg inspect`: the commands on a dump, or on a machine under another stub."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from types import FrameType

from introspect.commands import Cancelled, CommandError, Registry, default_registry, exit_status
from introspect.commands.registry import error_json
from introspect.dump_context import DumpContext
from introspect.sources import Dump, SourceError, open_dump
from introspect.sources.given import parse_registers
from introspect.sources.notes import Registers
from introspect.sources.stub import leave, open_stub
from vmdbg import console
from vmdbg.console.run_commands import RUNNING
from vmdbg.options import UsageError, number, symbol_file

STUB = "gdb:"
TOLD_AFTER, TOLD_EVERY = 1.0, 0.2

DESCRIPTION = """\
Carry out a command on a dump: an ELF core (of `save core`, QEMU's dump-guest-memory, a vmcore), a LiME image, raw memory;
or on a machine under a stub with physical memory mode, as QEMU's: gdb:HOST:PORT or gdb:unix:PATH. That machine is stopped
meanwhile. Without a command, the console. `vmdbg inspect FILE help` lists the commands.
Exit status: 0; 1 if the command could not be carried out; 2 for a usage error or a dump that cannot be read; commands that
look for faults have their own."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inspect", help="look into a dump, or a machine under another stub", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--json", action="store_true", help="print results as JSON")
    add("--registers", type=_registers, metavar="R=V,...|FILE", help="registers of the first processor: cr3=0x1000,efer=0xd00")
    add("--vmcb", type=number, action="append", default=[], metavar="PA", help="a guest's VMCB; may be repeated")
    add("--scan", action="store_true", help="look for VMCBs first: those that are found are guests")
    add("--guest", type=number, metavar="N", help="the guest that commands mean if they name none (the host)")
    add("--base", type=number, metavar="ADDR", help="the file is raw memory from this physical address on")
    add("--symbols", type=symbol_file, action="append", default=[], metavar="WHO=FILE[@ADDR]",
        help="symbols: host=FILE, guest2=FILE; may be repeated")  # fmt: skip
    add("--stay-stopped", action="store_true", help="leave a machine under a stub stopped at the end; else it goes on")
    add("source", metavar="FILE|gdb:ADDR", help="the dump, or where the stub is")
    add("words", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command, with its arguments")
    parser.set_defaults(run=main)


def _registers(text: str) -> Registers:
    try:
        return parse_registers(text)
    except SourceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Progress:
    """Says on a terminal how far it is, once that takes a second. ^C ends what goes on; a second one ends the program."""

    def __init__(self) -> None:
        self._begun = self._told = time.monotonic()
        self._shown = False
        self.cancelled = False
        self._terminal = sys.stderr.isatty()

    def __call__(self, part: float, what: str) -> bool:
        now = time.monotonic()
        if self._terminal and now - self._begun > TOLD_AFTER and now - self._told > TOLD_EVERY:
            print(f"\r{what}: {part:4.0%} (^C ends it) ", end="", file=sys.stderr, flush=True)
            self._told, self._shown = now, True
        return not self.cancelled

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """^C sets `cancelled` meanwhile."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self.cancelled:
                raise KeyboardInterrupt
            self.cancelled = True

        try:
            before = signal.signal(signal.SIGINT, interrupt)
        except ValueError:  # not the main thread: whoever runs this has ^C
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self.clear()


def dump_registry() -> Registry:
    """The commands that a dump can answer, knowing the names of the others."""
    registry = default_registry()
    known = json.loads(resources.files("vmdbg").joinpath("gdbside.json").read_text(encoding="utf-8"))
    names = {name for commands in known.values() for name, *_ in commands}
    registry.elsewhere = (names | set(RUNNING)) - set(registry.names)
    return registry


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[Dump]:
    """The source that the options name. UsageError if it cannot be read."""
    source: str = options.source
    try:
        if source.startswith(STUB):
            if options.base is not None:
                raise UsageError("--base goes with a file; a stub says where memory is")
            dump, wire = open_stub(source.removeprefix(STUB))
            try:
                yield dump
            finally:
                leave(wire, stay_stopped=options.stay_stopped)
        else:
            yield open_dump(Path(source), options.base)
    except SourceError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        if error.filename != source:
            raise
        raise UsageError(f"{source}: {error.strerror}; give a dump, or gdb:HOST:PORT") from None


def main(options: argparse.Namespace) -> int:
    registry, progress = dump_registry(), Progress()
    if options.words and options.words[0].startswith("-"):
        raise UsageError(f"{options.words[0]}: it stands where the command does; options stand before {options.source}")
    with opened(options) as dump:
        for remark in dump.remarks:
            print(f"vmdbg: {options.source}: {remark}", file=sys.stderr)
        symbols = {option.pid: (option.path, option.offset) for option in options.symbols}
        with progress.watching():
            try:
                context = DumpContext(dump, options.registers, options.vmcb, symbols, progress)
                if options.scan:
                    registry.run_line(context, "guests --scan")
                    progress.clear()
                context.select(options.guest)
            except CommandError as error:
                raise UsageError(str(error)) from None
        if not options.words:
            return console.inspect(context, registry, options.source)
        with progress.watching():
            return _run(context, registry, options.words, options.json, progress)


def _run(context: DumpContext, registry: Registry, words: Sequence[str], as_json: bool, progress: Progress) -> int:
    line = words[0] if len(words) == 1 else shlex.join(words)
    as_json = as_json or registry.wants_json(line)
    try:
        text, result = registry.answer(context, f"{line} --json" if as_json else line)
    except CommandError as error:
        progress.clear()
        if as_json:
            print(error_json(error))
        else:
            print(f"vmdbg: {error}", file=sys.stderr)
        return 1
    except Cancelled as cancelled:
        progress.clear()
        print(f"vmdbg: {cancelled}: ended on request", file=sys.stderr)
        return 130
    progress.clear()
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exit_status(result)
