"""VMCB clean bits (APM2 15.15): coherent by default, and taken at their word with `--vmcb-cache strict`.

The host runs the guest, changes a field of its VMCB, and runs it again with the clean bit of that field set or clear.
"""

from __future__ import annotations

from io import StringIO

import pytest

from introspect.vmcb import CLEAN, VMCB
from tests.svm.covers import covers
from tests.svm.hypervisor import HLT, INVALID, VMCB_PAGE, VMMCALL, Event, Hypervisor
from vmdbg.cpu.core import Notice
from vmdbg.svm.vmcbcache import VmcbCache

RBX = 3


def change(text: str, clean: int, *, strict: bool = True, guest: str = "vmmcall; vmmcall; hlt", python: bool = False) -> Hypervisor:
    """Run the guest to its first exit; then the host executes `text`, sets VMCB_CLEAN, and runs it on."""
    host = f"vmrun; movl ${VMCB_PAGE}, %eax; addq $3, 0x578(%rax); {text}; movl ${clean:#x}, 0xc0(%rax); vmrun; hlt"
    h = Hypervisor(guest, host=host, python=python)
    if strict:
        h.cpu.switcher = None
        h.cpu.vmcb_cache = VmcbCache()
    h.enter()
    return h


INTERCEPTS = "andl $~2, 0x10(%rax)"
"""The VMMCALL intercept off: the guest's second VMMCALL is #UD then."""


@covers("VmcbClean")
@pytest.mark.parametrize("strict", [False, True], ids=["coherent", "strict"])
def test_a_cleared_bit_reads_the_field(strict: bool, python: bool) -> None:
    h = change(INTERCEPTS + "; orl $0x40, 0x8(%rax)", ~CLEAN.intercepts & 0xFFFF, strict=strict, python=python)
    assert h["exitcode"] == 0x46


def test_a_forgotten_bit_keeps_the_old_value(python: bool) -> None:
    h = change(INTERCEPTS + "; orl $0x40, 0x8(%rax)", CLEAN.intercepts, python=python)
    assert h["exitcode"] == VMMCALL


def test_coherent_mode_ignores_the_bits(python: bool) -> None:
    h = change(INTERCEPTS + "; orl $0x40, 0x8(%rax)", 0xFFFF, strict=False, python=python)
    assert h["exitcode"] == 0x46


@covers("VmcbClean")
@pytest.mark.parametrize(
    ("bit", "text", "guest", "field", "old"),
    [
        (CLEAN.control_registers, "movq $0x80050013, %rcx; movq %rcx, 0x558(%rax)", "vmmcall; movq %cr0, %rbx; hlt", "cr0", None),
        (CLEAN.cr2, "movq $0x1234, 0x640(%rax)", "vmmcall; movq %cr2, %rbx; hlt", "cr2", 0),
        (CLEAN.segments, "movw $0x3b, 0x430(%rax)", "vmmcall; movw %ds, %bx; hlt", "ds.selector", 0x10),
        (CLEAN.descriptor_tables, "movl $0x77, 0x464(%rax)",
         "vmmcall; subq $16, %rsp; sgdt (%rsp); movzwl (%rsp), %ebx; hlt", "gdtr.limit", 0xAF),
        (CLEAN.debug_registers, "movl $0xffff0ff1, 0x568(%rax)", "vmmcall; movq %dr6, %rbx; hlt", "dr6", 0xFFFF0FF0),
    ],
)  # fmt: skip
def test_each_group(bit: int, text: str, guest: str, field: str, old: int | None, python: bool) -> None:
    """The guest sees the new value with the bit clear, the old one with it set; memory holds what the guest ran with."""
    fresh = change(text, 0xFFFF & ~bit, guest=guest, python=python)
    stale = change(text, 0xFFFF, guest=guest, python=python)
    assert fresh["exitcode"] == stale["exitcode"] == HLT
    assert fresh[field] != stale[field]
    if old is not None:
        assert stale[field] == stale.state.reg(RBX) == old
    assert fresh[field] == fresh.state.reg(RBX)


def test_fields_without_a_clean_bit_are_always_read(python: bool) -> None:
    h = change("movq $0x55, 0x5f8(%rax)", 0xFFFF, guest="vmmcall; movq %rax, %rbx; hlt", python=python)
    assert h.state.reg(RBX) == 0x55


def test_the_first_run_of_a_vmcb_reads_all(python: bool) -> None:
    """Nothing is cached yet: there is nothing old to use."""
    h = Hypervisor("vmmcall", python=python)
    h.cpu.switcher, h.cpu.vmcb_cache = None, VmcbCache()
    h.set(vmcb_clean=0xFFFF)
    assert h.enter() == VMMCALL


def test_what_the_guest_changed_is_cached_with_the_new_value(python: bool) -> None:
    """#VMEXIT writes cache and memory: no bit needs clearing for what the guest did itself."""
    h = change("nop", 0xFFFF, guest="movl $0x77, %ecx; movq %rcx, %cr2; vmmcall; movq %cr2, %rbx; hlt", python=python)
    assert h.state.reg(RBX) == 0x77


def test_a_refused_vmcb_is_not_cached(python: bool) -> None:
    h = Hypervisor("vmmcall", python=python)
    h.cpu.switcher, h.cpu.vmcb_cache = None, VmcbCache()
    h.set(guest_asid=0)
    assert h.enter() == INVALID
    assert h.again(guest_asid=1, vmcb_clean=0xFFFF) == VMMCALL


def test_a_stale_use_is_told_and_stopped_for() -> None:
    host = f"vmrun; movl ${VMCB_PAGE}, %eax; addq $3, 0x578(%rax); {INTERCEPTS}; movl $1, 0xc0(%rax); vmrun; hlt"
    h = Hypervisor("vmmcall; vmmcall; hlt", host=host)
    h.cpu.switcher, h.cpu.vmcb_cache = None, VmcbCache()
    history = h.machine.history
    history.trace = trace = StringIO()
    history.stop_on = frozenset((Notice.STALE,))
    assert h.machine.run(10_000) == Event.PAUSED
    assert "intercept_misc2" in history.stopped_for
    assert "Clear bit 0" in history.stopped_for
    assert h.cpu.guest is not None
    assert "# stale" in trace.getvalue()
    assert VMCB.read(h.view, "intercept_misc2") & 2 == 0


def test_failed_vmrun_and_shutdown_are_stopped_for(python: bool) -> None:
    h = Hypervisor("lidt (%rsp); ud2", host="vmrun; hlt", python=python)
    h.machine.history.stop_on = frozenset((Notice.VMRUN_FAIL, Notice.SHUTDOWN))
    h.set(guest_asid=0)
    assert h.machine.run(10_000) == Event.PAUSED
    assert "ASID is 0" in h.machine.history.stopped_for
    assert h.cpu.guest is None
    assert h["exitcode"] == INVALID
    h.machine.history.stopped_for = ""
    h.set(guest_asid=1)
    h.state.rip = h.program.origin
    h.state.set_reg(0, VMCB_PAGE)
    h.guest_write(h["rsp"], bytes(16))
    assert h.machine.run(10_000) == Event.PAUSED
    assert "shut down" in h.machine.history.stopped_for
