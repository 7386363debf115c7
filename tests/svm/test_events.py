"""Events across the border: EVENTINJ, EXITINTINFO, interrupts, virtual ones, shadows (APM2 15.13, 15.20, 15.21)."""

from __future__ import annotations

import pytest

from introspect.rules import EXCEPTIONS
from tests.engine.interrupts import IF, enable_apic, interrupt
from tests.engine.rig import CODE, HANDLERS, RING0_STACK, STACK, Mode, P
from tests.svm.covers import covers
from tests.svm.hypervisor import HLT, HOST_CODE, INVALID, NPF, SHUTDOWN, VMMCALL, Hypervisor
from vmdbg.cpu.events import DELIVERY
from vmdbg.cpu.faults import WITH_ERROR_CODE

INTR, NMI_EXIT, INIT_EXIT, VINTR = 0x60, 0x61, 0x63, 0x64
V, EV = 1 << 31, 1 << 11
RF = 1 << 16


def event(kind: int, vector: int, error: int | None = None) -> int:
    return V | kind << 8 | vector | (0 if error is None else EV | error << 32)


def change_gate(h: Hypervisor, vector: int, **change: object) -> None:
    h.inner.gate(vector, **change)  # type: ignore[arg-type]
    h.guest_write(0, h.inner.ram.read(0, 0x8000))


# EVENTINJ


@pytest.mark.parametrize(
    ("kind", "vector", "error"),
    [(0, 0x40, None), (2, 2, None), (2, 0x33, None), (3, 13, 0x18), (3, 14, 2), (3, 6, None), (4, 0x80, None)],
)
@pytest.mark.parametrize("mode", ["protected32", "pae", "compatibility", "long"])
def test_injection(kind: int, vector: int, error: int | None, mode: Mode, python: bool) -> None:
    h = Hypervisor("nop", mode, python=python)
    h.set(eventinj=event(kind, vector, error), cr2=0x1234, nrip=CODE + 7)
    h.intercept(*range(0x40, 0x60))  # intercepts do not see injected events
    h.intercept(0x75)
    assert h.enter() == HLT
    assert h.guest_vector == (2 if kind == 2 else vector), "of an NMI the vector is ignored"
    size = 8 if mode in ("compatibility", "long") else 4
    frame = h.guest_stack(2, size)
    back = CODE + 7 if kind == 4 else CODE
    assert frame[: 1 + (error is not None)] == ([error, back] if error is not None else [back])
    assert h["cr2"] == 0x1234
    assert not h["eventinj"] & V
    assert h["exitintinfo"] == 0


@pytest.mark.parametrize(
    "word",
    [
        *(V | kind << 8 | 0x40 for kind in (1, 5, 6, 7)),
        *(V | 3 << 8 | vector for vector in (2, 9, 15, 20, 31, 32, 0x80, 0xFF)),
    ],
)
def test_what_cannot_be_injected(word: int, python: bool) -> None:
    """Reserved types, and exceptions with a vector that is none (APM2 15.20): VMRUN refuses, and says why."""
    h = Hypervisor("nop", python=python)
    h.set(eventinj=word)
    assert h.enter() == INVALID
    assert "15.20" in h.cpu.last_fault
    assert h["rip"] == CODE


@pytest.mark.parametrize("vector", sorted(EXCEPTIONS))
def test_every_exception_can_be_injected(vector: int, python: bool) -> None:
    """Those, too, that nothing here raises; intercepts see none of them.  64-bit mode has no #OF and #BR."""
    h = Hypervisor("nop", "compatibility" if vector in (4, 5) else "long", python=python)
    h.intercept(*range(0x40, 0x60))
    h.set(eventinj=event(3, vector, 8 if vector in WITH_ERROR_CODE else None), nrip=CODE)
    assert (h.enter(), h.guest_vector) == (HLT, vector)


def test_without_v_nothing_is_injected(python: bool) -> None:
    h = Hypervisor("nop; vmmcall", python=python)
    h.set(eventinj=event(3, 2, 5) & ~V)
    assert h.enter() == VMMCALL


def test_the_error_code_is_pushed_if_ev_says_so(python: bool) -> None:
    """Whatever the vector: the hypervisor is to know which have one."""
    h = Hypervisor("nop", python=python)
    h.set(eventinj=event(3, 6, 0x1234))
    assert h.enter() == HLT
    assert h.guest_stack(2) == [0x1234, CODE]
    h = Hypervisor("nop", python=python)
    h.set(eventinj=event(3, 13))
    assert h.enter() == HLT
    assert h.guest_stack(1) == [CODE]


