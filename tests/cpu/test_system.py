"""System instructions: registers with rules, descriptor tables, time, identity, system calls."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.engine.rig import CODE, DATA, DATA32, GDT, STACK, USER_STACK, Mode, Rig
from vmdbg.cpu import transfers
from vmdbg.cpu.core import Cpu
from vmdbg.engine.state import CS, RAX, RBX, RCX, RDX, RSP, SS
from vmdbg.svm.switch import on_exit

UD, GP, DB, NM = 6, 13, 1, 7
MASK64 = (1 << 64) - 1
PE, MP, EM, TS, ET, WP, NW, CD, PG = 1, 2, 4, 8, 16, 1 << 16, 1 << 29, 1 << 30, 1 << 31


def write(register: str, value: int, mode: Mode = "long", *, python: bool, user: bool = False) -> Rig:
    rig = Rig(f"mov %{'r' if mode == 'long' else 'e'}ax, %{register}; nop", mode, python=python, user=user)
    rig.state.set_reg(RAX, value)
    rig.step()
    return rig


def refused(rig: Rig, vector: int = GP) -> bool:
    return rig.handled == vector and rig.stack(1, 8) == [0 if vector == GP else CODE]


@pytest.mark.parametrize(("register", "value"), [
    ("cr0", PE | PG | NW), ("cr0", PG), ("cr0", PE | PG | 1 << 32), ("cr0", PE), ("cr4", 0x600),
    ("cr4", 0x620 | 1 << 11),
    ("cr4", 0x620 | 1 << 32), ("cr4", 0x620 | 1 << 17), ("cr4", 0x620 | 1 << 12), ("cr3", 1 << 40), ("cr3", 1 << 63),
    ("cr8", 16),
    ("dr6", 1 << 32), ("dr7", 1 << 32),
])  # fmt: skip
def test_general_protection(register: str, value: int, python: bool) -> None:
    """CR0: NW without CD, PG without PE, high half, leaving 64-bit code; CR4: PAE in long mode, unknown bits."""
    assert refused(write(register, value, python=python))


@pytest.mark.parametrize("register", ["cr1", "cr5", "cr7", "cr9", "cr15", "dr4", "dr5", "dr8"])
def test_undefined_registers(register: str, python: bool) -> None:
    kind, number = (0x22, int(register[2:])) if register[0] == "c" else (0x23, int(register[2:]))
    rex = b"\x44" if number > 7 else b""
    for opcode in (kind, kind - 2):
        rig = Rig(rex + bytes([0x0F, opcode, 0xC0 | (number & 7) << 3]), python=python)
        rig.state.set_cr(4, rig.state.cr(4) | 8)  # DE: DR4 and DR5 are undefined
        rig.step()
        assert rig.handled == UD
        assert rig.stack(1, 8) == [CODE]


def test_dr4_and_dr5_are_dr6_and_dr7(python: bool) -> None:
    rig = Rig("movl $0x455, %eax; .byte 0x0f, 0x23, 0xe8; .byte 0x0f, 0x21, 0xe3; movq %dr7, %rcx; nop", python=python)
    rig.step(4)
    assert (rig.cpu.dr[7], rig.reg(RBX), rig.reg(RCX)) == (0x455, 0xFFFF0FF0, 0x455)


RDPRU = ".byte 0x0f, 0x01, 0xfd"


@pytest.mark.parametrize("mode", ["real", "virtual", "protected32", "compatibility", "long"])
def test_rdpru(mode: Mode, python: bool) -> None:
    """MPERF and APERF, each as WRMSR has left it and guest time later; other registers are zero (APM3 RDPRU)."""
    for number, start in ((0, 1 << 40), (1, 0x77), (2, None), (0xFFFF_FFFF, None)):
        rig = Rig(f"nop; {RDPRU}; nop", mode, python=python)
        if start is not None:
            rig.cpu.msrs.write(0xE7 + number, start, rig.cpu)
        for register, value in ((RCX, number), (RAX, MASK64), (RDX, MASK64)):
            rig.state.set_reg(register, value)
        rig.step(3)
        assert rig.rip == CODE + 5
        assert rig.reg(RDX) << 32 | rig.reg(RAX) == (0 if start is None else start + 1)


def test_rdpru_may_be_refused(python: bool) -> None:
    for tsd, user, vector in ((4, True, GP), (0, True, None), (4, False, None)):
        rig = Rig(f"{RDPRU}; nop", user=user, python=python)
        rig.state.set_cr(4, rig.state.cr(4) | tsd)
        rig.step()
        assert rig.handled == vector
    rig = Rig(f".byte 0xf0; {RDPRU}", python=python)
    rig.step()
    assert rig.handled == UD, "with LOCK there is no such instruction"


def test_values_read_back(python: bool) -> None:
    rig = Rig(
        """
        movl $0x80050033, %eax; movq %rax, %cr0; movq %cr0, %rbx
        movl $0x6b0, %eax; movq %rax, %cr4; movq %cr4, %rcx
        movl $9, %eax; movq %rax, %cr8; movq %cr8, %rdx
        movabsq $0x1122334455667788, %rax; movq %rax, %cr2; movq %cr2, %rsi
        movq %rax, %dr3; movq %dr3, %rdi; movl $-1, %eax; movq %rax, %dr6; movq %dr6, %r8; xorl $0x2000, %eax
        movq %rax, %dr7; movq %dr7, %r9; hlt
        """,
        python=python,
    )
    rig.cpu.dr[7] = 0x400
    rig.run()
    assert rig.reg(RBX) == 0x80010033 | 0x40000  # AM and the rest of the defined bits
    assert (rig.reg(RCX), rig.reg(RDX)) == (0x6B0, 9)
    assert (rig.reg(6), rig.reg(7)) == (0x1122334455667788, 0x1122334455667788)
    assert (rig.reg(8), rig.reg(9)) == (0xFFFFEFFF, 0xFFFF07FF)


def test_privileged_instructions(python: bool) -> None:
    for text in ("movq %cr0, %rax", "movq %rax, %cr3", "movq %dr7, %rax", "clts", "lmsw %ax", "hlt", "rdmsr", "wrmsr",
        "invlpg (%rax)",
                 "wbinvd", "invd", "lgdt (%rax)", "lidt (%rax)", "lldt %ax", "ltr %ax", "swapgs", "cli", "sti",
                 "inb $0x60, %al",
                 "sysretq"):  # fmt: skip
        rig = Rig(text, python=python, user=True)
        rig.state.efer |= 1
        rig.step()
        assert refused(rig), text


def test_unprivileged_instructions(python: bool) -> None:
    for text in ("smsw %ax", "sgdt (%rsp)", "sidt (%rsp)", "sldt %ax", "str %ax", "cpuid", "rdtsc", "pushfq", "pause"):
        rig = Rig(f"{text}\nend: nop", python=python, user=True)
        rig.step()
        assert rig.rip == rig.labels["end"], text


@pytest.mark.parametrize(("flag", "text"), [(1 << 2, "rdtsc"), (1 << 2, "rdtscp")])
def test_tsd(flag: int, text: str, python: bool) -> None:
    rig = Rig(text, python=python, user=True)
    rig.state.set_cr(4, rig.state.cr(4) | flag)
    rig.state.refresh()
    rig.step()
    assert refused(rig)


def test_rdpmc_needs_pce(python: bool) -> None:
    rig = Rig("rdpmc", python=python, user=True)
    rig.step()
    assert refused(rig)
    rig = Rig("rdpmc; nop", python=python, user=True)
    rig.state.set_cr(4, rig.state.cr(4) | 1 << 8)
    rig.state.refresh()
    rig.step()
    assert rig.rip == CODE + 2


def test_lmsw_and_smsw(python: bool) -> None:
    """LMSW reaches PE, MP, EM, TS and cannot clear PE."""
    rig = Rig("movl $0xfffe, %eax; lmsw %ax; smswl %ebx; clts; smsww 0x7000; hlt", "protected32", python=python)
    rig.run()
    assert rig.reg(RBX) == ET | PE | MP | EM | TS
    assert rig.ram.read(0x7000, 4) == b"\x17\0\0\0"
    rig = Rig("movw $1, %ax; lmsw %ax; hlt", "real", python=python)
    rig.run()
    assert rig.state.cr(0) & PE


def test_entering_and_leaving_protected_mode(python: bool) -> None:
    rig = Rig(
        """
        cli; lgdtl table; movl %cr0, %eax; orl $1, %eax; movl %eax, %cr0; ljmpl $0x18, $1f
        .code32; 1: movw $0x10, %ax; movw %ax, %ds; movw %ax, %ss; movl $0x100000, %ebx; movl $0x12345678, (%ebx)
        ljmp $0x20, $2f
        .code16; 2: movl %cr0, %eax; andl $~1, %eax; movl %eax, %cr0; ljmp $0, $3f
        3: movw $0x55aa, %cx; hlt
        table: .word 0xaf; .long 0x1000""",
        "real",
        python=python,
    )
    rig.run()
    assert rig.ram.read_u32(0x100000) == 0x12345678
    assert rig.reg(RCX) & 0xFFFF == 0x55AA
    assert rig.cpu.bits == 16
    assert not rig.state.cr(0) & PE


def test_entering_and_leaving_long_mode(python: bool) -> None:
    rig = Rig(
        """
        movl $0x41000, %eax; movl %eax, %cr3; movl %cr4, %eax; orl $0x20, %eax; movl %eax, %cr4
        movl $0xc0000080, %ecx; rdmsr; orl $0x100, %eax; wrmsr
        movl $0x40000, %eax; movl %eax, %cr3
        movl %cr0, %eax; orl $0x80000000, %eax; movl %eax, %cr0
        rdmsr; movl %eax, %esi; ljmp $0x8, $1f
        .code64; 1: movabsq $0x1122334455667788, %rbx; movq %rbx, 0x100000; ljmp *2f(%rip)
        2: .long 3f; .word 0x18
        .code32; 3: movl %cr0, %eax; andl $0x7fffffff, %eax; movl %eax, %cr0; rdmsr; movl %eax, %edi; hlt""",
        "protected32",
        python=python,
    )
    tables = Rig("nop", "long").ram.read(0x40000, 0x20000)
    rig.ram.write(0x40000, tables)
    rig.run()
    assert rig.ram.read_u64(0x100000) == 0x1122334455667788
    assert (rig.reg(6) & 0xD00, rig.reg(7) & 0xD00) == (0x500, 0x100)  # LMA comes and goes with PG
    assert not rig.state.is_long


def test_paging_in_long_mode_needs_pae(python: bool) -> None:
    rig = Rig("movl %cr0, %eax; orl $0x80000000, %eax; movl %eax, %cr0", "protected32", python=python)
    rig.state.efer |= 0x100
    rig.run()
    assert rig.handled == GP


@pytest.mark.parametrize(
    ("entry", "fine"),
    [(0x42001, True), (0x42000 | 0x1E6, True), (0x42003, False), (0x42021, False), (1 << 52 | 0x42001, False)],
)
def test_pae_pointers_are_checked_when_loaded(entry: int, fine: bool, python: bool) -> None:
    rig = Rig("movl %eax, %cr3; hlt", "pae", python=python)
    rig.state.set_reg(RAX, 0x41000)
    rig.ram.write_u64(0x41000 + 8 * 3, entry)
    rig.run()
    assert (rig.handled is None) == fine
    assert fine or rig.handled == GP


def test_x87_and_sse_not_available(python: bool) -> None:
    for text in ("fninit", "movaps %xmm0, %xmm1"):
        rig = Rig(text, python=python)
        rig.state.set_cr(0, rig.state.cr(0) | TS)
        rig.state.refresh()
        rig.step()
        assert rig.handled == NM, text


def test_sse_needs_osfxsr(python: bool) -> None:
    rig = Rig("movaps %xmm0, %xmm1", python=python)
    rig.state.set_cr(4, 0x20)
    rig.state.refresh()
    rig.step()
    assert rig.handled == UD


# MSRs


@pytest.mark.parametrize(("number", "value"), [
    (0xC0000080, 1 << 1), (0xC0000080, 0xC00), (0x12345, 0), (0xC0000082, 1 << 47), (0x277, 2), (0xC0010117, 0x123),
    (0x1B, 1 << 45),
    (0xC0000100, 1 << 63),
])  # fmt: skip
def test_refused_msrs(number: int, value: int, python: bool) -> None:
    rig = Rig("wrmsr", python=python)
    for register, part in ((RCX, number), (RAX, value & 0xFFFFFFFF), (RDX, value >> 32)):
        rig.state.set_reg(register, part)
    rig.step()
    assert refused(rig)


@pytest.mark.parametrize(("number", "value"), [
    (0xC0000081, 0x0023001000000000), (0xC0000082, 0xFFFF800000001000), (0xC0000084, 0x47700),
    (0xC0000100, 0x7FFF12340000),
    (0xC0000101, 0x1234), (0xC0000102, 0xFFFFFFFF80000000), (0x174, 8), (0x176, 0xC0001000), (0xC0010117, 0x91000),
    (0xC0000103, 5),
])  # fmt: skip
def test_msrs_read_back(number: int, value: int, python: bool) -> None:
    rig = Rig("wrmsr; xorl %eax, %eax; xorl %edx, %edx; rdmsr; hlt", python=python)
    for register, part in ((RCX, number), (RAX, value & 0xFFFFFFFF), (RDX, value >> 32)):
        rig.state.set_reg(register, part)
    rig.run()
    assert rig.reg(RDX) << 32 | rig.reg(RAX) == value


def test_efer_takes_effect_at_once(python: bool) -> None:
    """NXE off: bit 63 of an entry is reserved from then on."""
    rig = Rig("movl $0xc0000080, %ecx; rdmsr; andl $~0x800, %eax; wrmsr; movl 0x300000, %eax", python=python)
    rig.change(0x300000, add=1 << 63)
    rig.run()
    assert (rig.handled, rig.stack(1, 8)) == (14, [9])


def test_fs_and_gs_bases(python: bool) -> None:
    rig = Rig(
        f"""
        movl $0xc0000100, %ecx; movl ${DATA}, %eax; xorl %edx, %edx; wrmsr; movl $0x77, %fs:8
        movl $0xc0000102, %ecx; movl ${DATA + 0x100}, %eax; wrmsr; swapgs; movl $0x88, %gs:8; hlt""",
        python=python,
    )
    rig.run()
    assert (rig.ram.read_u32(DATA + 8), rig.ram.read_u32(DATA + 0x108)) == (0x77, 0x88)


# Time and identity


def test_tsc_is_the_clock(python: bool) -> None:
    rig = Rig("rdtsc; movl %eax, %esi; nop; nop; rdtscp; movl %eax, %edi; hlt", python=python)
    rig.run()
    assert (rig.reg(6), rig.reg(7)) == (0, 2 + 2 + 2)


def test_tsc_grows_in_a_loop(python: bool) -> None:
    rig = Rig(f"movl ${DATA}, %edi; movl $100, %ecx; 1: rdtsc; stosl; loop 1b; hlt", python=python)
    rig.run()
    values = [rig.ram.read_u32(DATA + 4 * n) for n in range(100)]
    assert [b - a for a, b in pairwise(values)] == [5] * 99


def test_tsc_can_be_written(python: bool) -> None:
    rig = Rig("movl $0x10, %ecx; movl $1000, %eax; xorl %edx, %edx; wrmsr; rdtsc; hlt", python=python)
    rig.run()
    # At the WRMSR the counter is 1000; the instruction itself takes two ticks.
    assert rig.reg(RAX) == 1002


def test_rdtscp_gives_tsc_aux(python: bool) -> None:
    rig = Rig("rdtscp; hlt", python=python)
    rig.state.set_field("tsc_aux", 0x1234)
    rig.run()
    assert rig.reg(RCX) == 0x1234


def test_cpuid(python: bool) -> None:
    rig = Rig(
        f"""
        xorl %eax, %eax; cpuid; movl ${DATA}, %edi; movl %ebx, (%rdi); movl %edx, 4(%rdi); movl %ecx, 8(%rdi)
        movl $0x80000001, %eax; cpuid; movl %ecx, %esi; movl $0x80000008, %eax; cpuid; hlt""",
        python=python,
    )
    rig.run()
    assert rig.ram.read(DATA, 12) == b"AuthenticAMD"
    assert rig.reg(6) & 4  # SVM
    assert rig.reg(RAX) & 0xFF == 40


def test_upper_halves_are_cleared(python: bool) -> None:
    rig = Rig("cpuid; movq %rax, %rsi; rdtsc; hlt", python=python)
    for register in (RAX, RBX, RCX, RDX):
        rig.state.set_reg(register, 0xFFFFFFFF00000000)
    rig.run()
    assert all(rig.reg(register) >> 32 == 0 for register in (RAX, RBX, RCX, RDX, 6))


# System calls


def syscall_rig(text: str, mode: Mode, python: bool, flags: int = 2) -> Rig:
    rig = Rig(text, mode, python=python, user=True)
    s = rig.state
    s.efer |= 1
    s.set_field("star", 0x0023_0008_0000_9000)
    s.set_field("lstar", 0x300000)
    s.set_field("cstar", 0x301000)
    s.set_field("sfmask", 0x200)
    s.rflags = flags
    return rig


@pytest.mark.parametrize(("mode", "target"), [("long", 0x300000), ("compatibility", 0x301000)])
def test_syscall(mode: Mode, target: int, python: bool) -> None:
    rig = syscall_rig("syscall", mode, python, 0x202)
    rig.step()
    s = rig.state
    assert (rig.rip, rig.reg(RCX), rig.reg(11)) == (target, CODE + 2, 0x202)
    assert (s.selector(CS), s.selector(SS), s.cpl, s.is_code64) == (8, 16, 0, True)
    assert s.rflags == 2
    assert rig.reg(RSP) == USER_STACK
    assert rig.now == 2


def test_legacy_syscall(python: bool) -> None:
    rig = syscall_rig("syscall", "protected32", python, 0x202)
    rig.step()
    assert (rig.rip, rig.reg(RCX), rig.state.cpl, rig.state.rflags) == (0x9000, CODE + 2, 0, 2)


@pytest.mark.parametrize("text", ["syscall", "sysretq"])
def test_system_calls_need_sce(text: str, python: bool) -> None:
    rig = Rig(text, python=python)
    rig.step()
    assert refused(rig, UD)
    assert rig.stack(1, 8) == [CODE]


def test_sysret(python: bool) -> None:
    rig = syscall_rig("syscall; movl $5, %ebx; hlt", "long", python, 0x202)
    rig.ram.write(0x300000, b"\x48\x0f\x07")
    rig.step(3)
    assert (rig.reg(RBX), rig.state.cpl, rig.state.selector(CS), rig.state.selector(SS), rig.state.rflags) == (
        5,
        3,
        0x33,
        0x2B,
        0x202,
    )


@pytest.mark.parametrize("flags", [0x202, 0xED7, 0x302], ids=["plain", "every arithmetic flag", "TF"])
def test_system_calls_at_full_speed(flags: int) -> None:
    """The native runtime makes common ones by itself: wherever it is cut, all is as the other has it."""
    rigs = []
    for python in (False, True):
        rig = syscall_rig("1: incl %ebx; syscall; addq %r11, %rsi; addq %rcx, %rsi; jmp 1b", "long", python, flags)
        rig.state.set_field("sfmask", 0x347D5)
        rig.ram.write(0x300000, bytes.fromhex("9c 5d 4801ef ffc5 480f07"))  # pushfq; pop rbp; add rdi, rbp; inc ebp; sysretq
        rigs.append(rig)
    for cut in (1, 3, 5, 2, 40, 7, 1, 1, 300, 11):
        states = []
        for rig in rigs:
            rig.machine.run(cut)
            s = rig.state
            segments = [(s.selector(n), s.base(n), s.limit(n), s.attrib(n)) for n in range(8)]
            states.append((rig.now, s.rip, s.rflags, s.hflags, [s.reg(n) for n in range(16)], segments))
        assert states[0] == states[1]


@pytest.mark.skipif(not on_exit(), reason="the native world switch is not built (it needs a C compiler)")
@pytest.mark.parametrize("watched", [False, True])
def test_system_calls_come_to_python_where_somebody_looks(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breakpoints of the debug registers follow page tables at system calls."""
    seen = 0
    original = transfers.syscall

    def syscall(cpu: Cpu) -> None:
        nonlocal seen
        seen += 1
        original(cpu)

    monkeypatch.setattr(transfers, "syscall", syscall)
    rig = syscall_rig("1: syscall; jmp 1b", "long", False, 0x202)
    rig.ram.write(0x300000, b"\x48\x0f\x07")
    if watched:
        rig.cpu.dr[0], rig.cpu.dr[7] = DATA, 0x10401
        rig.cpu.debug.update()
    rig.machine.run(700)
    assert seen == (100 if watched else 0)


