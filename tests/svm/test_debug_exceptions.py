"""Debug exceptions around a guest: RFLAGS.TF and DR7 across VMRUN, #DB, INT3, ICEBP (APM2 15.5.1, 15.6, 15.12)."""

from __future__ import annotations

import pytest

from introspect.exits import ExitCode
from introspect.registers import DR6, DR7, RFLAGS
from tests.engine.interrupts import interrupt
from tests.engine.rig import CODE, HANDLERS
from tests.svm.hypervisor import HLT, VMMCALL, Hypervisor

DB, BP = 1, 3
DB_EXIT, BP_EXIT, SMI = 0x41, 0x43, 0x62
DR6_RESET, DR7_RESET = 0xFFFF0FF0, 0x400


# RFLAGS.TF of the host


@pytest.mark.parametrize("exit_by", ["vmmcall", "interrupt", "invalid"])
def test_a_host_that_steps_vmrun_traps_behind_vmexit(exit_by: str, python: bool) -> None:
    """The guest is one instruction of the host: its trap comes when that is done, GIF or not."""
    h = Hypervisor("nop; vmmcall" if exit_by == "vmmcall" else "1: jmp 1b", host="vmrun\nback: nop; hlt", python=python)
    h.state.rflags |= RFLAGS.TF
    h.intercept(ExitCode.INTR, DB_EXIT)
    if exit_by == "interrupt":
        h.set(rflags=0x202)
        interrupt(h, 0x40)
    elif exit_by == "invalid":
        h.set(guest_asid=0)
    h.run()
    assert h["exitcode"] == {"vmmcall": VMMCALL, "interrupt": ExitCode.INTR}.get(exit_by, ExitCode.INVALID)
    assert (h.handled, h.stack(1, 8)) == (DB, [h.labels["host_back"]])
    assert h.cpu.dr[6] & DR6.BS
    assert not h.cpu.gif
    assert h["dr6"] == DR6_RESET


def test_the_guest_is_not_stepped_by_the_hosts_tf(python: bool) -> None:
    h = Hypervisor("nop; nop; vmmcall", python=python)
    h.state.rflags |= RFLAGS.TF
    h.intercept(DB_EXIT)
    h.run()
    assert (h["exitcode"], h["rip"]) == (VMMCALL, CODE + 2)


def test_the_host_is_not_stepped_by_the_guests_tf(python: bool) -> None:
    """A trap that #VMEXIT overtakes is not the host's."""
    h = Hypervisor("outb %al, $0xb2; vmmcall", host="vmrun\nback: nop; nop; hlt", python=python)
    h.intercept(SMI)
    h.set(rflags=2 | RFLAGS.TF)
    assert h.enter() == SMI
    assert h.rip == h.labels["host_back"] + 3


# RFLAGS.TF of the guest


def test_the_guests_own_debugger(python: bool) -> None:
    """#DB is not intercepted: the guest steps itself, through instructions that are emulated for it, too."""
    h = Hypervisor("nop; cpuid; nop; vmmcall", python=python)
    h.guest_handler(DB, "incl %esi; iretq")
    h.set(rflags=2 | RFLAGS.TF)
    assert h.enter() == VMMCALL
    assert (h.reg(6), h["rip"]) == (3, CODE + 4)


def test_an_injected_event_clears_tf_before_it_traps(python: bool) -> None:
    """VMRUN with TF and an event: the handler does not trap; behind its IRET the first instruction does."""
    h = Hypervisor("nop; vmmcall", python=python)
    h.intercept(DB_EXIT)
    h.guest_handler(0x40, "nop; vmmcall; iretq")
    h.set(rflags=2 | RFLAGS.TF, eventinj=1 << 31 | 0x40)
    assert h.enter() == VMMCALL
    assert h.guest_stack(3)[2] & RFLAGS.TF
    assert h.skip(3) == DB_EXIT
    assert h["rip"] == CODE + 1


def test_rf_is_loaded_and_saved(python: bool) -> None:
    h = Hypervisor("vmmcall", python=python)
    h.set(rflags=2 | RFLAGS.RF)
    assert h.enter() == VMMCALL
    assert h["rflags"] & RFLAGS.RF


# DR6 and DR7