def test_injection_in_real_mode(python: bool) -> None:
    h = Hypervisor("nop", "real", python=python)
    h.set(eventinj=event(0, 0x40))
    assert h.enter() == HLT
    assert h.guest_vector == 0x40
    assert h.guest_stack(3, 2) == [CODE, 0, 2]


@pytest.mark.parametrize(("vector", "mode"), [(3, "long"), (3, "compatibility"), (4, "compatibility")])
def test_injected_int3_and_into_are_software_exceptions(vector: int, mode: Mode, python: bool) -> None:
    """They return to nRIP, and the gate's DPL is checked (APM2 15.20)."""
    h = Hypervisor("int3", mode, python=python)
    h.set(eventinj=event(3, vector), nrip=CODE + 1)
    assert h.enter() == HLT
    assert (h.guest_vector, h.guest_stack(3)[2] & RF, h.guest_stack(1)) == (vector, 0, [CODE + 1])
    h = Hypervisor("int3", mode, python=python, user=True)
    h.set(eventinj=event(3, vector), nrip=CODE + 1)
    assert h.enter() == HLT
    assert (h.guest_vector, h.guest_stack(2)) == (13, [vector << 3 | 2, CODE])


def test_injection_takes_no_time_but_the_deliverys(python: bool) -> None:
    h = Hypervisor("int $0x80", python=python)
    h.set(eventinj=event(4, 0x80), nrip=CODE + 2)
    assert h.enter() == HLT
    assert h.now == 3 + DELIVERY + 1  # VMRUN, the delivery, the host's HLT


def test_injection_ignores_if_and_shadow(python: bool) -> None:
    h = Hypervisor("nop", python=python)
    h.set(eventinj=event(0, 0x40), int_state=1)
    assert h.enter() == HLT
    assert h.guest_vector == 0x40
    assert h["int_state"] & 1 == 0


def test_delivery_that_faults_is_reported(python: bool) -> None:
    """#NPF while the frame of an injected event is pushed: EXITINTINFO has the event, and it can be injected again."""
    for kind, vector, error in ((0, 0x40, None), (3, 13, 0x18), (4, 0x80, None), (2, 2, None)):
        h = Hypervisor("nop", python=python)
        h.set(eventinj=event(kind, vector, error), nrip=CODE + 1)
        h.change_nested(STACK - 0x1000, drop=P)
        h.change_nested(STACK - 8, drop=P)
        assert h.enter() == NPF
        assert h["exitintinfo"] == event(kind, vector, error)
        assert (h["rip"], h["rsp"]) == (CODE, STACK)
        assert h["exitinfo2"] & ~0xFFF == 0x6000
        assert h["exitinfo1"] == 1 << 32 | 6
        h.change_nested(STACK - 8, add=P)
        assert h.again(eventinj=h["exitintinfo"], nrip=CODE + 1) == HLT
        assert h.guest_vector == vector


def test_int_n_whose_delivery_faults(python: bool) -> None:
    """The software interrupt has not happened: RIP is on it, no time has passed."""
    h = Hypervisor("int $0x80", python=python)
    h.change_nested(STACK - 8, drop=P)
    assert h.enter() == NPF
    assert h["exitintinfo"] == event(4, 0x80)
    assert h["rip"] == CODE
    assert h["nrip"] == 0
    assert h.now == 3 + 1


@pytest.mark.parametrize(
    ("text", "info"), [("int3", event(3, 3)), (".byte 0xcd, 3", event(4, 3)), ("ud2", event(3, 6))]
)
def test_types_in_exitintinfo(text: str, info: int, python: bool) -> None:
    h = Hypervisor(text, python=python)
    h.change_nested(STACK - 8, drop=P)
    assert h.enter() == NPF
    assert h["exitintinfo"] == info


def test_idt_in_an_absent_nested_page(python: bool) -> None:
    h = Hypervisor("ud2", python=python)
    h.change_nested(0x2000, drop=P)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (1 << 32 | 4, 0x2000 + 6 * 16)
    assert h["exitintinfo"] == event(3, 6)


def test_intercepted_exception_in_delivery(python: bool) -> None:
    h = Hypervisor("int $0x80", python=python)
    h.intercept(0x4B)
    change_gate(h, 0x80, present=False)
    assert h.enter() == 0x4B
    assert (h["exitinfo1"], h["exitintinfo"], h["rip"]) == (0x80 << 3 | 2, event(4, 0x80), CODE)


