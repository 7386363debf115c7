"""Alignment checking (APM2 8.2.18): who asks for it, what it sees, and what comes before it.

What an operand must be aligned to was measured on a processor of AMD's (family 19h), instruction by instruction.
"""

from __future__ import annotations

import pytest

from tests.engine.assembler import assemble
from tests.engine.rig import CODE, DATA, GDT, HANDLERS, USER_CODE32, USER_CODE64, USER_DATA, USER_STACK, Mode, Rig, bits_of
from vmdbg.cpu import attention
from vmdbg.cpu.core import Cpu
from vmdbg.engine.physical import WATCH_READ
from vmdbg.engine.state import GDTR, RAX, RBP, RCX, RDI, RSI, RSP
from vmdbg.machine import Event

UD, SS, GP, PF, AC = 6, 12, 13, 14, 17
AM, FLAG = 1 << 18, 1 << 18
OFFSETS = (0, 1, 2, 4, 8)

SEE = {
    1: "movb %al, M; movzbl M, %eax; sete M; crc32b M, %eax; lea M, %rax; nopl M; prefetcht0 M; prefetchw M; clflush M; movsb; "
       "stosb; pinsrb $1, M, %xmm0; pextrb $1, %xmm0, M",
    2: "movw %ax, M; addw $1, M; lock incw M; xchgw %ax, M; btsw %ax, M; movzwl M, %eax; movswq M, %rax; crc32w M, %eax; movw %es, M; "
       "movw M, %es; verr M; lar M, %eax; str M; smsw M; lgsw M, %ax; movsw; rep stosw; pushw M; pmovsxbq M, %xmm0; "
       "pinsrw $1, M, %xmm0; pextrw $1, %xmm0, M; filds M; fists M; fiadds M; fnstcw M; fnstsw M; data16 fldenv M; data16 fnstenv M; "
       "data16 fnsave M; data16 frstor M",
    4: "movl M, %eax; movl %eax, M; negl M; mull M; shldl $1, %eax, M; btl $1, M; bsf M, %eax; movslq M, %rax; movbe M, %eax; "
       "crc32l M, %eax; movnti %eax, M; lgsl M, %eax; rex.W lgsl M, %eax; movsl; rep movsl; repe cmpsl; scasl; lodsl; "
       "movss M, %xmm0; movd M, %xmm0; movss %xmm0, M; movntss %xmm0, M; addss M, %xmm0; ucomiss M, %xmm0; comiss M, %xmm0; "
       "sqrtss M, %xmm0; cmpltss M, %xmm0; cvtss2sd M, %xmm0; cvttss2si M, %rax; cvtsi2ssl M, %xmm0; roundss $1, M, %xmm0; "
       "insertps $1, M, %xmm0; extractps $1, %xmm0, M; pmovsxbd M, %xmm0; pmovzxwq M, %xmm0; movd M, %mm0; punpcklbw M, %mm0; "
       "flds M; fsts M; fildl M; fistpl M; fadds M; fnstenv M; fldenv M; fnsave M; frstor M; stmxcsr M",
    8: "movq M, %rax; xaddq %rax, M; btsq %rax, M; popcnt M, %rax; movbe %rax, M; crc32q M, %rax; movnti %rax, M; cmpxchg8b M; movsq; "
       "stosq; cmpsq; pushq M; popq M; movq M, %xmm0; movsd M, %xmm0; movlps M, %xmm0; movhpd M, %xmm0; movhps %xmm0, M; "
       "movddup M, %xmm0; movntsd %xmm0, M; addsd M, %xmm0; comisd M, %xmm0; ucomisd M, %xmm0; cmpltsd M, %xmm0; cvtps2pd M, %xmm0; "
       "cvtdq2pd M, %xmm0; cvtpi2ps M, %xmm0; cvtsd2si M, %eax; cvtsi2sdq M, %xmm0; cvtps2pi M, %mm0; roundsd $1, M, %xmm0; "
       "pinsrq $1, M, %xmm0; pmovsxbw M, %xmm0; pmovzxdq M, %xmm0; maskmovdqu %xmm0, %xmm1; maskmovq %mm0, %mm1; movq M, %mm0; "
       "movntq %mm0, M; paddb M, %mm0; punpckhbw M, %mm0; pshufb M, %mm0; fldl M; fstl M; fildll M; fistpll M; fisttpll M; fmull M; "
       "fldt M; fstpt M; fbld M; fbstp M",
    16: "movups M, %xmm0; movups %xmm0, M; movupd M, %xmm0; movdqu M, %xmm0; movdqu %xmm0, M; lddqu M, %xmm0; "
        "pcmpistri $1, M, %xmm0; pcmpestrm $1, M, %xmm0",
}  # fmt: skip
"""By alignment; M is (%rdi), and RSI the same."""
DEMAND = (
    "movaps M, %xmm0; movapd %xmm0, M; movdqa M, %xmm0; movntps %xmm0, M; movntdq %xmm0, M; movntdqa M, %xmm0; addps M, %xmm0; "
    "sqrtpd M, %xmm0; cmpltps M, %xmm0; cvtpd2ps M, %xmm0; cvtdq2ps M, %xmm0; cvttpd2pi M, %mm0; haddps M, %xmm0; andps M, %xmm0; "
    "unpcklps M, %xmm0; shufps $1, M, %xmm0; movshdup M, %xmm0; paddb M, %xmm0; psllw M, %xmm0; punpcklbw M, %xmm0; "
    "pshufd $1, M, %xmm0; pshufb M, %xmm0; palignr $1, M, %xmm0; pmulld M, %xmm0; ptest M, %xmm0; dpps $1, M, %xmm0; aesenc M, %xmm0; "
    "pclmulqdq $1, M, %xmm0; cmpxchg16b M; xsave M"
)
"""#GP whatever is checked; of XSAVE it is 64 bytes."""


