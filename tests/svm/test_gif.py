"""The global interrupt flag: what it holds pending, and a guest's own (APM2 15.17, 15.33.2)."""

from __future__ import annotations

import pytest

from introspect.exits import ExitCode
from introspect.vmcb import V_INTR
from tests.engine.interrupts import IF, interrupt
from tests.engine.rig import CODE, STACK, TABLES, Rig
from tests.svm.covers import covers
from tests.svm.hypervisor import HLT, SVME, VMMCALL, Hypervisor
from vmdbg.platform.msrs import VM_CR

NMI, DB, SX = 2, 1, 30
R_INIT = 2
ENABLED, OPEN = V_INTR.v_gif_enable, V_INTR.v_gif_enable | V_INTR.v_gif


def host(source: str, python: bool) -> Rig:
    """A host with SVM on, and no guest."""
    rig = Rig(source, python=python)
    rig.state.efer |= SVME
    rig.state.refresh()
    return rig


# The processor's own


@pytest.mark.parametrize("event", ["interrupt", "nmi", "init as #SX"])
def test_pending_until_stgi(event: str, python: bool) -> None:
    rig = host("clgi; sti; nop; nop; stgi\nopen: nop; nop", python)
    rig.step(2)
    if event == "interrupt":
        interrupt(rig, 0x40)
    elif event == "nmi":
        rig.cpu.nmi()
    else:
        rig.cpu.msrs.values[VM_CR] = R_INIT
        rig.cpu.init()
    rig.run()
    assert rig.handled == {"interrupt": 0x40, "nmi": NMI}.get(event, SX)
    at = [rig.labels["open"]]
    assert rig.stack(2 if rig.handled == SX else 1, 8) == ([1, *at] if rig.handled == SX else at)


def test_single_steps_are_not_held_back(python: bool) -> None:
    """The trap of RFLAGS.TF is taken whatever GIF is."""
    rig = host("clgi; nop; stgi; hlt", python)
    rig.step()
    rig.state.rflags |= 1 << 8
    rig.step()
    assert rig.handled == DB
    assert not rig.cpu.gif
    assert rig.stack(1, 8) == [CODE + 4]


def test_vmrun_opens_and_vmexit_closes(python: bool) -> None:
    """A host runs VMRUN with GIF clear; the guest runs with it set (APM2 15.5.1, 15.6)."""
    h = Hypervisor("nop; jmp .", host="clgi; vmrun\nback: nop; hlt", python=python)
    h.intercept(ExitCode.NMI)
    h.step(2)
    assert h.cpu.gif
    h.cpu.nmi()
    h.step()
    assert (h.rip, h.cpu.gif) == (h.labels["host_back"], False)
    assert h["exitcode"] == ExitCode.NMI


@pytest.mark.parametrize("text", ["stgi", "clgi"])
def test_need_svm(text: str, python: bool) -> None:
    """STGI only where CPUID does not claim SKINIT (APM2 15.4)."""
    rig = Rig(f"{text}\nend: hlt", python=python)
    rig.run()
    assert (rig.handled, rig.rip) == ((None, rig.labels["end"] + 1) if text == "stgi" else (6, rig.rip))
    for svme in (0, SVME) if text == "stgi" else (SVME,):
        rig = Rig(text, python=python, user=True)
        rig.state.efer |= svme
        rig.state.refresh(3)
        rig.run()
        assert rig.handled == 13


# A guest's own


@covers("vGIF")
@pytest.mark.parametrize("text", ["stgi", "clgi"])
def test_stgi_and_clgi_set_v_gif(text: str, python: bool) -> None:
    """Without an exit, and without touching the processor's GIF."""
    h = Hypervisor(f"{text}; nop; vmmcall", python=python)
    h.set(v_intr=ENABLED if text == "stgi" else OPEN)
    h.step(2)
    assert h.cpu.gif
    assert h.enter() == VMMCALL
    assert h["v_intr"] == (OPEN if text == "stgi" else ENABLED)


def test_intercepts_come_first(python: bool) -> None:
    h = Hypervisor("stgi; vmmcall", python=python)
    h.intercept(ExitCode.STGI)
    h.set(v_intr=ENABLED)
    assert h.enter() == ExitCode.STGI
    assert (h["v_intr"], h["nrip"]) == (ENABLED, CODE + 3)


