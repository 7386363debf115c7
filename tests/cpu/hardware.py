"""The processor that the tests run on, as an oracle: it executes one SSE instruction and says what became of MXCSR."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

AVAILABLE = shutil.which("gcc") is not None

SOURCE = r"""
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

static sigjmp_buf back;
static volatile uint32_t seen;

static void handler(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info;
    seen = ((ucontext_t *)context)->uc_mcontext.fpregs->mxcsr;
    siglongjmp(back, 1);
}

/* Execute `code` with XMM0, XMM1 and MM1 (the low half of XMM1) loaded, RBX too; MXCSR afterwards, | 1 << 31 if it raised #XF. */
uint32_t execute(const uint8_t *code, uint32_t size, const void *first, const void *second, uint64_t rbx, uint32_t mxcsr)
{
    static uint8_t *page;
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_NODEFER}, old;
    volatile uint32_t trapped = 0;
    uint32_t plain = 0x1f80, after = 0;
    if (!page)
        page = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(page, code, size);
    page[size] = 0xc3;
    sigaction(SIGFPE, &action, &old);
    if (!sigsetjmp(back, 1)) {
        __asm__ volatile("movups (%1), %%xmm0; movups (%2), %%xmm1; movq (%2), %%mm1; ldmxcsr %4; call *%3; stmxcsr %0; emms"
                         : "=m"(after) : "r"(first), "r"(second), "r"(page), "m"(mxcsr), "b"(rbx)
                         : "rax", "xmm0", "xmm1", "mm0", "mm1", "memory", "cc");
        seen = after;
    } else {
        trapped = 1u << 31;
        __asm__ volatile("emms");
    }
    __asm__ volatile("ldmxcsr %0" :: "m"(plain));
    sigaction(SIGFPE, &old, 0);
    return seen | trapped;
}
"""


@cache
def _execute() -> ctypes._NamedFuncPointer:
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "oracle.c"), Path(folder, "oracle.so")
        source.write_text(SOURCE)
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-mno-red-zone", "-o", built, source], check=True)
        function = ctypes.CDLL(str(built)).execute
    function.restype = ctypes.c_uint32
    function.argtypes = [
        ctypes.c_char_p, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint32,
    ]  # fmt: skip
    return function


def execute(code: bytes, first: int, second: int, mxcsr: int) -> tuple[int, bool]:
    """MXCSR behind an instruction with XMM0 and XMM1 (or MM1, or RBX) for operands, and whether it raised #XF."""
    operands = (value.to_bytes(16, "little") for value in (first, second))
    found: int = _execute()(code, len(code), *operands, second & 0xFFFFFFFFFFFFFFFF, mxcsr)
    return found & 0xFFFF, bool(found >> 31)
