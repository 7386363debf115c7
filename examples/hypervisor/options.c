/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "options.h"
#include "print.h"

struct multiboot {
    uint32_t flags, memory_lower, memory_upper, boot_device, command_line;
};

static const char *after(const char *word, const char *prefix)
{
    while (*prefix)
        if (*word++ != *prefix++)
            return 0;
    return word;
}

static const char *number(const char *text, uint64_t *value)
{
    if (*text < '0' || *text > '9')
        fatal("a number is missing on the command line; it takes guests=1,2,4 loop=N tick=N");
    for (*value = 0; *text >= '0' && *text <= '9'; text++)
        *value = *value * 10 + (uint64_t)(*text - '0');
    return text;
}

struct options read_options(uint32_t information, uint32_t all_guests)
{
    const struct multiboot *multiboot = (const struct multiboot *)(uint64_t)information;
    struct options options = {.guests = all_guests, .loop = 1, .tick = 200000};
    if (multiboot->flags & 1)
        options.memory = 0x100000 + multiboot->memory_upper * 1024ull;
    if (!(multiboot->flags & 4))
        return options;
    for (const char *word = (const char *)(uint64_t)multiboot->command_line; *word; word++) {
        const char *text;
        uint64_t value;
        if ((text = after(word, "guests="))) {
            options.guests = 0;
            do {
                text = number(text, &value);
                if (value > 31 || !(all_guests & 1u << value))
                    fatal("guests= names a guest that does not exist");
                options.guests |= 1u << value;
            } while (*text++ == ',');
        } else if ((text = after(word, "loop="))) {
            number(text, &options.loop);
        } else if ((text = after(word, "tick="))) {
            number(text, &value);
            if (value < 1000 || value > 0xffffffff)
                fatal("tick= must be between 1000 and 4294967295");
            options.tick = (uint32_t)value;
        }
        while (word[0] && word[1] && word[0] != ' ')
            word++;
    }
    return options;
}
