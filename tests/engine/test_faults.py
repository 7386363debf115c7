"""Faults of the engine are on the right instruction with the right address, wherever blocks and pages end."""

from __future__ import annotations

import pytest

from tests.engine.rig import DATA, LONG_MODES, NX, Mode, P, Rig, U, W, bits_of
from vmdbg.cpu.events import DELIVERY
from vmdbg.engine.state import RBX, RSP

PF = 14
PAGED: tuple[Mode, ...] = ("legacy", "pae", "compatibility", "long")
POINTER = {mode: "%rbx" if mode == "long" else "%ebx" for mode in PAGED}


def fault(rig: Rig) -> tuple[int, int, int]:
    """Run to a page fault; (error code, CR2, RIP)."""
    rig.run()
    assert rig.handled == PF
    error, rip = rig.stack(2, 8 if rig.mode in LONG_MODES else 4)
    return error, rig.state.cr(2), rip


@pytest.mark.parametrize("mode", PAGED)
@pytest.mark.parametrize("before", [0, 1, 2, 3, 4])
def test_instruction_across_into_an_absent_page(mode: Mode, before: int, python: bool) -> None:
    """`before` bytes of MOV EAX, imm32 are on the present page: CR2 is the first byte that is not there."""
    at = 0x300FF8 - before
    rig = Rig(b"\x90" * 8 + b"\xb8\x44\x33\x22\x11\xf4", mode, python=python, origin=at)
    rig.change(0x301000, drop=P)
    error, address, rip = fault(rig)
    assert (address, rip) == (0x301000, at + 8)
    assert error in (0, 0x10)  # I/D is reported only where NXE or SMEP is on
    assert rig.now == 8 + DELIVERY + 1


@pytest.mark.parametrize("mode", PAGED)
def test_block_that_ends_with_its_page(mode: Mode, python: bool) -> None:
    """The page behind is absent, but is never reached: no fault."""
    rig = Rig(b"\xb0\x05\xeb\xfa", mode, python=python, origin=0x300FFC)  # mov $5, %al; jmp .-4
    rig.change(0x301000, drop=P)
    rig.ram.write(0x300FFA, b"\xf4")
    rig.run()
    assert rig.reg(0) & 0xFF == 5
    assert rig.cpu.halted


@pytest.mark.parametrize("mode", PAGED)
def test_jump_into_an_absent_page(mode: Mode, python: bool) -> None:
    rig = Rig(f"nop; movl $0x300123, %ebx; jmp *{POINTER[mode]}", mode, python=python)
    rig.change(0x300000, drop=P)
    _, address, rip = fault(rig)
    assert (address, rip) == (0x300123, 0x300123)
    assert rig.now == len(rig.program.code) + DELIVERY + 1


@pytest.mark.parametrize("mode", ["pae", "compatibility", "long"])
def test_no_execute(mode: Mode, python: bool) -> None:
    rig = Rig(f"movl $0x300123, %ebx; call *{POINTER[mode]}", mode, python=python)
    rig.change(0x300000, add=NX)
    assert fault(rig) == (0x11, 0x300123, 0x300123)


@pytest.mark.parametrize("mode", PAGED)
def test_data_across_into_an_absent_page(mode: Mode, python: bool) -> None:
    rig = Rig("nop; movl %eax, 0x300ffe; nop; movl 0x300ffd, %eax", mode, python=python)
    rig.change(0x301000, drop=P)
    error, address, rip = fault(rig)
    assert (error, address, rip) == (2, 0x301000, 0x8001)
    assert rig.ram.read(0x300FFE, 2) == b"\0\0"


@pytest.mark.parametrize("mode", PAGED)
def test_write_protection(mode: Mode, python: bool) -> None:
    for wp in (False, True):
        rig = Rig("movl %eax, 0x300000; hlt", mode, python=python)
        rig.state.set_cr(0, rig.state.cr(0) | wp << 16)
        rig.state.refresh()
        rig.change(0x300000, drop=W)
        if wp:
            assert fault(rig) == (3, 0x300000, 0x8000)
        else:
            rig.run()
            assert rig.cpu.halted
            assert rig.handled is None