def test_sysenter(python: bool) -> None:
    rig = Rig("sysenter", "protected32", python=python, user=True)
    for field, value in (("sysenter_cs", 0x18), ("sysenter_esp", STACK), ("sysenter_eip", 0x9000)):
        rig.state.set_field(field, value)
    rig.step()
    assert (rig.rip, rig.reg(RSP), rig.state.cpl, rig.state.selector(CS), rig.state.selector(SS)) == (
        0x9000,
        STACK,
        0,
        0x18,
        0x20,
    )
    rig = Rig("sysenter", "protected32", python=python, user=True)
    rig.step()
    assert rig.handled == GP
    rig = Rig("sysenter", "long", python=python)
    rig.step()
    assert refused(rig, UD)  # AMD processors have it in legacy mode only


# Descriptor tables


def test_descriptor_tables_round_trip(python: bool) -> None:
    rig = Rig(
        f"""
        movl ${DATA}, %ebx; movw $0x123, (%rbx); movabsq $0xffff800012345678, %rax; movq %rax, 2(%rbx)
        lidt (%rbx); sidt 16(%rbx); sgdt 32(%rbx); hlt""",
        python=python,
    )
    rig.run()
    assert rig.ram.read(DATA + 16, 10) == rig.ram.read(DATA, 10)
    assert rig.ram.read(DATA + 32, 10) == b"\xaf\x00" + GDT.to_bytes(8, "little")


def test_segment_load_reads_the_table(python: bool) -> None:
    rig = Rig(
        "movw $0x10, %ax; movw %ax, %es; movw $0xa0, %ax; movw %ax, %fs; movw $0x98, %ax; movw %ax, %gs",
        "protected32",
        python=python,
    )
    rig.run()
    assert rig.handled == 11  # the descriptor at 98 is not present
    assert rig.stack(1, 4) == [0x98]
    assert rig.state.selector(0) == DATA32