def test_page_fault_in_delivery(python: bool) -> None:
    """A guest page fault on its own stack, intercepted."""
    h = Hypervisor("int $0x80", python=python, user=True)
    h.intercept(0x4E)
    change_gate(h, 0x80, dpl=3)
    h.guest_write(0x50000 + (RING0_STACK - 8 >> 12) * 8, bytes(8))
    assert h.enter() == 0x4E
    assert (h["exitinfo1"], h["exitinfo2"], h["exitintinfo"]) == (2, RING0_STACK - 8, event(4, 0x80))


@pytest.mark.parametrize("kind", [0, 3, 4])
def test_injection_that_faults(kind: int, python: bool) -> None:
    """The fault of a delivery is an exception like any other: the guest's, or an exit with the event in EXITINTINFO."""
    vector, error = (13, 0) if kind == 3 else (0x40, None)
    for intercepted in (False, True):
        h = Hypervisor("nop", python=python)
        h.intercept(0x4B, on=intercepted)
        change_gate(h, vector, present=False)
        h.set(eventinj=event(kind, vector, error), nrip=CODE + 1)
        external = kind != 4
        code = h.enter()
        if intercepted:
            assert (code, h["exitintinfo"], h["rip"]) == (0x4B, event(kind, vector, error), CODE)
            assert h["exitinfo1"] == vector << 3 | 2 | external
        elif kind == 3:  # #GP and #NP are both contributory
            assert (code, h.guest_vector, h.guest_stack(2)) == (HLT, 8, [0, CODE])
        else:
            assert (code, h.guest_vector) == (HLT, 11)
            assert h.guest_stack(2) == [vector << 3 | 2 | external, CODE]


def test_injection_through_a_task_gate_exits(python: bool) -> None:
    """An event that would switch tasks is the hypervisor's where it intercepts that (APM2 15.14.1)."""
    h = Hypervisor("nop", "protected32", python=python)
    h.intercept(0x7D)
    change_gate(h, 13, kind=5, selector=0x88)
    h.set(eventinj=event(3, 13, 0x18))
    assert h.enter() == 0x7D
    assert (h["exitinfo1"], h["exitintinfo"], h["rip"]) == (0x88, event(3, 13, 0x18), CODE)
    assert h["exitinfo2"] == 1 << 48 | 1 << 44 | 0x18  # a fault: the flags that would be saved have RF


def test_an_injected_exception_that_its_handler_repeats_is_intercepted(python: bool) -> None:
    """Intercepts do not see the injected #UD, but the next one."""
    h = Hypervisor("nop", python=python)
    h.intercept(0x46)
    h.guest_handler(6, "nop; ud2")
    h.set(eventinj=event(3, 6))
    assert h.enter() == 0x46
    assert (h["rip"], h["exitintinfo"]) == (HANDLERS + 16 * 6 + 1, 0)


@pytest.mark.parametrize(("first", "second"), [(21, 8), (28, 11), (29, 8), (30, 8), (17, 11)])
def test_classes_of_exceptions(first: int, second: int, python: bool) -> None:
    """#CP, #VC and #SX are contributory as #GP is (APM2 table 8-2, 15.28): #NP in their delivery makes #DF."""
    h = Hypervisor("nop", python=python)
    change_gate(h, first, present=False)
    h.set(eventinj=event(3, first))
    assert (h.enter(), h.guest_vector) == (HLT, second)


def test_injected_double_fault_that_faults_shuts_down(python: bool) -> None:
    h = Hypervisor("nop", python=python)
    h.set(eventinj=event(3, 8, 0))
    change_gate(h, 8, present=False)
    change_gate(h, 11, present=False)
    assert h.enter() == SHUTDOWN


# Physical interrupts while a guest runs.


@covers(0x60)
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("host_if", [False, True])
@pytest.mark.parametrize("guest_if", [False, True])
def test_interrupt_exits(masking: bool, host_if: bool, guest_if: bool, python: bool) -> None:
    """Which IF counts: the guest's, or with V_INTR_MASKING the host's at VMRUN (APM2 15.21.1)."""
    h = Hypervisor("movl $50, %ecx; 1: loop 1b; vmmcall", host="clgi; vmrun; hlt", python=python)
    h.intercept(INTR)
    h.set(v_intr=masking << 24, rflags=2 | guest_if << 9)
    h.state.rflags = 2 | host_if << 9
    h.step()
    interrupt(h, 0x40)
    assert h.enter() == (INTR if (host_if if masking else guest_if) else VMMCALL)
    if h["exitcode"] == INTR:
        assert (h["rip"], h["exitintinfo"], h["nrip"]) == (CODE, 0, 0)
        assert h.cpu.lapic.pending() == 0x40  # it is the host's to take


