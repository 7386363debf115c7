/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The example's guest: 32-bit protected mode without paging, flat segments, loaded and entered at 1000. */
    .code32
    .text
    .globl _start
_start:
    mov $0xf000, %esp /* the last page but one, there from the start */
    mov $hello, %esi
    call print
    call vendor
    mov $16, %edi
1:  call work
    dec %edi
    jnz 1b
    mov $done, %esi
    call print
    xor %eax, %eax
    vmmcall /* 0 in EAX: all went well */

/* ESI: text. The port is the hypervisor's: each byte is an IOIO exit. */
    .globl print
print:
    mov $0x3f8, %edx
1:  lodsb
    test %al, %al
    jz 2f
    out %al, %dx
    jmp 1b
2:  ret

/* Ask who is there: a CPUID exit. */
    .globl vendor
vendor:
    mov $0x40000000, %eax
    cpuid
    mov %ebx, signature
    mov %ecx, signature + 4
    mov %edx, signature + 8
    ret

/* A round: count it, and leave a mark in the upper half of memory, whose pages come as they are touched (NPF exits). */
    .globl work
work:
    mov counter, %eax
    and $3, %eax
    shl $12, %eax
    incl 0x8000(%eax)
    incl counter
    ret

    .data
hello: .asciz "hello from the guest\n"
done: .asciz "done\n"
    .globl counter, signature
    .balign 8
counter: .quad 0
signature: .fill 16
    .section .note.GNU-stack, "", @progbits
