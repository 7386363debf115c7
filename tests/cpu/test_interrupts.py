"""Where interrupts are taken: IF, shadows, TPR, NMI blocking, HLT."""

from __future__ import annotations

import pytest

from tests.engine.interrupts import IF, enable_apic, interrupt
from tests.engine.rig import CODE, HANDLERS, LONG_MODES, MODES, STACK, Mode, Rig, bits_of
from vmdbg.engine.state import CS, DS, LDTR, RSP, SS, TR

NMI, IRET = 2, {16: b"\xcf", 32: b"\xcf", 64: b"\x48\xcf"}
STEPPED = pytest.mark.parametrize("stepped", [False, True], ids=["run", "stepped"])


def taken_at(rig: Rig, stepped: bool = False, size: int = 8) -> int:
    """Run until a handler halts; the return address on its stack."""
    if stepped:
        for _ in range(200):
            if rig.handled is not None:
                break
            rig.step()
    else:
        rig.run()
    assert rig.handled is not None
    return rig.stack(1, size)[0]


@STEPPED
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "virtual"])
def test_sti_opens_after_the_next_instruction(mode: Mode, stepped: bool, python: bool) -> None:
    rig = Rig("nop; sti; nop; cli; nop", mode, python=python)
    interrupt(rig, 0x40)
    at = taken_at(rig, stepped, 8 if mode in LONG_MODES else 2 if mode == "real" else 4)
    assert (rig.handled, at & 0xFFFF) == (0x40, CODE + 3)


@STEPPED
def test_sti_then_cli_never_opens(stepped: bool, python: bool) -> None:
    rig = Rig("sti; cli; nop; sti; nop", python=python)
    interrupt(rig, 0x40)
    assert taken_at(rig, stepped) == CODE + 5


@STEPPED
def test_sti_casts_a_shadow_only_when_it_sets_if(stepped: bool, python: bool) -> None:
    """The second STI finds IF set: no shadow of its own (APM3 STI); the first one's ends behind it."""
    rig = Rig("sti; sti; nop; nop", python=python)
    interrupt(rig, 0x40)
    assert taken_at(rig, stepped) == CODE + 2


@STEPPED
@pytest.mark.parametrize(("text", "length"), [("movw %ds, %ax; movw %ax, %ss", 3 + 2), ("pushw %ss; popw %ss", 4)])
def test_loading_ss_casts_a_shadow(text: str, length: int, stepped: bool, python: bool) -> None:
    """An interrupt that arrives during the load waits for the instruction behind it (APM3 MOV, POP)."""
    mode: Mode = "protected32" if "pop" in text else "long"
    rig = Rig(f"{text}\nnext: nop; nop", mode, python=python)
    rig.state.rflags |= IF
    rig.step(2)
    assert rig.rip == rig.labels["next"]
    assert rig.state.shadow
    interrupt(rig, 0x40)
    assert taken_at(rig, stepped, 8 if mode == "long" else 4) == rig.labels["next"] + 1
    assert length


@STEPPED
def test_nmi_waits_for_the_shadow(stepped: bool, python: bool) -> None:
    rig = Rig("movw %ds, %ax; movw %ax, %ss\nnext: nop; nop", python=python)
    rig.step(2)
    rig.cpu.nmi()
    assert taken_at(rig, stepped) == rig.labels["next"] + 1
    assert rig.handled == NMI


@STEPPED
def test_popf_opens_at_once(stepped: bool, python: bool) -> None:
    rig = Rig("pushfq; orl $0x200, (%rsp); popfq; nop; nop", python=python)
    interrupt(rig, 0x40)
    assert taken_at(rig, stepped) == CODE + 9


@STEPPED
def test_iret_opens_at_once(stepped: bool, python: bool) -> None:
    rig = Rig("int $0x21; nop; nop", python=python)
    rig.ram.write(HANDLERS + 16 * 0x21, b"\x81\x4c\x24\x10\x00\x02\x00\x00\x48\xcf")  # orl $0x200, 16(%rsp); iretq
    interrupt(rig, 0x40)
    assert taken_at(rig, stepped) == CODE + 2


