/* Drives the edu device from user space, as a driver would: BAR 0 through sysfs, DMA to a page of this process whose
   physical address /proc/self/pagemap tells.  Says what it found in one line. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static volatile uint32_t *bar;

static uint64_t physical(void *address)
{
    uint64_t entry = 0;
    int file = open("/proc/self/pagemap", O_RDONLY);
    pread(file, &entry, 8, (uintptr_t)address / 4096 * 8);
    close(file);
    return (entry & ((1ull << 55) - 1)) * 4096;
}

static void transfer(uint64_t source, uint64_t destination, uint32_t count, uint32_t command)
{
    bar[0x80 / 4] = source, bar[0x84 / 4] = source >> 32;
    bar[0x88 / 4] = destination, bar[0x8c / 4] = destination >> 32;
    bar[0x90 / 4] = count;
    bar[0x98 / 4] = command;
    while (bar[0x98 / 4] & 1)
        ;
}

int main(int argc, char **argv)
{
    int file = open(argv[1], O_RDWR | O_SYNC);
    bar = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (bar == MAP_FAILED) {
        perror(argv[1]);
        return 1;
    }
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED | MAP_POPULATE, -1, 0);
    strcpy(page, "written by DMA");
    bar[1] = 0x12345678;
    printf("%08x %08x ", bar[0], bar[1]);
    transfer(physical(page), 0x40000, 64, 1);
    memset(page, 0, 64);
    transfer(0x40000, physical(page) + 32, 32, 3);
    printf("%s\n", page + 32);
    return 0;
}