def rig(text: str, mode: Mode = "long", *, python: bool = False, user: bool = True, am: int = AM, flag: int = FLAG, at: int = DATA) -> Rig:
    """A program with alignment checking, RDI and RSI at `at`."""
    made = Rig(text.replace("M", "(%rdi)"), mode, python=python, user=user)
    s = made.state
    s.set_cr(0, s.cr(0) | am)
    s.set_cr(4, s.cr(4) | 1 << 18)
    s.rflags |= flag
    s.refresh()
    for register, value in ((RDI, at), (RSI, at), (RCX, 1)):
        s.set_reg(register, value)
    return made


def outcomes(texts: str, *, python: bool) -> dict[str, tuple[int | None, ...]]:
    """The vectors that instructions raise with their operand at each of OFFSETS, on one machine for all."""
    r = rig("nop", python=python)
    start, found = bytes(r.state.bytes), {}
    for text in texts.split("; "):
        vectors = []
        r.ram.write(CODE, assemble(text.replace("M", "(%rdi)"), CODE).code)
        for offset in OFFSETS:
            r.state.bytes[:] = start
            r.state.set_reg(RDI, DATA + offset)
            r.state.set_reg(RSI, DATA + offset)
            r.ram.write(DATA, bytes(0x400))
            r.cpu.halted = False
            r.step()
            vectors.append(r.handled)
        found[text] = tuple(vectors)
    return found


@pytest.mark.parametrize("alignment", SEE)
def test_operands(alignment: int, python: bool) -> None:
    expected = tuple(AC if offset % alignment else None for offset in OFFSETS)
    assert {text: found for text, found in outcomes(SEE[alignment], python=python).items() if found != expected} == {}


def test_operands_that_must_be_aligned(python: bool) -> None:
    found = outcomes(DEMAND, python=python)
    assert {text: vectors for text, vectors in found.items() if vectors != (None, GP, GP, GP, GP)} == {}


