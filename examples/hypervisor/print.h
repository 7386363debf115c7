/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Text on the first serial port, and the two ways to end. */
#ifndef PRINT_H
#define PRINT_H

#include <stdint.h>

void serial_start(void);
void put_char(char c);
/* Knows %s %c %u %x (64-bit values all), a width, and a leading 0 or - : print("%-8s %016x\n", name, value). */
void print(const char *format, ...);

#define DEBUG_EXIT_PORT 0xf4
/* Write `status` to the debug-exit port (QEMU then ends with 2 * status + 1); halt where there is no such device. */
_Noreturn void end(uint32_t status);
/* Print "hypervisor: <message>" and end with status 1. */
_Noreturn void fatal(const char *message);

#endif
