# SPDX-License-Identifier: GPL-2.0-or-later
"""`vmdbg demo`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from vmdbg.demo import directory, session
from vmdbg.options import UsageError

DESCRIPTION = """\
A narrated session: a real gdb on a small hypervisor and its four guests. Each command shown is sent to gdb as it stands,
each answer is gdb's, and what the narration claims is checked: status 1 if an answer is not as told."""

BY_HAND = """\
Now by hand. In one terminal:

    cd {directory}/build
    {vmdbg} run hypervisor.elf --append loop=0 --symbols guest2=guest64.elf --gdb 1234 --wait

In another:

    cd {directory}
    gdb -ex 'set schedule-multiple on' build/hypervisor.debug
    (gdb) target extended-remote localhost:1234
    (gdb) continue                                        # the guests run for ever; Ctrl-C stops them
    (gdb) add-inferior
    (gdb) inferior 2
    (gdb) attach 2
    (gdb) break tick
    (gdb) continue
    (gdb) monitor help

Or both at once: {vmdbg} gdb build/hypervisor.elf --append loop=0
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("demo", help="a narrated session of gdb on a hypervisor and its guests", description=DESCRIPTION)
    parser.add_argument(
        "--copy", type=Path, metavar="DIR",
        help="only copy that hypervisor, its guests and their sources to a new directory DIR, to try and to change",
    )  # fmt: skip
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Exit status 0, or 1 if something was not as told."""
    source = directory()
    if options.copy is not None:
        _copy(source, options.copy)
        print(by_hand(options.copy), end="")
        return 0
    status = session.main(source)
    if status == 0:
        print(f"\n{by_hand(source)}", end="")
    return status


def by_hand(source: Path) -> str:
    """What to type, for paths as they are from here."""
    program = Path(sys.argv[0])
    found = shutil.which("vmdbg")
    known = found is not None and program.exists() and Path(found).samefile(program)
    vmdbg = "vmdbg" if known else str(program.absolute()) if program.name == "vmdbg" else f"{sys.executable} -m vmdbg"
    place = source.absolute()
    return BY_HAND.format(directory=os.path.relpath(place) if place.is_relative_to(Path.cwd()) else place, vmdbg=vmdbg)


def _copy(source: Path, into: Path) -> None:
    try:
        shutil.copytree(source, into, ignore=shutil.ignore_patterns("__pycache__", "*.o", "*.bin"))
    except FileExistsError:
        raise UsageError(f"--copy {into} exists; name a directory that is to be made") from None
    except (OSError, shutil.Error) as error:
        raise UsageError(f"--copy {into}: {error}") from None
