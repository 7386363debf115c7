"""#XF and the flags of MXCSR: by the processor that the tests run on, and in guest programs (APM2 8.2.20, APM1 4.10)."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu import hardware
from tests.engine.rig import CODE, DATA, MODES, Mode, Rig
from vmdbg.cpu import attention, simd
from vmdbg.cpu.core import Cpu
from vmdbg.cpu.floats import DOUBLE, SINGLE, Format, unmasked
from vmdbg.cpu.reset import power_on
from vmdbg.engine.attention import call_attention
from vmdbg.engine.engine import Engine
from vmdbg.engine.state import RAX, RBX
from vmdbg.platform.clock import Clock

UD, NM, GP, PF, XF = 6, 7, 13, 14, 19
IE, DE, ZE, OE, UE, PE = 1, 2, 4, 8, 16, 32
DEFAULT, DAZ, FTZ = 0x1F80, 0x40, 0x8000
ONE, HALF, LARGEST, LEAST, DENORMAL, QUIET, SIGNALING, INFINITY = (
    0x3F800000, 0x3F000000, 0x7F7FFFFF, 0x00800000, 1, 0x7FC00000, 0x7F800001, 0x7F800000,
)  # fmt: skip


def without(*flags: int, and_: int = 0) -> int:
    """An MXCSR with these exceptions unmasked."""
    return DEFAULT & ~(sum(flags) << 7) | and_


# The rules, against hardware

EVERY = [(key, form, False) for key, form in simd.FORMS.items()] + [(key, form, True) for key, form in simd.WIDE.items()]


def instruction(key: tuple[int, int], wide: bool, imm: int) -> bytes:
    """With XMM0 (MM0, RAX) and XMM1 (MM1, RBX)."""
    opcode, prefix = key
    code = (bytes((prefix,)) if prefix else b"") + (b"\x48" if wide else b"") + b"\x0f"
    code += bytes((0x3A, opcode & 0xFF) if opcode >> 8 == 0x3A else (opcode & 0xFF,))
    code += b"\xc3" if opcode == 0x0F2A and prefix in (simd.REPZ, simd.REPNZ) else b"\xc1"
    return code + bytes((imm,)) if opcode == 0x0FC2 or opcode >> 8 == 0x3A else code


@st.composite
def number(draw: st.DrawFn, form: Format) -> int:
    """Bits of a number: special ones, neighbours of them, and such whose products and quotients are at the limits."""
    size, bias = form.fraction, form.bias
    exponent = draw(st.sampled_from((0, 0, 0, 1, 2, bias // 2, bias, bias + 1, bias + bias // 2, 2 * bias, 2 * bias + 1))
                    | st.integers(bias - 70, bias + 70) | st.integers(0, 2 * bias + 1))  # fmt: skip
    fraction = draw(st.sampled_from((0, 1, (1 << size) - 1, 1 << size - 1, (1 << size - 1) - 1)) | st.integers(0, (1 << size) - 1))
    return draw(st.integers(0, 1)) << form.bits - 1 | exponent << size | fraction


@st.composite
def operand(draw: st.DrawFn, form: simd.Form) -> int:
    """128 bits."""
    if isinstance(form.of, int):
        bits, part = form.of, st.sampled_from((0, 1, 1 << form.of - 1, (1 << form.of) - 1)) | st.integers(0, (1 << form.of) - 1)
    else:
        bits, part = form.of.bits, number(form.of)
    parts = [draw(part) if n < form.lanes else 0 for n in range(128 // bits)]
    return sum(value << bits * n for n, value in enumerate(parts))


SETTINGS = st.builds(
    lambda masks, rc, daz, ftz: masks << 7 | rc << 13 | daz << 6 | ftz << 15,
    st.sampled_from((63, 0, *(63 ^ 1 << n for n in range(6)))) | st.integers(0, 63), st.integers(0, 3), st.integers(0, 1),
    st.integers(0, 1),
)  # fmt: skip


@pytest.mark.skipif(not hardware.AVAILABLE, reason="gcc is needed to ask the processor")
@pytest.mark.parametrize(("key", "form", "wide"), EVERY, ids=[f"{op:x}-{prefix:x}{'-w' * wide}" for (op, prefix), _, wide in EVERY])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_flags_are_those_of_hardware(key: tuple[int, int], form: simd.Form, wide: bool, data: st.DataObject) -> None:
    """All operations, special values, rounding modes, DAZ, FTZ, masks: which flags, and whether it is #XF."""
    first, second, mxcsr = data.draw(operand(form)), data.draw(operand(form)), data.draw(SETTINGS)
    imm = data.draw(st.integers(0, 255 if key[0] >= 0x3A40 else 15 if key[0] >= 0x3A00 else 7))
    after, trapped = hardware.execute(instruction(key, wide, imm), first, second, mxcsr)
    flags = simd.raised(form, first, second, mxcsr, imm)
    assert (flags, bool(flags & unmasked(mxcsr))) == (after & 63, trapped)