def test_fxsave(python: bool) -> None:
    """#AC for less than 4, else its own #GP for less than 16."""
    assert set(outcomes("fxsave M; fxrstor M", python=python).values()) == {(None, AC, AC, GP, GP)}


@pytest.mark.parametrize(("text", "size"), [
    ("pushq %rax", 8), ("pushq $1", 8), ("pushq %fs", 8), ("pushw %ax", 2), ("popq %rax", 8), ("popw %ax", 2), ("pushfq", 8),
    ("pushfw", 2), ("call 1f; 1:", 8), ("ret", 8), ("enter $0, $0", 8), ("enter $8, $2", 8), ("leave", 8), ("popfq", 8),
    ("lretq", 8), ("lretl", 4), ("iretq", 8),
])  # fmt: skip
def test_stack(text: str, size: int, python: bool) -> None:
    for offset in (0, 1, 2, 4):
        r = rig(text, python=python)
        for register in (RSP, RBP):
            r.state.set_reg(register, DATA + 0x100 + offset)
        frame = {"lre": (CODE, USER_CODE64), "ire": (CODE, USER_CODE64, 2, USER_STACK, USER_DATA)}.get(text[:3], (0x202, 0, 0))
        for n, value in enumerate(frame):
            r.ram.write(DATA + 0x100 + offset + size * n, value.to_bytes(size, "little"))
        r.step()
        assert r.handled == (AC if offset % size else None), offset


@pytest.mark.parametrize(("mode", "text"), [
    (mode, text) for mode in ("virtual", "protected16", "protected32", "legacy", "pae", "compatibility")
    for text in ("movl %eax, 0x7101", "movw %ax, 0x7101", "movsw", "push %eax", "pusha", "popa", "les 0x7101, %eax", "bound %ax, 0x7101")
])  # fmt: skip
def test_modes(mode: Mode, text: str, python: bool) -> None:
    r = rig(text, mode, python=python, at=0x7101)
    r.state.set_reg(RSP, 0x7101)
    r.step()
    assert r.handled == AC
    assert r.stack(2, 8 if mode == "compatibility" else 4)[0] == 0, "its error code"


def test_far_pointers(python: bool) -> None:
    """Of 32 bits by two, of 48 by four (table 8-8)."""
    for text, size, offsets in (("lesw 0x7100+{0}, %ax", 2, (0, 2, 4)), ("lesl 0x7100+{0}, %eax", 4, (0, 4)), ("ljmpl *0x7100+{0}", 4, (0, 4)),
                                ("ljmpw *0x7100+{0}", 2, (0, 2, 4))):  # fmt: skip
        for offset in (0, 1, 2, 4):
            r = rig(text.format(offset), "protected32", python=python)
            r.ram.write(0x7100 + offset, (CODE | (USER_CODE32 if "jmp" in text else USER_DATA) << 8 * size).to_bytes(6, "little"))
            r.step()
            assert r.handled == (None if offset in offsets else AC)


@pytest.mark.parametrize("user", [True, False])
@pytest.mark.parametrize("am", [AM, 0])
@pytest.mark.parametrize("flag", [FLAG, 0])
def test_who_asks_for_it(flag: int, am: int, user: bool, python: bool) -> None:
    r = rig("movl %eax, 1(%rdi)", python=python, user=user, am=am, flag=flag)
    r.step()
    assert r.handled == (AC if user and am and flag else None)


def test_only_am_asks_for_it(python: bool) -> None:
    """Not where an instruction is looked at for its SIMD exceptions."""
    for am, vector in ((AM, AC), (0, None)):
        r = rig("addss M, %xmm0", python=python, am=am, at=DATA + 1)
        r.state.mxcsr = 0
        r.step()
        assert r.handled == vector


