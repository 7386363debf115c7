/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Nested page tables (APM2 15.25): the processor translates each guest-physical address once more, through a table
 * of the format the host's own paging has, rooted in the VMCB's N_CR3.
 */
#ifndef NPT_H
#define NPT_H

#include "guest.h"

void npt_create(struct guest *guest);
/* After a #NPF: map the page if it belongs to the guest. Returns 0 if it does not. */
int npt_fill(struct guest *guest, uint64_t gpa);
/* Take the 4 KiB page at `gpa` away, until npt_fill brings an empty one. Returns 0 if there is none, or it is part of a large one. */
int npt_release(struct guest *guest, uint64_t gpa);
/* Print the entry of each level on the way to `gpa`. */
void npt_show(const struct guest *guest, uint64_t gpa);

#endif
