/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The kernels of compute.c:   uint64_t kernel(uint64_t rounds (RDI), void *memory (RSI))
 * The number of instructions in a round is the same in each round, whichever way its branches go.
 */
    .text
    .globl kernel_mix, kernel_store, kernel_tight

    /* Four blocks of 16 instructions; the second has two variants. */
kernel_mix:
    movl $1, %eax
    movl $0x12345678, %ecx
    xorl %r8d, %r8d
    .balign 16
1:  /* block 1: 16 */
    movq %rax, %rdx
    shlq $13, %rdx
    xorq %rdx, %rax
    movq %rax, %rdx
    shrq $7, %rdx
    xorq %rdx, %rax
    movq %rax, %rdx
    shlq $17, %rdx
    xorq %rdx, %rax
    movzwl %ax, %edx
    andl $0xfff8, %edx
    movq (%rsi, %rdx), %r9
    addq %r9, %r8
    rorq $5, %r8
    testb $1, %al
    jz 2f
    /* block 2, odd: 16 */
    addq %rax, %rcx
    leaq 3(%rcx, %rcx, 2), %rcx
    movq %rcx, %r10
    shrq $11, %r10
    xorq %r10, %r8
    imulq $31, %r8, %r8
    movzbl %cl, %edx
    movl (%rsi, %rdx, 4), %r11d
    addq %r11, %rcx
    subq $9, %r8
    notq %r10
    andq %r10, %r9
    orq $1, %r9
    addq %r9, %r8
    bswapq %r10
    jmp 3f
2:  /* block 2, even: 16 */
    subq %rax, %rcx
    leaq 5(%rcx, %rcx, 4), %rcx
    movq %rcx, %r10
    shlq $9, %r10
    xorq %r10, %r8
    imulq $37, %r8, %r8
    movzbl %cl, %edx
    movl 4096(%rsi, %rdx, 4), %r11d
    subq %r11, %rcx
    addq $9, %r8
    negq %r10
    andq %r10, %r9
    orq $2, %r9
    subq %r9, %r8
    bswapq %r10
    xorq %r10, %rcx
3:  /* block 3: 16 */
    movq %r8, %rdx
    andl $0x7ff8, %edx
    addq 8192(%rsi, %rdx), %rcx
    movq %rcx, %r9
    rolq $23, %r9
    xorq %r9, %r8
    cmpq %r8, %rcx
    cmovbq %r9, %r10
    setb %dl
    movzbl %dl, %edx
    addq %rdx, %r8
    leaq (%r8, %r10), %r11
    shrq $3, %r11
    addq %r11, %rcx
    testb $4, %cl
    jz 4f /* both ways lead to block 4 */
4:  /* block 4: 16 */
    movq %rcx, %rdx
    shrq $32, %rdx
    xorl %edx, %ecx
    addq $0x1234567, %rcx
    movq %rax, %r10
    rolq $1, %r10
    addq %r10, %r8
    movl %r8d, %edx
    andl $0xffc, %edx
    movl (%rsi, %rdx), %r11d
    xorq %r11, %r8
    adcq $0, %r8
    movq %r8, %r9
    shrq $29, %r9
    decq %rdi
    jnz 1b
    movq %r8, %rax
    addq %rcx, %rax
    ret

    .balign 16
kernel_store:
    xorl %eax, %eax
    xorl %ecx, %ecx
    .balign 16
1:  movq %rax, (%rsi, %rcx)
    addq $3, %rax
    movq %rax, 8(%rsi, %rcx)
    leaq 1(%rax, %rax, 2), %rdx
    movq %rdx, 4096(%rsi, %rcx)
    xorq %rdi, %rdx
    movq %rdx, 8192(%rsi, %rcx)
    shrq $3, %rdx
    addq %rdx, %rax
    movl %eax, 16384(%rsi, %rcx)
    rolq $7, %rax
    addl $16, %ecx
    andl $0x7ff0, %ecx
    movq %rax, %r8
    addq %r8, %rax
    decq %rdi
    jnz 1b
    ret

    .balign 16
kernel_tight:
    xorl %eax, %eax
    .balign 16
1:  addq %rdi, %rax
    decq %rdi
    jnz 1b
    ret
    .section .note.GNU-stack, "", @progbits
