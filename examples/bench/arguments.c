/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "arguments.h"

struct multiboot {
    uint32_t flags, memory_lower, memory_upper, boot_device, command_line;
};

/* What follows `prefix` in the word that begins with it, or 0. */
static const char *find(uint32_t information, const char *prefix)
{
    const struct multiboot *multiboot = (const struct multiboot *)(uint64_t)information;
    if (!(multiboot->flags & 4))
        return 0;
    const char *text = (const char *)(uint64_t)multiboot->command_line;
    for (;;) {
        unsigned i = 0;
        while (prefix[i] && text[i] == prefix[i])
            i++;
        if (!prefix[i])
            return text + i;
        while (*text && *text != ' ')
            text++;
        if (!*text)
            return 0;
        text++;
    }
}

uint64_t number_argument(uint32_t information, const char *name, uint64_t otherwise)
{
    const char *text = find(information, name);
    if (!text)
        return otherwise;
    uint64_t value = 0;
    for (; *text >= '0' && *text <= '9'; text++)
        value = value * 10 + (uint64_t)(*text - '0');
    return value;
}

uint64_t memory_size(uint32_t information)
{
    const struct multiboot *multiboot = (const struct multiboot *)(uint64_t)information;
    return multiboot->flags & 1 ? 0x100000 + multiboot->memory_upper * 1024ull : ~0ull;
}

int has_argument(uint32_t information, const char *word)
{
    const char *rest = find(information, word);
    return rest && (*rest == ' ' || !*rest);
}
