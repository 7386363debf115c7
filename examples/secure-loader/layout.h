/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Where things are.  The linker scripts have the same numbers. */
#pragma once
#define BLOCK 0x200000     /* the secure loader's block: 64 KiB, which SKINIT keeps from devices */
#define BLOCK_SIZE 0x10000
#define KERNEL 0x208000    /* in the block: where the loader copies the kernel to, and it runs */
#define KERNEL_ROOM 0x5000
#define SCRATCH 0x20d000   /* in the block: what a device tries to write to */
#define DELIVERED 0x300000 /* where the launcher has the kernel: any device reaches it */
