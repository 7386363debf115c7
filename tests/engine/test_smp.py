"""Several CPUs: start, IPIs, shared memory and code; the same in every run and in both runtimes."""

from __future__ import annotations

import pytest

from tests.engine.assembler import assemble
from vmdbg.cpu.ports import PORT_TICKS
from vmdbg.machine import QUANTUM, Config, Event, Machine

TRAMPOLINE = 0x9000
BOOT = """
    movl $0xfee00000, %ebx
    movl $0x1ff, 0xf0(%rbx)
    # the trampoline: real mode to long mode on the boot CPU's own tables
    leaq trampoline(%rip), %rsi; movl $0x9000, %edi; movl $trampoline_end - trampoline, %ecx; rep movsb
    movq %cr3, %rax; movl %eax, 0x9ff0
    sgdt 0x9fe0
    movl $0, 0x310(%rbx); movl $0xc4500, 0x300(%rbx)      # INIT to all others
    movl $0xc4609, 0x300(%rbx)                            # SIPI, vector 9
"""
AP = """
    .code16
trampoline:
    cli; xorw %ax, %ax; movw %ax, %ds
    lgdtl 0x9fe0
    movl 0x9ff0, %eax; movl %eax, %cr3
    movl $0x620, %eax; movl %eax, %cr4
    movl $0xc0000080, %ecx; movl $0x100, %eax; xorl %edx, %edx; wrmsr
    movl $0x80000011, %eax; movl %eax, %cr0
    ljmpl $8, $ap
trampoline_end:
    .code64
ap:
    movl $0x10, %eax; movw %ax, %ss; movw %ax, %ds
    movl $0xfee00000, %ebx; movl $0x1ff, 0xf0(%rbx)
    movl 0x20(%rbx), %ebp; shrl $24, %ebp                 # the APIC's number
    movl %ebp, %esp; shll $12, %esp; addl $0x500000, %esp
"""
COUNTER, DONE, FLAG = 0x400000, 0x400008, 0x400010


def machine(source: str, cpus: int, python: bool) -> Machine:
    code = assemble(source, 0x200000).code
    return Machine(code, Config(memory=16 << 20, cpus=cpus, flat_address=0x200000, mode="long", python_runtime=python))


