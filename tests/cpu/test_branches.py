"""Control-transfer recording and single steps from branch to branch: DebugCtl.LBR and BTF (APM2 13.1.4, 13.1.6)."""

from __future__ import annotations

import pytest

from tests.engine.interrupts import interrupt
from tests.engine.rig import CODE, HANDLERS, MODES, Mode, Rig
from vmdbg.machine import Event
from vmdbg.platform.msrs import (
    DEBUGCTL,
    LAST_BRANCH_FROM,
    LAST_BRANCH_TO,
    LAST_EXCEPTION_FROM,
    LAST_EXCEPTION_TO,
)

LBR, BTF = 1, 2
TF, IF = 1 << 8, 1 << 9
DB, UD = 1, 6


def recording(source: str, mode: Mode = "long", flags: int = LBR, *, python: bool = False, user: bool = False) -> Rig:
    rig = Rig(source, mode, python=python, user=user)
    rig.cpu.msrs.values[DEBUGCTL] = flags
    return rig


def branch(rig: Rig) -> tuple[int, int]:
    return rig.cpu.msrs.values[LAST_BRANCH_FROM], rig.cpu.msrs.values[LAST_BRANCH_TO]


def exception(rig: Rig) -> tuple[int, int]:
    return rig.cpu.msrs.values[LAST_EXCEPTION_FROM], rig.cpu.msrs.values[LAST_EXCEPTION_TO]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "virtual"])
@pytest.mark.parametrize(
    "text",
    ["nop; nop\nat: jmp to\nnop\nto: hlt", "at: call to\nnop\nto: hlt", "xor %ax, %ax\nat: jz to\nnop\nto: hlt",
     "mov $1, %cx\nnop\nat: jmp to\n nop\nto: jcxz 1f\nhlt; 1: hlt", "mov $to, %ax\nat: jmp *%{a}\nnop\nto: hlt",
     "mov $to, %ax\npush %{a}\nat: ret\nnop\nto: hlt", "mov $2, %cx\nto: nop\nat: loop to\nhlt", "at: call to\nto: hlt"],
)  # fmt: skip
def test_branches_are_named_by_their_instruction(text: str, mode: Mode, python: bool) -> None:
    """The record is the branch itself and where it went, not the block around it."""
    text = text.format(a="rax" if mode == "long" else "ax" if mode in ("real", "protected16") else "eax")
    if mode not in ("real", "protected16"):
        text = text.replace("%ax", "%eax").replace("%cx", "%ecx").replace("jcxz", "jecxz")
    rig = recording(text, mode, python=python)
    rig.run()
    assert branch(rig) == (rig.labels["at"], rig.labels["to"])
    assert exception(rig) == (0, 0)


@pytest.mark.parametrize("text", ["cmpl %eax, %eax; jnz 1f; 1: hlt", "movl $1, %ecx; 1: loop 1b; hlt", "nop; cpuid; hlt"])
def test_what_is_not_taken_is_not_recorded(text: str, python: bool) -> None:
    rig = recording(text, python=python)
    rig.run()
    assert branch(rig) == (0, 0)


def test_repetitions_are_no_branches(python: bool) -> None:
    rig = recording("at: jmp to\nto: movl $0x100000, %edi; movl $50, %ecx; rep stosb; hlt", python=python)
    rig.run()
    assert branch(rig) == (rig.labels["at"], rig.labels["to"])
    assert rig.reg(1) == 0


def test_off_by_default(python: bool) -> None:
    rig = Rig("jmp 1f; nop; 1: hlt", python=python)
    rig.run()
    assert branch(rig) == (0, 0)


def test_a_program_that_reads_them(python: bool) -> None:
    rig = Rig(
        """
        movl $0x1d9, %ecx; movl $1, %eax; xorl %edx, %edx; wrmsr
        at: jmp to
        nop
        to: xorl %eax, %eax; movl $0x1d9, %ecx; wrmsr
        jmp 1f; 1: movl $0x1db, %ecx; rdmsr; movl %eax, %esi; incl %ecx; rdmsr; movl %eax, %edi; hlt""",
        python=python,
    )
    rig.run()
    assert (rig.reg(6), rig.reg(7)) == (rig.labels["at"], rig.labels["to"])


