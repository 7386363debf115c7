"""Events through the interrupt table in every mode: frames, error codes, privilege, what faults on the way become."""

from __future__ import annotations

import struct

import pytest

from tests.engine.rig import (
    ABSENT_CODE,
    CODE16,
    CODE32,
    CODE64,
    CONFORMING32,
    CONFORMING64,
    DATA16,
    DATA32,
    GDT,
    HANDLERS,
    IDT,
    IST_STACK,
    LONG_MODES,
    MODES,
    PROTECTED_MODES,
    RING0_STACK,
    STACK,
    TSS,
    TSS_SELECTOR,
    USER_CODE16,
    USER_CODE32,
    USER_CODE64,
    USER_DATA,
    USER_STACK,
    Mode,
    P,
    Rig,
    bits_of,
    descriptor,
)  # fmt: skip
from vmdbg.cpu.events import DELIVERY, raise_event
from vmdbg.cpu.faults import Event, Kind
from vmdbg.engine.state import CS, DS, ES, FS, GS, IDTR, RSP, SS, TR

RF, VM, TF, IF, NT = 1 << 16, 1 << 17, 1 << 8, 1 << 9, 1 << 14

ICEBP = ".byte 0xf1"
DE, DB, NMI, BP, OF, UD, NM, DF, TS, NP, SS_FAULT, GP, PF, AC = 0, 1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 13, 14, 17


def code_selector(mode: Mode, user: bool = False) -> int:
    if mode in ("real", "virtual"):
        return 0
    return {16: (CODE16, USER_CODE16), 32: (CODE32, USER_CODE32), 64: (CODE64, USER_CODE64)}[bits_of(mode)][user]


def inner_frame(mode: Mode, rip: int, flags: int) -> list[int]:
    """What a handler of the same privilege finds on its stack."""
    if mode in LONG_MODES:
        return [rip, code_selector(mode), flags, STACK, DATA32]
    return [rip, code_selector(mode), flags]


def item(mode: Mode) -> int:
    """Bytes of a stack slot, under 32-bit and 64-bit gates."""
    return 8 if mode in LONG_MODES else 2 if mode == "real" else 4


SAME = [mode for mode in MODES if mode != "virtual"]


@pytest.mark.parametrize("mode", SAME)
def test_software_interrupt(mode: Mode, python: bool) -> None:
    rig = Rig("int $0x21; hlt", mode, python=python)
    rig.state.rflags = IF | 2
    rig.step()
    assert rig.handled == 0x21
    assert rig.stack(3, item(mode)) == inner_frame(mode, 0x8002, IF | 2)[:3]
    frame = inner_frame(mode, 0x8002, IF | 2)
    assert rig.stack(len(frame), item(mode)) == frame
    assert not rig.state.rflags & IF
    assert rig.now == 2 + DELIVERY


@pytest.mark.parametrize("mode", PROTECTED_MODES + LONG_MODES)
def test_trap_gate_leaves_if(mode: Mode, python: bool) -> None:
    rig = Rig("int $0x21", mode, python=python)
    rig.gate(0x21, kind=0xF)
    rig.state.rflags = IF | 2
    rig.step()
    assert rig.handled == 0x21
    assert rig.state.rflags & IF


@pytest.mark.parametrize("mode", SAME)
def test_fault_points_at_its_instruction_with_rf(mode: Mode, python: bool) -> None:
    rig = Rig("nop; ud2", mode, python=python)
    rig.run()
    assert rig.handled == UD
    # Real mode pushes 16 bits of flags.
    flags = 2 if mode == "real" else RF | 2
    assert rig.stack(3, item(mode)) == inner_frame(mode, 0x8001, flags)[:3]
    # The faulting instruction costs no time; the HLT of the handler does.
    assert rig.now == 1 + DELIVERY + 1


