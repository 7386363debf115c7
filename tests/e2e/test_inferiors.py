"""Which guests there are: numbers, names, vCPUs, guests that come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.e2e.served import Served, attach, reach, run
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]
Image = Callable[[str], Path]


def test_guests_come_and_go(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path) -> None:
    elf = image("vcpus")
    undebugged = run(elf, tmp_path)
    served = serve(elf)
    assert "_start () at" in served.connect(gdb)
    assert 'Thread 1.1 "CPU 0" (running)' in gdb("info threads")

    # The first guest has the hypervisor's register layout, so gdb takes it for a fork, and lets go of it.
    gdb("break second_vcpu")
    printed = gdb("continue")
    assert "[Detaching after fork from child process 2]" in printed or "process 2 (guest 2) appeared" in printed
    assert "Breakpoint 1, second_vcpu" in printed or "second_vcpu" in gdb("continue")
    vmcb1, vmcb2, vmcb3 = (gdb.value(f"&{name}") for name in ("vmcb1", "vmcb2", "vmcb3"))
    attach(gdb, 2)
    assert f'Thread 2.1 "guest 2 asid=1 vmcb={vmcb1:#x}" (in host)' in gdb("info threads")
    gdb("inferior 1")

    # A second VMCB under the same nested root is one more vCPU.
    gdb("break other_guest")
    assert "other_guest" in gdb("continue")
    threads = gdb("info threads")
    assert f'Thread 2.2 "guest 2 asid=2 vmcb={vmcb2:#x}" (in host)' in threads
    assert "Thread 3." not in threads

    # The third has a guest of its own, which goes when its VMCB is used for another.
    gdb("break anew")
    printed = gdb("continue")
    assert "anew" in printed or "anew" in gdb("continue")
    attach(gdb, 3)
    gdb("break again")
    printed = gdb("continue")
    assert "[Inferior 3 (process 3) exited normally]" in printed
    gdb("inferior 1")
    printed = gdb("continue")
    assert "Breakpoint" in printed, printed
    listing = gdb("monitor guests")
    assert [line.split()[0] for line in listing.splitlines()[2:]] == ["2", "4"], listing
    assert f"{vmcb3:#x}" in listing.splitlines()[3]
    assert "4          guest 4" in gdb("info os processes")

    # Corrections of the guess.
    assert "guest 4 is called linux" in gdb("monitor guest name 4 linux")
    assert f"VMCB {vmcb2:#x} is now guest 5" in gdb(f"monitor guest split 2 {vmcb2:#x}")
    assert "2: a client debugs it, and it would be gone; detach from it first" in gdb("monitor guest merge 4 2")
    assert "guest 4 is now part of guest 2, which has 2 vCPUs" in gdb("monitor guest merge 2 4")
    assert "it must be one of several VMCBs of guest 5" in gdb(f"monitor guest split 5 {vmcb2:#x}")
    assert "there is no guest 4" in gdb("monitor guest name 4 gone")
    gdb("delete")
    gdb("break end")
    printed = gdb("continue")
    for _ in range(4):
        if "Breakpoint" in printed:
            break
        gdb("inferior 1")
        printed = gdb("continue")
    assert "end ()" in printed, printed
    gdb("inferior 2")
    threads = gdb("info threads")
    assert f'Thread 2.3 "guest 2 asid=4 vmcb={vmcb3:#x}" (in host)' in threads, threads
    gdb("inferior 1")
    assert "exited with code 01" in gdb("continue")
    gdb.close()
    # Splitting a guest renumbers nothing that the trace said before.
    assert served.finish()[:3] == undebugged[:3]


def test_inferiors_have_the_names_of_guests(gdb: Gdb, serve: Serve, hypervisor: Path) -> None:
    served = serve(hypervisor, "--symbols", f"guest2={hypervisor.parent / 'guest64.elf'}")
    served.connect(gdb)
    gdb("tbreak handle_exit if guest->number == 4")
    gdb("continue")
    for pid in (2, 3, 4, 5):
        printed = attach(gdb, pid)
        assert "warning" not in printed, printed
    executables = {line.split()[-1] if "asid" not in line else line[line.index("target:") :].strip()
                   for line in gdb("info inferiors").splitlines()[1:]}  # fmt: skip
    assert executables == {
        f"target:{hypervisor.with_suffix('.debug')}",
        "target:/guest 2 asid=1 vmcb=0x800000/guest64.elf",
        "target:/guest 3 asid=2 vmcb=0x805000",
        "target:/guest 4 asid=3 vmcb=0x809000",
        "target:/guest 5 asid=4 vmcb=0x80c000",
    }

    # They are executables of no architecture and no contents: 64, 32 and 16 bits go with them.
    for number, mode in ((2, "i386:x86-64"), (3, "i386"), (4, "i8086"), (5, "i386")):
        gdb(f"inferior {number}")
        assert f'(currently "{mode}")' in gdb("show architecture")
    gdb("inferior 2")
    assert "work (round=1) at" in gdb("frame")
    assert "sum += WINDOW[i];" in gdb("list")

    # A new name is seen in the next inferior that attaches to it; the one that gdb has can still be opened.
    gdb("monitor guest name 5 stray / of mine")
    assert "a name is a line of printable characters" in gdb("monitor guest name 5 ' '")
    gdb("inferior 5")
    gdb("detach")
    attach(gdb, 5)
    assert "target:/stray / of mine asid=4 vmcb=0x80c000" in gdb("info inferiors")
    assert "warning" not in gdb("exec-file target:/guest 5 asid=4 vmcb=0x80c000")
    assert "/etc/passwd" in gdb("exec-file target:/etc/passwd")
    assert "/etc/passwd" not in gdb("info inferiors")


def test_a_fork_is_followed(gdb: Gdb, serve: Serve, image: Image) -> None:
    elf = image("vcpus")
    served = serve(elf, "--symbols", f"guest2={elf}")
    served.connect(gdb)
    gdb("set detach-on-fork off")
    gdb("break anew")
    printed = gdb("continue")
    assert "[New inferior 2 (process 2)]" in printed
    # gdb takes a child for a copy of its parent, until it is told what it executes.
    vmcb1, vmcb3 = gdb.value("&vmcb1"), gdb.value("&vmcb3")
    assert f"process 2 is executing new program: /guest 2 asid=1 vmcb={vmcb1:#x}/vcpus.elf" in printed
    assert "[New inferior 3 (process 3)]" in printed
    assert f"process 3 is executing new program: /guest 3 asid=3 vmcb={vmcb3:#x}\n" in printed
    assert "Breakpoint 1.1, anew" in printed
    gdb("delete")
    assert "[Inferior 3 (process 3) exited normally]" in gdb("continue")  # its VMCB is used anew
    gdb("inferior 2")
    gdb("break *guest")
    printed = gdb("continue")
    assert "[New inferior 4 (process 4)]" in printed
    assert "Thread 2.1" in printed or "Thread 2.1" in gdb("continue")
    assert gdb.value("$_inferior") == 2


def test_a_child_is_named_after_the_steps(gdb: Gdb, serve: Serve, image: Image) -> None:
    served = serve(image("vcpus"))
    served.connect(gdb)
    gdb("set detach-on-fork off")
    gdb("tbreak *run_until_vmmcall")
    gdb("continue")
    printed = gdb("stepi")
    assert "[New inferior 2 (process 2)]" in printed, printed
    assert "executing new program" not in printed
    assert "after_vmexit" in gdb("frame")
    gdb("stepi 2")
    gdb("tbreak anew")
    assert "process 2 is executing new program: /guest 2 asid=1" in gdb("continue")


def test_breakpoints_belong_to_one_inferior(gdb: Gdb, serve: Serve, image: Image) -> None:
    """The code of all guests, and of the hypervisor, lies at the same virtual addresses."""
    elf = image("vcpus")
    served = serve(elf)
    served.connect(gdb)
    reach(gdb, "again")
    increment = gdb.value("(long)&increment")
    attach(gdb, 2)
    gdb("add-inferior")
    gdb("inferior 3")
    gdb("attach 4")

    # `thread` has gdb pick one inferior's location among those of the same address.
    gdb(f"break *{increment:#x} thread 3.1")
    for _ in range(3):
        assert "Thread 3.1" in gdb("continue")
    assert gdb.value("*(long *)0x400000") == 0x3003
    gdb("delete")
    gdb("inferior 2")
    gdb(f"break *{increment:#x} thread 2.2")
    for _ in range(3):
        assert "Thread 2.2" in gdb("continue")
    gdb("delete")

    # The same virtual address in three inferiors.
    of_guest_2 = gdb.value("*(long *)0x400000")
    gdb("inferior 3")
    of_guest_4 = gdb.value("*(long *)0x400000")
    gdb("inferior 1")
    assert gdb.value("*(long *)0x400000") == of_guest_2 > 0x1111
    assert gdb.value("*(long *)0xa00000") == of_guest_4 > 0x3003
    assert gdb.value("*(long *)0x800000") == 0x2001

    # Guests run the hypervisor's addresses all the time; its own breakpoint there is none of theirs.
    gdb(f"break *{increment:#x}")
    gdb("detach inferiors 2 3")
    gdb("tbreak end")
    assert "Temporary breakpoint 5, end" in gdb("continue")
