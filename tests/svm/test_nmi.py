"""NMIs around a guest: their mask across world switches, the IRET that ends a handler, virtual NMIs (APM2 15.13.2, 15.21.10)."""

from __future__ import annotations

import struct

import pytest

from introspect.vmcb import V_INTR
from tests.engine.rig import CODE, HANDLERS, STACK, Mode, P
from tests.svm.covers import covers
from tests.svm.hypervisor import HLT, INVALID, NPF, VMMCALL, Hypervisor

NMI = 2
NMI_EXIT, IRET_EXIT, VINTR = 0x61, 0x74, 0x64
INJECT_NMI = 1 << 31 | 2 << 8 | 2
HANDLER = HANDLERS + 16 * NMI


def count_nmis(h: Hypervisor) -> None:
    """The guest's handler counts in ESI."""
    h.guest_handler(NMI, "incl %esi; iretq")


# The processor's own NMIs


def test_an_intercepted_nmi_is_the_hosts_after_stgi(python: bool) -> None:
    """It stays pending until GIF lets the host's handler have it (APM2 15.13.2)."""
    h = Hypervisor("1: jmp 1b", host="clgi; vmrun\nback: nop; stgi\nopen: nop; hlt", python=python)
    h.intercept(NMI_EXIT)
    h.machine.run(100)
    h.cpu.nmi()
    assert h.enter() == NMI_EXIT
    assert (h.handled, h.stack(1, 8)) == (NMI, [h.labels["host_open"]])
    assert h.state.nmi_blocked


@pytest.mark.parametrize("mode", ["protected32", "long"])
def test_a_guest_without_the_intercept_masks_until_iret(mode: Mode, python: bool) -> None:
    """The second NMI comes behind the IRET of the handler of the first."""
    h = Hypervisor("nop\nnext: nop; jmp next", mode, python=python)
    h.guest_handler(NMI, "incl %esi; nop; iretq" if mode == "long" else "incl %esi; nop; iret")
    h.step(2)
    h.cpu.nmi()
    h.step(2)
    assert (h.reg(6), h.rip - HANDLER) == (1, 2 if mode == "long" else 1)
    h.cpu.nmi()
    h.machine.run(200)
    assert h.reg(6) == 2
    assert not h.state.nmi_blocked


def test_the_mask_crosses_world_switches(python: bool) -> None:
    """A host that runs a guest from its NMI handler: #VMEXIT leaves the mask as it is, the guest's IRET ends it."""
    h = Hypervisor("vmmcall; nop\nreturns: iretq\nback: nop; vmmcall", python=python)
    h.intercept(NMI_EXIT)
    h.state.nmi_blocked = True
    h.cpu.nmi()
    assert h.enter() == VMMCALL
    assert h.state.nmi_blocked
    assert h.cpu.nmi_pending
    frame = (h.labels["back"], h["cs.selector"], 2, STACK, h["ss.selector"])
    h.guest_write(STACK - 40, struct.pack("<5Q", *frame))
    assert h.again(rip=h.labels["returns"] - 1, rsp=STACK - 40) == NMI_EXIT
    assert h["rip"] == h.labels["back"]
    assert not h.state.nmi_blocked


def test_injected_nmis_mask_nothing(python: bool) -> None:
    """EVENTINJ delivers, but the processor's mask is for NMIs of its own: hence the IRET intercept."""
    h = Hypervisor("1: jmp 1b", python=python)
    h.intercept(NMI_EXIT, IRET_EXIT)
    count_nmis(h)
    h.set(eventinj=INJECT_NMI)
    assert h.enter() == IRET_EXIT
    assert (h["rip"], h.reg(6), h.state.nmi_blocked) == (HANDLER + 2, 1, False)


def test_the_end_of_an_nmi_handler_by_the_iret_intercept(python: bool) -> None:
    """How a hypervisor without virtual NMIs finds it: the exit is before IRET; it steps the IRET with TF."""
    h = Hypervisor("nop; vmmcall", python=python)
    h.intercept(NMI_EXIT, IRET_EXIT)
    count_nmis(h)
    h.set(eventinj=INJECT_NMI)
    assert h.enter() == IRET_EXIT
    h.intercept(IRET_EXIT, on=False)
    h.intercept(0x41)
    assert h.again(rflags=h["rflags"] | 1 << 8) == 0x41
    assert h["rip"] == CODE
    h.intercept(0x41, on=False)
    assert h.again(rflags=2) == VMMCALL


# Virtual NMIs


def virtual(h: Hypervisor, **bits: int) -> int:
    """V_NMI_ENABLE with more bits of V_INTR by name."""
    h.intercept(NMI_EXIT)
    return V_INTR.make(v_nmi_enable=1, **bits)


@covers("VNMI")
def test_a_virtual_nmi_is_delivered_masked_and_ended_by_iret(python: bool) -> None:
    h = Hypervisor("nop; vmmcall", python=python)
    h.guest_handler(NMI, "vmmcall; iretq")
    h.set(v_intr=virtual(h, v_nmi=1))
    assert h.enter() == VMMCALL
    assert (h["rip"], h.guest_stack(1)) == (HANDLER, [CODE])
    assert h["v_intr"] == virtual(h, v_nmi_mask=1)
    assert h.skip(3) == VMMCALL
    assert h["rip"] == CODE + 1
    assert h["v_intr"] == virtual(h)


