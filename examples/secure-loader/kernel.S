/* SPDX-License-Identifier: GPL-2.0-or-later */
    .section .entry, "ax"
    .globl entry
entry:
    movl $0x210000, %esp
    call kernel_main
