"""The breakpoints of DR0 to DR3 (APM2 13.1): instructions, data and ports, in every mode."""

from __future__ import annotations

import pytest

from tests.engine.assembler import assemble
from tests.engine.rig import CODE, GDT, HANDLERS, IDT, MODES, RING0_STACK, STACK, TSS, Mode, Rig, bits_of
from vmdbg.engine.state import RAX, RBX, RCX, RDI, RDX, RSI
from vmdbg.machine import Event

DB, GP = 1, 13
RF, TF = 1 << 16, 1 << 8
B0, B1, B2, B3, BD, BS = 1, 2, 4, 8, 1 << 13, 1 << 14
RESET = 0xFFFF0FF0
EXECUTE, WRITE, PORT, ACCESS = range(4)
LENGTH = {1: 0, 2: 1, 8: 2, 4: 3}
PLACE = 0x9000
"""Data that every mode reaches."""


def control(number: int, kind: int, size: int = 1, *, local: bool = False) -> int:
    """DR7's fields of one register."""
    return (1 if local else 2) << 2 * number | kind << 16 + 4 * number | LENGTH[size] << 18 + 4 * number


def watch(rig: Rig, *points: tuple[int, int, int], local: bool = False) -> None:
    """(address, kind, size) for DR0 and on."""
    cpu = rig.cpu
    cpu.dr[7] = 0x400
    for number, (address, kind, size) in enumerate(points):
        cpu.dr[number] = address
        cpu.dr[7] |= control(number, kind, size, local=local)
    cpu.debug.update()


def handler(rig: Rig, source: str, vector: int = DB) -> None:
    """A handler in place of the halt, at most 16 bytes."""
    code = assemble(source, HANDLERS + 16 * vector, 64 if rig.mode in ("long", "compatibility") else bits_of(rig.mode)).code
    assert len(code) <= 16
    rig.ram.write(HANDLERS + 16 * vector, code)


def frame(rig: Rig) -> tuple[int, int]:
    """(RIP, RFLAGS) that the handler would return to."""
    size = 2 if rig.mode == "real" else 8 if rig.mode in ("compatibility", "long") else 4
    ip, _, flags = rig.stack(3, size)
    return ip, flags


# Instructions


@pytest.mark.parametrize("mode", MODES)
def test_an_instruction_breakpoint_comes_before_the_instruction(mode: Mode, python: bool) -> None:
    rig = Rig("nop; inc %ecx; here: inc %ebx; inc %ecx; hlt", mode, python=python)
    if mode == "virtual":
        rig.gate(DB)
    watch(rig, (0, EXECUTE, 1), (rig.labels["here"], EXECUTE, 1), local=True)
    rig.run()
    assert rig.handled == DB
    assert (rig.reg(RBX), rig.reg(RCX)) == (0, 1)
    rip, flags = frame(rig)
    assert rip == rig.labels["here"]
    assert bool(flags & RF) == (mode != "real")
    assert rig.cpu.dr[6] == RESET | B1


def test_the_guest_sets_it_up(python: bool) -> None:
    rig = Rig(
        "movl $here, %eax; movq %rax, %dr3; movl $0x480, %eax; movq %rax, %dr7; nop; here: inc %ebx; hlt", python=python
    )
    rig.run()
    assert (rig.handled, rig.reg(RBX), rig.cpu.dr[6]) == (DB, 0, RESET | B3)


@pytest.mark.parametrize("mode", ["protected32", "pae", "compatibility", "long"])
def test_rf_lets_one_instruction_pass(mode: Mode, python: bool) -> None:
    """The handler returns to the instruction, which executes; the next round stops again, the instruction behind too."""
    rig = Rig("mov $3, %ecx; here: inc %ebx; next: dec %ecx; jnz here; hlt", mode, python=python)
    handler(rig, "inc %edx; iretq" if mode in ("long", "compatibility") else "inc %edx; iret")
    watch(rig, (rig.labels["here"], EXECUTE, 1), (rig.labels["next"], EXECUTE, 1))
    rig.run()
    assert (rig.handled, rig.reg(RBX), rig.reg(RDX)) == (None, 3, 6)
    assert not rig.state.rflags & RF


