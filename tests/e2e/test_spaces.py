"""Guest-virtual, guest-physical and system-physical addresses, of the hypervisor and of a guest."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.e2e.served import Served, attach, run
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]


def test_three_names_of_one_byte(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor, "--symbols", f"guest2={hypervisor.parent / 'guest64.elf'}")
    served.connect(gdb)
    gdb("tbreak on_nested_page_fault")
    gdb("continue")
    attach(gdb, 2)
    gdb("tbreak work")
    gdb("continue")
    gva = gdb.value("(long)&counter")
    value = gdb.value("*(unsigned *)&counter")
    found = re.search(r"-> gpa (0x\w+) -> spa (0x\w+)", gdb(f"monitor walk {gva & (1 << 64) - 1:#x} 2"))
    assert found is not None
    gpa, spa = int(found[1], 16), int(found[2], 16)
    assert len({gva & 0xFFFFFFFF, gpa, spa}) == 3

    def word(address: int) -> int:
        return gdb.value(f"*(unsigned *){address & (1 << 64) - 1:#x}")

    assert "memory of process 2 is at gva" in gdb("monitor space gva 2")
    assert word(gva) == value
    assert "memory of process 2 is at gpa" in gdb("monitor space gpa 2")
    assert word(gpa) == value
    # It is the inferior's own: the hypervisor's memory is where it was, and there guest-physical is system-physical.
    gdb("inferior 1")
    assert "memory of process 1 is at gva" in gdb("monitor space")
    assert word(spa) == value
    assert "at gpa" in gdb("monitor space gpa 1")
    assert word(spa) == value
    gdb("monitor space gva 1")
    gdb("inferior 2")
    assert "at spa: physical addresses of the machine" in gdb("monitor space spa 2")
    assert word(spa) == value
    assert "Cannot access memory" in gdb("x/x 0xffffff0000000000")

    # Written by one name, read by the others, and put back.
    gdb(f"set var *(unsigned *){spa:#x} = 0x12345678")
    gdb("monitor space gpa 2")
    assert word(gpa) == 0x12345678
    pattern = gdb(f"find /w {gpa & ~0xFFF:#x}, +0x1000, 0x12345678")
    assert hex(gpa) in pattern
    gdb(f"set var *(unsigned *){gpa:#x} = {value:#x}")
    assert "Cannot access memory" in gdb("set var *(unsigned *)0xff00000000 = 0")

    # QEMU's switch, for scripts written for it; a breakpoint is at a linear address all the while.
    assert 'received: "1"' in gdb("maintenance packet qqemu.PhyMemMode")
    gdb("tbreak work")
    assert "work (" in gdb("continue")
    assert 'received: "OK"' in gdb("maintenance packet Qqemu.PhyMemMode:0")
    gdb("maintenance flush dcache")
    assert word(gva) >= value
    assert "no such address space; choose of gva, gpa, spa" in gdb("monitor space moon")
    assert "there is no such process" in gdb("monitor space gpa 77")
    gdb("detach")
    gdb("inferior 1")
    assert "exited with code 01" in gdb("continue")
    gdb.close()
    outcome = served.finish()
    assert outcome.fingerprint != undebugged.fingerprint  # that it was put back is input, too
    assert outcome._replace(fingerprint=undebugged.fingerprint) == undebugged

