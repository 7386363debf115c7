"""What comes first, the intercept or the exception (APM2 15.7, table 15-7).

Each guest executes one instruction, at `it`, that is intercepted and also raises something.
"""

from __future__ import annotations

import pytest

from tests.engine.rig import CODE, TABLES, Mode
from tests.svm.covers import covers
from tests.svm.hypervisor import IOPM, MSRPM, NPF, VMMCALL, Hypervisor, P
from vmdbg.engine.state import RCX
from vmdbg.platform.msrs import HWCR

EXCEPTIONS = tuple(range(0x40, 0x60))
CR0_WRITE, SEL_CR0, CR3_WRITE, CR4_WRITE, CR8_WRITE = 0x10, 0x65, 0x13, 0x14, 0x18
IOIO = 0x7B
UD, DB, NM, GP, PF = 0x46, 0x41, 0x47, 0x4D, 0x4E
NOWHERE = 0x7FFF_F000
"""A linear address that nothing maps for the nested tables."""


def first(
    text: str, *intercepts: int, mode: Mode = "long", user: bool = False, np: bool = True, python: bool = False, **fields: int
) -> int:  # fmt: skip
    """Which exit the instruction at `it` makes when all of these and every exception are intercepted."""
    h = Hypervisor(text, mode, user=user, np=np, python=python)
    h.intercept(*EXCEPTIONS, *intercepts)
    h.ram.write(MSRPM, b"\xff" * 0x2000)
    h.ram.write(IOPM, b"\xff" * 0x3000)
    h.set(**fields)
    code = h.enter()
    assert h["rip"] == h.labels.get("it", CODE)
    assert h["exitintinfo"] == 0
    return code


PRIVILEGED = [
    ("movq %cr0, %rax", 0x00), ("movq %cr3, %rax", 0x03), ("movq %cr8, %rax", 0x08), ("movq %rax, %cr0", 0x10),
    ("movq %rax, %cr4", 0x14), ("movq %dr7, %rax", 0x27), ("movq %rax, %dr0", 0x30), ("lmsw %ax", 0x10), ("clts", 0x10),
    ("lidt (%rax)", 0x6A), ("lgdt (%rax)", 0x6B), ("lldt %ax", 0x6C), ("ltr %ax", 0x6D), ("invd", 0x76), ("hlt", 0x78),
    ("invlpg (%rax)", 0x79), ("invlpga", 0x7A), ("rdmsr", 0x7C), ("wrmsr", 0x7C), ("vmrun", 0x80), ("vmload", 0x82),
    ("vmsave", 0x83), ("stgi", 0x84), ("clgi", 0x85), ("skinit", 0x86), ("wbinvd", 0x89), ("inb $0x60, %al", 0x7B),
    ("outsb", 0x7B), ("insl", 0x7B),
]  # fmt: skip


@covers(*sorted({code for _, code in PRIVILEGED}))
@pytest.mark.parametrize(("text", "code"), PRIVILEGED, ids=[text for text, _ in PRIVILEGED])
def test_privilege_before_the_intercept(text: str, code: int, python: bool) -> None:
    assert first(text, code, user=True, python=python) == GP


@covers(0x66, 0x67, 0x68, 0x69, 0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0x77, 0x81)
@pytest.mark.parametrize(("text", "code"), [
    ("cpuid", 0x72), ("pushfq", 0x70), ("popfq", 0x71), ("iretq", 0x74), ("int $0x33", 0x75), ("rsm", 0x73), ("pause", 0x77),
    ("vmmcall", VMMCALL), (".byte 0xf1", 0x88), ("sgdt (%rsp)", 0x67), ("sidt (%rsp)", 0x66), ("sldt %ax", 0x68),
    ("str %ax", 0x69), ("smsw %ax", 0x00), ("rdtsc", 0x6E), ("rdtscp", 0x87), (".byte 0x0f, 0x01, 0xfd", 0x8E),
])  # fmt: skip
def test_not_privileged(text: str, code: int, python: bool) -> None:
    assert first(text, code, user=True, python=python) == code


