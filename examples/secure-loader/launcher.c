/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Any boot loader: nobody needs to trust it.  What it could do wrong, `tamper=` on the command line makes it do. */
#include "layout.h"
#include "platform.h"

#define APIC_ICR ((volatile uint32_t *)0xfee00300)
#define INIT_ALL_BUT_SELF 0xc4500
#define SKINIT_CLAIMED (1 << 12) /* of ECX, leaf 80000001 */

void launch(uint32_t block) __attribute__((noreturn));

static int has(const char *line, const char *word)
{
    for (; line && *line; line++) {
        const char *a = line, *b = word;
        while (*b && *a == *b)
            a++, b++;
        if (!*b)
            return 1;
    }
    return 0;
}

void main(const uint32_t *information)
{
    const char *line = information[0] & 4 ? (const char *)information[4] : 0;
    serial_start();
    uint32_t eax = 0x80000001, ebx, ecx, edx;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx));
    if (!(ecx & SKINIT_CLAIMED)) {
        print("launcher: the processor has no SKINIT\n");
        end(1);
    }
    uint32_t edu = edu_start();
    if (edu) {
        *(volatile uint32_t *)SCRATCH = 0;
        edu_write(edu, SCRATCH, 0x11111111);
        print(*(volatile uint32_t *)SCRATCH == 0x11111111 ? "launcher: a device writes to the block\n"
                                                          : "launcher: a device does nothing\n");
    }
    if (has(line, "tamper=kernel"))
        *(volatile uint8_t *)(DELIVERED + 0x40) ^= 1;
    if (has(line, "tamper=loader"))
        *(volatile uint8_t *)(BLOCK + *(volatile uint16_t *)(BLOCK + 2) - 1) ^= 1;
    *APIC_ICR = INIT_ALL_BUT_SELF; /* else SKINIT does not measure (APM2 15.27.8) */
    print("launcher: SKINIT\n");
    launch(BLOCK);
}
