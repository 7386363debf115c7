"""Resets: by port or triple fault, ending the run or starting the machine over."""

from __future__ import annotations

import pytest

from tests.engine.assembler import assemble
from tests.svm.hypervisor import Hypervisor
from vmdbg.machine import RESET_TICKS, Config, Event, Machine

ORIGIN, COUNT = 0x8000, 0x7000
WAYS = {
    "0x92": "in $0x92, %al; or $1, %al; out %al, $0x92",
    "0x64": "mov $0xfe, %al; out %al, $0x64",
    "0xcf9": "mov $0xcf9, %dx; mov $6, %al; out %al, %dx",
    "triple fault": "lidt %cs:none; int3; none: .word 0, 0, 0",
}


def machine(way: str, **options: object) -> Machine:
    """It resets until the third start, and then ends with status 0x2B."""
    source = f"""
        incb {COUNT}
        cmpb $3, {COUNT}
        jne again
        mov $0x15, %al
        out %al, $0xf4
        again: {WAYS[way]}
        hlt
    """
    code = assemble(source, ORIGIN, 16).code
    return Machine(code, Config(memory=16 << 20, flat_address=ORIGIN, mode="real", **options))  # type: ignore[arg-type]


def run(m: Machine) -> None:
    while m.run() != Event.EXIT:
        assert m.clock.now < 100 * RESET_TICKS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("python", [False, True])
def test_it_starts_over(way: str, python: bool) -> None:
    m = machine(way, reboot=True, python_runtime=python)
    run(m)
    assert (m.exit_status, m.ram.read(COUNT, 1)) == (0x2B, b"\3")
    assert 2 * RESET_TICKS < m.clock.now < 3 * RESET_TICKS


@pytest.mark.parametrize("way", WAYS)
def test_it_ends(way: str) -> None:
    m = machine(way)
    run(m)
    assert (m.exit_status, m.ram.read(COUNT, 1)) == (124 if way == "triple fault" else 0, b"\1")


def test_a_machine_that_only_resets_comes_to_its_limit() -> None:
    m = Machine(b"\x0f\xff", Config(memory=16 << 20, flat_address=ORIGIN, mode="protected", reboot=True, max_time=10**8))
    run(m)
    assert m.exit_status == 124


def test_from_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its guests are gone, and what comes is the host again, in C too."""
    h = Hypervisor("vmmcall; mov $0xfe, %al; out %al, $0x64", host="vmrun; addq $3, 0x90578; vmrun; hlt")
    monkeypatch.setattr(h.machine, "config", Config(memory=16 << 20, flat_address=0x80000, mode="real", reboot=True))
    h.run(2 * RESET_TICKS)
    assert h.cpu.guest is None
    assert h.state.linear_rip == 0x80001  # the image: a halt
    assert not h.machine.history.by_vmcb
    assert h.cpu.switcher is None or h.cpu.switcher.where() is None


def test_init_in_a_guest_leads_to_the_host() -> None:
    """Also for the switch in C: an intercept of the guest is none any more."""
    h = Hypervisor("vmmcall; jmp .", host="vmrun; addq $3, 0x90578; vmrun; hlt")
    h.intercept(0x72)
    h.machine.run(1000)
    assert h.cpu.guest is not None
    h.cpu.init()
    h.ram.write(0x18, b"\0\x90\0\0")  # #UD: there is no firmware at the reset vector
    h.ram.write(0x9000, b"\x0f\xa2\xf4")
    h.run()
    assert h.handled is None
    assert (h.state.rip, h["exitcode"]) == (0x9003, 0x81)