@STEPPED
def test_sysret_opens_at_once(stepped: bool, python: bool) -> None:
    rig = Rig("movl $0x300000, %ecx; movl $0x200, %r11d; sysretq", python=python)
    rig.state.efer |= 1
    rig.state.set_field("star", 0x0023000800000000)
    interrupt(rig, 0x40)
    assert taken_at(rig, stepped) == 0x300000


def test_pending_without_if_waits(python: bool) -> None:
    rig = Rig("movl $100, %ecx; 1: loop 1b; hlt", python=python)
    interrupt(rig, 0x40)
    rig.run()
    assert rig.handled is None
    assert rig.cpu.halted


@STEPPED
def test_task_priority(stepped: bool, python: bool) -> None:
    """CR8 holds back its class and those below; lowering it lets go at once."""
    rig = Rig(
        "movl $4, %eax; movq %rax, %cr8; sti; nop; nop; decl %eax; movq %rax, %cr8\nopen: nop; nop", python=python
    )
    interrupt(rig, 0x45)
    assert taken_at(rig, stepped) == rig.labels["open"]


@STEPPED
def test_task_priority_through_the_apic(stepped: bool, python: bool) -> None:
    rig = Rig(
        "movl $0xfee00000, %ebx; movl $0x50, 0x80(%rbx); sti; nop; nop; movl $0x3f, 0x80(%rbx)\nopen: nop",
        python=python,
    )
    interrupt(rig, 0x45)
    assert taken_at(rig, stepped) == rig.labels["open"]


def test_the_more_urgent_one_first(python: bool) -> None:
    rig = Rig("sti; nop; nop", python=python)
    interrupt(rig, 0x40)
    interrupt(rig, 0x60)
    rig.run()
    assert rig.handled == 0x60


def test_extint_comes_from_the_controller(python: bool) -> None:
    """IRQ 0 of the PIC (vector base 0x30) through virtual wire."""
    rig = Rig(
        """
        movb $0x11, %al; outb %al, $0x20; movb $0x30, %al; outb %al, $0x21; movb $4, %al; outb %al, $0x21
        movb $1, %al; outb %al, $0x21; movb $0xfe, %al; outb %al, $0x21
        movb $0x34, %al; outb %al, $0x43; movb $100, %al; outb %al, $0x40; xorl %eax, %eax; outb %al, $0x40
        sti; 1: hlt; jmp 1b""",
        python=python,
    )
    rig.machine.run(10_000_000)  # the timer never lets the machine idle
    assert rig.handled == 0x30


@pytest.mark.parametrize("mode", ["real", "protected32", "compatibility", "long"])
def test_nmi_blocks_until_iret(mode: Mode, python: bool) -> None:
    rig = Rig("nop; nop; nop; nop", mode, python=python)
    rig.ram.write(HANDLERS + 16 * NMI, b"\x90" + IRET[64 if mode in LONG_MODES else bits_of(mode)])
    rig.cpu.nmi()
    rig.step()
    assert rig.handled == NMI
    rig.cpu.nmi()
    rig.step()
    assert rig.rip & 0xFFFF == HANDLERS + 16 * NMI + 1  # not taken again
    rig.step()
    assert rig.rip & 0xFFFF == CODE
    assert not rig.state.nmi_blocked
    rig.step()
    assert rig.handled == NMI


def test_nmi_does_not_care_for_if(python: bool) -> None:
    rig = Rig("nop; hlt", python=python)
    rig.run()
    rig.cpu.nmi()
    rig.run()
    assert rig.handled == NMI


def test_halt_wakes_behind_itself(python: bool) -> None:
    rig = Rig("sti; hlt; nop", python=python)
    rig.run()
    assert rig.cpu.halted
    interrupt(rig, 0x40)
    rig.run()
    assert rig.handled == 0x40
    assert rig.stack(1, 8) == [CODE + 2]


def test_sti_hlt_loses_no_interrupt(python: bool) -> None:
    """The interrupt is pending when STI runs: it is taken behind HLT, which its shadow covers."""
    rig = Rig("sti; hlt; nop", python=python)
    interrupt(rig, 0x40)
    rig.run()
    assert rig.stack(1, 8) == [CODE + 2]