def test_exceptions_keep_the_branch_before_them(python: bool) -> None:
    """LASTEXCP is the branch that led there, BR the way into the handler."""
    rig = recording("at: jmp to\nnop\nto: nop\nbad: ud2", python=python)
    rig.run()
    assert exception(rig) == (rig.labels["at"], rig.labels["to"])
    assert branch(rig) == (rig.labels["bad"], HANDLERS + 16 * UD)


def test_software_and_hardware_interrupts(python: bool) -> None:
    rig = recording("nop\nat: int $0x21", python=python)
    rig.run()
    assert branch(rig) == (rig.labels["at"], HANDLERS + 16 * 0x21)
    rig = recording("nop\nat: nop; nop", python=python)
    rig.state.rflags |= IF
    rig.step()
    interrupt(rig, 0x40)
    rig.run()
    assert branch(rig) == (rig.labels["at"], HANDLERS + 16 * 0x40)


def test_iret_and_system_calls(python: bool) -> None:
    rig = recording("int $0x21\nnext: hlt", python=python)
    rig.handler(0x21, "nop; iretq")
    rig.run()
    assert branch(rig) == (HANDLERS + 16 * 0x21 + 1, rig.labels["next"])
    rig = recording("nop\nat: syscall\nnop\nto: hlt", python=python)
    rig.state.efer |= 1
    rig.state.set_field("star", 0x0023000800000000)
    rig.state.set_field("lstar", rig.labels["to"])
    rig.run()
    assert branch(rig) == (rig.labels["at"], rig.labels["to"])


def test_a_debug_exception_ends_it_and_is_not_recorded(python: bool) -> None:
    """Its handler finds what led there (APM2 13.1.6)."""
    rig = recording("at: jmp to\nnop\nto: .byte 0xf1", python=python)
    rig.handler(DB, "jmp .+4; nop; nop; hlt")
    rig.run()
    assert branch(rig) == (rig.labels["at"], rig.labels["to"])
    assert rig.cpu.msrs.values[DEBUGCTL] == 0


@pytest.mark.parametrize("emulated", ["nop", "cpuid"])
def test_single_steps_on_branches(emulated: str, python: bool) -> None:
    """BTF with TF: the trap comes behind the next branch that is taken, and clears BTF."""
    rig = recording(f"{emulated}; {emulated}; nop; jnz 1f\nat: jmp to\n1: nop\nto: nop; hlt", flags=BTF, python=python)
    rig.state.rflags |= TF | 1 << 6
    rig.run()
    assert rig.handled == DB
    assert rig.stack(1, 8) == [rig.labels["to"]]
    assert rig.cpu.dr[6] & 1 << 14
    assert rig.cpu.msrs.values[DEBUGCTL] == 0


def test_without_tf_btf_does_nothing(python: bool) -> None:
    rig = recording("jmp 1f; 1: hlt", flags=BTF, python=python)
    rig.run()
    assert rig.handled is None


def test_guest_time_is_the_same(python: bool) -> None:
    text = "movl $300, %ecx; 1: cpuid; movl $3, %ecx; 2: loop 2b; movl $0x100000, %edi; movl $9, %ecx; rep stosb; hlt"
    plain, recorded = Rig(text, python=python), recording(text, python=python)
    plain.run()
    recorded.run()
    assert plain.now == recorded.now


def test_breakpoints_of_a_debugger_hit(python: bool) -> None:
    rig = recording("nop; nop\nhere: nop; hlt", python=python)
    rig.machine.engine.arm({rig.labels["here"]})
    assert rig.machine.run(breakpoints=True) == Event.BREAKPOINT
    assert rig.rip == rig.labels["here"]


def test_a_stop_leaves_no_trace(python: bool) -> None:
    """Cut anywhere, stepped or run: the records are those of the program."""
    text = "movl $20, %ecx; 1: call 2f; loop 1b; ud2; 2: testb $1, %cl; jz 3f; nop; 3: ret"
    whole, cut, stepped = (recording(text, python=python) for _ in range(3))
    whole.run()
    for _ in range(400):
        cut.machine.run(3)
        stepped.step()
    for rig in (cut, stepped):
        assert (branch(rig), exception(rig), rig.rip) == (branch(whole), exception(whole), whole.rip)
    assert branch(whole)[1] == HANDLERS + 16 * UD
    assert exception(whole)[0] > CODE
