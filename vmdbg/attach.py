"""`vmdbg gdb`: start gdb with the right settings, symbols and connection, on a machine of its own or a running one."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from vmdbg.boot.elf import is_elf, is_elf64
from vmdbg.history import HOST
from vmdbg.options import UsageError
from vmdbg.run import add_machine_options, debug_file
from vmdbg.saved import image_file, settle

START_SECONDS = 60.0

GDB_SETTINGS = (
    "set confirm off", "set pagination off", "set osabi none", "set displaced-stepping off", "set schedule-multiple on",
    "set remotetimeout 30",
)  # fmt: skip
"""`osabi`: ELF files that say nothing count as GNU/Linux programs else, which gdb warns of in 16-bit code.
`displaced-stepping`: in non-stop mode gdb would execute instructions from a place of its own choice in the guest's memory.
`remotetimeout`: after two seconds, its own choice, gdb would ask again, and take each answer for that of the question behind it;
a computer with much to do may keep a stub waiting for longer.
`schedule-multiple`: `continue` resumes, and takes stops of, the hypervisor and all attached guests, whichever is
selected.  Without it breakpoints of the others are passed: gdb knows no stop of an inferior that it did not resume."""

MODULE = Path(__file__).with_name("gdbside.py")
"""What gdb loads on its side."""

DESCRIPTION = """\
Start gdb on an image, which waits before its first instruction, or on a running stub (PORT,
HOST:PORT or a socket's path).
What follows -- goes to gdb: vmdbg gdb hypervisor.elf -- -ex 'break main' -ex continue"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "gdb", help="start gdb on an image or a running stub", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_machine_options(parser)
    parser.add_argument(
        "--print-module", action="version", version=str(MODULE),
        help="print the path of the module that gives gdb commands of its own (walk, vmcb, exits ...), to `source` in any gdb",
    )  # fmt: skip
    parser.usage = parser.format_usage().removeprefix("usage: ").rstrip() + " [-- GDB-ARGUMENT ...]"
    parser.set_defaults(run=main, gdb_arguments=[])


def find_gdb() -> str:
    """The system's gdb, else the one that PyPI carries.  Raises `UsageError` if there is none."""
    system = shutil.which("gdb")
    if system is not None:
        return system
    beside = Path(sysconfig.get_path("scripts")) / "gdb"  # where the package gdb-for-pwndbg puts it
    if os.access(beside, os.X_OK):
        return str(beside)
    raise UsageError("there is no gdb; install it (apt install gdb, or pip install gdb-for-pwndbg)")


def is_address(text: str) -> bool:
    """Whether a stub is meant, and no file."""
    path = Path(text)
    return path.is_socket() or text.isdigit() or (not path.exists() and text.rpartition(":")[2].isdigit())


def gdb_command(gdb: str, where: str, symbols: Path | None, executable: bool, arguments: list[str]) -> list[str]:
    """gdb connected to `where`, with the settings a machine of many inferiors needs."""
    command = [gdb, "-q"]
    for setting in GDB_SETTINGS:
        command += ["-ex", setting]
    command += ["-ex", f"source {MODULE}"]
    if symbols is not None:
        # As an executable, a file of another word size would have gdb refuse the machine's registers.
        command += ["-ex", f"{'file' if executable else 'symbol-file'} {symbols}"]
    return [*command, "-ex", f"target extended-remote {where}", *arguments]


def host_symbols(options: argparse.Namespace) -> Path | None:
    """The hypervisor's symbol file, if gdb is to load it where it was linked."""
    return next((option.path for option in options.symbols if option.pid == HOST and not option.offset), None)


def main(options: argparse.Namespace) -> int:
    """Run gdb to its end; returns its exit status."""
    gdb = find_gdb()
    arguments = list(options.gdb_arguments)
    settle(options)
    if is_address(options.image):
        symbols = host_symbols(options)
        where = f"127.0.0.1:{options.image}" if options.image.isdigit() else options.image
        executable = symbols is not None and is_elf64(symbols)
        return subprocess.call(gdb_command(gdb, where, symbols, executable, arguments))
    with tempfile.TemporaryDirectory(prefix="vmdbg-") as directory:
        socket = str(Path(directory) / "gdb")
        machine = subprocess.Popen(
            [sys.executable, "-m", "vmdbg", "run", *options.typed, "--gdb", f"unix:{socket}", "--wait"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # ^C in gdb is gdb's
        )
        try:
            _wait_for(machine, socket)
            image = image_file(options)
            symbols = host_symbols(options) or (debug_file(image) if image else None)
            # An image that is no ELF file, a boot sector for one, may have symbols of a mode that it comes to later.
            executable = symbols is not None and is_elf64(symbols) and is_elf(Path(image))
            return subprocess.call(gdb_command(gdb, socket, symbols, executable, arguments))
        finally:
            machine.terminate()
            machine.wait()


def _wait_for(machine: subprocess.Popen[bytes], socket: str) -> None:
    until = time.monotonic() + START_SECONDS
    while not Path(socket).exists():
        if machine.poll() is not None:
            raise UsageError(f"the machine did not start (status {machine.returncode}); its message stands above")
        if time.monotonic() > until:
            raise UsageError(f"the machine did not start within {START_SECONDS:g} s; run `vmdbg run` to see why")
        time.sleep(0.02)
