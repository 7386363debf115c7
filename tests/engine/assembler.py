"""Guest programs from assembly text, by the GNU assembler, each text once a test run."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection


class Program(NamedTuple):
    """Machine code that belongs at `origin`, and the addresses of its labels."""

    origin: int
    code: bytes
    labels: dict[str, int]


@cache
def assemble(source: str, origin: int, bits: int = 64) -> Program:
    """Assemble AT&T text for a `bits`-bit code segment; `;` separates instructions, `.code16` and so on may follow."""
    with tempfile.TemporaryDirectory() as folder:
        unit, linked = Path(folder, "a.o"), Path(folder, "a.elf")
        text = f".code{bits}\n.globl _start\n_start:\n{source}\n"
        done = subprocess.run(["as", "--64", "-o", unit, "-"], input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{done.stderr}\n{text}"
        command = ["ld", "-m", "elf_x86_64", f"-Ttext={origin:#x}", "-z", "noexecstack", "-o", str(linked), str(unit)]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        with linked.open("rb") as file:
            elf = ELFFile(file)
            table = elf.get_section_by_name(".symtab")
            assert isinstance(table, SymbolTableSection)
            labels = {symbol.name: symbol["st_value"] for symbol in table.iter_symbols() if symbol.name}
            code = elf.get_section_by_name(".text")
            assert code is not None
            return Program(origin, code.data(), labels)
