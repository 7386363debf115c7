"""Guest time is a property of the program: the same however its run is cut, in whichever runtime, debugged or not."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.rig import DATA, HANDLERS, Mode, P, Rig
from vmdbg.cpu.events import DELIVERY
from vmdbg.cpu.ports import PORT_TICKS
from vmdbg.machine import Event

EXIT = "\noutb %al, $0xf4\nhlt"
APIC = """
    movl $0xfee00000, %ebx
    movl $0x1ff, 0xf0(%rbx)        # enable the local APIC
    movl $0xb, 0x3e0(%rbx)         # divide by 1
"""


@dataclass(frozen=True)
class Case:
    """A program that ends with EXIT; `handlers` is the code for each vector, `absent` pages are not present."""

    name: str
    source: str
    mode: Mode = "long"
    handlers: tuple[tuple[int, str], ...] = ()
    absent: tuple[int, ...] = ()
    user: bool = False
    time: int | None = None
    """The clock at the end, where counting by hand is easy."""


SKIP_2 = "addq $2, (%rsp); iretq"
CASES = [
    Case("loop", "movl $1000, %ecx\n1: addl %ecx, %eax; decl %ecx; jnz 1b" + EXIT, time=5 + 1000 * 6 + 2 + PORT_TICKS),
    Case("nested loops", "movl $20, %edx\n1: movl $20, %ecx\n2: addl %ecx, %eax; loop 2b; decl %edx; jnz 1b" + EXIT),
    Case("calls", "movl $50, %ecx\n1: call 3f; loop 1b; jmp 2f\n3: pushq %rcx; incl %eax; popq %rcx; ret\n2:" + EXIT),
    Case("faults in blocks", "movl $30, %ecx\n1: incl %eax; ud2; incl %eax; loop 1b" + EXIT, handlers=((6, SKIP_2),)),
    Case("divisions by zero", "movl $9, %ecx; xorl %esi, %esi\n1: incl %eax; divl %esi; loop 1b" + EXIT,
        handlers=((0, SKIP_2),)),
    Case(
        "demand paging",
        """movl $0x300000, %ebx; movl $8, %ecx
        1: movl %ecx, (%rbx); addl (%rbx), %eax; addl $4096, %ebx; loop 1b""" + EXIT,
        handlers=((14, """
            pushq %rax; movq %cr2, %rax; shrq $12, %rax; orl $1, 0x50000(,%rax,8)
            popq %rax; addq $8, %rsp; iretq"""),),
        absent=tuple(0x300000 + 4096 * n for n in range(8)),
    ),
    Case("no repetition", f"movl ${DATA}, %esi; leal 64(%rsi), %edi; xorl %ecx, %ecx; rep movsb; incl %eax" + EXIT),
    Case("one repetition", f"movl ${DATA}, %esi; leal 64(%rsi), %edi; movl $1, %ecx; rep movsb; incl %eax" + EXIT),
    Case("movs", f"movl ${DATA}, %esi; leal 64(%rsi), %edi; movl $40, %ecx; rep movsb; incl %eax" + EXIT),
    Case("movs backward", f"std; movl ${DATA + 256}, %esi; leal 64(%rsi), %edi; movl $40, %ecx; rep movsq; cld" + EXIT),
    Case("stos", f"movl $7, %eax; movl ${DATA}, %edi; movl $100, %ecx; rep stosl" + EXIT),
    Case("lods", f"movl ${DATA}, %esi; movl $10, %ecx; rep lodsb" + EXIT),
    Case("16-bit stos", f"movw $0x3000, %di; movw $9, %cx; rep stosw; incw %ax; movw $0, %cx; rep stosb{EXIT}", "real"),
    Case("32-bit address", f"movl ${DATA}, %edi; movl $9, %ecx; addr32 rep stosw; incl %eax{EXIT}"),
    *(
        Case(f"{prefix} {name} count {count}", f"{setup}; movl ${DATA}, %esi; movl ${DATA + 0x100}, %edi; "
             f"movl ${count}, %ecx; {prefix} {name}; sete %bl; incl %eax{EXIT}")
        for name, setup in (("scasb", "movb $5, %al; movb $5, 0x100103"), ("cmpsb", "movb $5, 0x100103"))
        for prefix in ("repe", "repne") for count in (0, 1, 3, 4, 20)
    ),
    Case("all equal", f"movl ${DATA}, %edi; xorl %eax, %eax; movl $20, %ecx; repe scasl; setz %bl{EXIT}"),
    Case("none equal", f"movl ${DATA}, %edi; movl $1, %eax; movl $20, %ecx; repne scasw; setz %bl{EXIT}"),
    Case("fault in a repetition", f"""
        movl $0x300ff0, %edi; movl $12, %ecx; movl $0x55, %eax; rep stosl; incl %ebx{EXIT}""",
        handlers=((14, "orl $1, 0x50000 + 0x301 * 8; addq $8, %rsp; iretq"),), absent=(0x301000,)),
    Case("port input", "inb $0x70, %al; inw $0x80, %ax; movw $0x71, %dx; inb %dx, %al; incl %ebx" + EXIT),
    Case("port output", "movl $20, %ecx\n1: outb %al, $0x80; incl %eax; loop 1b" + EXIT),
    Case("rep outs", f"movl ${DATA}, %esi; movw $0x80, %dx; movl $9, %ecx; rep outsb; incl %eax" + EXIT),
    Case("rep ins", f"movl ${DATA}, %edi; movw $0x71, %dx; movl $9, %ecx; rep insb; incl %eax" + EXIT),
    Case("ins and outs", f"""
        movl ${DATA}, %edi; movl ${DATA}, %esi; movw $0x71, %dx; insb; insw; insl; outsb; rex.w outsl; incl %eax{EXIT}""",
        time=5 + 5 + 4 + 1 + 2 + 1 + 1 + 2 + 2 + 2 + 6 * PORT_TICKS),
    Case("16-bit ins", f"movw $0x3000, %di; movw $0x71, %dx; movw $9, %cx; rep insw; addr32 insb; incw %ax{EXIT}", "real"),
    Case("ins under TF", f"""
        movl ${DATA}, %edi; movl $5, %ecx; movw $0x71, %dx; pushfq; orl $0x100, (%rsp); popfq; insb; rep insb; rep insb
        pushfq; andl $~0x100, (%rsp); popfq{EXIT}""",
        handlers=((1, "incl %ebp; iretq"),)),
    Case("fault in repeated ins", f"""
        movl $0x300ff8, %edi; movl $12, %ecx; movw $0x71, %dx; rep insw; incl %ebx{EXIT}""",
        handlers=((14, "orl $1, 0x51808; addq $8, %rsp; iretq"),), absent=(0x301000,)),
    Case("timer in repeated ins", APIC + f"""
        movl $0x20030, 0x320(%rbx); movl $3333, 0x380(%rbx); sti
        movl ${DATA}, %edi; movl $90, %ecx; movw $0x71, %dx; rep insb; sti; insb; cli{EXIT}""",
        handlers=((0x30, "incl %r9d; addl %ecx, %esi; movl $0, 0xb0(%rbx); iretq"),)),
    Case("rep outs of nothing", "movw $0x80, %dx; xorl %ecx, %ecx; rep outsb; rep insl; incl %eax" + EXIT),
    Case("self-modifying loop", "movl $20, %ecx\n1: incb 2f+1(%rip)\n2: movb $0, %al; addl %eax, %ebx; loop 1b" + EXIT),
    Case("modifies the next instruction", "movb $0x48, 1f(%rip)\n1: nop; .byte 0xff, 0xc0; incl %ebx" + EXIT),
    Case("modifies another page", """
        movl $0x300000, %edi; movb $0xc3, 1(%rdi); movl $30, %ecx
        1: movb $0x90, (%rdi); call *%rdi; movb $0xf9, (%rdi); call *%rdi; adcl $0, %eax; loop 1b""" + EXIT),
    Case("across a page", """
        jmp 1f; .org 0xffb
        1: incl %eax; incl %eax; movl $0x11223344, %ebx; incl %ebx; cmpl $8, %eax; jb 1b""" + EXIT),
    Case("INT n", "movl $20, %ecx\n1: int $0x21; incl %eax; loop 1b" + EXIT,
         handlers=((0x21, "addl $3, %eax; iretq"),)),
    Case("INT n from 32-bit code", "movl $20, %ecx\n1: int $0x21; incl %eax; loop 1b" + EXIT, "protected32",
         ((0x21, "addl $3, %eax; iret"),)),
    Case("INT n from 16-bit code", "movw $20, %cx\n1: int $0x21; incw %ax; loop 1b" + EXIT, "real",
         ((0x21, "addw $3, %ax; iret"),)),
    Case("system instructions", """
        movl $10, %ecx
        1: movq %cr0, %rax; movq %rax, %cr0; pushq %rcx; xorl %eax, %eax; cpuid; rdtsc; movl %eax, %esi
        movl $0xc0000080, %ecx
        rdmsr; wrmsr; popq %rcx; movq %cr3, %rdx; movq %rdx, %cr3; invlpg (%rax); clts; loop 1b""" + EXIT),
    Case("guest single step", """
        pushfq; orl $0x100, (%rsp); popfq; incl %eax; cpuid; incl %esi; pushfq; andl $~0x100, (%rsp); popfq""" + EXIT,
         handlers=((1, "incl %ebp; iretq"),)),
    Case("repetition under TF", f"""
        movl ${DATA}, %edi; movl $5, %ecx; pushfq; orl $0x100, (%rsp); popfq; rep stosb
        pushfq; andl $~0x100, (%rsp); popfq""" + EXIT,
         handlers=((1, "incl %ebp; iretq"),)),
    Case("APIC registers", APIC + """
        movl $20, %ecx
        1: movl 0x20(%rbx), %eax; movl $0x30, 0x80(%rbx); addl 0x30(%rbx), %eax
        movl 0x390(%rbx), %edx; loop 1b""" + EXIT),
    Case("copies from the APIC", APIC + f"""
        movl $0x20, %esi; addl %ebx, %esi; movl ${DATA}, %edi; movl $8, %ecx; rep movsl; incl %eax
        movl ${DATA}, %esi; leal 0x80(%rbx), %edi; movl $3, %ecx; rep movsl; incl %eax""" + EXIT),
    Case("pushes the APIC", APIC + "pushq 0x30(%rbx); popq %rax; addl %eax, 0x80(%rbx); xchgl %eax, 0x80(%rbx)" + EXIT),
    Case("unclaimed memory", """
        movl $0xd0000000, %ebx; movl $9, %ecx
        1: movl %ecx, (%rbx); addl (%rbx), %eax; loop 1b""" + EXIT),
    Case("HLT and the timer", APIC + """
        movl $0x20030, 0x320(%rbx); movl $5000, 0x380(%rbx); movl $5, %ecx
        1: sti; hlt; cli; incl %eax; loop 1b""" + EXIT, handlers=((0x30, "incl %edx; movl $0, 0xb0(%rbx); iretq"),)),
    Case("busy timer", APIC + """
        movl $0x20030, 0x320(%rbx); movl $777, 0x380(%rbx); sti
        1: incl %eax; cmpl $9, %edx; jb 1b; cli""" + EXIT, handlers=((0x30, "incl %edx; movl $0, 0xb0(%rbx); iretq"),)),
    Case("interrupt windows", APIC + """
        movl $0x20030, 0x320(%rbx); movl $97, 0x380(%rbx); movl $200, %ecx
        1: cli; incl %eax; nop; nop; sti; nop; cli; incl %eax; pushfq; orl $0x200, (%rsp); popfq
        loop 1b; cli""" + EXIT,
        handlers=((0x30, "incl %edx; addl %ecx, %esi; movl $0, 0xb0(%rbx); iretq"),)),
    Case("timer in a repetition", APIC + f"""
        movl $0x20030, 0x320(%rbx); movl $333, 0x380(%rbx); sti
        movl ${DATA}, %edi; movl $900, %ecx; rep stosb; cli""" + EXIT,
         handlers=((0x30, "incl %edx; addl %ecx, %esi; movl $0, 0xb0(%rbx); iretq"),)),
    Case("system calls", """
        movl $0xc0000080, %ecx; rdmsr; orl $1, %eax; wrmsr; movl $0xc0000081, %ecx; movl $0x00230008, %edx; wrmsr
        incl %ecx; leaq 3f(%rip), %rax; xorl %edx, %edx; wrmsr; movl $9, %ebx
        1: syscall; incl %esi; decl %ebx; jnz 1b; jmp 2f
        3: incl %edi; jmp *%rcx
        2:""" + EXIT),
]  # fmt: skip


def build(case: Case, *, python: bool = False) -> Rig:
    from tests.engine.assembler import assemble
    from tests.engine.rig import bits_of

    rig = Rig(case.source, case.mode, python=python, user=case.user)
    for vector, text in case.handlers:
        at = HANDLERS + 0x1000 + 64 * vector
        rig.ram.write(at, assemble(text, at, bits_of(case.mode)).code)
        rig.gate(vector, offset=at)
    for page in case.absent:
        rig.change(page, drop=P)
    rig.ram.write(DATA, bytes(n * 7 % 256 for n in range(64)))
    return rig


def result(rig: Rig) -> tuple[object, ...]:
    """Everything a program can leave behind."""
    s = rig.state
    memory = hashlib.sha1(rig.ram.view[0x3000:0x400000]).hexdigest()
    assert rig.machine.exit_status is not None
    return rig.now, s.rip, s.rflags, [s.reg(n) for n in range(16)], memory, rig.machine.exit_status, rig.cpu.dr[6]


def finish(rig: Rig) -> tuple[object, ...]:
    assert rig.run() == Event.EXIT
    return result(rig)


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple[object, ...]]:
    return {case.name: finish(build(case)) for case in CASES}


by_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@by_case
def test_both_runtimes(case: Case, reference: dict[str, tuple[object, ...]]) -> None:
    assert finish(build(case, python=True)) == reference[case.name]
    if case.time is not None:
        assert reference[case.name][0] == case.time


@by_case
def test_single_stepped(case: Case, python: bool, reference: dict[str, tuple[object, ...]]) -> None:
    rig = build(case, python=python)
    for _ in range(20000):
        if rig.machine.run(step=True) == Event.EXIT:
            break
    assert result(rig) == reference[case.name]


@by_case
def test_cut_at_random(case: Case, python: bool, reference: dict[str, tuple[object, ...]]) -> None:
    for seed in range(2 if python else 6):
        random = Random(seed)
        rig = build(case, python=python)
        while rig.machine.run(random.choice((1, 2, 3, 7, 20, 100))) != Event.EXIT:
            pass
        assert result(rig) == reference[case.name], f"seed {seed}"


@by_case
def test_with_breakpoints(case: Case, python: bool, reference: dict[str, tuple[object, ...]]) -> None:
    """Breakpoints at every fifth byte (most of them within instructions), stepped over as a debugger does."""
    rig = build(case, python=python)
    places = {rig.program.origin + n for n in range(0, len(rig.program.code), 5)}
    rig.machine.engine.arm(places)
    for _ in range(20000):
        event = rig.machine.run(breakpoints=True)
        if event == Event.BREAKPOINT:
            assert rig.state.linear_rip in places
            event = rig.machine.run(step=True)
        if event == Event.EXIT:
            break
    assert result(rig) == reference[case.name]


@pytest.mark.parametrize("ticks", [1, 16, 40, 400])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cut_by_input(case: Case, ticks: int, reference: dict[str, tuple[object, ...]]) -> None:
    """A client that has something to say is heard in the middle of a run, which goes on as if nothing were."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        rig = build(case)
        engine, heard = rig.machine.engine, 0
        engine.look_at(ours.fileno(), ticks)
        while (event := rig.machine.run(1 << 20)) != Event.EXIT:
            heard += engine.asked
            assert not engine.asked or event == Event.PAUSED
        assert result(rig) == reference[case.name]
        assert heard or ticks not in (16, 40) or engine.binding.name == "python" or case.name != "loop"


