/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a secure loader is for: it knows from PCR 17 and 18 that it was started by that loader, and that it is itself. */
#include "layout.h"
#include "platform.h"
#include "tpm.h"

static void show(int pcr)
{
    uint8_t value[DIGEST];
    if (!tpm_read(pcr, value))
        return;
    print("kernel: PCR ");
    print(pcr == 17 ? "17 " : "18 ");
    print_bytes(value, DIGEST);
    print("\n");
}

void kernel_main(void)
{
    print("kernel: started\n");
    if (tpm_open(0)) {
        show(17);
        show(18);
        tpm_close();
    }
    end_protection();
    uint32_t edu = edu_find();
    if (edu) {
        edu_write(edu, SCRATCH, 0x44444444);
        print(*(volatile uint32_t *)SCRATCH == 0x44444444 ? "kernel: protection has ended, a device writes to the block\n"
                                                          : "kernel: a device still does not reach the block\n");
    }
    end(0);
}