def test_popf_and_interrupts_know_no_rf_behind_the_instruction(python: bool) -> None:
    rig = Rig("here: inc %ebx; int $0x40", "long", python=python)
    handler(rig, "iretq")
    watch(rig, (CODE, EXECUTE, 1))
    rig.run()
    assert rig.handled == 0x40
    assert not frame(rig)[1] & RF


def test_rf_survives_the_iterations_of_a_string_instruction(python: bool) -> None:
    rig = Rig("here: rep stosb; inc %ebx; hlt", "long", python=python)
    handler(rig, "inc %edx; iretq")
    rig.state.set_reg(RCX, 5)
    rig.state.set_reg(RDI, PLACE)
    watch(rig, (CODE, EXECUTE, 1))
    rig.run()
    assert (rig.reg(RBX), rig.reg(RCX), rig.reg(RDX)) == (1, 0, 1)


def test_a_jump_to_itself_stops_in_each_round(python: bool) -> None:
    rig = Rig("here: jmp here", "long", python=python)
    handler(rig, "inc %edx; iretq")
    watch(rig, (CODE, EXECUTE, 1))
    rig.machine.run(2000)
    assert rig.reg(RDX) > 10


def test_with_a_fault_of_the_resumed_instruction(python: bool) -> None:
    """The instruction has not been executed: the page fault's frame has RF, and it is tried again without a #DB."""
    rig = Rig("movl $1, (%rsi); hlt", "long", python=python)
    rig.change(PLACE, drop=1)
    handler(rig, "inc %edx; iretq")
    handler(rig, "orb $1, (%rdi); pop %rax; iretq", 14)
    rig.state.set_reg(RSI, PLACE)
    rig.state.set_reg(RDI, rig.entry(PLACE))
    watch(rig, (CODE, EXECUTE, 1))
    rig.run()
    assert (rig.handled, rig.reg(RDX), rig.ram.read_u32(PLACE)) == (None, 1, 1)


@pytest.mark.parametrize("text", ["cpuid", "movq %rax, %cr2", "int3", "movq %dr6, %rax", "rdtsc"])
def test_before_instructions_that_the_processor_layer_executes(text: str, python: bool) -> None:
    rig = Rig(f"nop; here: {text}; hlt", "long", python=python)
    watch(rig, (rig.labels["here"], EXECUTE, 1))
    rig.run()
    assert (rig.handled, frame(rig)[0]) == (DB, rig.labels["here"])
    rig = Rig(f"here: {text}; hlt", "long", python=python)
    handler(rig, "inc %edi; iretq")
    watch(rig, (CODE, EXECUTE, 1))
    rig.run()
    assert rig.reg(RDI) == 1


def test_disabled_ones_do_not_fire_nor_those_of_long_ago(python: bool) -> None:
    rig = Rig("xorl %eax, %eax; movq %rax, %dr7; here: inc %ebx; hlt", "long", python=python)
    watch(rig, (rig.labels["here"], EXECUTE, 1))
    rig.run()
    assert (rig.handled, rig.reg(RBX), rig.cpu.dr[6]) == (None, 1, RESET)
    rig = Rig("movq %rax, %dr0; here: inc %ebx; next: inc %ebx; hlt", "long", python=python)
    rig.state.set_reg(RAX, rig.labels["next"])
    watch(rig, (rig.labels["here"], EXECUTE, 1))
    rig.run()
    assert (rig.handled, rig.reg(RBX), frame(rig)[0]) == (DB, 1, rig.labels["next"])


def test_single_steps_and_breakpoints_together(python: bool) -> None:
    """The trap of the instruction before comes first, then the breakpoint."""
    rig = Rig("nop; here: inc %ebx; hlt", "long", python=python)
    rig.state.rflags |= TF
    watch(rig, (rig.labels["here"], EXECUTE, 1))
    rig.run()
    assert (frame(rig)[0], rig.cpu.dr[6]) == (rig.labels["here"], RESET | BS)
    assert not frame(rig)[1] & RF
    handler(rig, "iretq")
    rig.state.rip = HANDLERS + 16 * DB
    rig.cpu.halted = False
    rig.step()
    handler(rig, "hlt")
    rig.run()
    assert (frame(rig)[0], rig.reg(RBX)) == (rig.labels["here"], 0)
    assert rig.cpu.dr[6] == RESET | BS | B0
    assert frame(rig)[1] & (RF | TF) == RF | TF


