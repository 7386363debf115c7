/* SPDX-License-Identifier: GPL-2.0-or-later */
/* SIMD exceptions and alignment checks as Linux gives them to a program: signal, code and MXCSR of each. */
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sched.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

static sigjmp_buf back;
static volatile int code, number;
static volatile uint32_t flags;

/* The kernel leaves RFLAGS.AC set for handlers. */
__asm__("handler: pushfq; andl $~0x40000, (%rsp); popfq; jmp handle");
void handler(int, siginfo_t *, void *);

void handle(int signal_number, siginfo_t *info, void *context)
{
    number = signal_number;
    code = info->si_code;
    flags = ((ucontext_t *)context)->uc_mcontext.fpregs->mxcsr;
    siglongjmp(back, 1);
}

static void load(uint32_t mxcsr)
{
    __asm__ volatile("ldmxcsr %0" :: "m"(mxcsr));
}

static void divide(uint32_t mxcsr, float a, float b)
{
    volatile float quotient = 0;
    if (!sigsetjmp(back, 1)) {
        load(mxcsr);
        sched_yield();      /* MXCSR is the process's own */
        __asm__ volatile("divss %1, %0" : "+x"(a) : "x"(b));
        quotient = a;
        __asm__ volatile("stmxcsr %0" : "=m"(flags));
        flags &= ~63u;      /* what is masked may leave no trace */
        number = 0;
    }
    load(0x1f80);
    printf("%d %d %04x %g\n", number, number ? code : 0, flags, (double)quotient);
}

static void store(int offset)
{
    static long words[2];
    number = 0;
    if (!sigsetjmp(back, 1))
        __asm__ volatile("pushfq; orl $0x40000, (%%rsp); popfq; movl $1, (%0); pushfq; andl $~0x40000, (%%rsp); popfq"
                         :: "r"((char *)words + offset) : "memory", "cc");
    printf("%d %d\n", number, number ? code : 0);
}

int main(void)
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGFPE, &action, 0);
    sigaction(SIGBUS, &action, 0);
    setvbuf(stdout, 0, _IONBF, 0);
    pid_t child = fork();
    for (int round = 0; round < 20; round++)
        if (!child)
            sched_yield();      /* somebody to switch with, with all masked */
    if (!child)
        _exit(0);
    divide(0x1f80, 1, 0);
    divide(0x1d80, 1, 0);       /* zero divide */
    divide(0x1f00, 0, 0);       /* invalid */
    divide(0x1b80, 3e38f, .1f); /* overflow */
    divide(0x1780, 1e-38f, 9);  /* underflow */
    divide(0x0f80, 1, 3);       /* precision */
    divide(0x0f80, 1, 4);
    divide(0x0000, 1, 4);
    store(0);
    store(2);
    store(4);
    waitpid(child, 0, 0);
    return 0;
}