def limits(form: Format) -> list[int]:
    """Numbers whose sums, products and quotients lie just inside and outside of what the format has."""
    size, bias = form.fraction, form.bias
    exponents = (0, 1, 2, bias - size - 1, bias - 1, bias, bias + 1, 2 * bias - size, 2 * bias)
    fractions = (0, 1, 1 << size - 1, (1 << size) - 1)
    found = [exponent << size | fraction for exponent in exponents for fraction in fractions]
    infinity = (2 * bias + 1) << size
    return [*found, infinity, infinity | 1, infinity | 1 << size - 1, 1 << form.bits - 1 | bias << size | 1]


SCALAR = [(key, form) for key, form in simd.FORMS.items() if form.lanes == 1 and form.of in (SINGLE, DOUBLE) and key[1]]


@pytest.mark.skipif(not hardware.AVAILABLE, reason="gcc is needed to ask the processor")
@pytest.mark.parametrize(("key", "form"), SCALAR, ids=[f"{op:x}-{prefix:x}" for (op, prefix), _ in SCALAR])
def test_flags_at_the_limits(key: tuple[int, int], form: simd.Form) -> None:
    """Rounded up into the normal numbers or not, to infinity or not, exact or not."""
    assert isinstance(form.of, Format)
    numbers = limits(form.of)
    unary = key[0] in (0x0F51, 0x0F5A, 0x0F2C, 0x0F2D, 0x3A0A, 0x3A0B)
    modes = [without(*flags) & ~0xE040 | rc << 13 | more for flags in ((), (OE, UE), (IE, DE, ZE, OE, UE, PE))
             for rc in range(4) for more in ((0, FTZ, DAZ) if rc == 0 else (0,))]  # fmt: skip
    for first in numbers[:1] if unary else numbers:
        for second in numbers:
            for mxcsr in modes if unary or (first ^ second) % 3 == 0 else modes[:1]:
                after, trapped = hardware.execute(instruction(key, False, 4), first, second, mxcsr)
                flags = simd.raised(form, first, second, mxcsr, 4)
                assert (flags, bool(flags & unmasked(mxcsr))) == (after & 63, trapped), (hex(first), hex(second), hex(mxcsr))


# In guest programs


def rig(text: str, mode: Mode = "long", *, python: bool, mxcsr: int = DEFAULT, user: bool = False) -> Rig:
    """About to execute `text`, which may load `mxcsr` from DATA."""
    made = Rig(text, mode, python=python, user=user)
    made.state.set_cr(4, made.state.cr(4) | 0x40600)
    made.state.xcr0 = 3
    made.state.refresh()
    made.ram.write_u32(DATA, mxcsr)
    return made