def test_without_v_gif_they_set_the_processors(python: bool) -> None:
    """A guest that may run CLGI closes GIF for everybody: a hypervisor intercepts it."""
    h = Hypervisor("clgi; 1: jmp 1b", python=python)
    h.intercept(ExitCode.NMI)
    h.machine.run(100)
    h.cpu.nmi()
    h.machine.run(100)
    assert h.cpu.guest is not None
    assert not h.cpu.gif


@pytest.mark.parametrize("kind", ["interrupt", "window", "nmi"])
def test_v_gif_holds_virtual_events_back(kind: str, python: bool) -> None:
    """V_IRQ, its intercept, and V_NMI wait for the guest's STGI."""
    h = Hypervisor("nop; nop; stgi\nopen: nop; vmmcall", python=python)
    h.intercept(ExitCode.NMI)
    h.intercept(ExitCode.VINTR, on=kind == "window")
    pending = V_INTR.v_nmi_enable | V_INTR.v_nmi if kind == "nmi" else V_INTR.v_irq | 8 << 16 | 0x55 << 32
    h.set(v_intr=ENABLED | pending, rflags=2 | IF)
    code = h.enter()
    if kind == "window":
        assert (code, h["rip"]) == (ExitCode.VINTR, h.labels["open"])
    else:
        assert (code, h.guest_vector) == (HLT, NMI if kind == "nmi" else 0x55)
        assert h.guest_stack(1) == [h.labels["open"]]
    assert h["v_intr"] & OPEN == OPEN


@pytest.mark.parametrize("code", [ExitCode.INTR, ExitCode.NMI])
def test_physical_events_do_not_ask_v_gif(code: ExitCode, python: bool) -> None:
    h = Hypervisor("1: jmp 1b", python=python)
    h.intercept(code)
    h.set(v_intr=ENABLED | V_INTR.v_intr_masking)
    h.state.rflags |= IF
    h.machine.run(100)
    if code == ExitCode.INTR:
        interrupt(h, 0x40)
    else:
        h.cpu.nmi()
    assert h.enter() == code


def test_clgi_closes_again(python: bool) -> None:
    h = Hypervisor("clgi; nop\nclosed: vmmcall", python=python)
    h.set(v_intr=OPEN, rflags=2 | IF)
    assert h.enter() == VMMCALL
    assert h.again(rip=h.labels["closed"], v_intr=h["v_intr"] | V_INTR.v_irq | 8 << 16 | 0x55 << 32) == VMMCALL
    assert h["v_intr"] & V_INTR.v_irq


# INIT


def test_init_is_redirected(python: bool) -> None:
    """VM_CR.R_INIT makes INIT an #SX with error code 1 (APM2 15.28): the processor is not reset."""
    rig = host("movl $0xc0010114, %ecx; movl $2, %eax; xorl %edx, %edx; wrmsr\nnext: nop; jmp next", python)
    rig.step(4)
    rig.cpu.init()
    rig.run()
    assert rig.handled == SX
    assert rig.stack(2, 8) == [1, rig.labels["next"]]
    assert rig.state.cr(3) == TABLES


@covers(ExitCode.EXCP_SX)
@pytest.mark.parametrize("intercepted", [False, True])
def test_a_redirected_init_is_an_exception_of_the_guest(intercepted: bool, python: bool) -> None:
    h = Hypervisor("1: jmp 1b", python=python)
    h.cpu.msrs.values[VM_CR] = R_INIT
    h.intercept(0x40 + SX, on=intercepted)
    h.machine.run(100)
    h.cpu.init()
    code = h.enter()
    assert (code, h["exitinfo1"]) == ((0x40 + SX, 1) if intercepted else (HLT, 0))
    if not intercepted:
        assert h.guest_vector == SX
        assert h["rsp"] == STACK - 48


def test_the_init_intercept_comes_before_the_redirection(python: bool) -> None:
    """#VMEXIT(INIT) in the guest, #SX in the host once GIF is set: it stays pending in between."""
    h = Hypervisor("1: jmp 1b", host="vmrun; stgi\nopen: nop; hlt", python=python)
    h.cpu.msrs.values[VM_CR] = R_INIT
    h.intercept(ExitCode.INIT)
    h.machine.run(100)
    h.cpu.init()
    assert h.enter() == ExitCode.INIT
    assert (h.handled, h.stack(2, 8)) == (SX, [1, h.labels["host_open"]])
