"""#AC and #XF in guests: across world switches, in their delivery and by injection (APM2 8.2.18, 8.2.20, 15.12)."""

from __future__ import annotations

import pytest

from tests.engine.rig import DATA, Mode, Rig
from tests.svm.covers import covers
from tests.svm.hypervisor import GUEST, HLT, VMMCALL, Hypervisor
from tests.svm.test_events import change_gate, event
from tests.svm.test_switch import both, looping, switcher
from vmdbg.engine.state import RDI
from vmdbg.svm import switch

NP, AC, XF = 11, 17, 19
EXCP_NP, EXCP_AC, EXCP_XF, CPUID, NPF = 0x40 + NP, 0x40 + AC, 0x40 + XF, 0x72, 0x400
AM, FLAG, DEFAULT, IE_UNMASKED = 1 << 18, 1 << 18, 0x1F80, 0x1F00
DIVIDE = f"ldmxcsr {DATA}; it: divss %xmm1, %xmm0; vmmcall"


def checked(guest: str, mode: Mode = "long", *, python: bool, np: bool = True, strict_tlb: bool = False) -> Hypervisor:
    """A user's program in a guest that checks alignment."""
    h = Hypervisor(guest, mode, user=True, python=python, np=np, strict_tlb=strict_tlb)
    h.set(cr0=h["cr0"] | AM, rflags=h["rflags"] | FLAG)
    return h


@covers(EXCP_AC)
@pytest.mark.parametrize("np", [True, False])
@pytest.mark.parametrize("mode", ["virtual", "protected32", "pae", "compatibility", "long"])
@pytest.mark.parametrize("intercepted", [True, False])
def test_alignment_check(intercepted: bool, mode: Mode, np: bool, python: bool) -> None:
    """From the first instruction behind VMRUN on."""
    h = checked("it: movl %eax, 0x7101", mode, np=np, python=python)
    h.intercept(EXCP_AC, on=intercepted)
    assert h.enter() == (EXCP_AC if intercepted else HLT)
    if intercepted:
        assert (h["rip"], h["nrip"], h["exitinfo1"], h["exitinfo2"], h["exitintinfo"]) == (h.labels["it"], 0, 0, 0, 0)
        assert h["rflags"] & 0x10000 == 0
    else:
        assert (h.guest_vector, h.guest_stack(1, 8 if mode in ("long", "compatibility") else 4)) == (AC, [0])


@covers(EXCP_XF)
@pytest.mark.parametrize("np", [True, False])
@pytest.mark.parametrize("mode", ["real", "protected32", "pae", "compatibility", "long"])
@pytest.mark.parametrize("intercepted", [True, False])
def test_simd_exception(intercepted: bool, mode: Mode, np: bool, python: bool) -> None:
    h = Hypervisor("ldmxcsr 0x7100; it: divss %xmm1, %xmm0", mode, np=np, python=python)
    h.guest_write(0x7100, IE_UNMASKED.to_bytes(4, "little"))
    h.set(cr4=h["cr4"] | 0x600)
    h.intercept(EXCP_XF, on=intercepted)
    assert h.enter() == (EXCP_XF if intercepted else HLT)
    assert h.state.mxcsr == IE_UNMASKED | 1
    if intercepted:
        assert (h["rip"], h["nrip"], h["exitinfo1"], h["exitinfo2"], h["exitintinfo"]) == (h.labels["it"], 0, 0, 0, 0)
    else:
        assert h.guest_vector == XF


def test_without_osxmmexcpt_the_intercept_of_undefined_instructions_sees_it(python: bool) -> None:
    h = Hypervisor(DIVIDE, python=python)
    h.guest_write(DATA, IE_UNMASKED.to_bytes(4, "little"))
    h.set(cr4=h["cr4"] & ~0x400)
    h.intercept(EXCP_XF, 0x46)
    assert (h.enter(), h["rip"]) == (0x46, h.labels["it"])


def test_mxcsr_is_not_switched(python: bool) -> None:
    """What one side unmasks the other has, too (APM2 15.5.1): VMRUN and #VMEXIT leave SSE alone."""
    h = Hypervisor("it: divss %xmm1, %xmm0", host=f"ldmxcsr {DATA}; vmrun; divss %xmm1, %xmm0; hlt", python=python)
    h.intercept(EXCP_XF)
    h.ram.write_u32(DATA, IE_UNMASKED)
    assert h.enter() == EXCP_XF
    assert h["rip"] == h.labels["it"]
    assert h.handled == XF
    h = Hypervisor(f"ldmxcsr {DATA}; vmmcall", host="vmrun; host_it: divss %xmm1, %xmm0; hlt", python=python)
    h.guest_write(DATA, IE_UNMASKED.to_bytes(4, "little"))
    assert h.enter() == VMMCALL
    assert (h.handled, h.stack(1, 8)) == (XF, [h.labels["host_host_it"]])