@covers(0x10, 0x13, 0x14, 0x18, 0x36, 0x37, 0x65, 0x6F, 0x8A, 0x8B, 0x8C, 0xA0, 0xA1, 0xA2, 0xA3, 0xA4)
@pytest.mark.parametrize(("text", "intercept", "exception"), [
    # Values that the registers refuse.
    ("movl $0x80000010, %eax\nit: movq %rax, %cr0", CR0_WRITE, GP),  # PG without PE
    ("movl $0xa0000011, %eax\nit: movq %rax, %cr0", CR0_WRITE, GP),  # NW without CD
    ("movabsq $0x180000011, %rax\nit: movq %rax, %cr0", CR0_WRITE, GP),
    ("movl $0x11, %eax\nit: movq %rax, %cr0", CR0_WRITE, GP),  # paging off in 64-bit mode
    ("movl $0xa0010011, %eax\nit: movq %rax, %cr0", SEL_CR0, GP),
    ("movabsq $0x10000000000, %rax\nit: movq %rax, %cr3", CR3_WRITE, GP),
    ("movl $0x2620, %eax\nit: movq %rax, %cr4", CR4_WRITE, GP),
    ("movl $0x600, %eax\nit: movq %rax, %cr4", CR4_WRITE, GP),  # PAE off in long mode
    ("movl $0x10, %eax\nit: movq %rax, %cr8", CR8_WRITE, GP),
    ("movabsq $0x100000400, %rax\nit: movq %rax, %dr7", 0x37, GP),
    ("movabsq $0x100000400, %rax\nit: movq %rax, %dr6", 0x36, GP),
    ("movl $4, %ecx\nit: rdpmc", 0x6F, GP),
    *((f"movl $1, %ecx\nit: {text}", code, GP) for text, code in (("monitor", 0x8A), ("mwait", 0x8B), ("mwait", 0x8C))),
    # Registers that do not exist.
    (".byte 0x0f, 0x20, 0xc8", 0x01, UD), (".byte 0x0f, 0x22, 0xe8", 0x15, UD), (".byte 0x44, 0x0f, 0x20, 0xc8", 0x09, UD),
    (".byte 0x44, 0x0f, 0x21, 0xc0", 0x28, UD), (".byte 0x44, 0x0f, 0x23, 0xf8", 0x3F, UD),
    # Instructions that CPUID does not claim.
    (".byte 0x0f, 0x01, 0xfe", 0xA0, UD), (".byte 0x66, 0x0f, 0x38, 0x82, 0x00", 0xA2, UD),
    (".byte 0xf3, 0x0f, 0x01, 0xfa", 0xA3, UD), (".byte 0x0f, 0x01, 0xff", 0xA4, UD),
])  # fmt: skip
def test_exception_before_the_intercept(text: str, intercept: int, exception: int, python: bool) -> None:
    assert first(text, intercept, python=python) == exception


@covers(0x8D)
@pytest.mark.parametrize("user", [False, True])
def test_xsetbv(user: bool, python: bool) -> None:
    """Only CR4.OSXSAVE comes before the intercept: not the privilege, nor what is written."""
    for code in ("movl $3, %eax; xorl %ecx, %ecx\nit: xsetbv", "movl $7, %eax; movl $5, %ecx\nit: xsetbv"):
        assert first(code, 0x8D, user=user, python=python) == UD
        assert first(code, 0x8D, user=user, cr4=0x40620, python=python) == 0x8D
        if user or "$7" in code:
            assert first(code, user=user, cr4=0x40620, python=python) == GP


@covers(0x8A, 0x8B)
def test_monitor_of_a_user(python: bool) -> None:
    """It is undefined unless HWCR lets it be."""
    for text, code in (("monitor", 0x8A), ("mwait", 0x8B)):
        for allowed, ecx, found in ((0, 0, UD), (1, 0, code), (1, 1, GP)):
            h = Hypervisor(text, user=True, python=python)
            h.intercept(*EXCEPTIONS, code)
            h.cpu.msrs.values[HWCR] |= allowed << 10
            h.state.set_reg(RCX, ecx)
            assert h.enter() == found
            assert h["rip"] == CODE


@covers(0x24, 0x41)
def test_debug_registers(python: bool) -> None:
    """#UD of DR4 and DR5 under CR4.DE, then #DB of DR7.GD, which has written DR6 and DR7 when it exits; then the intercept."""
    assert first("movq %dr4, %rax", 0x24, cr4=0x628, python=python) == UD
    assert first("movq %dr4, %rax", 0x24, python=python) == 0x24
    h = Hypervisor("movq %dr3, %rax", python=python)
    h.intercept(0x23, DB)
    h.set(dr7=0x2400)
    assert h.enter() == DB
    assert (h["rip"], h["dr6"], h["dr7"]) == (CODE, 0xFFFF0FF0 | 1 << 13, 0x400)


@covers(0x6E, 0x87, 0x8E, 0x6F)
def test_time_stamps(python: bool) -> None:
    """CR4.TSD at CPL 3."""
    for text, code in (("rdtsc", 0x6E), ("rdtscp", 0x87), (".byte 0x0f, 0x01, 0xfd", 0x8E)):
        assert first(text, code, user=True, cr4=0x624, python=python) == GP
    for cr4, code in ((0x620, GP), (0x720, 0x6F)):
        assert first("rdpmc", 0x6F, user=True, cr4=cr4, python=python) == code


@pytest.mark.parametrize("text", ["sldt %ax", "str %ax", "lldt %ax", "ltr %ax"])
@pytest.mark.parametrize("mode", ["real", "virtual"])
def test_task_and_ldt_registers_outside_protected_mode(text: str, mode: Mode, python: bool) -> None:
    assert first(text, *range(0x66, 0x6E), mode=mode, python=python) == UD


@pytest.mark.parametrize("text", ["vmrun", "vmload", "vmsave", "stgi", "clgi", "skinit", "invlpga"])
@pytest.mark.parametrize("mode", ["real", "virtual"])
def test_svm_outside_protected_mode(text: str, mode: Mode, python: bool) -> None:
    assert first(text, 0x7A, *range(0x80, 0x87), mode=mode, python=python) == UD


