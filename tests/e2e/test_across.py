"""Steps across worlds: vCPUs that move, steps that end in the hypervisor, in a guest, in a handler; who stops at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.e2e.served import Served, attach, run
from tests.gdbstub.gdb import Gdb, captured
from tests.gdbstub.serving import Wire
from vmdbg.boot.images import BootOptions, load

Serve = Callable[..., Served]
Image = Callable[[str], Path]


def at(gdb: Gdb) -> str:
    """The symbol that the selected thread is at."""
    found = re.search(r"<([\w+]+)>", gdb("x/i $pc"))
    assert found is not None
    return found[1]


def test_steps_follow_a_vcpu_from_cpu_to_cpu(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path) -> None:
    elf = image("moving")
    undebugged = run(elf, tmp_path, "--cpus", "2")
    served = serve(elf, "--cpus", "2")
    served.connect(gdb)
    gdb("tbreak after_vmexit")
    gdb("continue")
    attach(gdb, 2, elf)
    gdb("tbreak *increment thread 2.1")
    gdb("continue")
    seen, cpus = [], set()
    for _ in range(18):
        gdb("stepi")
        assert "* 2.1" in gdb("info threads 2.1")
        seen.append(at(gdb))
        cpus.add(captured(r"running on CPU (\d)", gdb("info threads 2.1")))
    lap = ["at_cpuid", "at_out", "at_out+2", "at_hlt", "at_hlt+1", "increment"]
    assert seen == lap * 3
    assert cpus == {"0", "1"}

    # advance and until, over exits of the guest; a false condition on the way.
    gdb("advance *at_hlt")
    assert at(gdb) == "at_hlt"
    gdb("advance *at_out")
    assert at(gdb) == "at_out"
    gdb("tbreak *at_out if *(long*)0x400000 == 40")
    assert "Temporary breakpoint" in gdb("continue")
    assert gdb.value("*(long*)0x400000") == 40

    # To the hypervisor and back: whichever CPU the guest is on.
    assert "ends in the hypervisor" in gdb("monitor follow host")
    assert at(gdb) == "at_out"
    printed = gdb("stepi")
    assert "[the step has left guest 2 by #VMEXIT IOIO]" in printed
    assert at(gdb) == "after_vmexit"
    assert "Thread 1." in gdb("thread")
    why = gdb("monitor why")
    assert "stopped at" in why
    assert re.search(r"guest 2 has left there last by #VMEXIT IOIO at 0x[0-9a-f]+, EXITINFO1 0x[0-9a-f]+", why)
    assert "the next VMRUN of any guest" in gdb("monitor step-into-guest")
    printed = gdb("continue")
    assert "[VMRUN has entered guest 2]" in printed
    assert "Thread 2.1" in gdb("thread")
    assert at(gdb) == "at_out+2"
    assert "at the guest's next instruction" in gdb("monitor follow guest")
    gdb("stepi 2")
    assert at(gdb) == "at_hlt+1"

    gdb("inferior 1")
    gdb("delete")
    served.ends_as(gdb, undebugged)


def test_a_range_is_one_round_trip(serve: Serve, image: Image) -> None:
    """A lap of a guest with four exits in it, but for its last instruction; then out of it, where a handler would be."""
    elf = image("vcpus")
    symbols = {symbol.name: symbol.address for symbol in load(elf, BootOptions(1 << 24)).symbols}
    start, end = symbols["increment"], symbols["at_vmmcall"]
    with Wire(serve(elf).port) as wire:
        wire.ask(b"qSupported:multiprocess+;swbreak+")
        wire.ask(b"QStartNoAckMode")
        wire.socket.sendall(b"+")
        wire.ask(b"Z0,%x,1" % symbols["again"])
        assert stop(wire, b"vCont;c").startswith(b"T05thread:p1.1;")
        assert wire.ask(b"vAttach;2").startswith(b"T05thread:p2.1;")
        wire.ask(b"Z0,%x,1" % start)
        assert stop(wire, b"vCont;c:p2.-1").startswith(b"T05thread:p2.1;")
        wire.ask(b"z0,%x,1" % start)
        for _ in range(3):
            reply = stop(wire, b"vCont;r%x,%x:p2.1;c:p2.-1" % (start, end))
            assert b"10:%b" % end.to_bytes(8, "little").hex().encode() in reply
            for _ in range(3):  # VMMCALL, a jump, a load
                assert stop(wire, b"vCont;s:p2.1").startswith(b"T05thread:p2.1;")


def stop(wire: Wire, packet: bytes) -> bytes:
    """Resume; the stop."""
    wire.send(packet)
    while (reply := wire.read()).startswith(b"O"):
        pass
    return reply


def test_into_a_guest(gdb: Gdb, serve: Serve, image: Image) -> None:
    elf = image("vcpus")
    served = serve(elf)
    served.connect(gdb)
    gdb("break *run_until_vmmcall")
    gdb("continue")
    assert "vmrun" in gdb("x/i $pc")
    assert "there is no guest 7" in gdb("monitor step-into-guest 7")
    gdb("monitor step-into-guest")
    printed = gdb("stepi")  # guest 2 is only known behind this VMRUN
    assert "[VMRUN has entered guest 2: it does not run for gdb. `attach 2` in a new inferior" in printed
    attach(gdb, 2, elf)
    assert at(gdb) == "guest"
    gdb("inferior 1")
    gdb("continue")
    gdb("monitor step-into-guest 2")
    gdb("delete")  # gdb resumes nobody else for a step off a breakpoint
    gdb("stepi")
    assert "Thread 2.1" in gdb("thread")
    before = gdb.value("$pc")
    gdb("stepi")
    assert gdb.value("$pc") != before

    # A VMCB that is refused: ASID 0.
    gdb("inferior 1")
    gdb("break *run_until_vmmcall thread 1.1")
    assert "run_until_vmmcall" in gdb("continue")
    gdb("set {int}((char*)&vmcb1 + 0x58) = 0")
    gdb("monitor step-into-guest 2")
    printed = gdb("stepi")
    assert "[VMRUN has not entered guest 2:" in printed
    assert "ASID" in printed
    assert at(gdb) == "after_vmexit"


def test_steps_into_handlers(gdb: Gdb, serve: Serve, hypervisor: Path, tmp_path: Path) -> None:
    arguments = ("--append", "guests=1 tick=3000")
    undebugged = run(hypervisor, tmp_path, *arguments)
    served = serve(hypervisor, *arguments)
    served.connect(gdb)
    gdb("tbreak handle_exit if guest->vmcb->efer & 0x400")
    gdb("continue")
    attach(gdb, 2, hypervisor.parent / "guest64.elf")
    gdb("tbreak work")
    gdb("continue")
    assert "7 (ENABLE 1 NOIRQ 2 NOTIMER 4): steps go over" in gdb("monitor sstep")
    assert 'received: "0x7"' in gdb("maintenance packet qqemu.sstep")
    assert 'received: "OK"' in gdb("maintenance packet Qqemu.sstep=0x5")
    assert "into the handlers" in gdb("monitor sstep")
    assert "cannot be switched off" in gdb("monitor sstep 4")
    functions = set()
    for _ in range(600):
        gdb("stepi 25")
        functions.add(captured(r"#0 .*?(\w+) \(", gdb("where 1")))
        if len(functions - {"work", "main"}):
            break
    assert functions - {"work", "main"}, functions
    assert "cannot be switched off" in gdb("monitor sstep 6")
    gdb("monitor sstep 7")
    gdb("inferior 1")
    gdb("delete")
    served.ends_as(gdb, undebugged)


def test_only_chosen_inferiors_stop(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    served = serve(hypervisor)
    served.connect(gdb)
    gdb("break handle_exit if guest->vmcb->efer & 0x400")
    gdb("continue")
    attach(gdb, 2, hypervisor.parent / "guest64.elf")
    gdb("break work")
    printed = gdb("monitor debug guest 2")
    assert re.search(r"^1 +hypervisor +yes +no$", printed, re.MULTILINE)
    assert re.search(r"^2 +guest 2 +yes +yes$", printed, re.MULTILINE)
    for _ in range(3):
        assert "Breakpoint 2, work" in gdb("continue")
    assert "guest64.c:56" in gdb("until guest64.c:56")
    gdb("monitor debug host")
    for _ in range(3):
        assert "Breakpoint 1, handle_exit" in gdb("continue")
    gdb("stepi")
    gdb("delete 1")
    gdb("inferior 2")
    gdb("next")  # what is asked for is made
    assert "Thread 2.1" in gdb("thread")
    assert "there is no guest 9" in gdb("monitor debug guest 2,9")
    gdb("monitor debug all")
    assert "Breakpoint" in gdb("continue")
