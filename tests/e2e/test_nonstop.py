"""Non-stop mode on real machines: one thread stands still, the others run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.served import Served, exits_of, run, same
from tests.gdbstub.gdb import GDBS, NonStopGdb
from tests.patience import until

Serve = Callable[..., Served]
Image = Callable[[str], Path]


@pytest.fixture(params=GDBS, ids=lambda path: path.replace("/", "_"))
def non_stop(request: pytest.FixtureRequest) -> Iterator[NonStopGdb]:
    one = NonStopGdb(request.param)
    yield one
    one.close()


def exits(gdb: NonStopGdb, guest: int) -> int:
    """Number of the guest's last exit, counted over the whole machine."""
    return exits_of(gdb, guest)[-1][0]


def ticks(gdb: NonStopGdb) -> int:
    return int(gdb("monitor time").split()[-2])


def later(found: Callable[[], int], before: int) -> bool:
    """Whether a number gets larger."""
    until(lambda: found() > before, "a larger number")
    return True


def test_one_guest_stands_still(non_stop: NonStopGdb, serve: Serve, hypervisor: Path) -> None:
    gdb = non_stop
    served = serve(hypervisor, "--append", "loop=0")
    gdb.connect(served.port)
    gdb("break handle_exit if guest->vmcb->efer & 0x400")
    gdb.mi("-exec-continue --thread 1")
    assert gdb.stop()["reason"] == "breakpoint-hit"
    gdb("delete")
    gdb.mi("-exec-continue --thread 1")
    gdb.attach(2, hypervisor.parent / "guest64.elf")  # the machine runs meanwhile
    gdb("break work")
    gdb.mi("-exec-continue --thread 2")
    stop = gdb.stop()
    assert (stop["frame"]["func"], stop["thread-id"]) == ("work", "2")

    # The hypervisor and the other guests go on; this one does not, and what it has in memory stays.
    counter, last, others, now = gdb.value("counter"), exits(gdb, 2), exits(gdb, 3), ticks(gdb)
    assert later(lambda: exits(gdb, 3), others + 100)
    assert later(lambda: ticks(gdb), now)
    assert (gdb.value("counter"), "work (round=" in gdb("backtrace 1")) == (counter, True)
    pc = gdb.value("$pc")
    since = [what.split()[0] for number, what in exits_of(gdb, 2, 100000) if number > last]
    assert since
    assert set(since) == {"INTR"}  # how its hypervisor gets the CPU back
    assert "* 2.1" in gdb("info threads")
    assert gdb("info threads 1.1").rstrip().endswith("(running)")
    assert gdb.value("$pc") == pc

    # Writes, also to what runs: the hypervisor's variable.
    gdb("print checksum = 0x1000000000")
    gdb.mi("-exec-next --thread 2")
    assert gdb.stop()["reason"] == "end-stepping-range"
    gdb("inferior 1")
    before = gdb.value("host_ticks")
    assert later(lambda: gdb.value("host_ticks"), before)
    gdb("print host_ticks = 1000000")
    assert later(lambda: gdb.value("host_ticks"), 1000000)

    # A watchpoint of the guest, while all run.
    gdb("inferior 2")
    gdb("watch counter")
    gdb.mi("-exec-continue --thread 2")
    stop = gdb.stop()
    assert (stop["reason"], stop["thread-id"]) == ("watchpoint-trigger", "2")
    assert gdb("info threads 1.1").rstrip().endswith("(running)")
    gdb("delete")
    gdb("inferior 1")

    # A breakpoint of the hypervisor while it runs: it stops, the guest's next step is answered all the same.
    gdb("break handle_exit")
    assert gdb.stop()["thread-id"] == "1"
    gdb("delete")
    gdb("inferior 2")
    for _ in range(3):
        gdb.mi("-exec-continue --thread 1")
        gdb.mi("-exec-step-instruction --thread 2")
        assert gdb.stop()["thread-id"] == "2"
        gdb.mi("-exec-interrupt --thread 1")
        assert gdb.stop()["thread-id"] == "1"
    now = ticks(gdb)
    time.sleep(0.1)
    assert ticks(gdb) == now  # nobody runs
    assert gdb.value("checksum") >= 0x1000000000

    # Detached, it runs on; killed, everything ends.
    gdb.mi("-exec-continue --thread 1")
    last = exits(gdb, 2)
    gdb("detach")
    gdb("inferior 1")
    assert later(lambda: exits(gdb, 2), last + 20)
    assert "killed" in gdb("kill")
    gdb("break handle_exit")
    gdb.mi("-exec-run")
    assert gdb.stop()["reason"] == "breakpoint-hit"


def test_the_hypervisor_stands_still(non_stop: NonStopGdb, serve: Serve, hypervisor: Path) -> None:
    """Its CPU runs the guest until the exit, and stops before the handler's first instruction."""
    gdb = non_stop
    served = serve(hypervisor, "--append", "guests=1 loop=0")
    gdb.connect(served.port)
    gdb("break handle_exit if guest->vmcb->efer & 0x400")
    gdb.mi("-exec-continue --thread 1")
    gdb.stop()
    gdb("delete")
    gdb.attach(2, hypervisor.parent / "guest64.elf")
    gdb.mi("-exec-continue --all")
    gdb("break work")
    gdb.stop()
    gdb("delete")
    gdb.mi("-exec-interrupt --thread 1")
    assert gdb.stop()["frame"]["func"] == "vmexit"
    for _ in range(3):  # the guest's own instructions
        gdb.mi("-exec-step-instruction --thread 2")
        assert gdb.stop()["thread-id"] == "2"
    last = exits(gdb, 2)
    gdb.mi("-exec-continue --thread 2")
    assert later(lambda: exits(gdb, 2), last)
    now, last = ticks(gdb), exits(gdb, 2)
    assert (ticks(gdb), exits(gdb, 2)) == (now, last)
    gdb("thread 1.1")
    assert "=> 0x" in gdb("x/i $pc")
    assert "<vmexit>" in gdb("x/i $pc")
    assert "(in host)" in gdb("info threads 2.1")
    gdb.mi("-exec-continue --thread 1")
    assert later(lambda: exits(gdb, 2), last + 10)


def test_processors_one_by_one(non_stop: NonStopGdb, serve: Serve, image: Image) -> None:
    """Two CPUs, one of them stopped; a vCPU that both would run."""
    gdb = non_stop
    elf = image("smp")
    served = serve(elf, "--cpus", "2")
    gdb.connect(served.port, stops=2)
    gdb("tbreak first_cpu")
    gdb.mi("-exec-continue --all")
    stop = gdb.stop()
    assert stop["thread-id"] == "1"
    low = "*(int*)0x9000"
    before = gdb.value(low)
    assert later(lambda: gdb.value(low), before + 1000)
    assert gdb.value("*(long*)&count") == 0
    gdb.mi("-exec-interrupt --thread 2")
    gdb.stop()
    before = gdb.value(low)
    assert gdb.value(low) == before
    gdb.mi("-exec-continue --all")
    assert re.fullmatch(r"exited(-normally)?", gdb.stop()["reason"])


def test_nothing_held_is_the_undebugged_run(non_stop: NonStopGdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor)
    non_stop.connect(served.port)
    non_stop.mi("-exec-continue --all")
    assert non_stop.stop()["reason"] == "exited"
    non_stop.close()
    same(served.finish(), undebugged)
