"""Cores of Debian's kernel, as a machine and as a guest, in what others read them with: gdb, drgn, Volatility 3."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from introspect.commands import run_line
from introspect.dump_context import DumpContext
from introspect.sources import BytesMemory, open_dump
from introspect.vmcb import VMCB
from tests.gdbstub.gdb import GDBS, Gdb
from tests.introspect.machines import CONTROL, STATE
from tests.introspect.tables import Tables
from tests.patience import PATIENCE
from tests.real.test_linux import INITRD, KERNEL, Linux
from vmdbg.debugger import Debugger
from vmdbg.monitor import Monitor

pytestmark = pytest.mark.skipif(not KERNEL.exists() or not INITRD.exists(), reason="no Linux image; run tests/real/fetch")
needs_drgn = pytest.mark.skipif(importlib.util.find_spec("drgn") is None, reason="drgn is not installed")
needs_volatility = pytest.mark.skipif(importlib.util.find_spec("volatility3") is None, reason="volatility3 is not installed")

MIB = 1 << 20
BASE, VMCB_AT, TABLES, MEMORY = 64 * MIB, 0x1000, 0x10000, 512 * MIB
"""In the made-up machine: where the guest's memory is, its VMCB, its nested tables."""


class Booted:
    """The machine with what its kernel says of itself."""

    def __init__(self) -> None:
        self.linux = Linux()
        self.linux.say("dmesg -n 1")
        found = self.linux.say("grep -E ' (init_uts_ns|linux_banner)$' /proc/kallsyms")
        self.symbols = {line.split()[2]: int(line.split()[0], 16) for line in found.splitlines()}
        self.release = self.linux.say("uname -r").strip()
        self.commands: Monitor = Debugger(self.linux.machine).monitor_commands


@pytest.fixture(scope="module")
def booted() -> Iterator[Booted]:
    made = Booted()
    yield made
    made.linux.machine.close()


