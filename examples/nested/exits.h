/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What this level does itself for a #VMEXIT. */
#ifndef EXITS_H
#define EXITS_H

#include <stdint.h>

void handle_exit(void);
/* A nested page fault that this level's own table is the reason of. `info`: EXITINFO1, `gpa`: of the guest. */
void own_page_fault(uint64_t gpa, uint64_t info);

#endif
