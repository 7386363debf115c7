"""SMIs around a guest: the intercept, SMM on top of a guest, and hypervisors that contain SMM (APM2 15.13.3, 15.22, 15.30.3)."""

from __future__ import annotations

import pytest

from introspect.exits import SMI_INFO, ExitCode, describe_exit
from introspect.vmcb import V_INTR
from tests.cpu.test_smm import SHOW, handler, saved
from tests.engine.interrupts import IF, interrupt
from tests.engine.rig import CODE, DATA, MODES, Mode
from tests.svm.covers import covers
from tests.svm.hypervisor import HOST_CODE, NESTED, VMCB_PAGE, VMMCALL, Hypervisor
from vmdbg.platform.msrs import HWCR, HWCR_SMMLOCK
from vmdbg.svm.switch import on_exit

SMM_CTL = "movl $0xc0010116, %ecx; xorl %edx, %edx"
DISMISS, ENTER, EXIT = 1, 2, 8
LOOP = "1: incl %esi; jmp 1b"


# The intercept


@covers(0x62)
def test_an_intercepted_smi_is_the_hosts_after_stgi(python: bool) -> None:
    """It stays pending, and GIF holds it back (APM2 15.13.3)."""
    h = Hypervisor(LOOP, host="clgi; vmrun\nback: nop; stgi\nopen: nop; hlt", python=python)
    h.intercept(ExitCode.SMI)
    h.machine.run(100)
    h.cpu.smi()
    assert h.enter() == ExitCode.SMI
    assert (h["exitinfo1"], h["exitinfo2"]) == (SMI_INFO.SMISRC, 0)
    assert saved(h)["rip"] == h.labels["host_open"]
    assert saved(h)["svm_state"] == 0


@pytest.mark.parametrize(("io", "of_it"), [
    ("outb %al, $0xb2", {"SZ8": 1}), ("inw $0xb2, %ax", {"SZ16": 1, "TYPE": 1}), ("outsb", {"SZ8": 1, "STR": 1}),
])  # fmt: skip
def test_an_smi_during_io(io: str, of_it: dict[str, int], python: bool) -> None:
    """EXITINFO1 says which I/O instruction asked for it, EXITINFO2 where that one is (APM2 15.13.3, figure 15-3)."""
    h = Hypervisor(f"movl $0xb2, %edx; movl ${DATA}, %esi\nio: {io}\nnext: nop; vmmcall", python=python)
    h.intercept(ExitCode.SMI)
    if of_it.get("TYPE"):  # the chipset asks for none at a read
        h.step(4)
        h.cpu.smi()
    assert h.enter() == ExitCode.SMI
    assert h["exitinfo1"] == SMI_INFO.make(SMISRC=1, VAL=1, SEG=3, A64=1, PORT=0xB2, **of_it)
    assert h["exitinfo2"] == h.labels["io"]
    assert h["rip"] == h.labels["next"]
    told = f"external, during {'IN' if of_it.get('TYPE') else 'OUT'} port 0xb2 at rIP {h.labels['io']:#x}"
    assert told in describe_exit(h["exitcode"], h["exitinfo1"], h["exitinfo2"])


def test_smmlock_takes_the_intercept_away(python: bool) -> None:
    h = Hypervisor("nop; nop; vmmcall", python=python)
    h.intercept(ExitCode.SMI)
    h.cpu.msrs.values[HWCR] |= HWCR_SMMLOCK
    h.step()
    h.cpu.smi()
    assert h.enter() == VMMCALL
    assert saved(h)["rip"] == CODE


# SMM on top of a guest


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("np", [True, False])
def test_a_guest_does_not_notice(mode: Mode, np: bool, python: bool) -> None:
    """SMM suspends the guest without #VMEXIT; RSM goes back into it."""
    push = "pushq %rsi; popq %rdi" if mode == "long" else "pushl %esi; popl %edi"
    h = Hypervisor(f"incl %esi; {push}; incl %esi; {push}; vmmcall", mode, python=python, np=np)
    handler(h, "movl $0x1234, %esi; movl %esi, %esp; rsm")
    h.step(3)
    for _ in range(3):
        h.cpu.smi()
        h.step(2)
        assert h.cpu.guest is None
        h.step(3)
        assert h.cpu.guest is not None
    assert h.enter() == VMMCALL
    assert (h.reg(6), h.reg(7)) == (2, 2)
    assert len(next(iter(h.machine.history.guests.values())).exits) == 1


def test_the_save_area_of_a_guest(python: bool) -> None:
    h = Hypervisor(LOOP, python=python)
    handler(h, "hlt")
    h.set(v_intr=V_INTR.v_intr_masking | 5)
    h.machine.run(100)
    h.cpu.smi()
    h.step()
    area = saved(h)
    assert (area["svm_state"], area["vmcb"], area["n_cr3"]) == (6, VMCB_PAGE, NESTED)
    assert (area["v_intr"], area["g_pat"]) == (V_INTR.v_intr_masking | 5, 0x0007040600070406)
    assert (area["host_cr0"], area["host_cr4"], area["host_efer"]) == (0x80000011, 0x620, 0x1D00)
    assert CODE <= area["rip"] < CODE + 4
    assert h.machine.history.by_vmcb[VMCB_PAGE][1].running_on is None


