/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Arguments on the multiboot command line: "n=1000 mode=cpuid". */
#ifndef ARGUMENTS_H
#define ARGUMENTS_H

#include <stdint.h>

/* The number behind `name`, or `otherwise` if the command line does not have it. `information`: EBX at the start. */
uint64_t number_argument(uint32_t information, const char *name, uint64_t otherwise);
/* Bytes of memory from 0 up that the loader found, or `~0` if it does not say. */
uint64_t memory_size(uint32_t information);
/* 1 if the command line has this very word. */
int has_argument(uint32_t information, const char *word);

#endif