def finish(m: Machine, ticks: int = 40_000_000) -> int:
    for _ in range(10):
        if m.run(ticks // 10) == Event.EXIT:
            assert m.exit_status is not None, m.ended
            return m.exit_status >> 1
    raise AssertionError(f"still running: {[(hex(cpu.state.rip), cpu.halted) for cpu in m.cpus]}")


INCREMENTS = f"""{BOOT}
    call work
    1: pause; cmpl $CPUS, {DONE}; jb 1b
    movl {COUNTER}, %eax; outl %eax, $0xf4; hlt
work: movl $1000, %ecx
    1: lock incl {COUNTER}; loop 1b
    lock incl {DONE}; ret
{AP}
    call work; cli; 1: hlt; jmp 1b"""


@pytest.mark.parametrize("cpus", [2, 8])
def test_atomic_increments(cpus: int, python: bool) -> None:
    m = machine(INCREMENTS.replace("CPUS", str(cpus)), cpus, python)
    assert finish(m) == 1000 * cpus
    again = machine(INCREMENTS.replace("CPUS", str(cpus)), cpus, not python)
    assert finish(again) == 1000 * cpus
    assert again.clock.now == m.clock.now


def test_turns_do_not_depend_on_slices(python: bool) -> None:
    source = INCREMENTS.replace("CPUS", "3").replace("$1000", "$30000")
    whole, cut = machine(source, 3, python), machine(source, 3, python)
    finish(whole)
    while cut.run(7777) != Event.EXIT:
        pass
    assert cut.clock.now == whole.clock.now
    assert [cpu.state.rip for cpu in cut.cpus] == [cpu.state.rip for cpu in whole.cpus]
    assert whole.clock.now > QUANTUM


CODE_EXCHANGE = f"""{BOOT}
    movl $1, %ecx
    1: movb $0xb8, 0x600000; movl %ecx, 0x600001; movb $0xc3, 0x600005    # mov $ecx, %eax; ret
    movl %ecx, {FLAG}
    2: pause; cmpl %ecx, {DONE}; jne 2b
    incl %ecx; cmpl $13, %ecx; jb 1b
    movl {COUNTER}, %eax; outl %eax, $0xf4; hlt
{AP}
    movl $1, %edi
    1: pause; cmpl %edi, {FLAG}; jne 1b
    movl $0x600000, %edx; call *%rdx
    addl %eax, {COUNTER}; movl %edi, {DONE}; incl %edi; jmp 1b"""


def test_code_written_by_one_cpu_runs_on_another(python: bool) -> None:
    assert finish(machine(CODE_EXCHANGE, 2, python)) == sum(range(1, 13))


IPIS = f"""{BOOT}
    1: pause; cmpl $1, {FLAG}; jne 1b                                      # the other one is ready
    movl $0x1000000, 0x310(%rbx); movl $0x4041, 0x300(%rbx)                # fixed, vector 41
    2: pause; cmpl $1, {DONE}; jne 2b
    movl $0x4400, 0x300(%rbx)                                              # NMI
    3: pause; cmpl $3, {DONE}; jne 3b
    movl {COUNTER}, %eax; outl %eax, $0xf4; hlt
{AP}
    lidt table(%rip)
    leaq fixed(%rip), %rdx; movl $0x41, %edi; call gate
    leaq nmi(%rip), %rdx; movl $2, %edi; call gate
    sti; movl $1, {FLAG}; 1: hlt; jmp 1b
gate: shll $4, %edi; addl $0x700000, %edi
    movl %edx, %eax; andl $0xffff, %eax; orl $0x80000, %eax; movl %eax, (%rdi)
    movl %edx, %eax; andl $0xffff0000, %eax; orl $0x8e00, %eax; movl %eax, 4(%rdi); movl $0, 8(%rdi); ret
fixed: addl $0x10, {COUNTER}; movl $0, 0xb0(%rbx); orl $1, {DONE}; iretq
nmi: addl $1, {COUNTER}; orl $2, {DONE}; iretq
table: .word 0xfff; .quad 0x700000"""


def test_interprocessor_interrupts(python: bool) -> None:
    m = machine(IPIS, 2, python)
    assert finish(m) == 0x11


INIT_AGAIN = f"""{BOOT}
    1: pause; cmpl $1, {DONE}; jb 1b
    movl $0x1000000, 0x310(%rbx); movl $0x4500, 0x300(%rbx); movl $0x4609, 0x300(%rbx)   # INIT and SIPI once more
    1: pause; cmpl $2, {DONE}; jb 1b
    movl {DONE}, %eax; outl %eax, $0xf4; hlt
{AP}
    lock incl {DONE}; 1: jmp 1b"""


def test_init_restarts_a_running_cpu(python: bool) -> None:
    assert finish(machine(INIT_AGAIN, 2, python)) == 2


def test_cpus_wait_for_sipi(python: bool) -> None:
    m = machine("movl $1000, %ecx; 1: loop 1b; outl %eax, $0xf4", 4, python)
    finish(m)
    assert all(cpu.wait_for_sipi for cpu in m.cpus[1:])
    assert m.clock.now == 5 + 2000 + 2 + PORT_TICKS


def test_guests_on_two_cpus(python: bool) -> None:
    """Each CPU runs a guest of its own; the exit trace is the same in two runs and both runtimes."""
    source = f"""{BOOT}
    xorl %ebp, %ebp; call work
    1: pause; cmpl $2, {DONE}; jb 1b
    movl {COUNTER}, %eax; outl %eax, $0xf4; hlt
work: movl $0xc0000080, %ecx; rdmsr; orl $0x1000, %eax; wrmsr
    movl $0xc0010117, %ecx; movl %ebp, %eax; shll $16, %eax; addl $0x610000, %eax; movl %eax, %edi; xorl %edx, %edx
    wrmsr
    addl $0x1000, %edi                                                      # the VMCB behind the save area
    movl $3, 0x10(%rdi); leal 1(%rbp), %eax; movl %eax, 0x58(%rdi)
    movw $8, 0x410(%rdi); movw $0xa9b, 0x412(%rdi); movl $-1, 0x414(%rdi)
    movw $0x10, 0x420(%rdi); movw $0xc93, 0x422(%rdi); movl $-1, 0x424(%rdi)
    movl $0x1d00, 0x4d0(%rdi); movq %cr4, %rax; movq %rax, 0x548(%rdi)
    movq %cr3, %rax; movq %rax, 0x550(%rdi); movq %cr0, %rax; movq %rax, 0x558(%rdi)
    movl $0x400, 0x560(%rdi); movl $0xffff0ff0, 0x568(%rdi); movl $2, 0x570(%rdi)
    leaq guest(%rip), %rax; movq %rax, 0x578(%rdi); movq %rsp, 0x5d8(%rdi)
    movl $20, %esi
    1: movq %rdi, %rax; vmrun; addq $3, 0x578(%rdi); decl %esi; jnz 1b
    lock incl {DONE}; ret
guest: movl $3000, %ecx; 2: loop 2b; lock incl {COUNTER}; vmmcall; jmp guest
{AP}
    call work; cli; 1: hlt; jmp 1b"""
    traces = []
    for runtime in (python, python, not python):
        m = machine(source, 2, runtime)
        assert finish(m) == 40
        traces.append(
            [record.line() for guest in m.history.guests.values() for record in guest.exits] + [str(m.clock.now)]
        )
    assert traces[0] == traces[1] == traces[2]
    assert len(traces[0]) == 41