def test_what_was_virtual_is_kept(python: bool) -> None:
    """V_IRQ, the virtual NMI mask and V_TPR live through SMM."""
    h = Hypervisor("nop; sti; nop\nopen: nop", python=python)
    word = V_INTR.make(v_irq=1, v_intr_prio=8, v_intr_masking=1, v_intr_vector=0x55, v_nmi_enable=1, v_nmi=1, v_nmi_mask=1)
    h.intercept(ExitCode.NMI)
    h.set(v_intr=word)
    h.step()
    h.cpu.smi()
    h.run()
    assert saved(h)["rip"] == CODE
    assert h.guest_vector == 0x55
    assert h["v_intr"] == word & ~V_INTR.v_irq
    assert not h.state.nmi_blocked


def test_a_host_interrupt_exits_behind_rsm(python: bool) -> None:
    h = Hypervisor(LOOP, python=python)
    handler(h, "nop; rsm")
    h.intercept(ExitCode.INTR)
    h.set(v_intr=V_INTR.v_intr_masking)
    h.state.rflags |= IF
    h.machine.run(100)
    h.cpu.smi()
    h.step()
    interrupt(h, 0x40)
    h.step()
    assert h.cpu.smm is not None
    assert h.enter() == ExitCode.INTR


def test_a_halted_guest_sleeps_on(python: bool) -> None:
    h = Hypervisor("hlt; vmmcall", python=python)
    h.intercept(ExitCode.HLT, on=False)
    h.run()
    h.cpu.smi()
    h.run()
    assert saved(h)["auto_halt_restart"] == 1
    assert h.cpu.guest is not None
    assert h.cpu.halted


@pytest.mark.skipif(not on_exit(), reason="the native world switch is not built (it needs a C compiler)")
def test_switches_go_on_in_c_afterwards() -> None:
    h = Hypervisor("1: incl %esi; vmmcall; jmp 1b", host="""
        movl $0x90000, %ebp
    1:  movq %rbp, %rax; vmrun; stgi; addq $3, 0x578(%rbp); clgi; decl %ebx; jnz 1b; hlt""")
    h.state.set_reg(3, 50)
    h.machine.run(300)
    h.cpu.smi()
    h.run()
    assert h.cpu.smm is None
    assert h.cpu.switcher is not None
    assert h.cpu.switcher.made > 60
    assert h.reg(6) == 50


# RSM in a guest


def test_rsm_exits(python: bool) -> None:
    h = Hypervisor("rsm", python=python)
    h.intercept(ExitCode.RSM)
    assert h.enter() == ExitCode.RSM
    assert (h["rip"], h["nrip"]) == (CODE, CODE + 2)


def test_rsm_without_the_intercept_is_undefined(python: bool) -> None:
    h = Hypervisor("rsm", python=python)
    h.intercept(0x46)
    assert h.enter() == 0x46


# SMM_CTL


def test_dismiss(python: bool) -> None:
    """The hypervisor has dealt with the SMI that #VMEXIT left pending."""
    h = Hypervisor(LOOP, host=f"clgi; vmrun; {SMM_CTL}; movl ${DISMISS}, %eax; wrmsr; stgi; nop; hlt", python=python)
    h.intercept(ExitCode.SMI)
    h.machine.run(100)
    h.cpu.smi()
    assert h.enter() == ExitCode.SMI
    assert saved(h)["revision"] == 0
    assert h.rip > HOST_CODE


def test_smm_in_a_guest(python: bool) -> None:
    """Containment (APM2 15.22.2): ENTER masks SMIs and NMIs, a guest runs the handler until its RSM, EXIT unmasks."""
    h = Hypervisor(
        "incl %esi; nop; rsm",
        host=f"""
        clgi; {SMM_CTL}; movl ${DISMISS | ENTER}, %eax; wrmsr; movl ${VMCB_PAGE}, %eax; vmrun
        stgi\nmasked: nop; clgi; {SMM_CTL}; movl ${EXIT}, %eax; wrmsr; stgi\nopen: nop; hlt""",
        python=python,
    )
    h.intercept(ExitCode.RSM, ExitCode.SMI, ExitCode.NMI)
    h.cpu.smi()
    h.step()
    while h.cpu.guest is None:
        h.step()
    h.cpu.smi()
    h.cpu.nmi()
    assert h.enter() == ExitCode.RSM
    assert h.reg(6) == 1
    assert saved(h)["rip"] == h.labels["host_open"]  # not at `masked`
    assert h.handled == 2  # and the NMI behind it


def test_smm_ctl_is_write_only(python: bool) -> None:
    h = Hypervisor("nop", host=f"{SMM_CTL}; rdmsr", python=python)
    h.run()
    assert h.handled == 13


def test_a_broken_area_shuts_the_processor_down(python: bool) -> None:
    h = Hypervisor(LOOP, python=python)
    handler(h, f"{SHOW}; movl $0, 0x158(%ebx); movl $1, 0x15c(%ebx); rsm")
    h.intercept(ExitCode.SHUTDOWN)  # the shutdown is not the guest's
    h.machine.run(100)
    h.cpu.smi()
    h.run()
    assert h.cpu.shutdown
