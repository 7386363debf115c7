/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "print.h"
#include "cpu.h"
#include <stdarg.h>

#define COM1 0x3f8

void serial_start(void)
{
    outb(COM1 + 1, 0x00); /* no interrupts */
    outb(COM1 + 3, 0x80); /* DLAB: the next two bytes are the divisor */
    outb(COM1 + 0, 0x01); /* 115200 baud */
    outb(COM1 + 1, 0x00);
    outb(COM1 + 3, 0x03); /* 8 bits, no parity, one stop bit */
    outb(COM1 + 2, 0xc7); /* clear and enable the FIFOs */
    outb(COM1 + 4, 0x03); /* DTR, RTS */
}

void put_char(char c)
{
    if (c == '\n')
        put_char('\r');
    /* Bounded: a machine whose line status never says "empty" must not hang us. */
    for (int i = 0; i < 100000 && !(inb(COM1 + 5) & 0x20); i++)
        ;
    outb(COM1, (uint8_t)c);
}

static void pad(int count, char with)
{
    while (count-- > 0)
        put_char(with);
}

static void print_number(uint64_t value, unsigned base, int width, char fill, int left)
{
    char digits[20];
    int count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    int space = width - count;
    if (!left)
        pad(space, fill);
    while (count)
        put_char(digits[--count]);
    if (left)
        pad(space, ' ');
}

void print(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            put_char(*format);
            continue;
        }
        int left = 0, width = 0;
        char fill = ' ';
        for (format++; *format == '-' || *format == '0'; format++) {
            if (*format == '-')
                left = 1;
            else
                fill = '0';
        }
        for (; *format >= '0' && *format <= '9'; format++)
            width = width * 10 + (*format - '0');
        if (*format == 's') {
            const char *text = va_arg(arguments, const char *);
            int length = 0;
            while (text[length])
                length++;
            if (!left)
                pad(width - length, ' ');
            for (int i = 0; i < length; i++)
                put_char(text[i]);
            if (left)
                pad(width - length, ' ');
        } else if (*format == 'c') {
            put_char((char)va_arg(arguments, int));
        } else if (*format == 'u' || *format == 'x') {
            print_number(va_arg(arguments, uint64_t), *format == 'x' ? 16 : 10, width, fill, left);
        } else {
            put_char('%');
            if (!*format)
                break;
            put_char(*format);
        }
    }
    va_end(arguments);
}

void end(uint32_t status)
{
    outl(DEBUG_EXIT_PORT, status);
    for (;;)
        __asm__ volatile("cli; hlt");
}

void fatal(const char *message)
{
    print("hypervisor: %s\n", message);
    end(1);
}
