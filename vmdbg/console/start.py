"""`vmdbg console`: what it is given, a machine of its own, a stub or a dump; and whether somebody types, or a script runs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import re
import shlex
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gdbstub.recording import Recorder
from gdbstub.server import Server, new_event_loop
from introspect.dump_context import DumpContext
from vmdbg.attach import is_address
from vmdbg.console.control import Goal, Report
from vmdbg.console.output import PlainOutput
from vmdbg.console.serial import ConsoleSerial
from vmdbg.console.shell import Quit, Shell
from vmdbg.console.source import ContextSource, LiveSource, Source
from vmdbg.fingerprint_report import Fingerprints
from vmdbg.history import HOST
from vmdbg.inspect import STUB, dump_registry, opened
from vmdbg.options import UsageError
from vmdbg.run import Limit, add_machine_options, add_stub_options, build, check_stub, debugger_of, listen, writing
from vmdbg.saved import settle

__all__ = ["add_parser", "main", "run_beside", "talk"]

REST_SECONDS = 0.2
"""So long the guest may take for a line before its beginning is shown."""
DESCRIPTION = """\
A prompt over all commands: on an image, which stands before its first instruction; on the stub of a machine that runs
(PORT, HOST:PORT or a socket's path); or on a dump (an ELF core, or LiME).
With -c or -x, or where standard input is no terminal, lines are carried out without a prompt.
Exit status: that of the last command that failed (1), 0 if none did; 2 for a usage error."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "console",
        help="a prompt on an image, a running stub or a dump",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_machine_options(parser)
    add_stub_options(parser)
    add_script_options(parser)
    parser.set_defaults(run=main, serial="console", wait=True)


def add_script_options(parser: argparse.ArgumentParser) -> None:
    """What is to be carried out, in the order in which it is given."""
    for names, metavar, text in (
        (("-c", "--command"), "COMMAND", "carry out a command; may be repeated"),
        (("-x", "--script"), "FILE", "carry out the commands of a file; may be repeated"),
    ):
        parser.add_argument(
            *names,
            dest="lines",
            action="append",
            default=[],
            metavar=metavar,
            help=text,
            type=(lambda text: ("line", text)) if metavar == "COMMAND" else (lambda text: ("file", text)),
        )
    parser.add_argument("-i", "--interactive", action="store_true", help="a prompt after -c and -x, too")


def main(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    check_stub(options)
    settle(options)
    if is_address(options.image):
        from vmdbg.console.remote import connect

        return talk(connect(options.image), options)
    if _is_dump(options.image):
        return _on_dump(options)
    return run_beside(options)


def _is_dump(name: str) -> bool:
    """An ELF core, or LiME's format, or a stub that has physical memory only."""
    if name.startswith(STUB):
        return True
    try:
        with open(name, "rb") as file:
            head = file.read(20)
    except (OSError, ValueError):
        return False
    return (head[:4] == b"\x7fELF" and head[16:18] == b"\4\0") or head[:4] == b"EMiL"


def _on_dump(options: argparse.Namespace) -> int:
    """As `vmdbg inspect` has it without options."""
    source = argparse.Namespace(source=options.image, base=None, stay_stopped=False)
    with opened(source) as dump:
        for remark in dump.remarks:
            print(f"vmdbg: {options.image}: {remark}", file=sys.stderr)
        symbols = {option.pid: (option.path, option.offset) for option in options.symbols}
        return talk(ContextSource(options.image, DumpContext(dump, symbols=symbols), dump_registry()), options)


# Who types


def interactive(options: argparse.Namespace) -> bool:
    """Whether there is somebody at a terminal, who is to be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty() and (not getattr(options, "lines", []) or options.interactive)


def folders() -> list[Path]:
    """Where commands.py and init of the user are looked for: the user's, and the project's."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "vmdbg"
    return [folder for folder in (home, Path(".vmdbg").absolute()) if _own(folder)]


def _own(folder: Path) -> bool:
    """Whether nobody but the user can have put something there: it will be executed."""
    try:
        found = folder.stat()
    except (OSError, RuntimeError):
        return True
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def history_file(name: str) -> Path:
    """For what is debugged: in the project's .vmdbg if there is one, else in the user's state directory."""
    project = Path(".vmdbg").absolute()
    if project.is_dir() and _own(project):
        return project / "history"
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "vmdbg"
    path = str(Path(name).absolute()) if Path(name).exists() else name
    readable = re.sub(r"[^\w.-]", "_", Path(name).name)[:40]
    return state / f"{readable}-{hashlib.sha256(path.encode()).hexdigest()[:8]}.history"


def _script(shell: Shell, options: argparse.Namespace) -> int:
    """-c and -x, or else standard input."""
    lines = getattr(options, "lines", [])
    if lines:
        for kind, text in lines:
            shell.execute(text) if kind == "line" else shell.execute(f"source {shlex.quote(text)}")
        return shell.status
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            shell.execute(line)
    return shell.status


def talk(source: Source, options: argparse.Namespace) -> int:
    """A console on something that needs nothing of ours to run."""
    try:
        return _talk(source, options, None, lambda: None, lambda: None)
    finally:
        source.close()


def _talk(
    source: Source,
    options: argparse.Namespace,
    serial: ConsoleSerial | None,
    poll: Callable[[], None],
    begin: Callable[[], object],
) -> int:
    loop = new_event_loop()
    try:
        return loop.run_until_complete(_converse(source, options, serial, poll, begin))
    finally:
        loop.close()


async def _converse(
    source: Source,
    options: argparse.Namespace,
    serial: ConsoleSerial | None,
    poll: Callable[[], None],
    begin: Callable[[], object],
) -> int:
    started = begin()
    if asyncio.iscoroutine(started):
        await started
    if not interactive(options):
        shell = Shell(source, PlainOutput(), folders=folders())
        _show_serial(serial, shell)
        with contextlib.suppress(Quit):
            _script(shell, options)
        return shell.status
    from vmdbg.console.prompt import Prompt, PromptOutput

    output = PromptOutput()
    shell = Shell(source, output, waits=False, folders=folders())
    _show_serial(serial, shell)
    prompt = Prompt(shell, output, history_file(source.name), poll)
    with contextlib.suppress(Quit):
        for folder in folders():
            if (folder / "init").is_file():
                shell.execute(f"source {shlex.quote(str(folder / 'init'))}")
        if getattr(options, "lines", []):
            _script(shell, options)
        _greet(shell)
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, prompt.leave)
        await prompt.run()
    return 0


def _greet(shell: Shell) -> None:
    control = shell.source.control
    runs = "F5 continue  F10 next  F11 step  ^C interrupt  " if control is not None else ""
    shell.output.show(f"vmdbg: {shell.source.name}", "title.name")
    shell.output.show(f"{runs}F1 help  Tab complete  ^R search  ^D quit", "hint")
    if control is None or not control.running:
        shell.view()


def _show_serial(serial: ConsoleSerial | None, shell: Shell) -> None:
    if serial is not None:
        serial.show = shell.serial


# A machine of this process


def run_beside(options: argparse.Namespace) -> int:
    """A machine, the console on it, and a stub if one is asked for."""
    if options.gdb is not None and not interactive(options):
        raise UsageError(
            "--gdb beside a script: nobody would answer gdb meanwhile; run the script without it, or on a terminal with -i"
        )
    fingerprints = Fingerprints(options)
    with writing("--trace-exits", options.trace_exits) as trace, writing("--gdb-log", options.gdb_log) as log:
        serial = ConsoleSerial() if options.serial in ("console", "stdio") else None
        machine = build(options, trace, serial=serial)
        debugger = debugger_of(machine, options, trace, serial)
        source = LiveSource(options.image, debugger)
        limit = Limit(options.timeout)
        server = Server(debugger, HOST, Recorder(log) if log is not None else None)
        beside = _Beside(source, server, limit, serial)
        if serial is not None:
            source.send = serial.send
        try:
            status = _talk(source, options, serial, beside.poll, lambda: beside.begin(options))
            return fingerprints.tell(debugger.machine, status)
        finally:
            server.close()
            debugger.machine.close()


class _Beside:
    """What a console and a stub on one machine owe each other: the machine is gdb's while one is connected."""

    def __init__(self, source: LiveSource, server: Server, limit: Limit, serial: ConsoleSerial | None) -> None:
        self.source, self.server, self.limit, self.serial = source, server, limit, serial
        self._rested = time.monotonic()
        server.arriving = self.poll_arrival
        source.driver.take_over = server.stop_detached

    async def begin(self, options: argparse.Namespace) -> None:
        if options.gdb is not None:
            where = await listen(self.server, options.gdb)
            print(f"vmdbg: gdb can attach: target extended-remote {where}", file=sys.stderr, flush=True)
        if not options.wait and self.source.control is not None:
            self.source.control.go(Goal())

    def poll_arrival(self) -> None:
        """A client is about to be served: the console lets go of the machine before it is asked anything."""
        control = self.source.control
        if control is not None and not self.source.driver.holder:
            control.release()
            self.source.driver.holder = "gdb"
            self._say("[gdb has connected, and holds the machine now]")

    def poll(self) -> None:
        """Between two slices."""
        driver, control = self.source.driver, self.source.control
        machine = self.source.debugger.machine
        machine.poll_input()
        if self.serial is not None and time.monotonic() - self._rested > REST_SECONDS:
            self._rested = time.monotonic()
            self.serial.rest()
        if driver.holder and not self.server.has_client:
            driver.holder = ""
            if control is not None and not driver.ended:
                control.take_back()
            self._say("[gdb has disconnected]")
        if driver.ended == "" and self.limit.reached(machine):
            self._say(f"[{machine.ended}]")

    def _say(self, text: str) -> None:
        self.source.reports.append(Report(text))
