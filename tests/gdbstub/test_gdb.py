"""Stock gdb against the example target: what its users type, and what they see."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdbstub.example import LOOP, Example
from gdbstub.target import ThreadId
from tests.gdbstub.gdb import Gdb
from tests.gdbstub.serving import Serving, serving


@pytest.fixture
def served() -> Iterator[Serving]:
    with serving() as one:
        yield one


@pytest.fixture
def gdb() -> Iterator[Gdb]:
    one = Gdb()
    yield one
    one.close()


@pytest.fixture
def connected(gdb: Gdb, served: Serving) -> Gdb:
    gdb(f"target extended-remote 127.0.0.1:{served.port}")
    return gdb


def attach_guest(gdb: Gdb) -> None:
    """Attach to process 2 in a second inferior.

    The step comes first: until inferior 1 has been resumed once, gdb 13 takes each of its stops for part of the
    connection's start-up and does not show it.
    """
    gdb("stepi")
    gdb("add-inferior")
    gdb("inferior 2")
    gdb("attach 2")


def test_registers_memory_and_steps(connected: Gdb, served: Serving) -> None:
    gdb = connected
    assert 'Thread 1.2 "cpu1" (awake)' in gdb("info threads")
    assert "=> 0x1000:\tnop" in gdb("x/i $pc")
    gdb("stepi 3")
    assert gdb.value("$rip") == 0x1003
    assert "<unavailable>" in gdb("info registers exitcode")
    assert "[ GIF ]" in gdb("info registers gif")
    gdb("set $efer = 0x1500UL")  # gdb casts to a register of flags only what is as wide
    assert "[ LME LMA SVME ]" in gdb("info registers efer")
    gdb("set $xmm1.v4_int32[2] = 7")
    assert gdb.value("$xmm1.v4_int32[2]") == 7
    gdb("set var *(long *)0x2000 = 0x1122334455667788")
    assert served.target.read_memory(ThreadId(1, 1), 0x2000, 2) == b"\x88\x77"
    assert "Cannot access memory at address 0x0" in gdb("x/b 0")
    assert "0x1008" in gdb("find /b 0x1000, 0x1fff, 0xfe, 0x07")
    assert "read-only" in gdb("set $asid = 3") or gdb.value("$asid") == 1


def test_breakpoints_and_watchpoints(connected: Gdb, served: Serving) -> None:
    gdb = connected
    gdb("break *0x1004 thread 2")
    assert "hit Breakpoint 1, 0x0000000000001004" in gdb("continue")
    assert gdb.value("$_thread") == 2
    gdb("delete")
    gdb("hbreak *0x1006")
    assert "hit Breakpoint 2, 0x0000000000001006" in gdb("continue")
    gdb("delete")
    gdb("watch *(char *)0x2000")
    assert "New value = 1" in gdb("continue")
    gdb("delete")
    gdb("rwatch *(char *)0x2000")
    assert "Value = " in gdb("continue")
    gdb("delete")
    gdb("break *0x1002 if *(unsigned char *)0x2000 >= 9")
    gdb("continue")
    assert gdb.value("*(unsigned char *)0x2000") >= 9
    assert served.target.points == {}  # gdb takes them out at every stop


def test_interrupt(connected: Gdb) -> None:
    gdb = connected
    for _ in range(3):
        gdb.start("continue")
        gdb.interrupt()
        assert "SIGINT" in gdb.wait()


def test_monitor(connected: Gdb) -> None:
    assert "lines N  say N lines" in connected("monitor help")
    assert connected("monitor lines 500").count("line ") == 500
    assert "there is no command 'nonsense'" in connected("monitor nonsense")


def test_two_inferiors_one_scheduled(connected: Gdb, served: Serving) -> None:
    gdb = connected
    attach_guest(gdb)
    listing = gdb("info inferiors")
    assert "process 1" in listing
    assert "* 2    process 2" in listing
    assert "i386" in gdb("show architecture")
    gdb("break *0x1004")
    gdb("set schedule-multiple off")
    before = [served.target.read_registers(ThreadId(1, tid)) for tid in (1, 2)]
    for _ in range(3):
        assert 'Thread 2.1 "cpu0" hit Breakpoint' in gdb("continue")
    assert gdb.value("$eip") == 0x1004
    assert [served.target.read_registers(ThreadId(1, tid)) for tid in (1, 2)] == before
    gdb("inferior 1")
    gdb("stepi")
    assert "i386:x86-64" in gdb("show architecture")


def test_two_inferiors_scheduled_together(connected: Gdb) -> None:
    gdb = connected
    gdb("break *0x1004")
    attach_guest(gdb)
    gdb("set schedule-multiple on")
    hits = "".join(gdb("continue") for _ in range(8))
    assert 'Thread 2.1 "cpu0" hit Breakpoint' in hits
    assert 'Thread 1.1 "cpu0" hit Breakpoint' in hits
    gdb("stepi")
    gdb("detach inferiors 2")
    assert "2    <null>" in gdb("info inferiors")
    hits = "".join(gdb("continue") for _ in range(4))
    assert "Thread 2.1" not in hits
    gdb("inferior 2")
    gdb("attach 2")
    assert "* 2    process 2" in gdb("info inferiors")


def test_a_stop_in_an_inferior_that_was_not_resumed(connected: Gdb) -> None:
    """As when a guest is resumed and the hypervisor below it reaches a breakpoint."""
    gdb = connected
    gdb("monitor together")
    gdb("break *0x1004")
    attach_guest(gdb)
    gdb("delete")
    gdb("inferior 1")
    gdb("break *0x1006")
    gdb("inferior 2")
    gdb("set schedule-multiple off")
    assert "hit Breakpoint 2" in gdb("continue")
    assert gdb.value("$_inferior") == 1
    assert gdb.value("$rip") == 0x1006


def test_a_guest_ends(connected: Gdb, served: Serving) -> None:
    gdb = connected
    attach_guest(gdb)
    gdb("set var *(unsigned char *)0x1004 = 0xf4")
    gdb("set $eax = 5")
    gdb("set schedule-multiple on")
    assert "[Inferior 2 (process 2) exited with code 05]" in gdb("continue")
    assert "2    <null>" in gdb("info inferiors")
    gdb("inferior 1")
    gdb("stepi")
    assert gdb.value("$rip") > 0x1000
    gdb("inferior 2")
    assert "Attaching to process 2 failed" in gdb("attach 2")
    assert list(served.target.processes) == [1]


def test_guests_appear(gdb: Gdb) -> None:
    with serving(Example(b"\x0f\x05" + LOOP[:-1] + b"\xf2")) as one:
        gdb(f"target extended-remote 127.0.0.1:{one.port}")
        gdb("break *0x1005")
        printed = gdb("continue")
        assert "[Detaching after fork from child process 3]" in printed
        assert "hit Breakpoint 1" in printed
        gdb("add-inferior")
        gdb("inferior 2")
        gdb("attach 3")
        assert "* 2    process 3" in gdb("info inferiors")
        assert "guest" in gdb("info os processes")


def test_guests_that_appear_are_attached(gdb: Gdb) -> None:
    with serving(Example(b"\x0f\x05" + LOOP[:-1] + b"\xf2")) as one:
        gdb("set detach-on-fork off")
        gdb(f"target extended-remote 127.0.0.1:{one.port}")
        gdb("break *0x1005")
        assert "[New inferior 2 (process 3)]" in gdb("continue")
        gdb("inferior 2")
        assert gdb.value("$rip") == 0x1000
        assert "Thread 2.1" in gdb("continue")
        assert one.target.attached >= {1, 3}


def test_symbols_come_through_the_stub(gdb: Gdb, tmp_path: Path) -> None:
    source, image = tmp_path / "program.s", tmp_path / "program"
    source.write_text(".globl _start, inner\n_start: .skip 4, 0x90\ninner: .skip 100, 0x90\n")
    subprocess.run(["as", source, "-o", tmp_path / "program.o"], check=True)
    subprocess.run(["ld", "-Ttext=0x1000", tmp_path / "program.o", "-o", image], check=True)
    target = Example()
    target.image = "/only/in/the/stub"
    target.files[target.image] = image.read_bytes()
    with serving(target) as one:
        assert "Reading /only/in/the/stub from remote target" in gdb(f"target extended-remote 127.0.0.1:{one.port}")
        gdb("break *inner")
        assert "in inner ()" in gdb("continue")


def test_kill_and_run(connected: Gdb, served: Serving) -> None:
    gdb = connected
    gdb("stepi 5")
    gdb("kill")
    assert list(served.target.processes) == [2]
    gdb("break *0x1002")
    assert "hit Breakpoint 1" in gdb("run")
    assert gdb.value("$rip") == 0x1002


def test_detach_lets_the_machine_run_and_the_next_gdb_finds_it(connected: Gdb, served: Serving) -> None:
    connected("detach")
    before = served.target.executed
    assert "* 1    <null>" in connected("info inferiors")
    connected("attach 1")
    assert served.target.executed > before
    assert "process 1" in connected("info inferiors")
    connected("disconnect")
    connected(f"target remote 127.0.0.1:{served.port}")
    assert connected.value("$rip") >= 0x1000
