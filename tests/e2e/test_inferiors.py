"""Which guests there are: numbers, names, vCPUs, guests that come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.e2e.served import Served, attach, run
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
    assert [line.split()[0] for line in listing.splitlines()[1:]] == ["2", "4"], listing
    assert f"{vmcb3:#x}" in listing.splitlines()[2]
    assert "4          guest 4" in gdb("info os processes")

    # Corrections of the guess.
    assert "guest 4 is called linux" in gdb("monitor guest name 4 linux")
    assert f"VMCB {vmcb2:#x} is now guest 5" in gdb(f"monitor guest split 2 {vmcb2:#x}")
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


def test_a_fork_is_followed(gdb: Gdb, serve: Serve, image: Image) -> None:
    served = serve(image("vcpus"))
    served.connect(gdb)
    gdb("set detach-on-fork off")
    gdb("break *guest")
    gdb("break anew")
    printed = gdb("continue")
    assert "[New inferior 2 (process 2)]" in printed
    assert "Thread 2.1" in printed or "Thread 2.1" in gdb("continue")
    assert gdb.value("$_inferior") == 2
    gdb("delete")
    printed = gdb("continue")
    assert "[New inferior 3 (process 3)]" in printed
    assert "[Inferior 3 (process 3) exited normally]" in printed  # its VMCB is used anew
    gdb("inferior 1")
    assert "[New inferior 4 (process 4)]" in gdb("continue") or "exited with code 01" in gdb("continue")


def test_breakpoints_belong_to_one_inferior(gdb: Gdb, serve: Serve, image: Image) -> None:
    """The code of all guests, and of the hypervisor, lies at the same virtual addresses."""
    elf = image("vcpus")
    served = serve(elf)
    served.connect(gdb)
    gdb("break again")
    while "Breakpoint 1, again" not in gdb("continue"):
        pass
    gdb("delete")
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
