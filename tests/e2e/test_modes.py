"""16-, 32- and 64-bit code: registers and disassembly of each, and the way from one to another."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.e2e.served import Served, attach, run
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]


def test_boot_sector_through_three_modes(each_gdb: Gdb, serve: Serve, examples: Path, tmp_path: Path) -> None:
    gdb = each_gdb
    sector = examples / "bootsector/build/bootsector.img"
    undebugged = run(sector, tmp_path)
    served = serve(sector)
    gdb(f"symbol-file {sector.with_suffix('.elf')}")
    printed = served.connect(gdb)
    assert "handler for the OS ABI" not in printed
    assert '(currently "i8086")' in gdb("show architecture")
    assert gdb.value("$eip") == 0x7C00
    assert "ljmp   $0x0,$0x7c05" in gdb("x/i $pc")
    gdb("stepi")
    assert "<real_mode>:\tcli" in gdb("x/i $pc")
    for expected in ("cld", "xor    %ax,%ax", "mov    %ax,%ds"):
        gdb("stepi")
        assert expected in gdb("x/i $pc")
    assert gdb.value("$cr0 & 1") == 0

    # 32-bit code: the registers are the same, the disassembly is set by hand.
    gdb("break protected_mode")
    gdb("break long_mode")
    assert "Breakpoint 1, protected_mode" in gdb("continue")
    assert gdb.value("$cr0 & 1") == 1
    gdb("set architecture i386")
    assert "mov    $0x10,%eax" in gdb("x/i $pc")
    gdb("stepi")
    assert gdb.value("$eax") == 0x10

    # 64-bit code needs other registers: gdb reads them when it connects.
    assert "Breakpoint 2, long_mode" in gdb("continue")
    assert "has the registers of i386:x86-64 when gdb connects again" in gdb("monitor arch 1 i386:x86-64")
    gdb("disconnect")
    gdb("set architecture auto")
    served.connect(gdb)
    assert '(currently "i386:x86-64")' in gdb("show architecture")
    assert "[ LME LMA ]" in gdb("info registers efer")
    gdb("stepi 2")
    assert gdb.value("$rdx") == 0x3F8
    assert "mov    $0x7c00,%esp" in gdb("x/i $pc")
    gdb("delete")
    served.ends_as(gdb, undebugged)


def test_guests_of_other_modes(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    undebugged = run(hypervisor, tmp_path)
    build = hypervisor.parent
    served = serve(hypervisor)
    served.connect(gdb)
    gdb("break on_nested_page_fault")
    gdb("continue")
    while "guest 5" not in gdb("info os processes"):
        gdb("continue")
    gdb("delete")

    assert "gdb loads them when it attaches" in gdb(f"monitor symbols 3 {build / 'guestpae.elf'}")
    printed = attach(gdb, 3)
    assert "Reading symbols from target:/guest 3 asid=2 vmcb=0x805000/guestpae.elf" in printed
    assert '(currently "i386")' in gdb("show architecture")
    registers = gdb("info registers")
    assert "eip" in registers
    assert re.search(r"^rip", registers, re.MULTILINE) is None
    assert "[ PE ET" in registers
    assert "PG ]" in registers
    assert gdb.value("(unsigned long long)(unsigned)$eip") >= 0xC0000000
    assert "main (iterations=640) at guests/guestpae.c" in gdb("bt")
    gdb("break touch")
    printed = gdb("continue")
    assert "Breakpoint 2, touch (" in printed, printed
    assert "#1 " in gdb("bt")
    gdb("stepi 5")
    gdb("watch counter")
    assert "Hardware watchpoint 3: counter" in gdb("continue") or "Hardware watchpoint 3: counter" in gdb("continue")
    gdb("delete")
    gdb("detach")

    # Real mode on a shadow table: pc is linear.
    attach(gdb, 4, build / "guestreal.elf", "symbol-file")
    assert '(currently "i8086")' in gdb("show architecture")
    assert gdb.value("$eip") < 0x20000
    gdb("break work")
    printed = gdb("continue")
    assert "Breakpoint 4, work" in printed, printed
    before = gdb.value("*(int *)0x20000")
    code = [gdb("x/i $pc")]
    for _ in range(6):
        gdb("stepi")
        code.append(gdb("x/i $pc"))
    assert all("(bad)" not in line for line in code)
    assert any("%ax" in line or "%bx" in line or "%si" in line or "%cx" in line or "%di" in line for line in code), code
    gdb("continue")
    assert gdb.value("*(int *)0x20000") > before
    gdb("inferior 1")
    gdb("delete")
    served.ends_as(gdb, undebugged)


def test_two_processors(gdb: Gdb, serve: Serve, image: Callable[[str], Path], tmp_path: Path) -> None:
    elf = image("smp")
    undebugged = run(elf, tmp_path, "--cpus", "2")
    served = serve(elf, "--cpus", "2")
    served.connect(gdb)
    threads = gdb("info threads")
    assert 'Thread 1.1 "CPU 0" (running)' in threads
    assert 'Thread 1.2 "CPU 1" (waiting for SIPI)' in threads
    gdb("break first_cpu")
    gdb("continue")
    gdb("delete")
    gdb("break *0x8004")
    printed = gdb("continue")
    assert 'Thread 2 "CPU 1" hit Breakpoint 2' in printed, printed
    assert gdb.value("$rip") == 0x8004
    for _ in range(5):
        assert 'Thread 2 "CPU 1" hit Breakpoint 2' in gdb("continue")
    gdb("stepi 50")
    assert gdb.value("$_thread") == 2
    assert 0x8004 <= gdb.value("$rip") < 0x8010
    gdb("delete")
    gdb("thread 1")
    first = gdb.value("(long)&first_cpu")
    gdb("stepi 50")
    assert gdb.value("$_thread") == 1
    assert first <= gdb.value("$rip") < first + 30
    gdb("watch *(int *)0x9000 if *(int *)0x9000 % 100 == 0")
    printed = gdb("continue")
    assert 'Thread 2 "CPU 1" hit Hardware watchpoint 3' in printed, printed
    gdb("delete")
    served.ends_as(gdb, undebugged)
