"""VMLOAD and VMSAVE of a guest: intercepted, of system-physical pages, or virtual (APM2 15.5.2, 15.33.1)."""

from __future__ import annotations

import pytest

from introspect.exits import NPF_INFO, ExitCode
from introspect.vmcb import MISC_CTL2, VMCB
from tests.engine.rig import CODE, P, W
from tests.svm.covers import covers
from tests.svm.hypervisor import GUEST, NPF, VMMCALL, Hypervisor
from vmdbg.engine.state import CS

GPA, SPA = 0x150000, GUEST + 0x150000
"""A page of the guest, and where it is."""
MARK = 0x1122334455667788


def guest(text: str, python: bool, rax: int = GPA, *, virtual: bool = True) -> Hypervisor:
    h = Hypervisor(f"{text}; vmmcall", python=python)
    h.set(rax=rax, misc_ctl2=MISC_CTL2.v_vmload_vmsave if virtual else 0)
    h.state.set_field("kernel_gs_base", MARK >> 20)
    return h


def kernel_gs_base(h: Hypervisor, spa: int) -> int:
    return VMCB.read(h.ram.view[spa : spa + 0x1000], "kernel_gs_base")


@pytest.mark.parametrize("virtual", [True, False])
def test_vmsave(virtual: bool, python: bool) -> None:
    """Virtual: to the guest's page, by way of the nested table; else to the system's page with that number."""
    h = guest("vmsave", python, virtual=virtual)
    assert h.enter() == VMMCALL
    assert kernel_gs_base(h, SPA if virtual else GPA) == MARK >> 20
    assert kernel_gs_base(h, GPA if virtual else SPA) == 0


@covers("V_VMSAVE_VMLOAD")
@pytest.mark.parametrize("virtual", [True, False])
def test_vmload(virtual: bool, python: bool) -> None:
    h = guest("vmload", python, virtual=virtual)
    for spa, value in ((SPA, 0x111), (GPA, 0x222)):
        VMCB.write(h.ram.view[spa : spa + 0x1000], "kernel_gs_base", value)
    assert h.enter() == VMMCALL
    assert h.state.field("kernel_gs_base") == (0x111 if virtual else 0x222)


@pytest.mark.parametrize("text", ["vmload", "vmsave"])
def test_intercepts_come_first(text: str, python: bool) -> None:
    h = guest(text, python)
    code = ExitCode.VMLOAD if text == "vmload" else ExitCode.VMSAVE
    h.intercept(code)
    assert h.enter() == code
    assert h["nrip"] == CODE + 3


@pytest.mark.parametrize(("text", "drop", "info"), [
    ("vmload", P, NPF_INFO.FINAL | NPF_INFO.U), ("vmsave", P, NPF_INFO.FINAL | NPF_INFO.U | NPF_INFO.W),
    ("vmsave", W, NPF_INFO.FINAL | NPF_INFO.U | NPF_INFO.W | NPF_INFO.P),
])  # fmt: skip
def test_a_page_that_the_nested_table_lacks(text: str, drop: int, info: int, python: bool) -> None:
    h = guest(text, python)
    h.change_nested(GPA, drop=drop)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"], h["rip"]) == (info, GPA, CODE)
    h.change_nested(GPA, add=drop)
    assert h.again() == VMMCALL


@pytest.mark.parametrize("rax", [GPA + 8, 1 << 40, 1 << 52])
def test_addresses_that_are_no_page(rax: int, python: bool) -> None:
    h = guest("vmload", python, rax)
    h.intercept(0x4D)
    assert h.enter() == 0x4D


@pytest.mark.parametrize("text", ["vmload", "vmsave"])
@pytest.mark.parametrize("lacking", ["nested paging", "64-bit mode"])
def test_virtual_ones_that_cannot_be_exit(text: str, lacking: str, python: bool) -> None:
    """The enable bit is recognized with nested paging, of a hypervisor in 64-bit mode; else they exit, intercepted or not
    (APM2 15.33.1)."""
    h = Hypervisor(f"{text}; vmmcall", python=python, np=lacking != "nested paging",
                   host_mode="compatibility" if lacking == "64-bit mode" else "long")  # fmt: skip
    h.set(rax=GPA, misc_ctl2=MISC_CTL2.v_vmload_vmsave)
    assert h.enter() == (ExitCode.VMLOAD if text == "vmload" else ExitCode.VMSAVE)
    assert h["nrip"] == CODE + 3
    assert h.again(misc_ctl2=0) == VMMCALL


def test_the_same_guest_from_64_bit_and_from_compatibility_mode(python: bool) -> None:
    """The native switch takes an entry of the one for no VMRUN of the other."""
    h = guest("1: vmsave; vmmcall; jmp 1b", python)
    for number in range(6):
        assert h.again(rip=CODE, rax=GPA) == VMMCALL
        h.state.set_segment(CS, h.state.selector(CS), 0, 0xFFFFFFFF, 0xC9B if number % 2 else 0xA9B)
        h.state.refresh()
        assert h.again(rip=CODE, rax=GPA) == (ExitCode.VMSAVE if number % 2 else VMMCALL)
        h.state.set_segment(CS, h.state.selector(CS), 0, 0xFFFFFFFF, 0xA9B)
        h.state.refresh()
