"""XSAVE and its like, which the engine executes, and what of them is ours: XSETBV, CR0.TS."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.engine.rig import CODE, DATA, Mode, Rig
from vmdbg.cpu.reset import init, power_on
from vmdbg.engine import repair
from vmdbg.engine.engine import Engine
from vmdbg.engine.state import RAX, RCX, RDX
from vmdbg.platform.clock import Clock

UD, NM, GP = 6, 7, 13
OSXSAVE, OSFXSR, TS, EM = 1 << 18, 1 << 9, 8, 4
FORMS = (f"xsave {DATA}", f"xsaveopt {DATA}", f"xrstor {DATA}", f"xsave64 {DATA}", f"xsave %fs:{DATA}", f"addr32 xrstor {DATA}")


def rig(text: str, mode: Mode = "long", *, python: bool, user: bool = False, cr0: int = 0, cr4: int = OSXSAVE, value: int = 3,
        ecx: int = 0) -> Rig:  # fmt: skip
    """About to execute `text` with `value` in EDX:EAX."""
    made = Rig(text, mode, python=python, user=user)
    s = made.state
    s.set_cr(0, s.cr(0) | cr0)
    s.set_cr(4, s.cr(4) | OSFXSR | cr4)
    s.refresh()
    for register, content in ((RAX, value & 0xFFFFFFFF), (RDX, value >> 32), (RCX, ecx)):
        s.set_reg(register, content)
    return made


@pytest.mark.parametrize("mode", ["real", "protected32", "compatibility", "long"])
@pytest.mark.parametrize(("value", "ecx", "vector"), [
    (1, 0, None), (3, 0, None), (0, 0, GP), (2, 0, GP), (7, 0, GP), (0x203, 0, GP), (1 << 32 | 3, 0, GP), (1 << 63 | 3, 0, GP),
    (3, 1, GP),
])  # fmt: skip
def test_xsetbv(mode: Mode, value: int, ecx: int, vector: int | None, python: bool) -> None:
    """x87 is always on; there is nothing but SSE besides; XCR0 is the only such register."""
    r = rig("xsetbv; xgetbv", mode, python=python, value=value, ecx=ecx)
    r.state.xcr0 = before = 3 if value == 1 else 1
    r.step()
    assert r.handled == vector
    assert r.state.xcr0 == (before if vector else value)
    if not vector:
        r.state.set_reg(RDX, 0x77)
        r.step()
        assert (r.rip, r.reg(RAX), r.reg(RDX), r.now) == (CODE + 6, value, 0, 6)


@pytest.mark.parametrize("text", ["xsetbv", "xgetbv", *FORMS])
@pytest.mark.parametrize("cr0", [0, TS])
def test_undefined_without_osxsave(text: str, cr0: int, python: bool) -> None:
    for user in (False, True):
        r = rig(text, python=python, user=user, cr0=cr0, cr4=0)
        r.step()
        assert r.handled == UD


def test_a_user_may_read_but_not_write(python: bool) -> None:
    r = rig("xgetbv; xsetbv", python=python, user=True)
    r.step()
    assert (r.handled, r.reg(RAX)) == (None, 1)
    r.step()
    assert (r.handled, r.state.xcr0) == (GP, 1)


def test_undefined_forms(python: bool) -> None:
    """With LOCK, an operand size or a repeat prefix there is no such instruction, whatever CR0.TS."""
    for text in ("xsetbv", f"xsave {DATA}"):
        for prefix in ("0xf0", "0x66", "0xf2"):
            for cr0 in (0, TS):
                r = rig(f".byte {prefix}; {text}", python=python, cr0=cr0)
                r.step()
                assert r.handled == UD


def test_power_on_and_init(python: bool) -> None:
    """x87 alone at power-on; INIT leaves it (APM2 14.1.3)."""
    r = rig("nop", python=python)
    assert r.state.xcr0 == 1
    r.state.xcr0 = 3
    init(r.cpu)
    assert r.state.xcr0 == 3
    power_on(r.cpu)
    assert r.state.xcr0 == 1


@pytest.mark.parametrize("xcr0", [1, 3])
def test_saves_what_xcr0_has(xcr0: int, python: bool) -> None:
    r = rig(
        f"fninit; fld1; pcmpeqd %xmm3, %xmm3; xsave {DATA}; fninit; pxor %xmm3, %xmm3; xrstor {DATA}; fnstsw %ax; hlt",
        python=python, value=(1 << 64) - 1,
    )  # fmt: skip
    r.state.xcr0 = xcr0
    r.run()
    sse = xcr0 == 3
    assert r.ram.read_u64(DATA + 512) == xcr0, "XSTATE_BV"
    assert r.ram.read(DATA + 160 + 48, 16) == (b"\xff" if sse else b"\0") * 16
    assert r.state.xmm(3) == ((1 << 128) - 1 if sse else 0)
    assert r.reg(RAX) & 0x3800 == 7 << 11, "the top of the x87 stack"


def test_xrstor_of_what_is_not_there(python: bool) -> None:
    """A component that XSTATE_BV has not is reset; one that XCR0 has not is #GP, and so is an area that is not aligned."""
    for bits, vector in ((0, None), (1, None), (4, GP)):
        r = rig(f"xrstor {DATA}", python=python, value=7)
        r.state.xcr0 = 3
        r.state.set_xmm(3, 77)
        r.ram.write_u64(DATA + 512, bits)
        r.step()
        assert r.handled == vector
        assert r.state.xmm(3) == (77 if vector else 0)
    r = rig(f"xsave {DATA + 8}", python=python)
    r.step()
    assert r.handled == GP


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize(("cr0", "vector"), [(TS, NM), (TS | EM, NM), (EM, None), (0, None)])
def test_task_switched(text: str, cr0: int, vector: int | None, python: bool) -> None:
    """CR0.TS, and not EM, is #NM, before memory is touched."""
    for user in (False, True):
        r = rig(text, python=python, user=user, cr0=cr0)
        r.step()
        assert r.handled == vector
        assert r.ram.read_u64(DATA + 512) == (0 if vector or "rstor" in text else 1)


def test_xsave_is_mended() -> None:
    Engine(1 << 20, Clock())
    assert repair.mend_xsave()
    assert not repair.mend_xsave.__wrapped__(), "its code is not the wheel's any more"


WITHOUT = """
import re
from vmdbg.engine import repair
repair.XSAVE_SITE = re.compile(b"never (there)")
from tests.engine.rig import Rig
rig = Rig("xorl %ecx, %ecx; movl $1, %eax; cpuid; movl %ecx, %ebx; movq %cr4, %rax; btsq $18, %rax; movq %rax, %cr4; hlt")
assert not repair.mend_xsave()
rig.run()
print(rig.handled, "XSAVE" in rig.cpu.cpuid_config.features, rig.machine.cpuid == rig.cpu.cpuid_config)
"""


def test_where_it_cannot_be_mended_it_is_not_claimed() -> None:
    """In a process of its own, since the library is mended once for all."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "13 False True\n"), done.stderr