@pytest.mark.parametrize("vector", [AC, XF])
def test_interrupted_in_delivery(vector: int, python: bool) -> None:
    """EXITINTINFO has it, with the error code of #AC; injected again it comes to its handler."""
    h = checked(f"ldmxcsr {DATA}; divss %xmm1, %xmm0" if vector == XF else "movl %eax, 0x100001", python=python)
    h.guest_write(DATA, IE_UNMASKED.to_bytes(4, "little"))
    h.intercept(EXCP_NP)
    change_gate(h, vector, present=False)
    info = event(3, vector, 0 if vector == AC else None)
    assert h.enter() == EXCP_NP
    assert (h["exitinfo1"], h["exitintinfo"]) == (vector << 3 | 3, info)
    change_gate(h, vector)
    assert h.again(eventinj=info) == HLT
    assert h.guest_vector == vector


@pytest.mark.parametrize("vector", [AC, XF])
def test_injected(vector: int, python: bool) -> None:
    """Whether anything asks for it or not, and unseen by intercepts."""
    h = Hypervisor("nop", user=True, python=python)
    h.intercept(EXCP_AC, EXCP_XF)
    h.set(eventinj=event(3, vector, 0 if vector == AC else None))
    assert (h.enter(), h.guest_vector) == (HLT, vector)


def test_alignment_before_the_nested_page(python: bool) -> None:
    h = checked("movl (%rdi), %eax; vmmcall", python=python)
    h.inner.state.set_reg(RDI, 0)
    h.state.set_reg(RDI, DATA + 1)
    h.intercept(EXCP_AC)
    h.change_nested(DATA, drop=1)
    assert h.enter() == EXCP_AC
    h.state.set_reg(RDI, DATA)
    assert (h.again(), h["exitinfo2"]) == (NPF, DATA)


def test_operand_behind_two_translations(python: bool) -> None:
    """What is divided lies in the guest's memory; where it is not mapped that is the exit."""
    h = Hypervisor(f"ldmxcsr {DATA}; it: divps {DATA + 0x1000}, %xmm0; vmmcall", python=python)
    h.guest_write(DATA, (DEFAULT & ~(4 << 7)).to_bytes(4, "little"))
    h.state.set_xmm(0, 0x3F800000 * (1 << 96 | 1 << 64 | 1 << 32 | 1))
    h.guest_write(DATA + 0x1000, (0x3F800000).to_bytes(4, "little") * 3)
    h.intercept(EXCP_XF)
    h.change_nested(DATA + 0x1000, drop=1)
    assert (h.enter(), h["exitinfo2"]) == (NPF, DATA + 0x1000)
    h.change_nested(DATA + 0x1000, add=1)
    assert (h.again(), h["rip"]) == (EXCP_XF, h.labels["it"])
    h.ram.write_u32(GUEST + DATA + 0x1000 + 12, 0x3F800000)
    assert h.again() == VMMCALL


def test_under_a_strict_tlb(python: bool) -> None:
    for guest, vector in (("movl %eax, 0x100001", AC), (DIVIDE, XF)):
        h = checked(guest, python=python, strict_tlb=True)
        h.guest_write(DATA, IE_UNMASKED.to_bytes(4, "little"))
        h.intercept(EXCP_AC, EXCP_XF)
        assert h.enter() == 0x40 + vector


@pytest.mark.skipif(not switch.on_exit(), reason="the native world switch is not built (it needs a C compiler)")
@pytest.mark.parametrize("am", [AM, 0])
def test_the_switch_in_c_pays_attention(am: int) -> None:
    """A guest that is entered in C has its alignment checked, and its SIMD exceptions; and the host's mode is its own."""
    guest = "1: cpuid; movq %rax, (%rdi); mulss %xmm1, %xmm0; addl $1, %esi; jmp 1b"

    def run(h: Hypervisor) -> None:
        h.state.set_reg(RDI, DATA)
        h.state.mxcsr = DEFAULT & ~(8 << 7)
        h.run(100_000)

    plain, native, h = both(looping(guest, cr0=0x80000011 | am, cpl=3, cs__attrib=0xAFB, rflags=FLAG | 2), run)
    assert plain == native
    assert switcher(h).made > (15 if am else 30)  # CPUID, too, is looked at, and its exit made in Python
    h = Hypervisor(guest, host="1: vmrun; addq $2, 0x90578; decl %ebx; jnz 1b; hlt", user=True)
    h.set(cr0=h["cr0"] | am, rflags=h["rflags"] | FLAG)
    h.intercept(CPUID, EXCP_AC)
    h.state.set_reg(3, 2)
    h.state.set_reg(RDI, DATA + 1)
    code = h.enter()
    assert switcher(h).made
    assert code == (EXCP_AC if am else CPUID)


@pytest.mark.parametrize("mode", ["long", "protected32"])
def test_data_breakpoints_and_watches(mode: Mode, python: bool) -> None:
    """A debug register meets what is looked at; and the engine stops before an access that somebody watches."""
    for dr7 in (0, 0xD0002):
        r = Rig("nop; movl %eax, 0x7100; it: nop; hlt", mode, python=python, user=True)
        r.state.set_cr(0, r.state.cr(0) | AM)
        r.state.rflags |= FLAG
        r.state.refresh()
        r.cpu.dr[0], r.cpu.dr[7] = 0x7100, dr7 | 0x400
        r.cpu.debug.update()
        r.run()
        assert r.handled == (1 if dr7 else 13)
        if dr7:
            assert r.stack(1, 8 if mode == "long" else 4) == [r.labels["it"]]
