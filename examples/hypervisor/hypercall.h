/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The hypercalls: VMMCALL with a number in RAX and arguments in RBX and RCX (the 32-bit halves outside long mode),
 * from CPL 0. The result comes back in RAX, 0 for success, all ones for a call that is unknown or makes no sense.
 * This file is included by the hypervisor, by guests in C and by guests in assembly.
 */
#ifndef HYPERCALL_H
#define HYPERCALL_H

#define HYPERCALL_PRINT 1 /* RBX: guest-physical address, RCX: length, at most 4096 */
#define HYPERCALL_YIELD 2 /* let the others run */
#define HYPERCALL_DONE  3 /* RBX: 0 if all went well; does not return */
#define HYPERCALL_TIMER 4 /* RBX: vector, 32 to 255, to interrupt at every host tick; 0: no more. No EOI is wanted */
#define HYPERCALL_RELEASE 5 /* RBX: guest-physical address of a 4 KiB page that is given back; the next touch brings an empty one */

#define MSR_GUEST_NUMBER 0x40000000 /* read-only; outside the ranges of the MSR permission map, so always intercepted */

#ifndef __ASSEMBLER__
static inline unsigned long hypercall(unsigned long number, unsigned long first, unsigned long second)
{
    unsigned long result;
    __asm__ volatile("vmmcall" : "=a"(result) : "a"(number), "b"(first), "c"(second) : "memory");
    return result;
}
#endif

#endif
