"""One gdb on the hypervisor and two of its guests, and a run that does not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.e2e.served import Served, attach, run, same
from tests.gdbstub.gdb import Gdb

COUNTER = 0xFFFFFFFF80109000
COUNTER_SPA = 0x10F6000


def test_two_guests_and_a_run_that_does_not_notice(
    gdb: Gdb, serve: Callable[..., Served], hypervisor: Path, tmp_path: Path
) -> None:
    undebugged = run(hypervisor, tmp_path)
    build = hypervisor.parent
    served = serve(hypervisor)
    served.connect(gdb)

    # Both guests are there when the second one touches its first new page.
    gdb("tbreak on_nested_page_fault")
    assert "Temporary breakpoint 1, on_nested_page_fault" in gdb("continue")
    attach(gdb, 2, build / "guest64.elf")
    attach(gdb, 3, build / "guestpae.elf")
    threads = gdb("info threads")
    assert 'Thread 2.1 "guest 2 asid=1 vmcb=0x800000" (in host)' in threads
    assert 'Thread 3.1 "guest 3 asid=2 vmcb=0x805000" (in host)' in threads
    before = gdb.value("counter")

    # A source line in one guest; the other runs on meanwhile, and never stops.
    gdb("inferior 2")
    gdb("break guest64.c:51")
    stops = [gdb("continue") for _ in range(12)]
    assert all("Thread 2.1" in stop and "Breakpoint 2, work" in stop for stop in stops), stops
    gdb("inferior 3")
    assert gdb.value("counter") > before

    # A value through both levels of paging, and what the hypervisor has at the same address.
    gdb("inferior 2")
    in_guest = gdb.value(f"*(unsigned long *){COUNTER:#x}")
    assert gdb.value("counter") == in_guest >= 2
    gdb("inferior 1")
    assert gdb.value(f"*(unsigned long *){COUNTER_SPA:#x}") == in_guest
    assert gdb.value(f"*(unsigned long *){COUNTER:#x}") == gdb.value("*(unsigned long *)0x109000") != in_guest
    assert f"{COUNTER_SPA:#x}" in gdb(f"monitor walk {COUNTER:#x} 2")

    # Steps: many of one guest, some of the hypervisor.
    gdb("inferior 2")
    gdb("delete 2")
    gdb("stepi 10000")
    assert gdb.value("$_inferior") == 2
    gdb("inferior 1")
    gdb("break handle_exit")
    assert "Breakpoint 3, handle_exit" in gdb("continue")
    for _ in range(20):
        gdb("next")
    gdb("stepi 200")
    gdb("delete 3")

    # Watchpoints on both sides of the world switch.
    gdb("inferior 3")
    gdb("watch counter")
    assert "Thread 3.1" in gdb("continue")
    gdb("delete 4")
    gdb("inferior 1")
    gdb("watch guests[1].exits[0]")
    printed = gdb("continue")
    assert "Hardware watchpoint 5" in printed, printed
    gdb("delete 5")

    printed = gdb("continue")
    assert "[Inferior 1 (process 1) exited with code 01]" in printed, printed
    gdb.close()
    same(served.finish(), undebugged)
