/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guest 3: real mode, as it thinks. CS:IP starts at 0000:1000, EBX holds the number of iterations.
 * It counts at 2000:0000, a page the hypervisor supplies at first touch, and prints on the debug port E9.
 */
#include "../hypercall.h"

#define STACK_TOP     0x8000
#define TIMER_VECTOR  0x20
#define COUNT_SEGMENT 0x2000
#define DEBUG_PORT    0xe9

    .text
    .code16
    .globl _start
_start:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $STACK_TOP, %sp
    movl %ebx, iterations

    movw $hello, %si
    call put

    /* The hypervisor has set CR0.PG behind our back. MOV from CR0 must not show it. */
    movl %cr0, %eax
    testl $0x80000001, %eax
    movl $1, %ebx
    jnz done
    movw $unpaged, %si
    call put

    movw $timer, TIMER_VECTOR * 4 /* the interrupt vector table, at linear address 0 */
    movw $0, TIMER_VECTOR * 4 + 2
    movl $HYPERCALL_TIMER, %eax
    movl $TIMER_VECTOR, %ebx
    vmmcall
    sti

    movw $COUNT_SEGMENT, %ax
    movw %ax, %fs
    .globl loop
loop:
    incl %fs:0 /* the counter, linear address 20000 */
    call work
    movl %fs:0, %eax
    testb $7, %al
    jnz 1f
    hlt        /* until the timer */
1:  testb $31, %al
    jnz 2f
    movw $counter_is, %si
    call put
    movl %fs:0, %eax
    call put_number
2:  movl iterations, %ecx
    jecxz loop
    cmpl %ecx, %fs:0
    jb loop

    movw $finished, %si
    call put
    xorl %ebx, %ebx
    cmpw $0, ticks
    jne done
    incw %bx
done:
    movl $HYPERCALL_DONE, %eax
    vmmcall

    /* Fill 4 KiB at 3000:0000 with the counter's low word. */
    .globl work
work:
    movw $0x3000, %ax
    movw %ax, %es
    xorw %di, %di
    movw %fs:0, %ax
    movw $2048, %cx
    rep stosw
    ret

    .globl timer
timer:
    incw %cs:ticks
    iret

    /* Print the string at DS:SI. */
put:
    lodsb
    testb %al, %al
    jz 1f
    outb %al, $DEBUG_PORT
    jmp put
1:  ret

    /* Print EAX in decimal, and a line's end. */
put_number:
    movl $10, %ebx
    xorw %cx, %cx
1:  xorl %edx, %edx
    divl %ebx
    pushw %dx
    incw %cx
    testl %eax, %eax
    jnz 1b
2:  popw %ax
    addb $'0', %al
    outb %al, $DEBUG_PORT
    loopw 2b
    movb $'\n', %al
    outb %al, $DEBUG_PORT
    ret

    .data
    .globl iterations, ticks
iterations: .long 0
ticks:      .word 0
hello:      .asciz "real mode guest at 0000:1000\n"
unpaged:    .asciz "CR0 says: no protection, no paging\n"
counter_is: .asciz "counter at 2000:0000 is "
finished:   .asciz "done\n"
    .section .note.GNU-stack, "", @progbits
