/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The secure loader: it takes the kernel into the block, where no device reaches it, measures and verifies it there, and
 * starts it there.  What was verified is what runs.
 */
#include "expected.h"
#include "layout.h"
#include "platform.h"
#include "sha256.h"
#include "tpm.h"

#define VM_CR 0xc0010114
#define KERNEL_PCR 18

_Static_assert(KERNEL_SIZE <= KERNEL_ROOM, "the kernel is larger than its room");

static const uint8_t expected[DIGEST] = KERNEL_DIGEST;

static void try_device(void)
{
    uint32_t edu = edu_find();
    if (!edu)
        return;
    volatile uint32_t *word = (volatile uint32_t *)SCRATCH;
    *word = 0x22222222;
    edu_write(edu, SCRATCH, 0x33333333);
    print(*word == 0x22222222 ? "loader: a device does not reach the block\n" : "loader: A DEVICE HAS WRITTEN TO THE BLOCK\n");
}

void verified(const uint8_t *digest)
{
    for (int i = 0; i < DIGEST; i++) {
        if (digest[i] != expected[i]) {
            print("loader: the kernel is not the one that was built with me: refused\n");
            end(1);
        }
    }
    print("loader: the kernel is genuine\n");
}

void loader_main(void)
{
    uint8_t *kernel = (uint8_t *)KERNEL;
    const volatile uint8_t *delivered = (const volatile uint8_t *)DELIVERED;
    uint8_t digest[DIGEST];

    print("loader: started\n");
    try_device();
    for (uint32_t i = 0; i < KERNEL_SIZE; i++)
        kernel[i] = delivered[i];
    sha256(kernel, KERNEL_SIZE, digest);
    if (tpm_open(2)) {
        int extended = tpm_extend(KERNEL_PCR, digest);
        tpm_close();
        if (!extended) {
            print("loader: the TPM refuses to extend PCR 18\n");
            end(1);
        }
    }
    verified(digest);

    /* Normal operation again: DPD, R_INIT and DIS_A20M off, GIF on (APM2 15.27.7).  The block stays protected. */
    __asm__ volatile("wrmsr" : : "c"(VM_CR), "a"(0), "d"(0));
    __asm__ volatile("stgi; jmp *%0" : : "r"(KERNEL));
    __builtin_unreachable();
}