def test_the_host_takes_the_interrupt_after_stgi(python: bool) -> None:
    h = Hypervisor("1: jmp 1b", host="sti; clgi; vmrun\nback: stgi\nopen: nop; hlt", python=python)
    h.intercept(INTR)
    h.set(v_intr=1 << 24)
    h.machine.run(200)
    interrupt(h, 0x40)
    h.run()
    assert h["exitcode"] == INTR
    assert h.handled == 0x40
    assert h.stack(1, 8) == [h.labels["host_open"]]


def test_without_the_intercept_the_guest_takes_it(python: bool) -> None:
    h = Hypervisor("nop; nop", python=python)
    h.set(rflags=2 | IF)
    interrupt(h, 0x40)
    h.state.rflags = 2
    assert h.enter() == HLT
    assert h.guest_vector == 0x40
    assert h.cpu.lapic.pending() is None


@covers(0x61)
@pytest.mark.parametrize("intercepted", [False, True])
def test_nmi(intercepted: bool, python: bool) -> None:
    h = Hypervisor("1: jmp 1b", python=python)
    h.intercept(NMI_EXIT, on=intercepted)
    h.machine.run(100)
    h.cpu.nmi()
    assert h.enter() == (NMI_EXIT if intercepted else HLT)
    assert h.cpu.nmi_pending == intercepted
    if not intercepted:
        assert h.guest_vector == 2


@covers(0x63)
def test_init_exits_and_stays_pending(python: bool) -> None:
    h = Hypervisor("1: jmp 1b", python=python)
    h.intercept(INIT_EXIT)
    h.machine.run(100)
    h.cpu.init()
    assert h.enter() == INIT_EXIT
    assert h.cpu.init_pending


def test_halted_guests_wake(python: bool) -> None:
    """A guest whose HLT is not intercepted sleeps in guest mode; an interrupt for the host ends that."""
    h = Hypervisor("hlt; vmmcall", python=python)
    h.intercept(HLT, on=False)
    h.intercept(INTR)
    h.set(v_intr=1 << 24)
    h.state.rflags = 2 | IF
    h.run()
    assert h.cpu.halted
    assert h.cpu.guest is not None
    interrupt(h, 0x40)
    assert h.enter() == INTR
    assert h["rip"] == CODE + 1


# Virtual interrupts.


def v_intr(vector: int, priority: int = 8, tpr: int = 0, *, masking: bool = True, ignore_tpr: bool = False) -> int:
    return 1 << 8 | priority << 16 | ignore_tpr << 20 | masking << 24 | vector << 32 | tpr


@covers(0x64)
@pytest.mark.parametrize(("guest_if", "shadow", "tpr", "ignore", "taken"), [
    (True, False, 0, False, True), (False, False, 0, False, False), (True, False, 8, False, False),
    (True, False, 9, False, False),
    (True, False, 7, False, True), (True, False, 15, True, True),
])  # fmt: skip
@pytest.mark.parametrize("intercepted", [False, True])
def test_virtual_interrupt(
    guest_if: bool, shadow: bool, tpr: int, ignore: bool, taken: bool, intercepted: bool, python: bool
) -> None:  # fmt: skip
    h = Hypervisor("nop; vmmcall", python=python)
    h.intercept(VINTR, on=intercepted)
    h.set(rflags=2 | guest_if << 9, v_intr=v_intr(0x55, 8, tpr, ignore_tpr=ignore))
    code = h.enter()
    if not taken:
        assert code == VMMCALL
    elif intercepted:
        assert (code, h["rip"]) == (VINTR, CODE)
    else:
        assert (code, h.guest_vector) == (HLT, 0x55)
    assert bool(h["v_intr"] >> 8 & 1) == (not taken or intercepted)  # V_IRQ is cleared when it is taken
    assert h["v_intr"] & 0xFF == tpr
    assert not shadow


@pytest.mark.parametrize("intercepted", [False, True])
def test_virtual_interrupt_waits_for_sti_and_its_shadow(intercepted: bool, python: bool) -> None:
    h = Hypervisor("nop; sti; nop\nopen: nop; vmmcall", python=python)
    h.intercept(VINTR, on=intercepted)
    h.set(v_intr=v_intr(0x55))
    h.enter()
    assert (h["rip"] if intercepted else h.guest_stack(1)[0]) == h.labels["open"]