def test_interrupts_come_before_instruction_breakpoints(python: bool) -> None:
    rig = Rig("here: inc %ebx; hlt", "long", python=python)
    rig.cpu.nmi()
    watch(rig, (CODE, EXECUTE, 1))
    rig.run()
    assert rig.handled == 2


def test_with_an_armed_breakpoint_of_the_debugger_at_the_same_place(python: bool) -> None:
    """The debugger's comes first; its step takes the #DB in the instruction's place."""
    rig = Rig("nop; here: inc %ebx; hlt", "long", python=python)
    here = rig.labels["here"]
    rig.machine.engine.arm({here})
    watch(rig, (here, EXECUTE, 1))
    assert rig.machine.run(100, breakpoints=True) == Event.BREAKPOINT
    assert (rig.rip, rig.cpu.dr[6]) == (here, RESET)
    assert rig.machine.run(100, breakpoints=True) == Event.BREAKPOINT
    rig.step()
    assert (rig.handled, rig.cpu.dr[6]) == (DB, RESET | B0)
    rig.machine.engine.arm(set())
    handler(rig, "iretq")
    rig.run()
    assert rig.reg(RBX) == 1


def test_a_breakpoint_of_the_debugger_alone_is_stepped_over(python: bool) -> None:
    """Its hook stays when it is disarmed: with debug registers on, the processor finds nothing there and goes on."""
    rig = Rig("nop; here: inc %ebx; other: inc %ebx; hlt", "long", python=python)
    rig.machine.engine.arm({rig.labels["here"]})
    rig.machine.engine.arm(set())
    watch(rig, (rig.labels["other"], EXECUTE, 1))
    rig.run()
    assert (rig.handled, rig.reg(RBX)) == (DB, 1)


def test_time_is_that_of_a_run_without(python: bool) -> None:
    source = "mov $200, %ecx; here: inc %ebx; mov %ebx, (%rsi); dec %ecx; jnz here; hlt"
    times = []
    for points in ((), ((0x12345, EXECUTE, 1), (PLACE + 0x20, ACCESS, 8))):
        rig = Rig(source, "long", python=python)
        rig.state.set_reg(RSI, PLACE)
        watch(rig, *points)
        rig.run()
        times.append(rig.now)
    assert times[0] == times[1]