@pytest.mark.parametrize(("key", "form", "wide"), EVERY, ids=[f"{op:x}-{prefix:x}{'-w' * wide}" for (op, prefix), _, wide in EVERY])
def test_every_form_raises(key: tuple[int, int], form: simd.Form, wide: bool, python: bool) -> None:
    """A signaling NaN, or an integer that is no number of the format: no result is written, RIP is at the instruction."""
    nan = {SINGLE: SIGNALING, DOUBLE: 0x7FF0000000000001, 32: 0x7FFFFFFF, 64: (1 << 63) - 1}[form.of]
    whole = key in ((0x0F2A, simd.REPNZ),) and not wide  # exact: it raises nothing
    r = rig("nop", python=python)
    r.ram.write(CODE, instruction(key, wide, 0xF1) + b"\xf4")
    second = sum(nan << form.element * n for n in range(form.lanes))
    r.state.set_xmm(1, second)
    r.state.set_reg(RAX, 77)
    r.state.set_reg(RBX, second)
    r.state.bytes[attention._MMX + 16 : attention._MMX + 24] = (second & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
    r.state.mxcsr = 0
    r.run()
    assert r.handled == (None if whole else XF)
    if not whole:
        assert (r.state.xmm(0), r.reg(RAX), r.stack(1, 8)) == (0, 77, [CODE])
        assert r.state.mxcsr == (PE if isinstance(form.of, int) else IE)


@pytest.mark.parametrize("mode", MODES)
def test_in_every_mode(mode: Mode, python: bool) -> None:
    """The load of MXCSR counts for the very next instruction, in the same block."""
    load = "mov $0x20, %bx; mov %bx, %ds; ldmxcsr 0" if mode == "real" else "ldmxcsr 0x100000"
    r = rig("ldmxcsr 0x7800; nop; divss %xmm1, %xmm2; hlt" if mode in ("real", "virtual", "protected16") else f"{load}; divss %xmm1, %xmm2; hlt",
            mode, python=python, mxcsr=without(ZE))  # fmt: skip
    r.ram.write_u32(0x7800, without(ZE))
    r.state.set_xmm(2, ONE)
    r.run()
    assert r.handled == XF
    assert r.state.mxcsr == without(ZE, and_=ZE)
    assert r.state.xmm(2) == ONE


@pytest.mark.parametrize("load", [f"fxrstor {DATA + 0x100}", f"xrstor {DATA + 0x100}", f"ldmxcsr {DATA + 0x118}"])
def test_whatever_loads_mxcsr(load: str, python: bool) -> None:
    """With an exception unmasked, and then with none: the same division goes on at full speed."""
    for mxcsr, vector in ((without(ZE), XF), (DEFAULT, None), (without(IE), None)):
        r = rig(f"movl $3, %eax; {load}; divps %xmm1, %xmm0; end: hlt", python=python)
        r.ram.write_u64(DATA + 0x100 + 512, 3)
        r.ram.write_u32(DATA + 0x118, mxcsr)
        for n in range(2):
            r.ram.write(DATA + 0x100 + 160 + 16 * n, (ONE * (1 - n) * (1 << 96 | 1 << 64 | 1 << 32 | 1)).to_bytes(16, "little"))
            r.state.set_xmm(n, ONE * (1 - n) * (1 << 96 | 1 << 64 | 1 << 32 | 1))
        r.run()
        assert r.handled == vector
        assert r.state.mxcsr == mxcsr | (ZE if mxcsr != DEFAULT else 0)


@pytest.mark.parametrize(("value", "vector"), [
    (0x10000 | DEFAULT, GP), (1 << 31, GP), (0x20000 | DEFAULT, GP), (0xFFFF, None), (0, None),
])  # fmt: skip
@pytest.mark.parametrize("load", [f"ldmxcsr {DATA + 24}", f"fxrstor {DATA}", f"xrstor {DATA}"])
def test_reserved_bits(load: str, value: int, vector: int | None, python: bool) -> None:
    """17 is MM, which is not claimed."""
    for before in (DEFAULT, without(OE)):
        r = rig(load, python=python)
        r.state.set_reg(RAX, 3)
        r.state.mxcsr = before
        r.ram.write_u32(DATA + 24, value)
        r.step()
        assert r.handled == vector
        assert r.state.mxcsr == (before if vector else value)


def test_xrstor_without_sse_loads_none(python: bool) -> None:
    r = rig(f"xrstor {DATA}", python=python)
    r.state.set_reg(RAX, 1)
    r.state.mxcsr = without(OE)
    r.ram.write_u32(DATA + 24, 1 << 31)
    r.step()
    assert (r.handled, r.state.mxcsr) == (None, without(OE))


def test_flags_stick_while_an_exception_is_unmasked(python: bool) -> None:
    r = rig(
        f"ldmxcsr {DATA}; divss %xmm1, %xmm0; addsd %xmm3, %xmm2; stmxcsr {DATA + 4}; comiss %xmm5, %xmm4; stmxcsr {DATA + 8}; hlt",
        python=python, mxcsr=without(OE),
    )  # fmt: skip
    r.state.set_xmm(0, ONE)
    r.state.set_xmm(2, 0x3FF0000000000000)
    r.state.set_xmm(3, 0x3C00000000000000)
    r.state.set_xmm(5, DENORMAL)
    r.run()
    assert r.ram.read_u32(DATA + 4) == without(OE, and_=ZE | PE)
    assert r.ram.read_u32(DATA + 8) == without(OE, and_=ZE | PE | DE)
    assert r.state.xmm(0) == INFINITY


@pytest.mark.parametrize("between", ["movq %cr0, %rax; movq %rax, %cr0", "int3", "cpuid", "syscall", "popfq"])
def test_it_outlasts_what_changes_the_mode(between: str, python: bool) -> None:
    r = rig(f"pushq $2; ldmxcsr {DATA}; {between}; 1: divss %xmm1, %xmm0; hlt", python=python, mxcsr=without(IE))
    r.handler(3, "iretq")
    r.state.efer |= 1
    r.state.set_field("star", 8 << 32)
    r.state.set_field("lstar", CODE + len(r.program.code) - 5)
    r.run()
    assert r.handled == XF


def test_without_osxmmexcpt_it_is_undefined(python: bool) -> None:
    r = rig("divss %xmm1, %xmm0", python=python)
    r.state.set_cr(4, r.state.cr(4) & ~0x400)
    r.state.refresh()
    r.state.mxcsr = 0
    r.step()
    assert (r.handled, r.state.mxcsr) == (UD, IE)


@pytest.mark.parametrize(("cr0", "cr4", "vector"), [(8, 0, NM), (4, 0, UD), (0, 0x200, UD), (0, 0, XF)])
def test_what_comes_first(cr0: int, cr4: int, vector: int, python: bool) -> None:
    """No SSE, none at the moment, its operand; then the exception."""
    for text in ("divss %xmm1, %xmm0", "divss 0x200000, %xmm0"):
        r = rig(text, python=python)
        r.change(0x200000, drop=1)
        r.state.set_cr(0, r.state.cr(0) | cr0)
        r.state.set_cr(4, r.state.cr(4) & ~cr4)
        r.state.refresh()
        r.state.mxcsr = 0
        r.step()
        assert r.handled == (PF if vector == XF and "0x200000" in text else vector)
        if r.handled == PF:
            assert r.state.cr(2) == 0x200000


def test_memory_operand(python: bool) -> None:
    r = rig(f"divps {DATA}, %xmm0", python=python)
    r.state.mxcsr = without(ZE)
    r.ram.write(DATA, ONE.to_bytes(4, "little") * 3 + bytes(4))
    r.state.set_xmm(0, LEAST << 96)
    r.step()
    assert (r.handled, r.state.mxcsr) == (XF, without(ZE, and_=ZE))
    r = rig(f"divps {DATA + 8}, %xmm0", python=python)
    r.state.mxcsr = without(ZE)
    r.step()
    assert r.handled == GP, "an operand of 16 bytes that is not aligned"


def test_the_handler_returns_and_the_instruction_is_executed(python: bool) -> None:
    """A fault: RFLAGS.RF, and the instruction again, once the exception is masked."""
    r = rig(f"ldmxcsr {DATA}; divss %xmm1, %xmm0; stmxcsr {DATA + 4}; end: hlt", python=python, mxcsr=without(ZE), user=True)
    r.handler(XF, f"ldmxcsr {DATA + 8}; iretq")
    r.ram.write_u32(DATA + 8, DEFAULT)
    r.state.set_xmm(0, ONE)
    r.step(2)
    assert r.handled == XF
    assert r.stack(3, 8)[2] & 0x10000
    r.run()
    assert (r.handled, r.state.xmm(0)) == (GP, INFINITY), "HLT of a user"
    assert r.ram.read_u32(DATA + 4) == DEFAULT


@pytest.mark.parametrize("mxcsr", [DEFAULT, without(OE)])
def test_code_is_looked_at_only_while_an_exception_is_unmasked(mxcsr: int, python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only SSE arithmetic.  Time is the same."""
    looks: list[int] = []
    check = attention.check

    def look(cpu: Cpu) -> int:
        looks.append(cpu.state.rip)
        return check(cpu)

    monkeypatch.setattr(attention, "check", look)
    r = rig(f"movl $20, %ecx; ldmxcsr {DATA}; 1: addss %xmm1, %xmm0; movl %eax, %ebx; loop 1b; hlt", python=python, mxcsr=mxcsr)
    r.run()
    assert len(looks) == (0 if mxcsr == DEFAULT else 21)
    assert r.now == 5 + 8 + 20 * (4 + 2 + 2) + 1


@pytest.mark.parametrize(("daz", "ftz"), [(0, 0), (0, FTZ), (DAZ, 0), (DAZ, FTZ)])
def test_daz_and_ftz(daz: int, ftz: int, python: bool) -> None:
    """Of SSE, not of x87, whichever way MXCSR was set."""
    text = "mulss %xmm1, %xmm0; addss %xmm3, %xmm2; flds 1f; fmuls 2f; fstps 3f; hlt; 1: .long 0x00800000; 2: .long 0x3f000000; 3: .long 0"
    for load in (f"ldmxcsr {DATA}; ", ""):
        r = rig(load + text, python=python, mxcsr=DEFAULT | daz | ftz)
        if not load:
            r.state.mxcsr = DEFAULT | daz | ftz
        for n, value in enumerate((LEAST, HALF, DENORMAL, 0)):
            r.state.set_xmm(n, value)
        r.run()
        assert r.state.xmm(0) == (0 if ftz else LEAST >> 1)
        assert r.state.xmm(2) == (0 if daz or ftz else DENORMAL)
        assert r.ram.read_u32(CODE + len(r.program.code) - 4) == LEAST >> 1


def test_rounding_follows_the_register(python: bool) -> None:
    """A debugger that writes MXCSR changes what it says."""
    for rc, result in ((0, ONE), (1, ONE), (2, ONE + 1), (3, ONE)):
        r = rig("addss %xmm1, %xmm0; hlt", python=python)
        r.state.mxcsr = DEFAULT | rc << 13
        r.state.set_xmm(0, ONE)
        r.state.set_xmm(1, DENORMAL)
        r.run()
        assert r.state.xmm(0) == result


def test_power_on_and_init(python: bool) -> None:
    """Everything is masked at power-on; INIT leaves MXCSR (APM2 14.1.3)."""
    r = rig("hlt", python=python)
    assert r.state.mxcsr == DEFAULT
    r.state.mxcsr = 0
    power_on(r.cpu)
    assert r.state.mxcsr == DEFAULT
    r.state.mxcsr = 0
    r.cpu.init_pending = True
    r.step()
    assert (r.rip, r.state.mxcsr) == (0xFFF0, 0)


def test_undefined_instructions_stay_undefined(python: bool) -> None:
    for text in ("ud2", ".byte 0x0f, 0x7c, 0xc1", ".byte 0x0f, 0xae, 0x10"):
        r = rig(text, python=python)
        r.state.mxcsr = 0
        if text.endswith("0x10"):
            r.state.set_cr(4, r.state.cr(4) & ~0x200)
            r.state.refresh()
        r.step()
        assert r.handled == UD, text


def test_the_engine_pays_attention() -> None:
    Engine(1 << 20, Clock())
    assert call_attention()
    assert not call_attention.__wrapped__(), "its code is not the wheel's any more"


WITHOUT = """
import re
from vmdbg.engine import attention
attention._FTZ = re.compile(b"never there")
from tests.engine.rig import DATA, Rig
rig = Rig(f"ldmxcsr {DATA}; divss %xmm1, %xmm0; hlt")
assert not attention.call_attention()
rig.run()
print(rig.handled, rig.state.mxcsr)
"""


def test_where_it_cannot_there_are_no_such_exceptions() -> None:
    """In a process of its own, since the library is mended once for all."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "None 0\n"), done.stderr