@pytest.mark.parametrize(("text", "vector", "length", "flags"), [
    ("int3", BP, 1, 0), (ICEBP, DB, 1, 0), (".byte 0xcd, 3", BP, 2, 0),
    ("movb $0x7f, %al; addb $1, %al; into", OF, 5, 0),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["real", "protected32", "compatibility", "long"])
def test_traps_point_behind(text: str, vector: int, length: int, flags: int, mode: Mode, python: bool) -> None:
    if "into" in text and mode == "long":
        rig = Rig(b"\xce", mode, python=python)
        rig.run()
        assert rig.handled == UD  # INTO does not exist in 64-bit mode
        return
    rig = Rig(text, mode, python=python)
    rig.run()
    assert rig.handled == vector
    at, _, image = rig.stack(3, item(mode))
    assert at == 0x8000 + length
    assert not image & RF
    assert rig.now == length + DELIVERY + 1


def test_into_without_overflow_goes_on(python: bool) -> None:
    rig = Rig("xorl %eax, %eax; into; nop", "protected32", python=python)
    rig.step(3)
    assert rig.rip == 0x8004


@pytest.mark.parametrize("mode", SAME)
def test_divide_error(mode: Mode, python: bool) -> None:
    rig = Rig("xorl %ecx, %ecx; divl %ecx", mode, python=python)
    rig.run()
    assert rig.handled == DE


@pytest.mark.parametrize("mode", [*PROTECTED_MODES, *LONG_MODES])
def test_error_code_is_on_top(mode: Mode, python: bool) -> None:
    """A load of a selector beyond the GDT: #GP with the selector."""
    rig = Rig("movw $0x1238, %ax; movw %ax, %ds", mode, python=python)
    rig.run()
    assert rig.handled == GP
    at = 0x8003 if bits_of(mode) == 16 else 0x8004
    assert rig.stack(4, item(mode)) == [0x1238, *inner_frame(mode, at, RF | 2)[:3]]


def test_real_mode_pushes_no_error_code(python: bool) -> None:
    rig = Rig("nop", "real", python=python)
    raise_event(rig.cpu, Event(GP, Kind.EXCEPTION, 0x1234))
    assert rig.handled == GP
    assert rig.stack(3, 2) == [0x8000, 0, 2]


def test_real_mode_stack_wraps_within_its_segment(python: bool) -> None:
    rig = Rig("int $0x21", "real", python=python)
    rig.state.set_segment(SS, 0x1000, 0x10000, 0xFFFF, 0x93)
    rig.state.set_reg(RSP, 0x12340002)
    rig.step()
    assert rig.handled == 0x21
    assert rig.state.reg(RSP) == 0x1234FFFC
    assert rig.ram.read(0x10000, 2) == b"\x02\x00"
    assert rig.ram.read(0x1FFFC, 4) == b"\x02\x80\x00\x00"


def test_sixteen_bit_gate_in_a_32_bit_segment(python: bool) -> None:
    rig = Rig("int $0x21", "protected32", python=python)
    rig.gate(0x21, kind=6, selector=CODE32)
    rig.step()
    assert rig.handled == 0x21
    assert rig.stack(3, 2) == [0x8002, CODE32, 2]


@pytest.mark.parametrize("mode", [*PROTECTED_MODES, *LONG_MODES])
def test_inner_privilege_switches_the_stack(mode: Mode, python: bool) -> None:
    rig = Rig("int $0x21", mode, python=python, user=True)
    rig.gate(0x21, dpl=3)
    rig.state.rflags = IF | 2
    rig.step()
    assert rig.handled == 0x21
    assert rig.state.cpl == 0
    frame = [0x8002, code_selector(mode, True), IF | 2, USER_STACK, USER_DATA]
    assert rig.stack(5, item(mode)) == frame
    assert rig.state.reg(RSP) == RING0_STACK - 5 * item(mode)
    # In long mode SS becomes null with the new privilege as RPL (APM2 8.9.3).
    assert rig.state.selector(SS) == (0 if mode in LONG_MODES else DATA32)


def test_virtual_8086_frame(python: bool) -> None:
    rig = Rig("int3", "virtual", python=python)
    rig.gate(BP, dpl=3)
    for register, value in ((ES, 0x11), (DS, 0x22), (FS, 0x33), (GS, 0x44)):
        rig.state.set_segment(register, value, value << 4, 0xFFFF, 0xF3)
    rig.step()
    assert rig.handled == BP
    assert rig.stack(9, 4) == [0x8001, 0, VM | 2, USER_STACK, 0, 0x11, 0x22, 0x33, 0x44]
    assert not rig.state.rflags & VM
    assert [rig.state.selector(register) for register in (ES, DS, FS, GS)] == [0, 0, 0, 0]
    assert rig.state.selector(CS) == CODE32
    assert rig.state.cpl == 0


def test_virtual_8086_returns(python: bool) -> None:
    rig = Rig("int3; movw $7, %bx; hlt", "virtual", python=python)
    rig.gate(BP, dpl=3)
    rig.ram.write(HANDLERS + 16 * BP, b"\xcf")  # IRET
    rig.step(3)
    assert rig.reg(3) == 7
    assert rig.state.rflags & VM
    assert rig.state.cpl == 3


@pytest.mark.parametrize(("dpl", "selector"), [(0, CONFORMING32), (3, CONFORMING32), (0, 0x40 | 3)])
def test_virtual_8086_needs_a_handler_at_privilege_0(dpl: int, selector: int, python: bool) -> None:
    """A conforming or user handler cannot be entered from virtual-8086 mode (APM2 8.8): #GP with its selector."""
    rig = Rig("int3", "virtual", python=python)
    rig.gate(BP, dpl=3, selector=selector)
    rig.step()
    assert rig.handled == GP
    assert rig.stack(1, 4) == [selector & 0xFFFC]


def test_virtual_8086_int_n_needs_iopl(python: bool) -> None:
    rig = Rig("int $0x21", "virtual", python=python)
    rig.gate(0x21, dpl=3)
    rig.step()
    assert (rig.handled, rig.stack(2, 4)) == (GP, [0, 0x8000])
    rig = Rig("int $0x21", "virtual", python=python)
    rig.gate(0x21, dpl=3)
    rig.state.rflags |= 3 << 12
    rig.step()
    assert rig.handled == 0x21


@pytest.mark.parametrize(("mode", "selector"), [
    ("protected32", CONFORMING32), ("pae", CONFORMING32), ("long", CONFORMING64), ("compatibility", CONFORMING64),
])  # fmt: skip
def test_conforming_handlers_keep_the_privilege(mode: Mode, selector: int, python: bool) -> None:
    rig = Rig("int $0x21", mode, python=python, user=True)
    rig.gate(0x21, dpl=3, selector=selector)
    rig.step()
    assert rig.handled == 0x21
    assert rig.state.cpl == 3
    assert rig.state.selector(CS) == selector | 3
    # In long mode the stack pointer and SS are pushed, though there is no other stack.
    count = 5 if mode in LONG_MODES else 3
    assert rig.state.reg(RSP) == USER_STACK - count * item(mode)
    if mode in LONG_MODES:
        assert rig.state.selector(SS) == USER_DATA


@pytest.mark.parametrize("mode", LONG_MODES)
def test_interrupt_stack_table(mode: Mode, python: bool) -> None:
    rig = Rig("int $0x21", mode, python=python)
    rig.gate(0x21, ist=1)
    rig.step()
    assert rig.handled == 0x21
    assert rig.state.reg(RSP) == IST_STACK - 40
    assert rig.state.selector(SS) == DATA32  # no change of privilege: SS stays


def test_the_stack_is_aligned_in_long_mode(python: bool) -> None:
    rig = Rig("int $0x21", "long", python=python)
    rig.state.set_reg(RSP, STACK + 11)
    rig.step()
    assert rig.state.reg(RSP) == STACK - 40
    assert rig.stack(4, 8)[3] == STACK + 11


# Gates that do not let in: INT n is checked against the gate's DPL, the processor's own events are not.


@pytest.mark.parametrize("mode", [*PROTECTED_MODES, *LONG_MODES])
@pytest.mark.parametrize("text", ["int $0x21", "int3"])
def test_gate_privilege(mode: Mode, text: str, python: bool) -> None:
    rig = Rig(text, mode, python=python, user=True)
    vector = BP if text == "int3" else 0x21
    rig.step()
    assert rig.handled == GP
    assert rig.stack(2, item(mode)) == [vector << 3 | 2, 0x8000]
    assert rig.now == DELIVERY


@pytest.mark.parametrize("mode", [*PROTECTED_MODES, *LONG_MODES])
@pytest.mark.parametrize("text", ["ud2", ICEBP])
def test_gate_privilege_does_not_concern_exceptions(mode: Mode, text: str, python: bool) -> None:
    rig = Rig(text, mode, python=python, user=True)
    rig.step()
    assert rig.handled == (UD if text == "ud2" else DB)


GATES = [
    # (text, change of the gate, (vector, error code for INT n), contributes: becomes a double fault after #DE)
    ("absent", {"present": False}, NP, 0x21 << 3 | 2),
    ("wrong type", {"kind": 0xC}, GP, 0x21 << 3 | 2),
    ("null selector", {"selector": 0}, GP, 0),
    ("data selector", {"selector": DATA32}, GP, DATA32),
    ("absent code", {"selector": ABSENT_CODE}, NP, ABSENT_CODE),
    ("beyond the GDT", {"selector": 0xFF8}, GP, 0xFF8),
    ("less privileged code", {"selector": USER_CODE32 | 3}, GP, USER_CODE32 & ~3),
]


@pytest.mark.parametrize(("name", "change", "vector", "error"), GATES, ids=[gate[0] for gate in GATES])
@pytest.mark.parametrize("mode", ["protected32", "pae", "long"])
@pytest.mark.parametrize("from_exception", [False, True], ids=["int n", "exception"])
def test_bad_gates(
    name: str, change: dict[str, int], vector: int, error: int, mode: Mode, from_exception: bool, python: bool
) -> None:
    """Error codes of faults in delivery: EXT is set unless INT n asked for it (APM2 8.4.1)."""
    number = UD if from_exception else 0x21
    rig = Rig("ud2" if from_exception else "int $0x21", mode, python=python)
    if mode == "long" and change.get("selector") == ABSENT_CODE:
        rig.ram.write(GDT + ABSENT_CODE, struct.pack("<Q", 0x002F1B000000FFFF))
    rig.gate(number, **change)  # type: ignore[arg-type]
    rig.step()
    expected = number << 3 | 2 if error == 0x21 << 3 | 2 else error
    assert rig.handled == vector
    assert rig.stack(2, item(mode)) == [expected | from_exception, 0x8000]


def test_long_mode_wants_64_bit_handlers(python: bool) -> None:
    rig = Rig("int $0x21", "long", python=python)
    rig.gate(0x21, selector=CODE32)
    rig.step()
    assert (rig.handled, rig.stack(1, 8)) == (GP, [CODE32])


def test_long_mode_wants_canonical_handlers(python: bool) -> None:
    rig = Rig("int $0x21", "long", python=python)
    rig.gate(0x21, offset=0x8000_0000_0000)
    rig.step()
    assert (rig.handled, rig.stack(1, 8)) == (GP, [0])


def test_non_canonical_stack(python: bool) -> None:
    rig = Rig("int $0x21", "long", python=python)
    rig.gate(SS_FAULT, ist=1)
    rig.state.set_reg(RSP, 0x8000_0000_0000)
    rig.step()
    assert (rig.handled, rig.stack(1, 8)) == (SS_FAULT, [0])


@pytest.mark.parametrize("mode", ["protected32", "long"])
def test_vector_beyond_the_table(mode: Mode, python: bool) -> None:
    rig = Rig("int $0x80", mode, python=python)
    rig.state.set_table(IDTR, IDT, 0x40 * (16 if mode == "long" else 8) - 1)
    rig.step()
    assert (rig.handled, rig.stack(1, item(mode))) == (GP, [0x80 << 3 | 2])


def test_real_mode_vector_beyond_the_table(python: bool) -> None:
    rig = Rig("int $0x80", "real", python=python)
    rig.state.set_table(IDTR, 0, 0x1FF)
    rig.step()
    assert rig.handled == GP


# The TSS.


@pytest.mark.parametrize("mode", ["protected32", "pae", "long"])
def test_stack_beyond_the_tss(mode: Mode, python: bool) -> None:
    rig = Rig("int $0x21", mode, python=python, user=True)
    rig.gate(0x21, dpl=3)
    rig.gate(TS, selector=CONFORMING64 if mode == "long" else CONFORMING32)
    rig.state.set_segment(TR, TSS_SELECTOR, TSS, 8, 0x08B)
    rig.step()
    assert (rig.handled, rig.stack(1, item(mode))) == (TS, [TSS_SELECTOR])


@pytest.mark.parametrize(("ss", "vector", "error"), [
    (0, TS, 0), (DATA32 | 3, TS, DATA32), (CODE32, TS, CODE32), (0xFF8, TS, 0xFF8), (0x98, SS_FAULT, 0x98),
    (0xA0, TS, 0xA0),
    (USER_DATA & ~3, TS, USER_DATA & ~3),
])  # fmt: skip
def test_bad_stack_segment_in_the_tss(ss: int, vector: int, error: int, python: bool) -> None:
    rig = Rig("int $0x21", "protected32", python=python, user=True)
    rig.gate(0x21, dpl=3)
    for number in (TS, SS_FAULT):
        rig.gate(number, selector=CONFORMING32)
    rig.ram.write(TSS + 8, struct.pack("<I", ss))
    rig.step()
    assert (rig.handled, rig.stack(2, 4)) == (vector, [error, 0x8000])


def test_inner_stack_too_small(python: bool) -> None:
    rig = Rig("int $0x21", "protected32", python=python, user=True)
    rig.gate(0x21, dpl=3)
    rig.gate(SS_FAULT, selector=CONFORMING32)
    rig.ram.write_u64(GDT + DATA16, descriptor(0, 0xFFFF, 0x493))
    rig.ram.write(TSS + 4, struct.pack("<II", 0x10004, DATA16))  # the first push is beyond the limit
    rig.step()
    assert (rig.handled, rig.stack(1, 4)) == (SS_FAULT, [DATA16])


def test_expand_down_stack(python: bool) -> None:
    rig = Rig("int $0x21", "protected32", python=python)
    rig.state.set_segment(SS, DATA32, 0, STACK - 9, 0x497)
    rig.state.refresh()
    rig.ram.write(TSS + 4, struct.pack("<II", RING0_STACK, DATA32))
    rig.gate(DF, kind=5, selector=TSS_SELECTOR)
    rig.step()
    # Two pushes fit above the limit, the third does not; neither does #SS, nor the busy TSS: shutdown.
    assert rig.cpu.shutdown


# Faults on the way: benign ones are delivered in turn, contributory ones make a double fault (APM2 table 8-4).


@pytest.mark.parametrize(("first", "second", "double"), [
    ("ud2", NP, False), ("xorl %eax, %eax; divl %eax", NP, True), ("movl (0x300000), %eax", NP, True),
    ("movw $0x1238, %ax; movw %ax, %ds", NP, True), ("int $0x21", NP, False),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["pae", "long"])
def test_double_faults(first: str, second: int, double: bool, mode: Mode, python: bool) -> None:
    rig = Rig(first, mode, python=python)
    rig.change(0x300000, drop=P)
    for vector in (UD, DE, PF, GP, 0x21):
        rig.gate(vector, present=False)
    rig.run()
    assert rig.handled == (DF if double else second)
    if double:
        assert rig.stack(1, item(mode)) == [0]


def test_page_fault_in_delivery_of_a_page_fault(python: bool) -> None:
    rig = Rig("movl 0x300000, %eax", "long", python=python)
    rig.gate(DF, ist=1)
    rig.change(0x300000, drop=P)
    rig.change(STACK - 8, drop=P)
    rig.run()
    assert rig.handled == DF
    # The second fault's address is in CR2 only if that fault is delivered; the first one's stays.
    assert rig.state.cr(2) == 0x300000


def test_page_fault_in_delivery_of_a_benign_event(python: bool) -> None:
    rig = Rig("int $0x21", "long", python=python, user=True)
    rig.gate(0x21, dpl=3)
    rig.gate(PF, ist=1)
    rig.change(RING0_STACK - 8, drop=P)
    rig.step()
    assert rig.handled == PF
    assert rig.stack(2, 8) == [2, 0x8000]
    # Pushes go to the page below the stack's top.
    assert rig.state.cr(2) == RING0_STACK - 8


@pytest.mark.parametrize("mode", ["real", "protected32", "pae", "long"])
def test_triple_fault(mode: Mode, python: bool) -> None:
    rig = Rig("ud2", mode, python=python)
    rig.state.set_table(IDTR, 0, 0)
    rig.run()
    assert rig.cpu.shutdown
    assert rig.machine.exit_status == 124
    assert "0x8000" in rig.machine.ended


# Debug exceptions.


@pytest.mark.parametrize("mode", MODES)
def test_single_step_traps_after_the_instruction(mode: Mode, python: bool) -> None:
    rig = Rig("nop; nop", mode, python=python)
    rig.state.rflags |= TF
    rig.run()
    assert rig.handled == DB
    at, _, flags = rig.stack(3, item(mode))
    assert at == 0x8001
    assert flags & TF
    assert not flags & RF
    assert not rig.state.rflags & TF
    assert rig.cpu.dr[6] == 0xFFFF4FF0
    assert rig.now == 1 + DELIVERY + 1


def test_popf_traps_after_the_next_instruction(python: bool) -> None:
    rig = Rig("pushf; orl $0x100, (%rsp); popf; nop; nop", "long", python=python)
    rig.run()
    assert rig.handled == DB
    assert rig.stack(1, 8) == [rig.program.origin + 1 + 7 + 1 + 1]


def test_iret_into_single_step(python: bool) -> None:
    rig = Rig("int $0x21; nop; nop", "long", python=python)
    rig.ram.write(HANDLERS + 16 * 0x21, b"\x81\x4c\x24\x10\x00\x01\x00\x00\x48\xcf")  # orl $0x100, 16(%rsp); iretq
    rig.run()
    assert rig.handled == DB
    assert rig.stack(1, 8) == [0x8003]


def test_single_step_of_an_emulated_instruction(python: bool) -> None:
    """CPUID is executed by us: its trap comes all the same."""
    rig = Rig("cpuid; nop", "long", python=python)
    rig.state.rflags |= TF
    rig.run()
    assert rig.handled == DB
    assert rig.stack(1, 8) == [0x8002]


@pytest.mark.parametrize("text", ["inb $0x70, %al", "outb %al, $0x80", "movq %rax, %dr0", "movq %cr0, %rax", "rdtsc"])
def test_single_step_of_other_emulated_instructions(text: str, python: bool) -> None:
    rig = Rig(f"{text}\nend: nop", "long", python=python)
    rig.state.rflags |= TF | RF
    rig.run()
    assert rig.handled == DB
    assert rig.stack(1, 8) == [rig.labels["end"]]


def test_general_detect(python: bool) -> None:
    rig = Rig("movq %dr0, %rax; nop", "long", python=python)
    rig.cpu.dr[7] |= 1 << 13
    rig.run()
    assert rig.handled == DB
    assert rig.stack(1, 8) == [0x8000]
    assert rig.cpu.dr[6] & 1 << 13
    assert not rig.cpu.dr[7] & 1 << 13


def test_gate_read_through_paging_as_the_system(python: bool) -> None:
    """The IDT in a supervisor page is read at CPL 3: an implicit access."""
    rig = Rig("int $0x21", "long", python=python, user=True)
    rig.gate(0x21, dpl=3)
    rig.change(IDT, drop=4)
    rig.step()
    assert rig.handled == 0x21


def test_injected_by_hand_with_error_code(python: bool) -> None:
    """`raise_event` itself, as VMRUN uses it."""
    rig = Rig("nop", "long", python=python)
    raise_event(rig.cpu, Event(GP, Kind.EXCEPTION, 0x1234), injected=True)
    assert rig.handled == GP
    assert rig.stack(2, 8) == [0x1234, 0x8000]


def test_accessed_bit_of_the_handlers_segment(python: bool) -> None:
    rig = Rig("int $0x21", "long", python=python)
    at = GDT + CODE64 + 5
    rig.ram.write(at, bytes([rig.ram.read(at, 1)[0] & ~1]))
    rig.step()
    assert rig.ram.read(at, 1)[0] & 1
    assert DS == 3


# Supervisor-mode access prevention: accesses of the processor itself are implicit, RFLAGS.AC does not spare them.


@pytest.mark.parametrize("ac", [False, True])
def test_smap_and_the_inner_stack(ac: bool, python: bool) -> None:
    """The frame of an interrupt from user mode must not go to a user page (APM2 5.6.7)."""
    rig = Rig("int $0x21", "long", python=python, user=True)
    rig.gate(0x21, dpl=3)
    rig.gate(PF, ist=1)
    for page in (IDT, GDT, TSS, HANDLERS, IST_STACK - 8):
        rig.change(page, drop=4)
    rig.state.set_cr(4, rig.state.cr(4) | 1 << 21)
    rig.state.rflags = 2 | ac << 18
    rig.state.refresh()
    rig.step()
    assert (rig.handled, rig.stack(2, 8), rig.state.cr(2)) == (PF, [3, 0x8000], RING0_STACK - 8)


@pytest.mark.parametrize("ac", [False, True])
def test_smap_and_the_own_stack(ac: bool, python: bool) -> None:
    """Without a change of privilege the pushes are the program's own: RFLAGS.AC spares them."""
    rig = Rig("int $0x21", "long", python=python)
    rig.gate(PF, ist=1)
    for page in (IDT, GDT, TSS, 0x8000, HANDLERS, IST_STACK - 8):
        rig.change(page, drop=4)
    rig.state.set_cr(4, rig.state.cr(4) | 1 << 21)
    rig.state.rflags = 2 | ac << 18
    rig.state.refresh()
    rig.step()
    assert rig.handled == (0x21 if ac else PF)


def test_smep_and_the_handler(python: bool) -> None:
    rig = Rig("int $0x21", "long", python=python)
    rig.gate(PF, offset=0xC000)
    rig.ram.write(0xC000, b"\xf4")
    for page in (0x8000, 0xC000):
        rig.change(page, drop=4)
    rig.state.set_cr(4, rig.state.cr(4) | 1 << 20)
    rig.state.refresh()
    rig.run()
    assert rig.rip == 0xC001
    assert rig.stack(2, 8) == [0x11, HANDLERS + 16 * 0x21]
