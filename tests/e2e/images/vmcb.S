/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a hypervisor needs before VMRUN.  The guest runs the code at `guest` on the hypervisor's own page tables. */
#define VM_HSAVE_PA 0xc0010117

    .macro new_vmcb vmcb, asid, root, sp
    mov $\vmcb, %edi
    mov $\asid, %esi
    mov $\root, %edx
    mov $\sp, %r10d
    call fill_vmcb
    .endm

prepare:
    mov $0x10, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov $VM_HSAVE_PA, %ecx
    mov $hsave, %eax
    xor %edx, %edx
    wrmsr
    mov $iopm, %edi
    mov $-1, %eax
    mov $0x3000 / 4, %ecx
    cld
    rep stosl
    ret

fill_root: /* EDI: three pages; EBX: the entry for gpa 400000 */
    lea 0x1007(%rdi), %rax
    mov %rax, (%rdi)
    lea 0x2007(%rdi), %rax
    mov %rax, 0x1000(%rdi)
    mov $0x87, %eax
    xor %ecx, %ecx
1:  mov %rax, 0x2000(%rdi, %rcx, 8)
    add $0x200000, %rax
    inc %ecx
    cmp $8, %ecx
    jne 1b
    mov %rbx, 0x2010(%rdi)
    ret

fill_vmcb: /* EDI: page, ESI: ASID, EDX: nested root, R10D: RSP */
    mov %rdi, %r9
    xor %eax, %eax
    mov $512, %ecx
    rep stosq
    mov %r9, %rdi
    movl $(1 << 18 | 1 << 24 | 1 << 27), 0xc(%rdi) /* CPUID, HLT, IOIO */
    movl $3, 0x10(%rdi)                            /* VMRUN, VMMCALL */
    movq $iopm, 0x40(%rdi)
    mov %esi, 0x58(%rdi)
    movq $1, 0x90(%rdi)
    mov %rdx, 0xb0(%rdi)
    movl $0x0a9b0008, 0x410(%rdi)
    movl $0x0c930010, 0x420(%rdi)
    movl $0x0c930010, 0x430(%rdi)
    movl $0x0c930010, 0x400(%rdi)
    movl $-1, 0x414(%rdi)
    movl $-1, 0x424(%rdi)
    movl $-1, 0x434(%rdi)
    movl $-1, 0x404(%rdi)
    movq $0x1500, 0x4d0(%rdi)
    mov %cr4, %rax
    mov %rax, 0x548(%rdi)
    mov %cr3, %rax
    mov %rax, 0x550(%rdi)
    mov %cr0, %rax
    mov %rax, 0x558(%rdi)
    movq $0x400, 0x560(%rdi)
    movq $2, 0x570(%rdi)
    movq $guest, 0x578(%rdi)
    mov %r10, 0x5d8(%rdi)
    movq $0x00070106, 0x668(%rdi)
    ret

    .bss
    .balign 4096
hsave: .skip 4096
iopm: .skip 4096 * 3
    .text
