/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Debug registers as Linux gives them to a debugger: a child is stopped at a function, and behind stores and loads. */
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ROUNDS = 5 };
static volatile long variable, other;
static volatile char untouched[8192];

static __attribute__((noinline)) void target(void)
{
    variable += 3;
}

static void set(pid_t child, int number, unsigned long value)
{
    if (ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg) + number * sizeof(long), value)) {
        perror("PTRACE_POKEUSER");
        exit(1);
    }
}

static unsigned long dr6(pid_t child)
{
    unsigned long value = ptrace(PTRACE_PEEKUSER, child, offsetof(struct user, u_debugreg) + 6 * sizeof(long), 0);
    set(child, 6, 0);
    return value;
}

int main(void)
{
    int status, count[3] = {0};
    volatile char *page = untouched + 4096;
    pid_t child = fork();
    if (!child) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        for (int i = 0; i < ROUNDS; i++) {
            target();
            other = i;
            page[i] = 1;        /* the first one brings the page in, anew since the fork */
        }
        _exit(variable == 3 * ROUNDS ? 42 : 1);
    }
    waitpid(child, &status, 0);
    set(child, 0, (unsigned long)target);
    set(child, 1, (unsigned long)&variable);
    set(child, 2, (unsigned long)(page + 3));
    set(child, 7, 0x15 | 0x9ul << 20 | 0x1ul << 24);    /* instruction; stores of 8 bytes; stores of 1 byte */
    for (;;) {
        ptrace(PTRACE_CONT, child, 0, 0);
        waitpid(child, &status, 0);
        if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP)
            break;
        unsigned long hit = dr6(child);
        for (int n = 0; n < 3; n++)
            count[n] += hit >> n & 1;
    }
    printf("%d %d %d %d\n", count[0], count[1], count[2], WIFEXITED(status) ? WEXITSTATUS(status) : -1);
    return 0;
}
