/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef SCHEDULE_H
#define SCHEDULE_H

/* Run the guests in turn until none is left to run. */
void schedule(void);

#endif