def test_dr6_and_dr7_are_switched(python: bool) -> None:
    """The guest's come from the VMCB and go there; the host's DR7 is off behind #VMEXIT, its DR6 as it was (APM2 15.6)."""
    h = Hypervisor("movq %dr6, %rbx; movq %dr7, %rcx; movl $0x4000, %eax; movq %rax, %dr6; vmmcall", python=python)
    h.cpu.dr[6], h.cpu.dr[7] = DR6_RESET | DR6.B3, DR7_RESET | DR7.GE
    h.set(dr6=DR6_RESET | DR6.B0, dr7=DR7_RESET | DR7.LE)
    assert h.enter() == VMMCALL
    assert (h.reg(3), h.reg(1)) == (DR6_RESET | DR6.B0, DR7_RESET | DR7.LE)
    assert (h["dr6"], h["dr7"]) == (DR6_RESET | DR6.BS, DR7_RESET | DR7.LE)
    assert h.cpu.dr[7] == DR7_RESET


def test_dr0_to_dr3_are_not_switched(python: bool) -> None:
    h = Hypervisor("movq %dr0, %rbx; movl $0x5678, %eax; movq %rax, %dr3; vmmcall", python=python)
    h.cpu.dr[0] = 0x1234
    assert h.enter() == VMMCALL
    assert (h.reg(3), h.cpu.dr[3]) == (0x1234, 0x5678)


@pytest.mark.parametrize("intercepted", [False, True])
def test_general_detect_of_the_guest(intercepted: bool, python: bool) -> None:
    """DR7.GD: #DB before the access, with DR6.BD; GD is clear in the handler, and in the VMCB if it is intercepted."""
    h = Hypervisor("movq %dr0, %rax", python=python)
    h.intercept(DB_EXIT, on=intercepted)
    h.set(dr7=DR7_RESET | DR7.GD)
    assert h.enter() == (DB_EXIT if intercepted else HLT)
    assert h["dr6"] & DR6.BD
    assert not h["dr7"] & DR7.GD
    assert h["rip" if intercepted else "rsp"] == (CODE if intercepted else h["rsp"])


# INT3, INTO, ICEBP, INT 1


@pytest.mark.parametrize(
    ("text", "codes", "seen", "at", "nrip"),
    [
        ("int3", (BP_EXIT,), BP_EXIT, 0, 1),  # reported before it happens
        (".byte 0xcd, 3", (BP_EXIT, ExitCode.SWINT), ExitCode.SWINT, 0, 2),  # INT n with n = 3 is not INT3
        (".byte 0xf1", (DB_EXIT, ExitCode.ICEBP), ExitCode.ICEBP, 0, 1),  # its own intercept first
        (".byte 0xcd, 1", (DB_EXIT, ExitCode.SWINT), ExitCode.SWINT, 0, 2),
    ],
)
def test_which_intercept(text: str, codes: tuple[int, ...], seen: int, at: int, nrip: int, python: bool) -> None:
    h = Hypervisor(text, python=python)
    h.intercept(*codes)
    assert h.enter() == seen
    assert (h["rip"], h["nrip"]) == (CODE + at, CODE + nrip if nrip else 0)
    assert h["dr6"] == DR6_RESET


@pytest.mark.parametrize("text", [".byte 0xf1", "int3"])
def test_icebp_and_int3_pass_gates_of_the_kernel_or_not(text: str, python: bool) -> None:
    """INT3 at CPL 3 needs a gate of DPL 3; ICEBP is no INT n and does not."""
    h = Hypervisor(text, python=python, user=True)
    assert h.enter() == HLT
    assert h.guest_vector == (DB if text != "int3" else 13)


def test_int3_reinjected(python: bool) -> None:
    """How a hypervisor that looked at an INT3 lets the guest have it: an exception behind the instruction (APM2 15.20)."""
    h = Hypervisor("int3; vmmcall", python=python)
    h.intercept(BP_EXIT)
    h.guest_handler(BP, "incl %esi; iretq")
    assert h.enter() == BP_EXIT
    assert h.again(eventinj=1 << 31 | 3 << 8 | BP, nrip=h["nrip"]) == VMMCALL
    assert (h.reg(6), h["rip"]) == (1, CODE + 1)


def test_a_trap_and_an_interrupt_at_one_boundary(python: bool) -> None:
    """The trap of the instruction before comes first; the interrupt exits from the handler's first instruction (APM2 8.5)."""
    h = Hypervisor("nop; nop", python=python)
    h.intercept(ExitCode.INTR)
    h.set(rflags=0x202 | RFLAGS.TF, v_intr=1 << 24)
    h.state.rflags |= RFLAGS.IF
    h.step(2)  # VMRUN, NOP and its trap
    assert h.rip == HANDLERS + 16 * DB
    interrupt(h, 0x40)
    assert h.enter() == ExitCode.INTR
    assert h["rip"] == HANDLERS + 16 * DB