def test_guest_lowers_its_v_tpr(python: bool) -> None:
    h = Hypervisor(
        "movl $5, %eax; movq %rax, %cr8; sti; nop; nop; xorl %eax, %eax; movq %rax, %cr8\nopen: nop; vmmcall",
        python=python,
    )
    h.set(v_intr=v_intr(0x55, 3))
    physical = h.cpu.lapic.cr8
    h.enter()
    assert h.guest_vector == 0x55
    assert h.guest_stack(1) == [h.labels["open"]]
    assert h["v_intr"] & 0xFF == 0
    assert h.cpu.lapic.cr8 == physical


def test_cr8_without_masking_is_the_physical_tpr(python: bool) -> None:
    h = Hypervisor("movl $5, %eax; movq %rax, %cr8; vmmcall", python=python)
    assert h.enter() == VMMCALL
    assert h.cpu.lapic.cr8 == 5


def test_physical_before_virtual(python: bool) -> None:
    h = Hypervisor("nop", python=python)
    h.intercept(INTR)
    h.set(rflags=2 | IF, v_intr=v_intr(0x55, masking=False))
    interrupt(h, 0x40)
    assert h.enter() == INTR
    assert h["v_intr"] >> 8 & 1


# Interrupt shadows.


@pytest.mark.parametrize("virtual", [False, True])
def test_shadow_into_the_guest(virtual: bool, python: bool) -> None:
    """INT_STATE bit 0 holds interrupts back for one instruction."""
    h = Hypervisor("nop; nop; vmmcall", python=python)
    h.intercept(INTR, VINTR)
    h.set(rflags=2 | IF, int_state=1, v_intr=v_intr(0x55) if virtual else 0)
    if not virtual:
        interrupt(h, 0x40)
    assert h.enter() == (VINTR if virtual else INTR)
    assert h["rip"] == CODE + 1
    assert h["int_state"] & 1 == 0


def test_shadow_out_of_the_guest(python: bool) -> None:
    """An exit in the shadow of STI saves it; the guest goes on with it (APM2 15.21.5)."""
    h = Hypervisor("sti\nit: cpuid\nopen: nop", python=python)
    h.intercept(0x72, VINTR)
    h.set(v_intr=v_intr(0x55))
    assert h.enter() == 0x72
    assert h["int_state"] & 1 == 1
    h.intercept(0x72, on=False)
    assert h.again() == VINTR
    assert h["rip"] == h.labels["open"]


def test_the_host_has_no_shadow_after_an_exit(python: bool) -> None:
    h = Hypervisor("sti; cpuid", python=python)
    h.intercept(0x72)
    assert h.enter() == 0x72
    assert not h.state.shadow


def test_sti_before_vmrun(python: bool) -> None:
    """The hypervisor's STI right before VMRUN: its shadow does not reach into the guest."""
    h = Hypervisor("nop; vmmcall", host="sti; vmrun; hlt", python=python)
    h.intercept(INTR)
    h.set(v_intr=1 << 24)
    interrupt(h, 0x40)
    assert h.enter() == INTR
    assert h["rip"] == CODE


def test_single_step_of_the_guest_by_the_hypervisor(python: bool) -> None:
    """RFLAGS.TF in the VMCB traps after the first guest instruction."""
    h = Hypervisor("nop; nop; vmmcall", python=python)
    h.intercept(0x41)
    h.set(rflags=2 | 1 << 8)
    assert h.enter() == 0x41
    assert h["rip"] == CODE + 1
    assert h["dr6"] & 1 << 14
    assert h.again() == 0x41
    assert h["rip"] == CODE + 2


def test_tf_with_emulated_instructions(python: bool) -> None:
    h = Hypervisor("cpuid; nop", python=python)
    h.intercept(0x41)
    h.set(rflags=2 | 1 << 8)
    assert h.enter() == 0x41
    assert h["rip"] == CODE + 2


def test_timer_of_the_host_preempts_a_guest(python: bool) -> None:
    h = Hypervisor(
        "1: jmp 1b",
        host="""
        movl $0xfee00000, %ebx; movl $0xb, 0x3e0(%rbx); movl $0x30, 0x320(%rbx); movl $5000, 0x380(%rbx)
        sti; clgi; vmrun; hlt""",
        python=python,
    )
    enable_apic(h)
    h.intercept(INTR)
    h.set(v_intr=1 << 24)
    assert h.enter() == INTR
    assert 20000 <= h.now < 20200  # the APIC counts once in four ticks
    assert h.rip > HOST_CODE