@by_case
def test_with_a_stale_breakpoint_among_many(case: Case, python: bool, reference: dict[str, tuple[object, ...]]) -> None:
    """Disarmed breakpoints do not stop it, and are taken out where it comes to them often."""
    rig = build(case, python=python)
    engine = rig.machine.engine
    engine.arm({rig.program.origin + n for n in range(len(rig.program.code))})
    engine.arm({0x700000 + n for n in range(1000)})
    while (event := rig.machine.run(1000, breakpoints=True)) != Event.EXIT:
        assert event != Event.BREAKPOINT
    assert result(rig) == reference[case.name]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.sampled_from(CASES))
def test_any_cuts(cuts: list[int], case: Case) -> None:
    """Each cut is kept, up to the end of an instruction that lies across it."""
    rig = build(case)
    for ticks in cuts:
        before = rig.now
        if rig.machine.run(ticks) == Event.EXIT:
            break
        assert before + ticks <= rig.now <= before + ticks + 15 + PORT_TICKS + DELIVERY or rig.cpu.halted
    assert finish(rig) == finish(build(case))


def test_time_is_monotone_at_every_step(python: bool) -> None:
    """Guest time names an instruction boundary: it grows with every instruction, by its length."""
    rig = build(CASES[0], python=python)
    seen = []
    for _ in range(50):
        seen.append((rig.rip, rig.now))
        rig.step()
    for (rip, before), (following, after) in pairwise(seen):
        assert after - before == following - rip or following < rip
        assert after > before
