"""`save core`, `dump` and `load` on a machine in bytes; what was saved, opened again."""

from __future__ import annotations

from pathlib import Path

import pytest

from introspect.commands import CommandError, GuestView, HostView, run_line
from introspect.dump_context import DumpContext
from introspect.paging import Nested, PagingState
from introspect.sources import BytesMemory, open_dump
from introspect.vmcb import VMCB

from .machines import CODE, MEMORY_A, MEMORY_B, STATE, VMCB_A, VMCB_B, VMCB_MADE, build
from .world import World

HOST_STATE = {**STATE, "cr3": 0x10000, "rip": CODE, "rsp": 0x3000}


def view(memory: BytesMemory, number: int, vmcb: int, parent: int | None = None, inner: int | None = None) -> GuestView:
    contents = memory.read(vmcb, 0x1000)
    nested = Nested.from_vmcb(contents, STATE["cr4"], STATE["efer"])
    assert nested is not None
    return GuestView(
        number=number, name=f"g{number}", vmcbs=(vmcb,), asid=VMCB.read(contents, "guest_asid"), ncr3=nested.ncr3,
        paging=PagingState.from_vmcb(contents), nested=nested, parent=parent, inner=inner,
    )  # fmt: skip


@pytest.fixture
def world() -> World:
    memory = build()
    for at in range(CODE, CODE + 0x1000, 16):
        memory.write(at, b"host code %06x" % at)
        memory.write(MEMORY_A + at, b"A's  code %06x" % at)
        memory.write(MEMORY_B + at, b"B's  code %06x" % at)
    paging = PagingState(STATE["cr0"], 0x10000, STATE["cr4"], STATE["efer"])
    guests = [view(memory, 2, VMCB_A), view(memory, 3, VMCB_B, 2, VMCB_MADE)]
    registers = {1: HOST_STATE, 2: {**STATE, "cr3": 0x10000, "rip": CODE + 0x10, "rbx": 77}, 3: {**STATE, "rip": 3}}
    return World(memory, guests, host=HostView(paging=paging), known_registers=registers)


def said(world: World | DumpContext, line: str) -> str:
    return run_line(world, line).text()


def test_the_machines_core_has_everything(world: World, tmp_path: Path) -> None:
    path = tmp_path / "machine core"
    text = said(world, f"save core '{path}'")
    assert text.splitlines()[0].startswith(f"{path}: the host, 4 MiB of memory, ")
    dump = DumpContext(open_dump(path))
    assert dump.memory.read(0, 0x400000) == world.memory.read(0, 0x400000)
    assert dump.registers(1) == HOST_STATE
    assert [(guest.number, guest.name, guest.parent, guest.inner) for guest in dump.guests] == [
        (2, "g2", None, None), (3, "g3", 2, VMCB_MADE),
    ]  # fmt: skip
    assert dump.registers(2)["rbx"] == 77
    for line in (f"walk 3:{CODE:#x}", "walk host:rip", "vmcb 3 inner", "vmcb 2"):
        assert said(dump, line) == said(world, line)


@pytest.mark.parametrize(("number", "base", "size"), [(2, MEMORY_A, 0x100000), (3, MEMORY_B, 0x40000)])
def test_a_guests_core_is_a_machine_of_its_own(world: World, tmp_path: Path, number: int, base: int, size: int) -> None:
    path = tmp_path / "core"
    said(world, f"save core {path} --guest {number}")
    dump = DumpContext(open_dump(path))
    assert str(dump.host) == f"guest {number} (g{number})"
    assert dump.memory.read(0, size) == world.memory.read(base, size)
    assert dump.guests == []
    assert dump.registers(1) == world.registers(number)


def test_a_core_cannot_be_written(world: World, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="No such file or directory; choose a file that can be"):
        said(world, f"save core {tmp_path}/none/core")
    with pytest.raises(CommandError, match="no guest has this number"):
        said(world, f"save core {tmp_path}/core --guest 9")


def test_dump_and_load(world: World, tmp_path: Path) -> None:
    path = tmp_path / "page"
    assert said(world, f"dump {path} 2:{CODE + 8:#x} 4K") == f"0x1000 bytes at 2:gva:{CODE + 8:#x} to {path}"
    assert path.read_bytes() == world.memory.read(MEMORY_A + CODE + 8, 0x1000)
    path.write_bytes(b"changed" * 1000)
    assert said(world, f"load {path} 3:gpa:0x8ffc") == f"{7000:#x} bytes of {path} to 3:gpa:0x8ffc"
    assert world.memory.read(MEMORY_B + 0x8FFC, 7000) == b"changed" * 1000


def test_what_is_not_mapped(world: World, tmp_path: Path) -> None:
    path = tmp_path / "page"
    with pytest.raises(CommandError, match="gva:0x100000: there is no memory; ask for less"):
        said(world, f"dump {path} 2:0xff000 8K")
    assert list(tmp_path.iterdir()) == []
    assert "0x1000 bytes of them could not be read" in said(world, f"dump {path} 2:0xff000 8K --holes")
    assert path.read_bytes() == world.memory.read(MEMORY_A + 0xFF000, 0x1000) + bytes(0x1000)
    before = world.memory.read(0, 0x400000)
    with pytest.raises(CommandError, match="nothing was written"):
        said(world, f"load {path} 2:0xff000")
    assert world.memory.read(0, 0x400000) == before


@pytest.mark.parametrize("size", ["0", "-1", "4x", "", "1e3", "99999999999999999G"])
def test_sizes(world: World, tmp_path: Path, size: str) -> None:
    with pytest.raises(CommandError, match="LENGTH"):
        said(world, f"dump {tmp_path}/x 0 '{size}'")


def test_sizes_in_hexadecimal_have_no_unit(world: World, tmp_path: Path) -> None:
    said(world, f"dump {tmp_path}/x spa:0 0x1c")
    assert (tmp_path / "x").stat().st_size == 0x1C


def test_a_dump_cannot_be_changed(world: World, tmp_path: Path) -> None:
    said(world, f"save core {tmp_path}/core")
    (tmp_path / "page").write_bytes(b"x")
    with pytest.raises(CommandError, match="dumps and ROM are read-only"):
        said(DumpContext(open_dump(tmp_path / "core")), f"load {tmp_path}/page spa:0")


def test_nested_tables_in_circles_fill_no_disk(world: World, tmp_path: Path) -> None:
    for entry in range(16):
        world.memory.write_u64(0x20000 + 8 * entry, 0x20007)
    with pytest.raises(CommandError, match="they lead in circles"):
        said(world, f"save core {tmp_path}/core --guest 2")
    assert list(tmp_path.iterdir()) == []
