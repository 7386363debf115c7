"""Memory and registers of threads that run and that do not: right, writable, and without side effects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.e2e.served import Served, attach, reach
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]

GUEST_MEMORY = 0x1000000
"""Of guest 1 of the example, at its spa; its page tables are in it."""


def image_of(gdb: Gdb, folder: Path, name: str, first: int, length: int) -> bytes:
    file = folder / name
    gdb(f"dump binary memory {file} {first:#x} {first + length:#x}")
    return file.read_bytes()


def test_reads_have_no_side_effects(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    served = serve(hypervisor)
    served.connect(gdb)
    gdb("tbreak on_nested_page_fault")
    gdb("continue")
    gdb("inferior 1")
    # The hypervisor's tables, the nested ones, and all of the guest's memory with its own tables.
    regions = (("host", 0x100000, 0x80000), ("nested", 0x800000, 0x40000), ("guest", GUEST_MEMORY, 0x200000))
    before = [image_of(gdb, tmp_path, name, first, length) for name, first, length in regions]
    attach(gdb, 2, hypervisor.parent / "guest64.elf")
    # Every page of the guest, in both of its windows, and what nobody has touched yet.
    assert len(image_of(gdb, tmp_path, "window", 0xFFFFFFFF80000000, 0x200000)) == 0x200000
    assert len(image_of(gdb, tmp_path, "pages", 0xFFFFFFFFA0000000, 0x8000)) == 0x8000
    gdb("x/8i $pc")
    gdb("bt")
    gdb("info registers")
    walked = gdb("monitor walk 0xffffffff80109000")
    assert "memory type: UC (guest PAT WB, nested PAT WB, MTRR UC, as MTRRs are off)" in walked
    gdb("monitor vmcb")
    attach(gdb, 3, hypervisor.parent / "guestpae.elf")
    image_of(gdb, tmp_path, "pae", 0xC0000000, 0x100000)
    gdb("inferior 1")
    assert [image_of(gdb, tmp_path, name, first, length) for name, first, length in regions] == before

    # Devices are not read, and a range is read as far as it goes.
    assert "Cannot access memory at address 0xfee00030" in gdb("x/wx 0xfee00030")
    assert "Cannot access memory at address 0x20000000" in gdb("x/2bx 0x1fffffff")
    assert "0x1ffffffe:\t0x00\t0x00" in gdb("x/2bx 0x1ffffffe")
    assert "0x1ffffff8:\t0x00" in gdb("x/16bx 0x1ffffff8")
    gdb("inferior 2")
    assert "Cannot access memory at address 0x0" in gdb("x/gx 0")
    assert "0xffffffff801ffff8" in gdb("x/16bx 0xffffffff801ffff8")


def test_writes_to_a_guest_that_is_not_on_the_processor(
    gdb: Gdb, serve: Serve, image: Callable[[str], Path], tmp_path: Path
) -> None:
    served = serve(image("vcpus"))
    served.connect(gdb)
    reach(gdb, "second_vcpu")
    symbols = {name: gdb.value(f"(long)&{name}") for name in ("guest", "increment", "at_out", "at_vmmcall", "vmcb1")}
    attach(gdb, 2)

    # At the last #VMEXIT the guest was before VMMCALL; its VMCB says behind it now.
    assert gdb.value("$rip") == symbols["at_vmmcall"] + 3
    assert gdb.value("$rsp") == 0x500000
    assert gdb.value("$rdi") == 0x400008
    assert "[ LME LMA SVME ]" in gdb("info registers efer")
    gdb("inferior 1")
    assert gdb.value(f"*(long *)({symbols['vmcb1']:#x} + 0x578)") == symbols["at_vmmcall"] + 3
    gdb("inferior 2")

    # RIP, RAX and RFLAGS go to the VMCB, RSI waits for the next VMRUN, memory is written through both translations.
    gdb(f"set $rip = {symbols['increment']:#x}")
    gdb("set $rdi = 0x400010")
    gdb("set $rsi = 0x1234567")
    gdb("set $rax = 0x40")
    gdb("set $eflags = 0x203")
    gdb("set $rsp = 0x502000")
    gdb("set var *(long *)0x400010 = 41")
    gdb("set $xmm3.v2_int64[1] = 99")
    assert gdb.value("$rsi") == 0x1234567
    gdb(f"break *{symbols['at_out']:#x} thread 2.1")
    printed = gdb("continue")
    assert "Thread 2.1" in printed
    assert gdb.value("*(long *)0x400010") == 42
    assert gdb.value("$rsi") == 0x1234567
    assert gdb.value("$rsp") == 0x502000
    assert gdb.value("$eflags & 0x200") == 0x200
    assert gdb.value("$xmm3.v2_int64[1]") == 99
    gdb("delete")
    gdb(f"break *{symbols['guest']:#x} thread 2.1")
    gdb("continue")
    assert gdb.value("*(long *)0x400008") == 0x1234567  # what the guest itself stored

    # What is not mapped cannot be written, and says so.
    assert "Cannot access memory at address 0x70000000" in gdb("set var *(long *)0x70000000 = 1")
    assert "0x70000000" in gdb("monitor walk 0x70000000")


def test_writes_through_a_hypervisor_that_reloads(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    """The example loads a guest's registers from its own structure before VMRUN: the debugger's writes come after."""
    served = serve(hypervisor)
    served.connect(gdb)
    gdb("tbreak on_nested_page_fault")
    gdb("continue")
    attach(gdb, 2, hypervisor.parent / "guest64.elf")
    assert "in work" in gdb("bt 1") or "work (" in gdb("bt 1")
    values = {"r13": 0x1122334455667788, "rbx": 77, "r15": 5}
    old = {name: gdb.value(f"${name}") for name in values}
    for name, value in values.items():
        gdb(f"set ${name} = {value}")
    gdb("stepi")
    assert {name: gdb.value(f"${name}") for name in values} == values
    for name, value in old.items():
        gdb(f"set ${name} = {value}")
    gdb("tbreak guest64.c:97")
    gdb("continue")
    gdb("set var counter = 250")
    gdb("inferior 1")
    gdb("delete")
    assert "exited with code" in gdb("continue")
    gdb.close()
    assert b"guest 1: counter 256" in served.finish().serial
    assert b"guest 1: counter 64" not in served.serial.read_bytes()