@pytest.fixture(scope="module")
def host_core(booted: Booted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("linux") / "host.core"
    said = run_line(booted.commands, f"save core {path}").text()
    assert "VMCOREINFO" in said
    return path


@pytest.fixture(scope="module")
def guest_core(booted: Booted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kernel as the guest of a machine that is made up around it: its VMCB, its nested tables, its memory elsewhere."""
    folder = tmp_path_factory.mktemp("guest")
    low = BytesMemory({0: bytearray(0x100000)})
    tables = Tables(low, "4-level", range(TABLES, 0x100000, 0x1000))
    for at in range(0, MEMORY, 2 * MIB):
        tables.map(at, BASE + at, level=2)
    names = {field.name for field in VMCB if field.group in ("segments", "state", "msrs")}
    registers = booted.commands.registers(1)
    fields = {name: value for name, value in registers.items() if name in names}
    fields |= {**CONTROL, "misc_ctl": 1, "n_cr3": tables.root, "guest_asid": 1, "efer": registers["efer"] | STATE["efer"] & 1 << 12}
    low.write(VMCB_AT, bytes(VMCB.encode(fields)))
    machine = folder / "machine"
    with machine.open("wb") as file:
        file.write(low.read(0, 0x100000))
        file.seek(BASE)
        file.write(booted.commands.memory.read(0, MEMORY))
    context = DumpContext(open_dump(machine), {**STATE, "cr3": 0})
    assert run_line(context, "guests --scan").text().startswith("1 VMCB ")
    path = folder / "guest.core"
    said = run_line(context, f"save core {path} --guest 2").text()
    assert "VMCOREINFO" in said
    assert "512 MiB of memory" in said
    return path


@pytest.fixture(params=["host_core", "guest_core"])
def core(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.skipif(not GDBS, reason="gdb is not in PATH")
def test_gdb(core: Path, booted: Booted) -> None:
    registers = booted.commands.registers(1)
    gdb = Gdb(GDBS[0])
    try:
        gdb(f"core-file {core}")
        for name in ("rip", "rsp", "rax"):  # the guest's others are not known: a VMCB has no more
            assert gdb.value(f"(unsigned long) ${name}") % (1 << 64) == registers[name], name
        assert gdb(f"x/s {booted.symbols['linux_banner']:#x}").split('"')[1].startswith(f"Linux version {booted.release}")
    finally:
        gdb.close()


@needs_drgn
def test_drgn(core: Path, booted: Booted) -> None:
    """It takes it for a kernel by VMCOREINFO, reads through the kernel's page tables, and finds its symbols in kallsyms."""
    import drgn
    from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms

    program = drgn.Program()
    program.set_core_dump(str(core))
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    program.register_symbol_finder("kallsyms", load_vmlinux_kallsyms(program), enable_index=0)
    symbol = program.symbol("init_uts_ns")
    assert symbol.address == booted.symbols["init_uts_ns"]
    assert booted.release.encode() in program.read(symbol.address, 400)
    assert program.symbol(booted.commands.registers(1)["rip"]).name
    assert program.read(0x1000, 64, physical=True) == booted.commands.memory.read(0x1000, 64)


@needs_drgn
def test_a_live_drgn_program(booted: Booted) -> None:
    from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms

    import vmdbg.drgn

    program = vmdbg.drgn.program(vmdbg.drgn.host(booted.commands))
    program.register_symbol_finder("kallsyms", load_vmlinux_kallsyms(program), enable_index=0)
    address = program.symbol("init_uts_ns").address
    assert address == booted.symbols["init_uts_ns"]
    before = program.read(address, 400)
    assert b"(none)" in before
    booted.linux.say("hostname changed")
    assert b"changed" in program.read(address, 400)
    booted.linux.say("hostname '(none)'")


def volatility_layer(core: Path) -> tuple[Any, Any]:
    """Its context with the layer of the file, and that of the core on it, as its automatic stacking makes them."""
    from volatility3.framework import contexts
    from volatility3.framework.layers import elf, physical

    context = contexts.Context()
    context.config["file.location"] = core.as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    stacked = elf.Elf64Stacker.stack(context, "file")
    assert stacked is not None
    context.add_layer(stacked)
    return context, stacked


@needs_volatility
def test_volatility_reads_physical_and_virtual_memory(core: Path, booted: Booted) -> None:
    from volatility3.framework.layers import intel

    context, layer = volatility_layer(core)
    memory = booted.commands.memory
    for address in (0x1000, 0x100000, MEMORY // 2 - 8, MEMORY - 64):
        assert layer.read(address, 64) == memory.read(address, 64)
    with pytest.raises(Exception, match="Invalid address"):
        layer.read(MEMORY, 1)
    context.config["paged.memory_layer"] = layer.name
    context.config["paged.page_map_offset"] = booted.commands.registers(1)["cr3"] & ~0xFFF
    paged = intel.Intel32e(context, "paged", "paged")
    context.add_layer(paged)
    assert paged.read(booted.symbols["linux_banner"], 100).startswith(f"Linux version {booted.release}".encode())


@needs_volatility
def test_volatility_finds_the_kernels_banner(core: Path, booted: Booted) -> None:
    """The program itself, on the file as it is."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vol")), "-q", "-f", str(core), "banners.Banners"],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^0x[0-9a-f]+\s+Linux version {re.escape(booted.release)} ", done.stdout, re.MULTILINE)


def test_headers_are_few_and_in_order(core: Path) -> None:
    data = core.read_bytes()[: 1 << 20]
    (count,) = struct.unpack_from("<H", data, 56)
    loads = [struct.unpack_from("<IIQQQQQQ", data, 64 + 56 * n) for n in range(count)]
    physical = [one[4] for one in loads if one[0] == 1]
    assert physical == sorted(physical)
    assert 100 < count < 12000


def test_a_core_of_ours_opens_here(core: Path, booted: Booted) -> None:
    dump = DumpContext(open_dump(core))
    text = run_line(dump, f"walk {booted.symbols['linux_banner']:#x}").text()
    spa = int(re.search(r"spa (0x[0-9a-f]+), in a", text)[1], 16)  # type: ignore[index]
    assert dump.memory.read(spa, 14) == b"Linux version "
