/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The guests' images, as data of the hypervisor. */
    .section .rodata
    .macro blob name, file
    .balign 16
    .globl \name\()_image, \name\()_image_end
\name\()_image:
    .incbin "\file"
\name\()_image_end:
    .endm

    blob driver, "build/driver.bin"
    blob neighbour, "build/neighbour.bin"
    .section .note.GNU-stack, "", @progbits
