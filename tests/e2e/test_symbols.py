"""Symbols that were linked for another address than they are at."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.e2e.served import Served, attach
from tests.gdbstub.gdb import Gdb

MOVED = 0x40000000


def elsewhere(elf: Path, folder: Path) -> Path:
    """An image of tests/e2e/images as it is linked `MOVED` further up."""
    moved = folder / "moved.elf"
    source = Path(__file__).parent / "images" / f"{elf.stem}.S"
    linker = f"-Wl,-Ttext={0x100000 + MOVED:#x},--build-id=none,-z,noexecstack,-z,max-page-size=4096"
    subprocess.run(["gcc", "-nostdlib", "-static", "-g", linker, "-o", moved, source], check=True, capture_output=True)
    return moved


def test_relocated_symbols(gdb: Gdb, serve: Callable[..., Served], image: Callable[[str], Path], tmp_path: Path) -> None:
    elf = image("vcpus")
    moved = elsewhere(elf, tmp_path)
    served = serve(elf, "--symbols", f"guest2={moved}@0x100000")
    served.connect(gdb)
    gdb("tbreak after_vmexit")
    gdb("continue")
    attach(gdb, 2)
    assert re.search(r"Yes .*target:/guest 2 asid=1 vmcb=0x[0-9a-f]+/moved.elf", gdb("info sharedlibrary"))
    assert gdb.value("&increment") == gdb.value("&increment") & 0xFFFFFF
    gdb("tbreak increment thread 2.1")
    assert "increment () at" in gdb("continue")
    printed = gdb("info os processes")
    assert re.search(r"^1 +hypervisor +0 +yes +in guest 2", printed, re.MULTILINE), printed
    assert re.search(r"^2 +guest 2 +0 +yes +on CPU 0, \d+ exits", printed, re.MULTILINE), printed

    # Another time, from the console; a file that is none.
    assert "is no ELF file" in gdb(f"monitor symbols 3 {Path(__file__)} 0x1000")
    gdb("inferior 1")
    gdb("tbreak again thread 1.1")
    gdb("continue")
    printed = gdb(f"monitor symbols 4 {moved} -{MOVED:#x}")
    assert f"-{MOVED:#x} further up" in printed
    attach(gdb, 4)
    assert "moved.elf" in gdb("info sharedlibrary")
    assert "vcpus.S" in gdb("info line *$pc")
