"""Breakpoints and watchpoints in a guest with processes: one linear address, several address spaces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, attach, run, same
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]
Image = Callable[[str], Path]
USER = 0x40000000
COUNTER = USER + 0x10


@pytest.fixture(params=["native", "python"])
def started(gdb: Gdb, serve: Serve, image: Image, request: pytest.FixtureRequest) -> Served:
    """The guest is selected, before it runs a process."""
    elf = image("processes")
    served = serve(elf, "--runtime", request.param)
    served.connect(gdb)
    gdb("tbreak *after_vmexit")
    while "after_vmexit" not in gdb("continue"):
        pass
    attach(gdb, 2, elf, "symbol-file")
    return served


def _go(gdb: Gdb, count: int) -> list[tuple[str, int]]:
    """The stops of the guest that follow: where, and in which process."""
    processes = {gdb.value(f"(long)&process{number}"): number for number in (1, 2, 3)}
    stops = []
    for _ in range(count):
        assert "Thread 2.1" in gdb("continue")
        stops.append(("user" if gdb.value("$pc") == USER else "kernel", processes[gdb.value("$cr3")]))
    return stops


def _to(gdb: Gdb, process: int) -> None:
    """To the kernel, on behalf of a process."""
    gdb(f"tbreak *kernel if $cr3 == (long)&process{process}")
    assert "hit Temporary breakpoint" in gdb("continue")


def _passed(printed: str) -> int:
    return printed.count("passes its breakpoint at 0x40000000 under the page tables at")


def test_a_user_breakpoint_and_one_of_the_kernel(gdb: Gdb, started: Served, image: Image, tmp_path: Path) -> None:
    kernel, process1, program1, process2 = (
        gdb.value(f"(long)&{name}") for name in ("kernel", "process1", "program1", "process2")
    )
    gdb("break *kernel")
    assert _go(gdb, 6) == [("kernel", 1), ("kernel", 2), ("kernel", 3)] * 2
    gdb("delete")

    # Bound to the process in which it is set, and to its page, which process 3 has too.
    _to(gdb, 1)
    gdb(f"break *{USER}")
    seen = len(gdb.text)
    assert _go(gdb, 5) == [("user", 3), ("user", 1), ("user", 3), ("user", 1), ("user", 3)]
    assert _passed(gdb.text[seen:]) == 1
    assert f"under the page tables at {process2:#x}: it belongs to those at {process1:#x}; `monitor breakpoints any`" in (
        gdb.text[seen:]
    )

    # gdb takes it out and puts it in again while other processes run, stepping included.
    gdb("break *kernel")
    three = [("kernel", 3), ("user", 1), ("kernel", 1), ("kernel", 2), ("user", 3)]
    assert _go(gdb, 10) == three * 2
    _go(gdb, 4)
    gdb("stepi 3")
    assert _go(gdb, 1) == [("user", 3)]
    listing = [line.split() for line in gdb("monitor breakpoints").splitlines()]
    assert listing[0] == ["process", "address", "kind", "page", "tables", "page", "hits", "passes"]
    by_address = {line[1]: line for line in listing[1:-1]}
    assert by_address["0x40000000"][:5] == ["2", "0x40000000", "break", f"{process1:#x}", f"{program1:#x}"]
    assert int(by_address["0x40000000"][5]) == 11
    assert int(by_address["0x40000000"][6]) == 6
    assert by_address[f"{kernel:#x}"][6] == "0"

    assert "under their own page tables" in gdb("monitor breakpoints own")
    assert _go(gdb, 4) == [("kernel", 3), ("user", 1)] * 2  # the kernel's was set in process 3
    assert "in every address space" in gdb("monitor breakpoints any")
    assert _go(gdb, 6) == [("kernel", 1), ("user", 2), ("kernel", 2), ("user", 3), ("kernel", 3), ("user", 1)]
    assert "the same page" in gdb("monitor breakpoints shared")
    assert _go(gdb, 3) == [("kernel", 1), ("kernel", 2), ("user", 3)]
    assert "there is no such rule; choose any, shared or own" in gdb("monitor breakpoints all")

    # Deleted, and the machine continued without it: it may be set for another process.
    gdb("delete")
    _to(gdb, 2)
    gdb(f"break *{USER}")
    assert _go(gdb, 2) == [("user", 2), ("user", 2)]

    gdb("delete")
    gdb("inferior 1")
    assert "exited with code 01" in gdb("continue")
    gdb.close()
    same(started.finish(), run(image("processes"), tmp_path))


def test_not_mapped_yet(gdb: Gdb, started: Served) -> None:
    gdb(f"break *{USER}")
    assert _go(gdb, 1) == [("user", 1)]
    assert _go(gdb, 3) == [("user", 3), ("user", 1), ("user", 3)]


def test_before_paging(gdb: Gdb, serve: Serve, image: Image) -> None:
    served = serve(image("processes"))
    served.connect(gdb)
    assert gdb.value("$cr0 & 0x80000000") == 0
    gdb("break *after_vmexit")
    gdb("stepi")
    after, tables = gdb.value("(long)&after_vmexit"), gdb.value("(long)&pml4")
    assert f"1        {after:#x}  break  -" in gdb("monitor breakpoints")
    while "after_vmexit" not in gdb("continue"):
        pass
    assert f"1        {after:#x}  break  {tables:#x}" in gdb("monitor breakpoints")
    assert "after_vmexit" in gdb("continue")


def test_a_watchpoint_stays_with_its_process(gdb: Gdb, started: Served) -> None:
    _to(gdb, 1)
    assert gdb.value(f"*(long *){COUNTER}") == 0x1001
    gdb(f"watch *(long *){COUNTER}")
    gdb("tbreak *kernel")
    gdb("continue")  # in process 2, which has changed its own counter
    assert gdb.value(f"*(long *){COUNTER}") == 0x2001
    for value in (0x1002, 0x1003, 0x1004):  # by processes 3, 1 and 3
        printed = gdb("continue")
        assert "Hardware watchpoint" in printed, printed
        assert gdb.value("*(long *)((long)&program1 + 16)") == value