def test_the_next_virtual_nmi_waits_for_iret(python: bool) -> None:
    """Several are sent one by one: V_NMI set while masked is taken behind the IRET (APM2 15.21.10)."""
    h = Hypervisor("nop\nend: vmmcall", python=python)
    h.guest_handler(NMI, "incl %esi; vmmcall; iretq")
    h.set(v_intr=virtual(h, v_nmi=1))
    assert h.enter() == VMMCALL
    assert h.again(rip=h["rip"] + 3, v_intr=h["v_intr"] | V_INTR.v_nmi) == VMMCALL
    assert (h["rip"], h.reg(6)) == (HANDLER + 2, 2)
    assert h.guest_stack(1) == [CODE]
    assert h.skip(3) == VMMCALL
    assert h["rip"] == h.labels["end"]


def test_masked_at_vmrun(python: bool) -> None:
    h = Hypervisor("nop; vmmcall", python=python)
    h.set(v_intr=virtual(h, v_nmi=1, v_nmi_mask=1))
    assert h.enter() == VMMCALL
    assert h["v_intr"] == virtual(h, v_nmi=1, v_nmi_mask=1)


def test_a_shadow_holds_a_virtual_nmi_back(python: bool) -> None:
    h = Hypervisor("nop; nop; vmmcall", python=python)
    h.set(v_intr=virtual(h, v_nmi=1), int_state=1)
    assert h.enter() == HLT
    assert (h.guest_vector, h.guest_stack(1)) == (NMI, [CODE + 1])


def test_halted_guests_wake_for_it(python: bool) -> None:
    h = Hypervisor("hlt; vmmcall", python=python)
    h.intercept(HLT, on=False)
    h.guest_handler(NMI, "vmmcall")
    h.set(v_intr=virtual(h, v_nmi=1))
    assert h.enter() == VMMCALL
    assert h["rip"] == HANDLER


def test_virtual_before_interrupts(python: bool) -> None:
    h = Hypervisor("nop", python=python)
    h.set(v_intr=virtual(h, v_nmi=1, v_irq=1) | 8 << 16 | 0x55 << 32, rflags=0x202)
    assert h.enter() == HLT
    assert h.guest_vector == NMI
    assert h["v_intr"] & V_INTR.v_irq


def test_physical_nmis_exit_whatever_the_guest_masks(python: bool) -> None:
    h = Hypervisor("1: jmp 1b", python=python)
    h.set(v_intr=virtual(h, v_nmi_mask=1))
    h.machine.run(100)
    h.cpu.nmi()
    assert h.enter() == NMI_EXIT
    assert h["v_intr"] & V_INTR.v_nmi_mask
    assert not h.state.nmi_blocked


def test_the_guests_iret_does_not_unmask_physical_nmis(python: bool) -> None:
    """The host's mask is not the guest's: it is back at #VMEXIT."""
    h = Hypervisor("nop; vmmcall", python=python)
    count_nmis(h)
    h.state.nmi_blocked = True
    h.cpu.nmi()
    h.set(v_intr=virtual(h, v_nmi=1))
    assert h.enter() == VMMCALL
    assert h.reg(6) == 1
    assert h.state.nmi_blocked
    assert h.cpu.nmi_pending


def test_an_injected_nmi_masks_virtual_ones(python: bool) -> None:
    h = Hypervisor("nop", python=python)
    h.set(v_intr=virtual(h, v_nmi=1), eventinj=INJECT_NMI)
    assert h.enter() == HLT
    assert h.guest_vector == NMI
    assert h["v_intr"] == virtual(h, v_nmi=1, v_nmi_mask=1)


def test_one_that_cannot_be_delivered_is_in_exitintinfo_and_masks_nothing(python: bool) -> None:
    """Injected again, it masks (APM2 15.21.10)."""
    h = Hypervisor("nop", python=python)
    h.set(v_intr=virtual(h, v_nmi=1))
    h.change_nested(STACK - 8, drop=P)
    assert h.enter() == NPF
    assert h["exitintinfo"] == INJECT_NMI
    assert h["v_intr"] == virtual(h)
    h.change_nested(STACK - 8, add=P)
    assert h.again(eventinj=INJECT_NMI) == HLT
    assert (h.guest_vector, h["v_intr"]) == (NMI, virtual(h, v_nmi_mask=1))


def test_without_v_nmi_enable_the_bits_mean_nothing(python: bool) -> None:
    h = Hypervisor("nop; vmmcall", python=python)
    h.set(v_intr=V_INTR.v_nmi | V_INTR.v_nmi_mask)
    assert h.enter() == VMMCALL
    assert h["v_intr"] == V_INTR.v_nmi | V_INTR.v_nmi_mask


@covers("vnmi-intercept")
def test_virtual_nmis_need_the_nmi_intercept(python: bool) -> None:
    h = Hypervisor("nop", python=python)
    h.set(v_intr=V_INTR.v_nmi_enable)
    assert h.enter() == INVALID
