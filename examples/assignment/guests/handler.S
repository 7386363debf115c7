/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The one interrupt of guest 1. */
    .text
    .globl handler
handler:
    pushal
    cld
    call on_interrupt
    popal
    iret
    .section .note.GNU-stack, "", @progbits
