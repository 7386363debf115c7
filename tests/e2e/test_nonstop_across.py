"""Non-stop mode across worlds: guests held under a hypervisor in a guest, and steps that change worlds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.served import Served, exits_of
from tests.e2e.test_nested import matryoshka
from tests.gdbstub.gdb import GDBS, NonStopGdb, captured
from tests.patience import until

__all__ = ["matryoshka"]

Serve = Callable[..., Served]
Image = Callable[[str], Path]


@pytest.fixture(params=GDBS, ids=lambda path: path.replace("/", "_"))
def gdb(request: pytest.FixtureRequest) -> Iterator[NonStopGdb]:
    one = NonStopGdb(request.param)
    yield one
    one.close()


def running(gdb: NonStopGdb, thread: str) -> bool:
    return gdb(f"info threads {thread}").rstrip().endswith("(running)")


def later(found: Callable[[], bool]) -> bool:
    """Whether it becomes true."""
    until(found)
    return True


def go(gdb: NonStopGdb, *threads: int) -> None:
    for thread in threads:
        gdb.mi(f"-exec-continue --thread {thread}")


def at(gdb: NonStopGdb, thread: str) -> str:
    gdb(f"thread {thread}")
    gdb("maintenance flush register-cache")
    return captured(r"<([\w+]+)>", gdb("x/i $pc"))


def test_guests_under_a_hypervisor_in_a_guest(gdb: NonStopGdb, serve: Serve, matryoshka: Path) -> None:
    """Thread 1 is the machine's hypervisor, 2 the one in guest 2, 3 its guest, the leaf."""
    symbols = matryoshka.with_suffix(".debug")
    served = serve(matryoshka, "--append", "depth=2")
    gdb.connect(served.port)
    gdb("break tables_create if count == 64")
    go(gdb, 1)
    assert gdb.stop()["frame"]["func"] == "tables_create"
    gdb("delete")
    gdb("monitor stop-on vmexit cpuid")
    go(gdb, 1)
    gdb.stop()
    assert "#VMEXIT CPUID of guest 3" in gdb("monitor why")
    for pid in (2, 3):
        gdb(f"monitor symbols {pid} {symbols}")
        gdb.attach(pid, symbols)

    # The leaf's step runs both hypervisors, held as they are.
    pc = gdb.value("$pc")
    assert "cpuid" in gdb("x/i $pc")
    gdb("thread 3.1")
    gdb.mi("-exec-step-instruction --thread 3")
    assert gdb.stop()["thread-id"] == "3"
    assert gdb.value("$pc") == pc + 2

    gdb("break primes_below thread 3.1")
    go(gdb, 1, 2, 3)
    stop = gdb.stop()
    assert (stop["thread-id"], stop["frame"]["func"]) == ("3", "primes_below")
    gdb("delete")

    # Its hypervisor, in guest 2, stands still: the leaf runs until it needs that, and the CPU waits in guest 2.
    gdb.mi("-exec-interrupt --thread 2")
    assert gdb.stop()["thread-id"] == "2"
    go(gdb, 3)
    assert later(lambda: "in guest 2" in gdb("info threads 1.1"))
    before = exits_of(gdb, 3)
    gdb("thread 2.1")
    gdb("maintenance flush register-cache")
    where = gdb.value("$pc")
    time.sleep(0.2)
    gdb("maintenance flush register-cache")
    assert (gdb.value("$pc"), exits_of(gdb, 3)) == (where, before)
    assert not running(gdb, "2.1")
    assert running(gdb, "1.1")
    assert running(gdb, "3.1")

    # It goes on, and so does the leaf.
    gdb("thread 3.1")
    gdb("break hypercall thread 3.1")
    go(gdb, 2)
    stop = gdb.stop()
    assert (stop["thread-id"], stop["frame"]["func"]) == ("3", "hypercall")
    gdb("delete")
    gdb("break timer_interrupt thread 2.1")
    gdb.mi("-exec-finish --thread 3")
    assert gdb.stop()["reason"] == "function-finished"

    # The leaf stands still, and its tick arrives at its hypervisor all the same.
    stop = gdb.stop()
    assert (stop["thread-id"], stop["frame"]["func"]) == ("2", "timer_interrupt")
    assert gdb.value("timer_expired") == 0
    gdb("thread 2.1")
    assert gdb.value("timer_expired") == 0
    gdb("delete")
    gdb.mi("-exec-finish --thread 2")
    gdb.stop()
    assert gdb.value("timer_expired") == 1
    go(gdb, 2)

    gdb("tbreak put_char thread 3.1")
    go(gdb, 3)
    assert gdb.stop()["frame"]["func"] == "put_char"

    # The machine's hypervisor stands still: it runs for steps alone.
    gdb.mi("-exec-interrupt --thread 1")
    assert gdb.stop()["thread-id"] == "1"
    gdb("thread 3.1")
    for _ in range(3):
        gdb.mi("-exec-step-instruction --thread 3")
        assert gdb.stop()["thread-id"] == "3"

    # From the leaf to it, and back, by way of the hypervisor in guest 2.
    gdb("monitor follow host")
    while "[the step has left guest 3 by #VMEXIT IOIO]" not in gdb("monitor why"):
        gdb.mi("-exec-step-instruction --thread 3")
        assert gdb.stop()["thread-id"] == "3"
    assert at(gdb, "1.1") == "vmexit"
    gdb("monitor step-into-guest 3")
    go(gdb, 1)
    assert gdb.stop()["thread-id"] == "1"
    assert "[VMRUN has entered guest 3, which stands still]" in gdb("monitor why")
    gdb("monitor follow guest")
    go(gdb, 1, 3)
    assert sorted(gdb.stop()["reason"] for _ in range(3)) == ["exited", "exited-normally", "exited-normally"]


