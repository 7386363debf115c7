"""Guests that go: their VMCBs are cleared, or SVM is turned off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, attach, run
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]
Image = Callable[[str], Path]


def _until(gdb: Gdb, stop: str) -> str:
    """What gdb prints until a stop at this label of the hypervisor, exits of guests on the way."""
    gdb("inferior 1")
    gdb(f"tbreak *{stop}")
    printed = ""
    while stop not in printed:
        printed += gdb("continue")
        gdb("inferior 1")
    return printed


def _guests(gdb: Gdb) -> list[str]:
    return [line.split()[0] for line in gdb("monitor guests").splitlines()[2:]]


@pytest.mark.parametrize("runtime", ["native", "python"])
def test_guests_go(gdb: Gdb, serve: Serve, image: Image, tmp_path: Path, runtime: str) -> None:
    elf = image("gone")
    undebugged = run(elf, tmp_path)
    served = serve(elf, "--runtime", runtime)
    served.connect(gdb)
    _until(gdb, "clear")
    attach(gdb, 2)
    attach(gdb, 3)
    assert "exited" not in _until(gdb, "wait")

    # A cleared VMCB is one no more.
    printed = _until(gdb, "cleared")
    assert "[Inferior 3 (process 3) exited normally]" in printed
    assert "[Inferior 2" not in printed
    assert _guests(gdb) == ["2"]

    # One that is found cleared, and is then made anew under the same nested root, is still the guest's.
    assert "exited" not in _until(gdb, "rebuilt")
    assert _guests(gdb) == ["2"]

    # The page that was cleared is another guest now.
    printed = _until(gdb, "again")
    assert "process 4" in printed
    assert _guests(gdb) == ["2", "4"]

    assert "exited" not in _until(gdb, "off")
    printed = _until(gdb, "on")
    assert "[Inferior 2 (process 2) exited normally]" in printed
    assert "No guest has been entered" in gdb("monitor guests")
    _until(gdb, "halted")
    assert _guests(gdb) == ["5"]
    assert "exited with code 01" in gdb("continue")
    gdb.close()
    done = served.finish()
    assert done == undebugged
    assert [line.split("guest=")[1][0] for line in done.exits.splitlines()] == ["2", "3", "2", "4", "5"]


def test_a_guest_goes_while_its_hypervisor_halts_for_ever(gdb: Gdb, serve: Serve, image: Image) -> None:
    served = serve(image("gone"))
    served.connect(gdb)
    gdb("set var *(int *)&forever = 1")
    _until(gdb, "halted")
    attach(gdb, 5)
    assert "[Inferior 2 (process 5) exited normally]" in gdb("continue")


def test_guests_end_with_the_machine(gdb: Gdb, serve: Serve, image: Image) -> None:
    served = serve(image("gone"))
    served.connect(gdb)
    _until(gdb, "halted")
    attach(gdb, 5)
    gdb("inferior 1")
    assert "[Inferior 1 (process 1) exited with code 01]" in gdb("continue")
    gdb("inferior 2")
    assert "[Inferior 2 (process 5) exited normally]" in gdb("continue")