def test_halt_without_if_sleeps_on(python: bool) -> None:
    rig = Rig("cli; hlt; nop", python=python)
    rig.run()
    interrupt(rig, 0x40)
    rig.run()
    assert rig.cpu.halted
    assert rig.rip == CODE + 2


def test_gif_holds_back_everything(python: bool) -> None:
    rig = Rig("clgi; sti; nop; nop; stgi\nopen: nop; nop", python=python)
    rig.state.efer |= 1 << 12
    rig.state.refresh()
    rig.step()
    interrupt(rig, 0x40)
    rig.cpu.nmi()
    rig.step(3)
    assert rig.handled is None
    rig.step(2)
    assert rig.handled == NMI
    assert rig.stack(1, 8) == [rig.labels["open"]]


@pytest.mark.parametrize("caches", [0, 1 << 30, 3 << 29])
def test_init_resets_and_waits(caches: int, python: bool) -> None:
    """Tables 14-1 and 14-2; CR0.CD and NW stay."""
    rig = Rig("nop; nop", python=python, cpus=2)
    rig.machine.cpus[1].wait_for_sipi = False
    rig.machine.cpus[1].init()
    rig.machine.cpus[1].take_event()
    assert rig.machine.cpus[1].wait_for_sipi
    rig.state.set_cr(0, rig.state.cr(0) | caches)
    rig.cpu.init()
    rig.step()
    s = rig.state
    assert (s.rip, s.selector(CS), s.base(CS), s.cr(0)) == (0xFFF0, 0xF000, 0xFFFF0000, 0x10 | caches)
    assert [s.attrib(segment) for segment in (CS, DS, SS, LDTR, TR)] == [0x9A, 0x92, 0x92, 0x82, 0x83]


def test_interrupts_nest_by_priority(python: bool) -> None:
    rig = Rig("sti; nop; nop", python=python)
    rig.ram.write(HANDLERS + 16 * 0x40, b"\xfb\x90\x90\xf4")  # sti; nop; nop; hlt
    interrupt(rig, 0x40)
    rig.step(3)
    assert rig.handled == 0x40
    interrupt(rig, 0x45)  # the same class: waits for EOI
    rig.run()
    assert rig.rip == HANDLERS + 16 * 0x40 + 4
    interrupt(rig, 0x55)
    rig.run()
    assert rig.handled == 0x55


def test_an_interrupt_faults_with_ext(python: bool) -> None:
    rig = Rig("sti; nop; nop", python=python)
    rig.gate(0x40, present=False)
    interrupt(rig, 0x40)
    rig.run()
    assert rig.handled == 11
    assert rig.stack(2, 8) == [0x40 << 3 | 3, CODE + 2]


def test_repetitions_are_interrupted_between_iterations(python: bool) -> None:
    rig = Rig("movl $0x100000, %edi; movl $1000000, %ecx\nit: rep stosb", python=python)
    rig.state.rflags |= IF
    enable_apic(rig)
    rig.machine.run(5000)
    interrupt(rig, 0x40)
    rig.run()
    assert rig.stack(1, 8) == [rig.labels["it"]]
    assert 0 < rig.reg(1) < 1000000
    assert rig.reg(7) == 0x100000 + 1000000 - rig.reg(1)
    assert rig.state.reg(RSP) == STACK - 40


def test_a_deadline_that_an_msr_sets_is_met_in_the_same_run(python: bool) -> None:
    """Not at the end of what had been planned before WRMSR armed the timer."""
    rig = Rig(
        "movl $0x832, %ecx; movl $0x40040, %eax; xorl %edx, %edx; wrmsr; sti;"
        "rdtsc; addl $500, %eax; movl $0x6e0, %ecx; wrmsr; 1: jmp 1b",
        python=python,
    )
    enable_apic(rig)
    rig.cpu.lapic.write_base(rig.cpu.lapic.base | 1 << 10, 40)
    rig.run()
    assert rig.handled == 0x40
    assert 500 < rig.now < 600
