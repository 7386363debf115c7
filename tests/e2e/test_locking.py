"""Which threads gdb resumes: scheduler-locking, schedule-multiple; threads that come while it waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, attach
from tests.gdbstub.gdb import Gdb
from tests.gdbstub.serving import Wire
from vmdbg.boot.images import BootOptions, load

Serve = Callable[..., Served]


def both(gdb: Gdb, served: Served, hypervisor: Path) -> None:
    """Breakpoint 1 in the hypervisor, 2 in guest 2; both inferiors have stopped."""
    served.connect(gdb)
    gdb("break handle_exit if guest->vmcb->efer & 0x400")
    gdb("continue")
    attach(gdb, 2, hypervisor.parent / "guest64.elf")
    gdb("break work")
    while "Breakpoint 2, work" not in gdb("continue"):
        pass


@pytest.mark.parametrize("locking", ["on", "step", "replay", "off"])
def test_scheduler_locking(gdb: Gdb, serve: Serve, hypervisor: Path, locking: str) -> None:
    """With `on`, only the selected thread stops; the hypervisor runs for it all the same.  With `step`, while it steps."""
    both(gdb, serve(hypervisor), hypervisor)
    gdb(f"set scheduler-locking {locking}")
    gdb("inferior 2")
    printed = ""
    for _ in range(12):
        gdb("inferior 2")
        printed += gdb("continue")
    assert "Breakpoint 2, work" in printed
    assert ("Breakpoint 1, handle_exit" in printed) == (locking != "on"), printed
    gdb("inferior 2")
    if locking in ("on", "step"):
        for _ in range(30):  # over exits of the guest
            gdb("stepi 20")
            assert "is 2.1" in gdb("thread")


def test_schedule_multiple(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    both(gdb, serve(hypervisor), hypervisor)
    gdb("set schedule-multiple off")
    gdb("inferior 2")
    printed = "".join(gdb("continue") for _ in range(12))
    assert printed.count("Breakpoint 2, work") == 12
    assert "[inferior 1 ran past its breakpoint at" in printed
    gdb("inferior 1")
    assert "Breakpoint 1, handle_exit" in gdb("continue")
    gdb("set schedule-multiple on")
    printed = gdb("continue")
    while "Breakpoint 2, work" not in printed:
        printed = gdb("continue")


@pytest.mark.parametrize("non_stop", [False, True])
def test_new_threads_are_told(serve: Serve, image: Callable[[str], Path], non_stop: bool) -> None:
    elf = image("vcpus")
    symbols = {symbol.name: symbol.address for symbol in load(elf, BootOptions(1 << 24)).symbols}
    with Wire(serve(elf).port) as wire:
        wire.ask(b"qSupported:multiprocess+;swbreak+;QThreadEvents+")
        wire.ask(b"QStartNoAckMode")
        wire.socket.sendall(b"+")
        wire.ask(b"Z0,%x,1" % symbols["second_vcpu"])
        wire.send(b"vCont;c")
        while not (reply := wire.read()).startswith(b"T05thread:p1.1;"):
            assert reply.startswith(b"O"), reply
        if non_stop:
            assert wire.ask(b"QNonStop:1") == b"OK"
            assert wire.ask(b"vAttach;2") == b"OK"
            while wire.ask(b"vStopped") != b"OK":
                pass
        else:
            assert wire.ask(b"vAttach;2").startswith(b"T05thread:p2.1;")
        assert wire.ask(b"QThreadEvents:1") == b"OK"
        wire.ask(b"Hgp1.1")
        assert wire.ask(b"z0,%x,1" % symbols["second_vcpu"]) == b"OK"
        if not non_stop:
            wire.send(b"vCont;c")
            while (reply := wire.read()).startswith(b"O"):
                pass
            assert reply.startswith(b"T05thread:p2.2;create:;"), reply
            return
        assert wire.ask(b"vCont;c") == b"OK"
        while b"%Stop:T05thread:p2.2;create:;" not in wire.data:
            wire.data += wire.socket.recv(1 << 16)