@pytest.mark.parametrize("mode", PAGED)
def test_user_may_not(mode: Mode, python: bool) -> None:
    rig = Rig("movl 0x300000, %eax", mode, python=python, user=True)
    rig.change(0x300000, drop=U)
    assert fault(rig) == (5, 0x300000, 0x8000)


def test_fault_in_the_middle_of_a_block_keeps_what_ran(python: bool) -> None:
    rig = Rig("incl %eax; incl %eax; pushq %rax; movl 0x300000, %ebx; incl %eax", "long", python=python)
    rig.change(0x300000, drop=P)
    assert fault(rig)[2] == 0x8005
    assert rig.reg(0) == 2
    assert rig.now == 5 + DELIVERY + 1


def test_flags_survive_a_fault(python: bool) -> None:
    """Arithmetic flags are kept apart by the engine; a fault's image shows them."""
    rig = Rig("xorl %eax, %eax; subl $1, %eax; movl 0x300000, %ebx", "long", python=python)
    rig.change(0x300000, drop=P)
    fault(rig)
    assert rig.stack(4, 8)[3] & 0x8D5 == 0x95  # CF PF AF SF


def test_push_into_an_absent_page_leaves_rsp(python: bool) -> None:
    rig = Rig("pushq %rax", "long", python=python)
    rig.gate(PF, ist=1)
    rig.state.set_reg(RSP, 0x301000)
    rig.change(0x300000, drop=P)
    assert fault(rig) == (2, 0x300FF8, 0x8000)
    assert rig.stack(5, 8)[4] == 0x301000


def test_repetition_stops_at_the_fault(python: bool) -> None:
    rig = Rig("rep movsq; hlt", "long", python=python)
    for register, value in ((1, 8), (6, DATA), (7, 0x300FE0)):
        rig.state.set_reg(register, value)
    rig.change(0x301000, drop=P)
    assert fault(rig) == (2, 0x301000, 0x8000)
    assert (rig.reg(1), rig.reg(6), rig.reg(7)) == (4, DATA + 32, 0x301000)
    assert rig.now == 4 * 3 + DELIVERY + 1


def test_non_canonical_addresses(python: bool) -> None:
    rig = Rig("movq $0x800000000000, %rbx; nop; movl (%rbx), %eax", "long", python=python)
    rig.run()
    assert rig.handled == 13
    assert rig.stack(2, 8) == [0, 0x800B]


def test_fifteen_bytes_are_the_limit(python: bool) -> None:
    rig = Rig(b"\x66" * 15 + b"\x90", "long", python=python)
    rig.run()
    assert rig.handled == 13
    assert rig.stack(2, 8) == [0, 0x8000]


def test_page_table_change_needs_invalidation_or_not_but_is_seen_after_it(python: bool) -> None:
    rig = Rig(
        "movl 0x300000, %eax; andl $~1, 0x50000 + 0x300 * 8; invlpg 0x300000; movl 0x300000, %eax",
        "long",
        python=python,
    )
    assert fault(rig)[:2] == (0, 0x300000)


@pytest.mark.parametrize(
    "text",
    ["movq %cr3, %rax; movq %rax, %cr3", "movl $0x6b0, %eax; movq %rax, %cr4; movl $0x630, %eax; movq %rax, %cr4"],
)
def test_translations_are_forgotten(text: str, python: bool) -> None:
    rig = Rig(f"movl 0x300000, %eax; andl $~1, 0x50000 + 0x300 * 8; {text}; movl 0x300000, %eax", "long", python=python)
    assert fault(rig)[:2] == (0, 0x300000)


def test_the_writers_code_is_coherent(python: bool) -> None:
    """Code written through another linear address, by a device, and by the debugger, is the code that runs."""
    rig = Rig("1: call *%rbx; addl %eax, %ecx; jmp 1b", "long", python=python)
    rig.state.set_reg(RBX, 0x300000)
    for value in (1, 2, 3, 4, 5, 6, 7, 8):
        rig.ram.write(0x300000, b"\xb8" + value.to_bytes(4, "little") + b"\xc3")
        rig.step(5)
        assert rig.reg(0) == value
        while rig.rip != 0x8000:
            rig.step()
    assert bits_of(rig.mode) == 64