def test_the_fault(python: bool) -> None:
    """Nothing has happened, RIP is at the instruction, the error code is zero; it comes from the middle of a block, too."""
    r = rig("movl $7, %eax; movl $8, %ebx; it: movl %eax, 1(%rdi); nop", python=python)
    r.run()
    assert r.handled == AC
    error, rip, selector, flags, rsp, _ = r.stack(6, 8)
    assert (error, rip, selector, flags, rsp) == (0, r.labels["it"], USER_CODE64, FLAG | 0x10002, USER_STACK)
    assert r.ram.read_u64(DATA) == 0
    assert r.now == 10 + 32 + 1, "two instructions, entering the handler, and its HLT"


@pytest.mark.parametrize("enter", ["popfq", "iretq", "sysretq", "lretq"])
def test_it_begins_wherever_the_flag_is_loaded(enter: str, python: bool) -> None:
    """With CPL 3, or with RFLAGS.AC: at the next instruction, in the same block or not."""
    prepare = {
        "popfq": "",  # is at CPL 3
        "iretq": f"pushq ${USER_DATA}; pushq ${USER_STACK}; pushq $0x40002; pushq ${USER_CODE64}; pushq $1f; iretq; 1:",
        "sysretq": "movl $0x40002, %r11d; movl $1f, %ecx; sysretq; 1:",
        "lretq": f"pushq $0x40002; popfq; pushq ${USER_DATA}; pushq ${USER_STACK}; pushq ${USER_CODE64}; pushq $1f; lretq; 1:",
    }[enter]
    r = rig(f"{prepare or 'pushq $0x40002; popfq'}; it: movl %eax, 1(%rdi)", python=python, user=enter == "popfq", flag=0)
    r.state.efer |= 1
    r.state.set_field("star", (USER_CODE64 - 16) << 48)
    r.run()
    assert r.handled == AC
    assert r.stack(2, 8) == [0, r.labels["it"]]