def started(gdb: NonStopGdb, serve: Serve, elf: Path) -> None:
    """The first guest is at its CPUID, and its hypervisor runs."""
    gdb.connect(serve(elf).port)
    gdb("break after_vmexit")
    go(gdb, 1)
    gdb.stop()
    gdb("delete")
    gdb.attach(2, elf)
    gdb("tbreak *at_cpuid thread 2.1")
    go(gdb, 2, 1)
    assert gdb.stop()["thread-id"] == "2"
    assert running(gdb, "1.1")


def test_a_step_of_a_guest_ends_in_the_hypervisor(gdb: NonStopGdb, serve: Serve, image: Image) -> None:
    """It is over for both: the guest's thread, and the hypervisor's if that ran, stand still."""
    started(gdb, serve, image("vcpus"))
    gdb("monitor follow host")
    gdb.mi("-exec-step-instruction --thread 2")
    stops = {stop["thread-id"]: stop for stop in (gdb.stop(), gdb.stop())}
    assert stops["1"]["frame"]["func"] == "after_vmexit"
    assert stops["2"]["frame"]["func"] == "at_cpuid"
    assert "[the step has left guest 2 by #VMEXIT CPUID]" in gdb("monitor why")
    assert (at(gdb, "1.1"), at(gdb, "2.1")) == ("after_vmexit", "at_cpuid")  # they stay there
    assert not running(gdb, "1.1")
    assert not running(gdb, "2.1")

    # The hypervisor stands still, and runs for steps alone, as far as these need it.
    gdb.mi("-exec-step-instruction --thread 2")
    assert gdb.stop()["thread-id"] == "2"
    assert at(gdb, "2.1") == "at_out"
    assert "in guest 2" in gdb("info threads 1.1")
    gdb.mi("-exec-step-instruction --thread 2")
    assert gdb.stop()["thread-id"] == "2"
    assert "[the step has left guest 2 by #VMEXIT IOIO]" in gdb("monitor why")
    assert (at(gdb, "2.1"), at(gdb, "1.1")) == ("at_out", "after_vmexit")
    assert "in guest 2" not in gdb("info threads 1.1")

    # Nobody debugs the hypervisor: it goes on.
    gdb("inferior 1")
    gdb("detach")
    gdb("inferior 2")
    gdb.mi("-exec-step-instruction --thread 2")
    assert gdb.stop()["thread-id"] == "2"
    assert later(lambda: at(gdb, "2.1") == "at_hlt+1")
    gdb("monitor follow guest")
    gdb.mi("-exec-step-instruction --thread 2")
    assert gdb.stop()["thread-id"] == "2"
    assert at(gdb, "2.1") == "at_hlt+6"


def test_vmrun_stops_at_a_guests_first_instruction(gdb: NonStopGdb, serve: Serve, image: Image) -> None:
    started(gdb, serve, image("vcpus"))
    gdb("inferior 1")
    gdb("tbreak *run_until_vmmcall if $rax == (long)&vmcb1")
    go(gdb, 2)
    assert gdb.stop()["thread-id"] == "1"

    # The guest runs, for gdb: it stops, while its hypervisor's step over VMRUN has still to end.
    gdb("monitor step-into-guest 2")
    gdb.mi("-exec-step-instruction --thread 1")
    stop = gdb.stop()
    assert (stop["thread-id"], stop["frame"]["func"]) == ("2", "at_out")
    assert "[VMRUN has entered guest 2]" in gdb("monitor why")
    assert running(gdb, "1.1")
    go(gdb, 2)
    stop = gdb.stop()
    assert (stop["thread-id"], stop["frame"]["func"], stop["reason"]) == ("1", "after_vmexit", "end-stepping-range")

    # It stands still: the hypervisor's CPU stops, in the guest.
    gdb.mi("-exec-interrupt --thread 2")
    assert gdb.stop()["thread-id"] == "2"
    for command in ("-exec-continue", "-exec-step-instruction"):
        gdb("inferior 1")
        gdb("tbreak *run_until_vmmcall if $rax == (long)&vmcb1")
        go(gdb, 1)
        assert gdb.stop()["thread-id"] == "1"
        gdb("monitor step-into-guest 2")
        gdb.mi(f"{command} --thread 1")
        assert gdb.stop()["thread-id"] == "1"
        assert "[VMRUN has entered guest 2, which stands still]" in gdb("monitor why")
        assert "in guest 2" in gdb("info threads 1.1")
        where = at(gdb, "2.1")
        assert at(gdb, "2.1") == where
        gdb.mi("-exec-step-instruction --thread 2")
        assert gdb.stop()["thread-id"] == "2"
        assert at(gdb, "2.1") != where
        go(gdb, 2)
        assert later(lambda: "in guest 2" not in gdb("info threads 1.1"))
        gdb.mi("-exec-interrupt --thread 2")
        assert gdb.stop()["thread-id"] == "2"
