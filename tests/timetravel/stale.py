# SPDX-License-Identifier: GPL-2.0-or-later
"""A program that lives on what it must not: translations of tables that it has changed, and accessed bits that it has cleared.

It draws pages at random: reads, writes and calls into them, leads them elsewhere, clears accessed and dirty bits, looks at them, and
seldom flushes.  What it saw goes into a sum in RBX, so that its registers and memory at the end tell of every stale use.
"""

from __future__ import annotations

from functools import cache

from tests.engine.assembler import assemble

ADDRESS, PAGES, POOL, FRAMES = 0x200000, 2048, 0x800000, 64
"""Where it is loaded; pages in its window at 1 GiB; the frames behind them, each with a function."""
ROUNDS, DRAWS = 24, 2000

SOURCE = f"""
.equ PML4, 0x400000
.equ TABLES, 0x404000
    xorl %eax, %eax                       # tables: 16 MiB to themselves in large pages, the window in small ones
    movl $PML4, %edi
    movl $0x4000, %ecx
    rep stosb
    movl $PML4 + 0x1003, PML4
    movl $PML4 + 0x2003, PML4 + 0x1000
    movl $PML4 + 0x3003, PML4 + 0x1008
    xorl %ecx, %ecx
1:  movl %ecx, %eax
    shll $21, %eax
    orl $0x83, %eax
    movl %eax, PML4 + 0x2000(, %rcx, 8)
    movl %ecx, %eax
    shll $12, %eax
    addl $TABLES + 3, %eax
    movl %eax, PML4 + 0x3000(, %rcx, 8)
    incl %ecx
    cmpl $8, %ecx
    jb 1b
    xorl %ecx, %ecx
2:  movl %ecx, %eax
    andl ${FRAMES - 1}, %eax
    shll $12, %eax
    addl ${POOL} + 3, %eax
    movq %rax, TABLES(, %rcx, 8)
    incl %ecx
    cmpl ${PAGES}, %ecx
    jb 2b
    movl ${POOL}, %edx                    # frames: a number, and a function
3:  movq %rdx, (%rdx)
    leaq 0x800(%rdx), %rdi
    leaq function(%rip), %rsi
    movl $function_end - function, %ecx
    rep movsb
    addl $0x1000, %edx
    cmpl ${POOL + FRAMES * 0x1000}, %edx
    jb 3b
    movl $PML4, %eax
    movq %rax, %cr3
    movl $0x100000, %esp
    movl $0x40000000, %r14d
    movabsq $6364136223846793005, %r13
    movl $1, %r15d
    xorl %ebx, %ebx
    movl ${ROUNDS}, %ebp
round:
    movl ${DRAWS}, %r12d
    movl ${PAGES - 1}, %r11d              # every third round in few pages
    movl %ebp, %eax
    xorl %edx, %edx
    movl $3, %ecx
    divl %ecx
    testl %edx, %edx
    jnz draw
    movl $15, %r11d
draw:
    imulq %r13, %r15
    addq $1442695, %r15
    movq %r15, %rdx
    shrq $33, %rdx
    andl %r11d, %edx                      # a page
    movl %edx, %edi
    shll $12, %edi
    addq %r14, %rdi                       # its address
    rolq $5, %rbx
    movq %r15, %rax
    shrq $56, %rax
    cmpl $100, %eax
    jb read
    cmpl $140, %eax
    jb write
    cmpl $170, %eax
    jb lead
    cmpl $200, %eax
    jb clear
    cmpl $225, %eax
    jb look
    cmpl $250, %eax
    jb call
    cmpl $254, %eax
    jb invalidate
    testl $0x300000, %r15d
    jnz done
    movq %cr3, %rax
    movq %rax, %cr3
    jmp done
read:
    xorq (%rdi), %rbx
    jmp done
write:
    movq %rbx, 8(%rdi)
    jmp done
lead:
    xorq $0x3000, TABLES(, %rdx, 8)
    jmp done
clear:
    andq $~0x60, TABLES(, %rdx, 8)
    jmp done
look:
    xorq TABLES(, %rdx, 8), %rbx
    jmp done
call:
    addl $0x800, %edi
    call *%rdi
    jmp done
invalidate:
    invlpg (%rdi)
done:
    decl %r12d
    jnz draw
    decl %ebp
    jnz round
    movb $0, %al
    outb %al, $0xf4
    hlt
function:
    movl $3, %ecx
4:  leaq function(%rip), %rax
    addq %rax, %rbx
    xorq -0x7f8(%rax), %rbx
    loop 4b
    ret
function_end:
"""


@cache
def image() -> bytes:
    """For a machine in long mode, with 16 MiB at least."""
    return assemble(SOURCE, ADDRESS, 64).code
