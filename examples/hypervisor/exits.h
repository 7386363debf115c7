/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef EXITS_H
#define EXITS_H

#include "guest.h"

/* Do what the guest's last #VMEXIT asks for. Returns 1 if another guest should have its turn. */
int handle_exit(struct guest *guest);

#endif