def test_code_is_looked_at_only_while_it_is_asked_for(python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the instruction behind the first POPF to the second; and time is what it is without."""
    looks: list[int] = []
    times = []
    check = attention.check

    def look(cpu: Cpu) -> int:
        looks.append(cpu.state.rip)
        return check(cpu)

    monkeypatch.setattr(attention, "check", look)
    for flags in (0x40002, 2):
        r = rig(
            f".byte 0x68; .long {flags}; popfq; movl $3, %ecx; rep movsq; movl $3, %ecx; 2: movq %rax, (%rdi); loop 2b; pushq $2; popfq; nop; "
            "movl $50, %ecx; 1: movq 1(%rdi), %rax; loop 1b; hlt",
            python=python, flag=0,
        )  # fmt: skip
        r.run()
        assert r.handled == GP, "HLT of a user"
        times.append(r.now)
        assert len(looks) == (1 + 3 + 1 + 2 * 3 + 2 if flags != 2 else 0)
        looks.clear()
    assert times[0] == times[1]


def test_repetitions_end_where_they_are(python: bool) -> None:
    """No access, no exception; else the first one raises it, with nothing done."""
    for count in (0, 3):
        r = rig("rep movsl", python=python, at=DATA + 2)
        r.state.set_reg(RCX, count)
        r.run() if count else r.step()
        assert r.handled == (AC if count else None)
        assert (r.reg(RCX), r.reg(RDI)) == (count, DATA + 2)


def test_a_system_call_ends_it(python: bool) -> None:
    """The kernel accesses what it likes; RFLAGS in R11 has the flag."""
    r = rig("syscall", python=python)
    r.state.efer |= 1
    r.state.set_field("star", 8 << 32)
    r.state.set_field("lstar", HANDLERS + 0x300)
    r.ram.write(HANDLERS + 0x300, b"\x48\x8b\x47\x01\xf4")  # movq 1(%rdi), %rax; hlt
    r.run()
    assert (r.rip, r.reg(11)) == (HANDLERS + 0x305, 0x40002)


def test_pushf_pushes_the_flag(python: bool) -> None:
    r = rig("pushfq; popq %rax", python=python)
    r.step(2)
    assert r.reg(RAX) == 0x40002


def test_descriptor_tables_are_not_checked(python: bool) -> None:
    r = rig("movl %eax, %ds; movl $7, %ebx", python=python)
    r.ram.write(GDT + 0x201, r.ram.read(GDT, 0xB0))
    r.state.set_table(GDTR, GDT + 0x201, 0xAF)
    r.state.set_reg(RAX, USER_DATA)
    r.step(2)
    assert (r.handled, r.reg(3)) == (None, 7)


@pytest.mark.parametrize(("at", "text", "vector"), [
    (0x200001, "movl %eax, M", AC), (0x200001, "movups M, %xmm0", AC), (0x200001, "movaps M, %xmm0", GP), (0x200000, "movl %eax, M", PF),
    (0x1FFFFF, "movl %eax, M", AC), (1 << 47 | 1, "movl %eax, M", GP), (1 << 47 | 1, "pushq (%rdi)", GP), (0x200001, "lea M, %rax", None),
])  # fmt: skip
def test_what_comes_first(at: int, text: str, vector: int | None, python: bool) -> None:
    """The segment, then the alignment, then the page."""
    r = rig(text, python=python, at=at)
    r.change(0x200000, drop=1)
    r.step()
    assert r.handled == vector
    assert r.state.cr(2) == (at if vector == PF else 0)


def test_a_stack_that_is_not_canonical(python: bool) -> None:
    r = rig("pushq %rax", python=python)
    r.state.set_reg(RSP, 1 << 47 | 1)
    r.step()
    assert r.handled == SS


def test_undefined_instructions_stay_undefined(python: bool) -> None:
    for text in ("ud2", ".byte 0x0f, 0x0b", ".byte 0xf0, 0x90", ".byte 0x06"):
        r = rig(text, python=python)
        r.step()
        assert r.handled == UD


def test_both_exceptions(python: bool) -> None:
    """With SIMD exceptions unmasked besides: #AC of the operand, then #XF of what is in it."""
    for at, vector in ((DATA + 2, AC), (DATA, 19)):
        r = rig("divss M, %xmm0", python=python, at=at)
        r.state.mxcsr = 0
        r.step()
        assert r.handled == vector


@pytest.mark.parametrize("mode", ["long", "protected32"])
def test_single_steps(mode: Mode, python: bool) -> None:
    """RFLAGS.TF: one trap behind each instruction."""
    r = rig("nop; movl %eax, 0x7100; nop", mode, python=python, flag=FLAG | 0x100)
    r.run()
    assert r.handled == 1
    assert r.stack(1, bits_of(mode) // 8) == [CODE + 1]


def test_watches_and_breakpoints_come_first(python: bool) -> None:
    """A debugger's: before the instruction is looked at, or executed after that; and flags of MXCSR only when it is."""
    r = rig(f"nop; it: addss {DATA + 0x1000}, %xmm0; end: nop; hlt", python=python)
    r.state.mxcsr = 0x1F00
    r.ram.write_u32(DATA + 0x1000, 1)
    r.state.set_xmm(0, 0x3F800000)
    engine = r.machine.engine
    engine.arm({r.labels["it"], r.labels["end"]})
    engine.physical.watch(DATA + 0x1000 >> 12, WATCH_READ, True)
    assert (r.machine.run(breakpoints=True), r.rip) == (Event.BREAKPOINT, r.labels["it"])
    assert (r.machine.run(step=True), r.rip, r.state.mxcsr) == (Event.WATCHED, r.labels["it"], 0x1F00)
    assert (r.machine.run(step=True), r.rip, r.state.mxcsr) == (Event.WATCHED, r.labels["it"], 0x1F00)
    engine.physical.watch(DATA + 0x1000 >> 12, WATCH_READ, False)
    assert (r.machine.run(step=True), r.rip, r.state.mxcsr) == (Event.SLICE, r.labels["end"], 0x1F22)
    assert (r.machine.run(breakpoints=True), r.rip) == (Event.BREAKPOINT, r.labels["end"])