@covers(*range(0x66, 0x6E), 0x10, 0x65, 0x00, 0x79, 0x8A)
@pytest.mark.parametrize(("text", "code"), [
    ("lgdt", 0x6B), ("lidt", 0x6A), ("sgdt", 0x67), ("sidt", 0x66), ("lldt", 0x6C), ("ltr", 0x6D), ("sldt", 0x68), ("str", 0x69),
    ("lmsw", CR0_WRITE), ("lmsw", SEL_CR0), ("smsw", 0x00), ("invlpg", 0x79), ("monitor", 0x8A),
])  # fmt: skip
def test_the_intercept_before_memory(text: str, code: int, python: bool) -> None:
    """The operand is where a page fault or a nested one would be."""
    at = f"movl ${NOWHERE}, %eax\nit: monitor" if text == "monitor" else f"{text} {NOWHERE:#x}"
    assert first(at, code, python=python) == code


@covers(0x70, 0x71, 0x74, 0x75, 0x88)
@pytest.mark.parametrize("text", ["pushfq", "popfq", "iretq", "int $0x80", ".byte 0xf1"])
def test_the_intercept_before_the_stack(text: str, python: bool) -> None:
    code = {"pushfq": 0x70, "popfq": 0x71, "iretq": 0x74, "int $0x80": 0x75, ".byte 0xf1": 0x88}[text]
    assert first(f"movl ${NOWHERE:#x}, %esp\nit: {text}", code, python=python) == code


@pytest.mark.parametrize(("text", "code"), [("pushf", 0x70), ("popf", 0x71), ("iret", 0x74), ("int $0x33", 0x75)])
def test_the_intercept_before_iopl(text: str, code: int, python: bool) -> None:
    """In virtual-8086 mode with IOPL below 3 these raise #GP, where they are not intercepted."""
    assert first(text, code, mode="virtual", python=python) == code
    assert first(text, mode="virtual", python=python) == GP


@covers(0x75)
def test_int_n_before_its_gate(python: bool) -> None:
    """The intercept of INT n sees it before the IDT is looked at, those of exceptions never."""
    for vector in (0, 3, 13, 14, 0xFF):
        text = f".byte 0xcd, {vector}"
        h = Hypervisor(text, python=python)
        h.intercept(*EXCEPTIONS, 0x75)
        h.set(idtr__limit=0)
        assert h.enter() == 0x75
        assert (h["exitinfo1"], h["rip"], h["nrip"]) == (vector, CODE, CODE + 2)


@covers(0x88)
def test_int1_is_no_debug_exception_to_intercepts(python: bool) -> None:
    """Only its own intercept sees it (15.12.2); it is an exception to EXITINTINFO (15.7.2)."""
    h = Hypervisor(".byte 0xf1", python=python)
    h.intercept(DB)
    assert h.enter() == 0x78
    assert h.guest_vector == 1
    h.change_nested(0x2000, drop=P)
    assert h.again(rip=CODE) == 0x400
    assert h["exitintinfo"] == 0x8000_0301


@covers(0x13)
def test_pdpes_after_the_intercept(python: bool) -> None:
    """A write of CR3 that is intercepted has not read PDPEs: the hypervisor cannot rely on them."""
    bad = f"orb $0x20, {TABLES + 0x1018}; movl %cr3, %eax\nit: movl %eax, %cr3\nend: vmmcall"
    assert first(bad, CR3_WRITE, mode="pae", np=False, python=python) == CR3_WRITE
    assert first(bad, mode="pae", np=False, python=python) == GP
    h = Hypervisor(bad, "pae", python=python)
    h.intercept(GP)
    assert h.enter() == VMMCALL, "under nested paging each walk reads them instead (15.25.10)"


def test_msrs(python: bool) -> None:
    """An MSR that does not exist: the permission map is asked first."""
    assert first("movl $0x1234, %ecx\nit: rdmsr", 0x7C, python=python) == 0x7C
    assert first("movl $0x1234, %ecx\nit: wrmsr", python=python) == GP


@pytest.mark.parametrize("text", ["insb", "rep insl", "outsw", "rep outsb"])
@pytest.mark.parametrize(("place", "fault"), [(0x300000, PF), (NOWHERE, NPF), (1 << 47, GP)], ids=["pf", "npf", "gp"])
def test_string_io_before_memory(text: str, place: int, fault: int, python: bool) -> None:
    """The port's permission, then the intercept, then the memory (15.10.2)."""
    pointer = "%rdi" if "ins" in text else "%rsi"
    absent = f"movq $0, {0x50000 + 0x300 * 8}"
    code = f"movl $3, %ecx; movl $0x1234, %edx; movabsq ${place}, {pointer}\nit: {text}"
    assert first(f"{absent}; {code}", IOIO, python=python) == IOIO
    assert first(f"{absent}; {code}", python=python) == fault
    assert first(f"{absent}; {code}", IOIO, user=True, python=python) == GP


def test_fpu(python: bool) -> None:
    """#NM of CR0.TS comes before #MF; there is no intercept of the instruction itself."""
    assert first("fld1", cr0=0x80000019, python=python) == NM