def test_alternating_breakpoints_keep_translations(python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("nop; hlt", "long", python=python)
    flushes: list[int] = []
    monkeypatch.setattr(rig.machine.engine, "flush_code", lambda: flushes.append(1))
    for _ in range(10):
        watch(rig, (0x8100, EXECUTE, 1))
        watch(rig, (0x8200, EXECUTE, 1))
        watch(rig)
    assert len(flushes) == 2


# Data


@pytest.mark.parametrize("mode", MODES)
def test_a_data_breakpoint_traps_behind_the_instruction(mode: Mode, python: bool) -> None:
    rig = Rig("mov %ecx, 0x9000; here: inc %ebx; hlt", mode, python=python)
    watch(rig, (PLACE, WRITE, 4))
    rig.state.set_reg(RCX, 7)
    rig.run()
    assert (rig.handled, rig.reg(RBX), rig.ram.read_u32(PLACE)) == (DB, 0, 7)
    rip, flags = frame(rig)
    assert (rip, flags & RF, rig.cpu.dr[6]) == (rig.labels["here"], 0, RESET | B0)


@pytest.mark.parametrize(("text", "kind", "hit"), [
    ("movb $1, 0x9000", WRITE, True), ("movb 0x9000, %al", WRITE, False), ("movb 0x9000, %al", ACCESS, True),
    ("movb $1, 0x9000", ACCESS, True), ("movb $0, 0x9000", WRITE, True), ("lea 0x9000, %eax", ACCESS, False),
    ("cmpb $1, 0x9000", ACCESS, True), ("cmpb $1, 0x9000", WRITE, False), ("lock incb 0x9000", WRITE, True),
    ("push 0x9000", ACCESS, True), ("movups 0x9000, %xmm0", ACCESS, True), ("movups %xmm0, 0x9000", WRITE, True),
    ("smsww 0x9000", WRITE, True), ("movb $1, 0x8fff", ACCESS, False),
])  # fmt: skip
def test_what_accesses(text: str, kind: int, hit: bool, python: bool) -> None:
    rig = Rig(f"{text}; hlt", "protected32", python=python)
    watch(rig, (0, EXECUTE, 1), (0, EXECUTE, 1), (PLACE, kind, 1))
    rig.run()
    assert rig.handled == (DB if hit else None)
    assert rig.cpu.dr[6] == RESET | (B2 if hit else 0)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_lengths_and_alignment(size: int, python: bool) -> None:
    """The low bits of the address do not count: the range is aligned to its length."""
    for place in range(PLACE - 1, PLACE + 9):
        rig = Rig(f"movb $1, {place:#x}; hlt", "long", python=python)
        watch(rig, (PLACE + size - 1, WRITE, size))
        rig.run()
        assert (rig.handled == DB) == (PLACE <= place < PLACE + size), place


def test_several_at_once(python: bool) -> None:
    rig = Rig("movsq; hlt", "long", python=python)
    rig.state.set_reg(RSI, PLACE)
    rig.state.set_reg(RDI, PLACE + 0x2000)
    rig.state.rflags |= TF
    watch(rig, (PLACE + 4, ACCESS, 4), (PLACE + 0x2000, WRITE, 1), (PLACE + 8, ACCESS, 8), (PLACE + 0x2007, ACCESS, 1))
    rig.cpu.dr[6] |= B2
    rig.run()
    assert (rig.handled, rig.cpu.dr[6]) == (DB, RESET | B0 | B1 | B3 | BS)


def test_each_iteration_of_a_string_instruction(python: bool) -> None:
    rig = Rig("rep stosb; inc %ebx; hlt", "long", python=python)
    handler(rig, "inc %edx; iretq")
    rig.state.set_reg(RCX, 8)
    rig.state.set_reg(RDI, PLACE)
    watch(rig, (PLACE + 2, WRITE, 2))
    rig.run()
    assert (rig.reg(RDX), rig.reg(RBX), rig.ram.read(PLACE, 8)) == (2, 1, bytes(8))


@pytest.mark.parametrize("text", ["mov 0x9000, %ss", "pop %ss"])
def test_loads_of_ss_delay_the_trap(text: str, python: bool) -> None:
    rig = Rig(f"{text}; inc %ebx; here: inc %ebx; hlt", "protected32", python=python)
    rig.state.set_reg(4, PLACE)
    rig.ram.write_u32(PLACE, 0x10)
    watch(rig, (PLACE, ACCESS, 2))
    rig.run()
    assert (rig.handled, rig.reg(RBX), frame(rig)[0]) == (DB, 1, rig.labels["here"])


def test_the_breakpoint_follows_the_page_tables(python: bool) -> None:
    """A page fault's handler maps the page, elsewhere than it was; also INVLPG behind a change."""
    rig = Rig("movl $1, (%rsi); hlt", "long", python=python)
    rig.change(PLACE, drop=1)
    watch(rig, (PLACE, WRITE, 4))
    handler(rig, "mov %rax, (%rdi); pop %rdx; iretq", 14)
    for register, value in ((RSI, PLACE), (RDI, rig.entry(PLACE)), (RAX, 0x123000 | 7)):
        rig.state.set_reg(register, value)
    rig.run()
    assert (rig.handled, rig.cpu.dr[6], rig.ram.read_u32(0x123000)) == (DB, RESET | B0, 1)
    rig = Rig("movl (%rsi), %ebx; mov %rax, (%rdi); invlpg (%rsi); movl $1, (%rsi); hlt", "long", python=python)
    for register, value in ((RSI, PLACE), (RDI, rig.entry(PLACE)), (RAX, 0x123000 | 7)):
        rig.state.set_reg(register, value)
    watch(rig, (PLACE, WRITE, 4))
    rig.run()
    assert (rig.handled, rig.cpu.dr[6], rig.ram.read_u32(0x123000)) == (DB, RESET | B0, 1)


def test_pages_of_the_user_under_smap(python: bool) -> None:
    """The breakpoint is set by a supervisor that may not access the page itself."""
    rig = Rig("movl $1, 0x9000; hlt", "long", python=python, user=True)
    rig.state.set_cr(4, rig.state.cr(4) | 1 << 21)
    rig.state.refresh()
    for page in (GDT, IDT, TSS, RING0_STACK - 1, HANDLERS):
        rig.change(page, drop=4)
    watch(rig, (PLACE, WRITE, 4))
    rig.run()
    assert (rig.handled, rig.cpu.dr[6]) == (DB, RESET | B0)


def test_a_faulting_access_does_not_count(python: bool) -> None:
    rig = Rig("movl $1, (%rsi); hlt", "long", python=python, user=True)
    rig.change(PLACE, drop=2)
    rig.state.set_reg(RSI, PLACE)
    watch(rig, (PLACE, WRITE, 4))
    rig.run()
    assert (rig.handled, rig.cpu.dr[6]) == (14, RESET)


def test_together_with_a_watchpoint_of_the_debugger(python: bool) -> None:
    rig = Rig("movl $1, 0x9000; hlt", "long", python=python)
    watch(rig, (PLACE, WRITE, 4))
    physical = rig.machine.engine.physical
    physical.watch(PLACE >> 12, 8, True)
    assert rig.machine.run(100) == Event.WATCHED
    assert (rig.rip, rig.ram.read_u32(PLACE)) == (CODE, 0)
    physical.watch(PLACE >> 12, 8, False)
    rig.step()
    assert (rig.handled, rig.ram.read_u32(PLACE), rig.cpu.dr[6]) == (DB, 1, RESET | B0)


def test_another_processors_breakpoints_are_not_this_ones(python: bool) -> None:
    rig = Rig("movl $1, 0x9000; here: nop; hlt", "long", python=python, cpus=2)
    other = rig.machine.cpus[1]
    other.dr[0], other.dr[1], other.dr[7] = PLACE, rig.labels["here"], 0x400 | control(0, WRITE, 4) | control(1, EXECUTE)
    other.debug.update()
    other.state.set_cr(0, 0x10)
    other.debug.prepare()
    rig.run()
    assert (rig.handled, rig.ram.read_u32(PLACE)) == (None, 1)


# Ports


@pytest.mark.parametrize(("text", "hit"), [
    ("outb %al, $0x80", True), ("inb $0x80, %al", True), ("outb %al, $0x81", True), ("outw %ax, $0x7f", True),
    ("outb %al, $0x82", False), ("outl %eax, $0x7c", False),
])  # fmt: skip
def test_a_port_breakpoint_traps_behind_the_instruction(text: str, hit: bool, python: bool) -> None:
    rig = Rig(f"{text}; here: hlt", "protected32", python=python)
    rig.state.set_cr(4, 8)
    watch(rig, (0x80, PORT, 2))
    rig.run()
    assert rig.handled == (DB if hit else None)
    if hit:
        assert (frame(rig)[0], rig.cpu.dr[6]) == (rig.labels["here"], RESET | B0)
    rig = Rig(f"{text}; hlt", "protected32", python=python)
    watch(rig, (0x80, PORT, 2))
    rig.run()
    assert rig.handled is None  # CR4.DE is clear


def test_cr4_de_enables_ports(python: bool) -> None:
    rig = Rig("mov %eax, %cr4; outb %al, $0x80; hlt", "protected32", python=python)
    watch(rig, (0x80, PORT, 1))
    rig.state.set_reg(RAX, 8)
    rig.run()
    assert rig.handled == DB


def test_string_io_to_watched_memory(python: bool) -> None:
    rig = Rig("insb; hlt", "protected32", python=python)
    rig.state.set_reg(RDX, 0x80)
    rig.state.set_reg(RDI, PLACE)
    rig.state.set_cr(4, 8)
    watch(rig, (PLACE, WRITE, 1), (0x80, PORT, 1))
    rig.run()
    assert (rig.handled, rig.cpu.dr[6]) == (DB, RESET | B0 | B1)


# General detection


def test_general_detection(python: bool) -> None:
    """#DB before the access, BD set, B0 to B3 cleared, GD clear for the handler."""
    rig = Rig("here: movq %dr0, %rax; hlt", "long", python=python)
    rig.cpu.dr[7] = 0x2400
    rig.cpu.dr[6] |= B1
    rig.run()
    assert (rig.handled, frame(rig)[0], rig.cpu.dr[6], rig.cpu.dr[7]) == (DB, CODE, RESET | BD, 0x400)
    assert frame(rig)[1] & RF


def test_an_interrupted_stack_is_data_too(python: bool) -> None:
    rig = Rig("push %rax; hlt", "long", python=python)
    watch(rig, (STACK - 8, WRITE, 8))
    rig.run()
    assert (rig.handled, rig.cpu.dr[6]) == (DB, RESET | B0)


