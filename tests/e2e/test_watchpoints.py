"""Watchpoints: every kind of store, page tables that move, other address spaces, the processor's own accesses, devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gdbstub.target import CONTINUE, BreakpointKind, Output, Stop, ThreadId
from tests.e2e.served import Served, run, same
from tests.gdbstub.gdb import Gdb
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine
from vmdbg.watchpoints import Fired, Space, Touch, Watchpoint, Watchpoints

Serve = Callable[..., Served]
Image = Callable[[str], Path]

STORES = (
    "mov", "inc", "xadd", "xchg", "cmpxchg", "byte", "overlap", "push", "call", "pushf", "movups", "fnstcw", "fstpt", "fxsave",
    "string", "string", "movsb", "stosq", "sgdt", "setcc", "movnti",
)  # fmt: skip
"""Names of tests/e2e/images/watch.S: where pc is after each store to the cell.  An iteration of REP MOVSB is a store."""


def stopped(gdb: Gdb, serve: Serve, elf: Path, place: str, *arguments: str) -> Served:
    """Connected, and at a place."""
    served = serve(elf, *arguments)
    served.connect(gdb)
    gdb(f"symbol-file {elf}")
    gdb(f"tbreak {place}")
    gdb("continue")
    return served


@pytest.mark.parametrize("runtime", ["native", "python"])
def test_each_store_stops_behind_itself(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path, runtime: str) -> None:
    elf = image("watch")
    undebugged = run(elf, tmp_path)
    served = stopped(gdb, serve, elf, "*main", "--runtime", runtime)
    gdb("watch *(long *)&cell")
    for name in STORES:
        printed = gdb("continue")
        assert "Hardware watchpoint 2" in printed, (name, printed)
        assert gdb.value("$pc") == gdb.value(f"(long)&at_{name}"), (name, gdb("x/2i $pc"))
    gdb("delete")
    assert "exited with code 01" in gdb("continue")
    gdb.close()
    same(served.finish(), undebugged)


@pytest.mark.parametrize("length", [1, 3, 8, 100, 4096])
def test_any_length_and_alignment(gdb: Gdb, serve: Serve, image: Image, length: int) -> None:
    """The last byte of the range is that of the first store, the first that of none."""
    stopped(gdb, serve, image("watch"), "*main")
    start = gdb.value("(long)&cell") - length + 1
    gdb(f"watch *(char (*)[{length}]){start:#x}")
    assert "Hardware watchpoint 2" in gdb("continue")
    assert gdb.value("$pc") == gdb.value("(long)&at_mov")
    gdb("delete")
    start = gdb.value("(long)&cell") + 8
    gdb(f"watch *(char (*)[{length}]){start:#x}")
    printed = gdb("continue")
    assert gdb.value("$pc") != gdb.value("(long)&at_inc"), printed


def test_it_follows_the_page_tables(gdb: Gdb, serve: Serve, image: Image) -> None:
    """INVLPG moves the watched address to another page, to none, and back; what is no longer behind it is not watched."""
    stopped(gdb, serve, image("watch"), "*window")
    gdb("watch *(long *)0x3fe00000")
    for name, value in (("first", 1), ("second", 2)):
        printed = gdb("continue")
        assert f"New value = {value}\n" in printed, printed
        assert gdb.value("$pc") == gdb.value(f"(long)&at_{name}")
    printed = gdb("continue")  # the store to the first page, by another address, is passed
    assert gdb.value("$pc") == gdb.value("(long)&at_third"), printed
    gdb("delete")
    assert "exited with code 01" in gdb("continue")


def test_the_processors_own_accesses(gdb: Gdb, serve: Serve, image: Image) -> None:
    stopped(gdb, serve, image("watch"), "*walked")
    gdb("watch *((long *)&table + 1)")
    printed = gdb("continue")
    assert re.search(r"was written by the processor's walk of the page tables, for 0x3fe01000, CPU 0 of the", printed), printed
    old, new = (int(value) for value in re.findall(r"(?:Old|New) value = (\d+)", printed))
    assert old ^ new == 0x20
    assert gdb.value("$pc") == gdb.value("(long)&at_walked")
    gdb("delete")
    gdb("tbreak *loads_ds")
    gdb("continue")
    gdb("rwatch *((long *)&own_gdt + 2)")
    printed = gdb("continue")
    assert "was read by the processor's access to the GDT" in printed, printed
    assert gdb.value("$pc") == gdb.value("(long)&loaded")


def test_other_address_spaces(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    served = serve(hypervisor)
    served.connect(gdb)
    gdb("tbreak on_nested_page_fault")
    gdb("continue")
    assert "watchpoint 1: 8 bytes at gpa:0x109000, which is spa 0x10f6000" in gdb("monitor watch 2:gpa:0x109000")
    assert "watchpoint 2: 4 bytes at spa:0x10f6000" in gdb("monitor watch spa:0x10f6000 4 a")
    assert "no guest has this number" in gdb("monitor watch 9:gpa:0x1000")
    assert "leads to no memory" in gdb("monitor watch 2:gpa:0xf00000000")
    printed = gdb("continue")
    assert "watchpoint 2 on spa:0x10f6000 was read by an instruction, guest 2 at 0xffffffff8010" in printed, printed
    gdb("monitor watch delete 2")
    listed = gdb("monitor watch")
    assert "gpa:0x109000" in listed
    assert "spa:0x10f6000" not in listed
    # Guest 2 is not attached, so the stop of its watchpoint goes to nobody: the hypervisor's own is another matter.
    gdb("monitor watch delete 1")
    gdb("monitor watch spa:0x10f6000 8 w")
    assert "was written by an instruction, guest 2 at" in gdb("continue")
    assert "there is no watchpoint 7" in gdb("monitor watch delete 7")


def test_ranges(gdb: Gdb, serve: Serve, image: Image) -> None:
    elf = image("watch")
    served = serve(elf)
    served.connect(gdb)
    gdb(f"symbol-file {elf}")
    start, end = gdb.value("(long)&at_inc"), gdb.value("(long)&at_cmpxchg")
    assert "range 1: stops" in gdb(f"monitor break-range {start:#x} {end:#x}")
    seen = []
    for _ in range(4):
        assert "range 1 was entered at" in gdb("continue")
        seen.append(gdb.value("$pc"))
    assert seen[0] == start
    assert seen == sorted(set(seen))
    assert seen[-1] < end
    gdb("monitor break-range delete 1")
    assert "exited with code 01" in gdb("continue")


def debugged(elf: Path) -> tuple[Machine, Debugger, dict[str, int]]:
    machine = Machine(elf, Config(memory=64 << 20))
    debugger = Debugger(machine)
    debugger.attach(1)
    return machine, debugger, {symbol.name: symbol.address for symbol in machine.image.symbols}


def resume(debugger: Debugger) -> list[Stop | Output]:
    """What happens until the next stop."""
    debugger.resume({ThreadId(1, 1): CONTINUE})
    seen: list[Stop | Output] = []
    while not seen or not isinstance(seen[-1], Stop):
        event = debugger.run_slice()
        if isinstance(event, Stop | Output):
            seen.append(event)
    return seen


def test_a_device_is_named(image: Image) -> None:
    machine, debugger, symbols = debugged(image("watch"))
    context = debugger.context(ThreadId(1, 1))
    point = debugger.watchpoints.add(BreakpointKind.WRITE, Space.SPA, symbols["first"], 16, 1, context)
    debugger.resume({ThreadId(1, 1): CONTINUE})
    machine.ram.dma("the disk", symbols["first"] + 15, b"\1")
    event = debugger.run_slice()
    assert isinstance(event, Stop)
    assert event.text.startswith(f"[{point} was written by the disk")
    machine.close()


def test_thousands(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the one that is hit is looked at: the others are not even compared."""
    machine, debugger, symbols = debugged(image("watch"))
    thread = ThreadId(1, 1)
    for number in range(5000):
        debugger.insert_breakpoint(BreakpointKind.WRITE, 0x800000 + 512 * number, 8, thread)
    debugger.insert_breakpoint(BreakpointKind.WRITE, symbols["cell"], 8, thread)
    for number in range(5000):
        debugger.insert_breakpoint(BreakpointKind.SOFTWARE, 0x900000 + number, 1, thread)
    looked: list[Watchpoint] = []

    def look(self: Watchpoints, point: Watchpoint, touched: list[Touch]) -> Fired | None:
        looked.append(point)
        return original(self, point, touched)

    original = Watchpoints._look
    monkeypatch.setattr(Watchpoints, "_look", look)
    (stop,) = resume(debugger)
    assert isinstance(stop, Stop)
    assert stop.address == symbols["cell"]
    assert len(looked) == 1
    machine.close()
