"""Stepping, interrupting, detaching, killing, running again, connecting again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.served import Served, attach, reach, run, same
from tests.gdbstub.gdb import Gdb, captured
from tests.gdbstub.serving import Wire

Serve = Callable[..., Served]
Image = Callable[[str], Path]


def test_steps_over_intercepted_instructions(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path) -> None:
    elf = image("vcpus")
    undebugged = run(elf, tmp_path)
    served = serve(elf)
    served.connect(gdb)
    reach(gdb, "again")

    # The hypervisor steps over VMRUN to behind the #VMEXIT.
    gdb("break *run_until_vmmcall")
    gdb("continue")
    gdb("delete")
    gdb("stepi")
    assert "<after_vmexit>" in gdb("x/i $pc")
    labels = ["guest", "increment", "at_cpuid", "at_out", "at_hlt", "at_vmmcall"]
    address = {name: gdb.value(f"(long)&{name}") for name in labels}

    # A guest steps to its own next instruction, though the hypervisor emulates it, and other guests run meanwhile.
    attach(gdb, 2, elf)
    gdb(f"break *{address['increment']:#x} thread 2.1")
    assert "Thread 2.1" in gdb("continue")
    gdb("delete")
    seen = []
    for _ in range(18):
        assert "Thread 2.1" in gdb("info threads 2.1")
        gdb("stepi")
        seen.append(gdb.value("$pc"))
    lap = [address["at_cpuid"], address["at_out"], address["at_hlt"], address["at_hlt"] + 1, address["at_hlt"] + 6,
           address["at_vmmcall"], address["at_vmmcall"] + 3, address["guest"], address["increment"]]  # fmt: skip
    assert seen == lap + lap
    gdb("inferior 1")
    served.ends_as(gdb, undebugged)


def test_steps_pass_over_interrupts(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    undebugged = run(hypervisor, tmp_path, "--append", "guests=1 tick=3000")
    served = serve(hypervisor, "--append", "guests=1 tick=3000")
    served.connect(gdb)
    gdb("monitor stop-on vmexit intr")
    gdb("continue")
    attach(gdb, 2, hypervisor.parent / "guest64.elf")
    gdb("tbreak work")
    gdb("continue")
    ticks = gdb.value("ticks")
    functions = set()
    for _ in range(400):
        gdb("next")
        functions.add(captured(r"#0 .*?(\w+) \(", gdb("where 1")))
    assert functions == {"work"}
    gdb("stepi 3000")
    functions = set()
    for _ in range(100):
        gdb("stepi")
        functions.add(captured(r"#0 .*?(\w+) \(", gdb("where 1")))
    assert functions <= {"work", "main"}
    for _ in range(20):
        gdb("next 200")
    assert gdb.value("ticks") > ticks

    # Into a function and out of it.
    gdb("tbreak work")
    gdb("continue")
    assert "Value returned is" in gdb("finish")
    printed = gdb("step")
    for _ in range(40):
        if "work (" in printed:
            break
        printed = gdb("step")
    assert "work (" in printed, printed

    # The hypervisor, whose own timer interrupts while a guest runs.
    gdb("inferior 1")
    gdb("delete")
    gdb("tbreak schedule.c:64")
    gdb("continue")
    assert "schedule.c" in gdb("frame")
    for _ in range(12):
        gdb("next")
        assert "#0  schedule" in gdb("where 1")
    gdb("delete")
    served.ends_as(gdb, undebugged)


def test_stop_on_vmexit(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    served = serve(hypervisor)
    served.connect(gdb)
    assert "Catchpoint 1 (once vmexit npf)" in gdb("monitor stop-on vmexit npf")
    printed = gdb("continue")
    assert "#VMEXIT NPF of guest" in printed
    assert "vmexit () at" in printed
    assert "nonsense: a code is a number" in gdb("monitor stop-on vmexit nonsense")
    assert "there is no guest 9" in gdb("monitor stop-on vmexit npf 9")
    attach(gdb, 3, hypervisor.parent / "guestpae.elf")
    gdb("monitor stop-on vmexit 0x81 3")
    printed = gdb("continue")
    assert "#VMEXIT VMMCALL of guest 3" in printed
    assert "Thread 2.1" in printed
    assert "vmmcall" in gdb("x/i $pc")
    exits = gdb("monitor exits 3")
    assert "VMMCALL" in exits


def test_interrupts(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    """^C right behind continue, and later."""
    served = serve(hypervisor, "--append", "loop=0")
    wire = Wire(served.port)
    wire.ask(b"qSupported:multiprocess+;swbreak+;vContSupported+")
    wire.ask(b"QStartNoAckMode")
    chance = random.Random(1)
    for count in range(200):
        wire.send(b"vCont;c:p1.-1")
        if count % 2:
            time.sleep(chance.random() * 0.004)
        wire.socket.sendall(b"\x03")
        reply = wire.read()
        while reply.startswith(b"O"):
            reply = wire.read()
        assert reply.startswith(b"T02thread:p1.1;"), reply
    wire.socket.close()

    # gone without a word: the machine is stopped and well
    time.sleep(0.05)
    served.connect(gdb)
    first = gdb("monitor time")
    time.sleep(0.05)
    assert gdb("monitor time") == first
    for _ in range(20):
        gdb.start("continue")
        time.sleep(chance.random() * 0.02)
        gdb.interrupt()
        assert "received signal SIGINT" in gdb.wait()
    assert gdb("monitor time") != first

    # A client for whom no inferior is left is refused, the others are left alone.
    others = []
    while True:
        others.append(Wire(served.port))
        others[-1].send(b"qC")
        reply = others[-1].read()
        if reply.startswith(b"E"):
            break
        assert reply == b"QC1"
    assert b"another client is connected, and no process is left that nobody debugs" in reply
    other = Gdb()
    printed = other(f"target extended-remote 127.0.0.1:{served.port}")
    other.close()
    assert "no process is left that nobody debugs" in printed, printed
    for wire in others:
        wire.socket.close()
    assert "Thread 1.1" in gdb("info threads")

    # `disconnect` leaves the machine stopped; gdb finds it so.
    attach(gdb, 2, hypervisor.parent / "guest64.elf")
    gdb("break work")
    assert "Breakpoint 1, work" in gdb("continue")
    time_before = gdb("monitor time")
    gdb("disconnect")
    time.sleep(0.05)
    gdb("inferior 1")
    served.connect(gdb)
    assert gdb("monitor time") == time_before
    gdb("stepi")


def test_detach_lets_the_machine_run(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor)
    served.connect(gdb)
    gdb("tbreak on_nested_page_fault")
    gdb("continue")
    attach(gdb, 2, hypervisor.parent / "guest64.elf")
    gdb("break work")
    assert "Breakpoint 2, work" in gdb("continue")
    assert "[Inferior 2 (process 2) detached]" in gdb("detach")
    gdb("inferior 1")
    gdb("tbreak exits.c:245")
    assert "Temporary breakpoint 3, " in gdb("continue")
    assert "[Inferior 1 (process 1) detached]" in gdb("detach")
    gdb.close()
    same(served.finish(), undebugged)


def test_kill_and_run_again(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    undebugged = run(hypervisor, tmp_path)
    served = serve(hypervisor)
    served.connect(gdb)
    gdb("break handle_exit")
    assert "Breakpoint 1, handle_exit" in gdb("continue")
    printed = gdb("run")
    assert "Breakpoint 1, handle_exit" in printed, printed
    attach(gdb, 2)
    assert "Can't kill process" in gdb("kill")
    gdb("inferior 1")
    assert "[Inferior 1 (process 1) killed]" in gdb("kill")
    printed = gdb("run guests=3")
    assert "Breakpoint 1, handle_exit" in printed, printed
    assert "handle_exit" in gdb("bt 1")
    gdb("delete")
    gdb("continue")
    assert b"guest 3: done" in served.serial.read_bytes()
    assert b"guest 1" not in served.serial.read_bytes()
    gdb("set args")
    printed = gdb("run")
    assert "exited with code 01" in printed
    gdb.close()
    outcome = served.finish()
    assert outcome == undebugged
